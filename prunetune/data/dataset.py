"""A decoded data set: uint8 images and labels, split into training, validation and test."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 and labels (N,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same split on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """The examples at `indices`."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Source:
    """What a data source gives: training examples, from which validation is split off, and test examples.

    A source is a function `source(root, *, options…)` with `data.root` as its first argument.
    """

    train: Split
    test: Split
    classes: int


@dataclass(frozen=True)
class Dataset:
    """Three splits, the number of classes, and the training images' mean and deviation per channel (C,).

    `digest` is the SHA-256 of the decoded training and test data and the split: it stands for the data in
    a stage's key, so results stay valid when files move and are not reused when files change.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor
    digest: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train.images.device

    def to(self, device: torch.device) -> Dataset:
        """The same data on a device."""
        return Dataset(
            self.train.to(device),
            self.validation.to(device),
            self.test.to(device),
            self.classes,
            self.mean.to(device),
            self.std.to(device),
            self.digest,
        )

    def arrays(self) -> dict[str, Any]:
        """The data on the CPU as arrays that share its memory, by name, and the plain rest."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        tensors = {
            **{f"{name}.images": split.images for name, split in splits.items()},
            **{f"{name}.labels": split.labels for name, split in splits.items()},
            "mean": self.mean,
            "std": self.std,
        }
        plain = {"classes": self.classes, "digest": self.digest}
        return {**{name: tensor.cpu().numpy() for name, tensor in tensors.items()}, **plain}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> Dataset:
        """The inverse of `arrays`, without a copy: where the arrays are read-only, so are the tensors."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")

            def tensor(name: str) -> Tensor:
                return torch.from_numpy(arrays[name])

            def split(name: str) -> Split:
                return Split(tensor(f"{name}.images"), tensor(f"{name}.labels"))

            return cls(
                split("train"),
                split("validation"),
                split("test"),
                arrays["classes"],
                tensor("mean"),
                tensor("std"),
                arrays["digest"],
            )

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels 0–255 (B, C, H, W) to floats: mean 0, deviation 1 per channel over the training set."""
        scale, shift = self._scale_and_shift
        return images.float().mul_(scale).add_(shift)

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Of `normalize`, each (1, C, 1, 1); not computed anew at every step."""
        return (1 / self.std).view(1, -1, 1, 1), (-self.mean / self.std).view(1, -1, 1, 1)


def split_off_validation(
    training: Split, test: Split, classes: int, *, fraction: float, seed: int
) -> Dataset:
    """A Dataset whose validation split is a random `fraction` of the training images, at least one.

    The drawing depends on `seed` and the number of images only, so it is the same on every machine.
    """
    n = len(training)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(n * fraction)), n - 1)
    validation, train = training.take(order[:count]), training.take(order[count:])
    mean, std = channel_statistics(train.images)
    return Dataset(train, validation, test, classes, mean, std, _digest(train, validation, test, classes))


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel of uint8 images (N, C, H, W), each (C,) float32.

    Summed exactly, in integers, from a histogram. A constant channel gets deviation 1.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.transpose(0, 1):
        share = torch.bincount(channel.flatten().int(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        deviation = (share * (values - mean) ** 2).sum().sqrt()
        means.append(mean)
        deviations.append(deviation if deviation > 0 else torch.ones_like(deviation))
    return torch.stack(means).float(), torch.stack(deviations).float()


def _digest(train: Split, validation: Split, test: Split, classes: int) -> str:
    sha = hashlib.sha256(str(classes).encode())
    for split in (train, validation, test):
        sha.update(str(tuple(split.images.shape)).encode())
        sha.update(split.images.contiguous().numpy().tobytes())
        sha.update(split.labels.contiguous().numpy().tobytes())
    return sha.hexdigest()
