"""Pruning scores: how much each weight matters. Higher is kept."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def magnitude(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|θ| of each weight, by layer (paper, section 2.1; one-shot magnitude pruning)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


CRITERIA = {"magnitude": magnitude}
"""By the name in `pruning.criterion`."""
