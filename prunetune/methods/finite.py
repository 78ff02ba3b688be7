"""Check that weights are finite before a mask is chosen among them."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.engine.constraint import DivergedError


def check_finite(weight: Tensor) -> None:
    """Raise DivergedError if the weight holds NaN or infinities, which cannot be ranked."""
    if not torch.isfinite(weight).all():
        raise DivergedError
