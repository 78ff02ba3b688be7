"""Gradual pruning: weights are pruned while the network trains (Zhu and Gupta, arXiv 1710.01878)."""

from __future__ import annotations

import math
from typing import final

import torch

from prunetune.config.canonical import kept
from prunetune.engine.constraint import Metrics
from prunetune.engine.seeds import seed_of
from prunetune.methods.finite import check_finite
from prunetune.sparsity import allocation
from prunetune.sparsity.dynamic import cubic_density
from prunetune.sparsity.masks import FixedMask


@final
class Gradual:
    """Gradual pruning: prunes the smallest weights during a part of the stage, on a cubic schedule.

    From `start` to `end`, which are shares of the stage, it prunes further every `every` steps, down to
    `density` at the end.
    """

    def __init__(
        self,
        mask: FixedMask,
        *,
        density: float,
        start: float,
        end: float,
        every: int,
        allocate: str,
        dense_layers: str,
        seed: int,
    ) -> None:
        self._mask = mask
        self._density = density
        self._start, self._end, self._every = start, end, every
        self._allocate, self._dense_layers = allocate, dense_layers
        self._seed = seed

    def before_forward(self, generator: torch.Generator) -> None:
        """Do nothing: pruned weights need no preparation."""

    def before_step(self, time: float, step: int) -> bool:
        """Prune further every `every` steps, and down to `density` at the last step before `end`."""
        step_time = time / step if step else 0.0
        if time + step_time >= self._end:  # this is the last step before the end, or a later one
            density = self._density
        else:
            density = cubic_density(time, self._start, self._end, 1.0, self._density)
        if density == self._density or (time >= self._start and step % self._every == 0):
            self._close(density, step)
        return True

    def after_step(self) -> None:
        """Set the pruned weights to zero."""
        self._mask.apply()

    def before_evaluation(self) -> None:
        """Do nothing: the network is evaluated with the weights that are trained."""

    def measure(self) -> Metrics:
        """Return `density_now`, the density that the mask has reached."""
        return {"density_now": self._count() / self._total()}

    def _count(self) -> int:
        return sum(int(mask.sum()) for mask in self._mask.masks.values())

    def _total(self) -> int:
        return sum(mask.numel() for mask in self._mask.masks.values())

    def _close(self, density: float, step: int) -> None:
        count = (
            kept(density, self._total()) if density == self._density else math.floor(density * self._total())
        )
        if count >= self._count():
            return
        for weight in self._mask.weights.values():
            check_finite(weight)
        masks = allocation.unstructured(
            {name: weight.detach().abs() for name, weight in self._mask.weights.items()},
            count,
            allocation=self._allocate,
            dense=allocation.dense_layer_names(list(self._mask.masks), self._dense_layers),
            alive={name: mask.bool() for name, mask in self._mask.masks.items()},
            generator=torch.Generator().manual_seed(seed_of(self._seed, "gradual", step)),
        )
        for name, mask in masks.items():
            self._mask.masks[name].copy_(mask)
        self._mask.apply()
