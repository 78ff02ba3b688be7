"""A trained sparse network as files that need no training code: saved, loaded, and used for prediction."""

from prunetune.export.files import SparseModel, load_model, save_model

__all__ = ["SparseModel", "load_model", "save_model"]
