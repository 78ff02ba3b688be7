"""Images as whole tensors on one device: loading, splitting, and batches with augmentation."""

from __future__ import annotations

from prunetune.data.batches import augment, batches, evaluation_batches
from prunetune.data.dataset import Dataset, Source, Split
from prunetune.data.loading import load, provide, shape_of

__all__ = [
    "Dataset",
    "Source",
    "Split",
    "augment",
    "batches",
    "evaluation_batches",
    "load",
    "provide",
    "shape_of",
]
