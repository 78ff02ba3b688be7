"""Fixed masks: pruned weights are zero and stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from prunetune.engine.constraint import Batched, Metrics, Rows
from prunetune.sparsity.masks import FixedMask


@final
class Pruned:
    """A fixed mask: after every step the pruned weights are exactly zero."""

    def __init__(self, mask: FixedMask) -> None:
        self.mask = mask

    def before_forward(self, generator: torch.Generator) -> None:
        """Do nothing: pruned weights need no preparation."""

    def before_step(self, time: float, step: int) -> bool:
        """Leave the gradients as they are; the optimizers always step."""
        return True

    def after_step(self) -> None:
        """Set the pruned weights to zero."""
        self.mask.apply()

    def before_evaluation(self) -> None:
        """Do nothing: the network is evaluated with the weights that are trained."""

    def measure(self) -> Metrics:
        """Return no metrics: the mask does not change."""
        return {}

    @staticmethod
    def batched(constraints: Sequence[Pruned], rows: Rows) -> Batched:
        """Combine the masks of K trials, one row per trial."""
        return _BatchedPruned([constraint.mask for constraint in constraints], rows)


@final
class _BatchedPruned:
    draws = False

    def __init__(self, masks: Sequence[FixedMask], rows: Rows) -> None:
        self.used = rows.values
        self._prunable = rows.prunable
        self._masks = torch.stack([_flat(mask) for mask in masks])

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        return []

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        pass

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        pass

    def after_step(self, now: Tensor) -> None:
        self.used[:, : self._prunable].mul_(self._masks)

    def before_evaluation(self) -> None:
        pass

    def measure(self) -> list[Metrics]:
        return [{} for _ in self.used]

    def write_back(self) -> None:
        pass


def _flat(mask: FixedMask) -> Tensor:
    """Return a mask over all prunable weights as floats (n,); a weight without a mask is all ones."""
    weights = mask.weights
    return torch.cat([mask.masks.get(name, torch.ones_like(w)).flatten() for name, w in weights.items()])
