"""Data sets as whole tensors on one device: loading, splitting, and batches with augmentation."""

from __future__ import annotations

from prunetune.data.batches import augment, batches, evaluation_batches
from prunetune.data.dataset import Dataset, Form, Source, Split
from prunetune.data.loading import forget, form_of, load, provide

__all__ = [
    "Dataset",
    "Form",
    "Source",
    "Split",
    "augment",
    "batches",
    "evaluation_batches",
    "forget",
    "form_of",
    "load",
    "provide",
]
