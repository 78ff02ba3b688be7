"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from torchvision, which downloads missing files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prunetune.data.dataset import Source, Split
from prunetune.errors import UserError


def mnist(root: str) -> Source:
    """Load MNIST: handwritten digits, 1×28×28, ten classes (LeCun et al. 1998)."""
    return _load(root, "mnist", "MNIST", 10)


def fashion_mnist(root: str) -> Source:
    """Load Fashion-MNIST: clothes, 1×28×28, ten classes (Xiao et al., arXiv 1708.07747)."""
    return _load(root, "fashion_mnist", "FashionMNIST", 10)


def cifar10(root: str) -> Source:
    """Load CIFAR-10: photographs, 3×32×32, ten classes (Krizhevsky 2009)."""
    return _load(root, "cifar10", "CIFAR10", 10)


def cifar100(root: str) -> Source:
    """Load CIFAR-100: photographs, 3×32×32, a hundred classes (Krizhevsky 2009)."""
    return _load(root, "cifar100", "CIFAR100", 100)


mnist.known = fashion_mnist.known = (1, 28, 28), 10  # type: ignore[attr-defined]
cifar10.known = (3, 32, 32), 10  # type: ignore[attr-defined]
cifar100.known = (3, 32, 32), 100  # type: ignore[attr-defined]


def _load(root: str, name: str, constructor_name: str, classes: int) -> Source:
    from torchvision import datasets

    constructor: Any = getattr(datasets, constructor_name)
    splits = []
    for train in (True, False):
        try:
            source = constructor(root, train=train, download=False)
        except RuntimeError:
            try:
                source = constructor(root, train=train, download=True)
            except Exception as error:
                raise UserError(
                    f"data.root = {root!r}: {name} is not there, and downloading it failed "
                    f"({type(error).__name__}: {error}); put torchvision's files there, or give the folder "
                    "that has them as data.root"
                ) from None
        except Exception as error:
            raise UserError(f"data.root = {root!r}: the files of {name} cannot be read: {error}") from None
        images = torch.as_tensor(np.asarray(source.data))
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        splits.append(Split(images.contiguous(), torch.as_tensor(source.targets).long()))
    return Source(splits[0], splits[1], classes)
