"""A decoded data set: inputs and targets, split into training, validation and test."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """The inputs and targets of a split as they are stored, with a row per example, on one device.

    Inputs are images (N, C, H, W) uint8, columns of a table (N, F) float32, or sequences (N, L) int64 of
    indices into a vocabulary. Targets are classes (N,) int64, numbers (N, T) float32, or sequences (N, L)
    int64.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))

    def take(self, indices: Tensor) -> Split:
        """Return the examples at `indices` as a split."""
        return Split(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True)
class Source:
    """The return value of a data source: training examples and test examples.

    The validation split is taken from the training examples later. A data source is a function
    `source(root, *, options…)` that gets `data.root` as its first argument. `classes` is the number of
    different targets (the size of the vocabulary if targets are sequences), or None if targets are numbers.
    """

    train: Split
    test: Split
    classes: int | None = None


@dataclass(frozen=True)
class Form:
    """The properties of a data set for which a network and a task are made, without its examples.

    `shape` is the shape of one input. `mean` and `std` (C,) are the mean and standard deviation of the
    training inputs, per channel of images or per column of a table; they are empty for indices into a
    vocabulary, which are not normalized. `target_mean` and `target_std` (T,) are those of the training
    targets if these are numbers, and None for classes.
    """

    shape: tuple[int, ...]
    classes: int | None
    mean: Tensor
    std: Tensor
    target_mean: Tensor | None = None
    target_std: Tensor | None = None

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalize stored inputs (B, …) to float32 with mean 0 and deviation 1 over the training set.

        Mean and deviation are per channel or column. Indices into a vocabulary are returned unchanged.
        """
        if not len(self.mean):
            return inputs
        scale, shift = self._scale_and_shift
        return inputs.to(torch.float32, copy=True).mul_(scale).add_(shift)

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The scale and shift that `normalize` applies, each (1, C, 1, …), cached for all steps."""
        view = 1, -1, *[1] * (len(self.shape) - 1)
        return (1 / self.std).view(view), (-self.mean / self.std).view(view)

    @classmethod
    def unseen(cls, shape: tuple[int, ...], classes: int | None) -> Form:
        """Make a form without statistics, for which a network can be built but not trained."""
        return cls(shape, classes, torch.zeros(shape[0]), torch.ones(shape[0]))

    def plain(self) -> dict[str, Any]:
        """Convert the form to plain data, for a file."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in found.items()}
        return {"input_shape": list(plain.pop("shape")), **plain}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Form:
        """Make a form from `plain` data; other keys are ignored, and target statistics may be missing."""

        def tensor(name: str) -> Tensor | None:
            values = plain.get(name)
            return None if values is None else torch.tensor(values, dtype=torch.float32)

        mean, std = tensor("mean"), tensor("std")
        assert mean is not None
        assert std is not None
        shape = tuple(plain["input_shape"])
        return cls(shape, plain["classes"], mean, std, tensor("target_mean"), tensor("target_std"))


@dataclass(frozen=True)
class Dataset:
    """Three splits, the number of classes (None for numbers), and the training set's statistics (`Form`).

    `digest` is the SHA-256 of the decoded data and their split. It represents the data in the keys of stages,
    so that results stay valid when files move, and are not reused when their content changes.
    """

    train: Split
    validation: Split
    test: Split
    classes: int | None
    mean: Tensor
    std: Tensor
    digest: str
    target_mean: Tensor | None = None
    target_std: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: (channels, height, width), (columns,), or (length,)."""
        return tuple(self.train.inputs.shape[1:])

    @cached_property
    def form(self) -> Form:
        """The form of the data, for which networks and tasks are made, on the data's device."""
        return Form(self.shape, self.classes, self.mean, self.std, self.target_mean, self.target_std)

    @property
    def device(self) -> torch.device:
        """The device that holds the tensors."""
        return self.train.inputs.device

    def to(self, device: torch.device) -> Dataset:
        """Return the data on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        movable = {name: v.to(device) for name, v in values.items() if isinstance(v, Split | Tensor)}
        return Dataset(**{**values, **movable})

    def arrays(self) -> dict[str, Any]:
        """Return the data as NumPy arrays by name, which share memory on the CPU, and the other fields."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        tensors = {
            **{f"{name}.inputs": split.inputs for name, split in splits.items()},
            **{f"{name}.targets": split.targets for name, split in splits.items()},
            "mean": self.mean,
            "std": self.std,
        }
        if self.target_mean is not None and self.target_std is not None:
            tensors |= {"target_mean": self.target_mean, "target_std": self.target_std}
        plain = {"classes": self.classes, "digest": self.digest}
        return {**{name: tensor.cpu().numpy() for name, tensor in tensors.items()}, **plain}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> Dataset:
        """Make a data set from `arrays` without copying; tensors of read-only arrays are read-only too."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")

            def tensor(name: str) -> Tensor:
                return torch.from_numpy(arrays[name])

            def split(name: str) -> Split:
                return Split(tensor(f"{name}.inputs"), tensor(f"{name}.targets"))

            has_numbers = "target_mean" in arrays
            return cls(
                split("train"),
                split("validation"),
                split("test"),
                arrays["classes"],
                tensor("mean"),
                tensor("std"),
                arrays["digest"],
                tensor("target_mean") if has_numbers else None,
                tensor("target_std") if has_numbers else None,
            )

    def normalize(self, inputs: Tensor) -> Tensor:
        """Normalize stored inputs for the network (`Form.normalize`)."""
        return self.form.normalize(inputs)


def split_off_validation(
    training: Split, test: Split, classes: int | None, *, fraction: float, seed: int
) -> Dataset:
    """Make a data set whose validation split is a random `fraction` of the training examples, at least one.

    The choice depends only on `seed` and the number of examples, so it is the same on every machine.
    """
    n = len(training)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(n * fraction)), n - 1)
    validation, train = training.take(order[:count]), training.take(order[count:])
    mean, std = input_statistics(train.inputs)
    target_mean = target_std = None
    if classes is None:
        target_mean, target_std = _statistics(train.targets)
    content = _digest(train, validation, test, classes)
    return Dataset(train, validation, test, classes, mean, std, content, target_mean, target_std)


def input_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of inputs (N, C, …) per channel or column; empty for indices into a vocabulary."""
    if inputs.dtype == torch.uint8:
        return channel_statistics(inputs)
    if inputs.is_floating_point():
        return _statistics(inputs)
    return torch.empty(0), torch.empty(0)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel of uint8 images (N, C, H, W), each (C,) float32.

    They are computed in float64 from exact counts of the pixel values. A constant channel gets deviation 1.
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


def _statistics(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of numbers (N, C, …), each (C,) float32; a constant column gets deviation 1."""
    rows = numbers.double().transpose(0, 1).flatten(1)
    is_constant = (rows == rows[:, :1]).all(1)  # rounding may give it a tiny deviation
    std = rows.std(1, correction=0).masked_fill(is_constant, 1.0)
    return rows.mean(1).float(), std.float()


def _digest(train: Split, validation: Split, test: Split, classes: int | None) -> str:
    sha = hashlib.sha256(str(classes).encode())
    for split in (train, validation, test):
        for tensor in (split.inputs, split.targets):
            sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
