"""A check before masks are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.engine.constraint import DivergedError


def check_finite(weight: Tensor) -> None:
    """Raise DivergedError where a mask would have to be chosen among NaN."""
    if not torch.isfinite(weight).all():
        raise DivergedError
