"""Saves a trained sparse network as files, and loads it for prediction."""

from prunetune.export.files import SparseModel, load_model, save_model

__all__ = ["SparseModel", "load_model", "save_model"]
