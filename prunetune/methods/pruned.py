"""Constraints of a network with pruned weights: masks that rest, move (RigL, SET), or close gradually."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from prunetune.config.reading import kept
from prunetune.config.schema import DynamicConfig, PruningConfig
from prunetune.engine.loop import DivergedError, Metrics, seed_of
from prunetune.sparsity import allocation
from prunetune.sparsity.dynamic import GROWTH, cubic_density, drop_fraction, move
from prunetune.sparsity.masks import FixedMask


@final
class Pruned:
    """Pruned weights are exactly zero after every step."""

    def __init__(self, mask: FixedMask) -> None:
        self.mask = mask

    def before_forward(self, generator: torch.Generator) -> None:
        """Nothing."""

    def before_step(self, time: float, step: int) -> bool:
        """Nothing."""
        return True

    def after_step(self) -> None:
        """Zero what was pruned."""
        self.mask.apply()

    def before_evaluation(self) -> None:
        """Nothing: the weights are as they are used."""

    def measure(self) -> Metrics:
        """Nothing."""
        return {}


@final
class Dynamic:
    """RigL or SET: every so many steps each layer drops its smallest weights and grows as many.

    RigL's update takes the place of that step; SET's comes after the step. New weights are 0 and their
    optimizer state is reset. The lots of an update are drawn from the seed and the step, so a resumed run
    draws the same.
    """

    def __init__(
        self, mask: FixedMask, config: DynamicConfig, optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        self._mask = mask
        self._config = config
        self._optimizer = optimizer
        self._seed = seed
        self._due: tuple[float, int] | None = None

    def before_forward(self, generator: torch.Generator) -> None:
        """Nothing."""

    def before_step(self, time: float, step: int) -> bool:
        """Whether this is an ordinary step."""
        is_due = step > 0 and step % self._config.every == 0 and time < self._config.end
        self._due = (time, step) if is_due else None
        if is_due and self._config.name == "rigl":
            self._update(time, step)
            self._due = None
            return False
        return True

    def after_step(self) -> None:
        """Zero what is not in the mask; SET's update."""
        self._mask.apply()
        if self._due is not None:
            self._update(*self._due)
            self._due = None

    def before_evaluation(self) -> None:
        """Nothing: the weights are as they are used."""

    def measure(self) -> Metrics:
        """Nothing."""
        return {}

    @torch.no_grad()
    def _update(self, time: float, step: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(self._seed, "dynamic", step))
        fraction = drop_fraction(time, self._config.end, self._config.alpha)
        for name, mask in self._mask.masks.items():
            weight = self._mask.weights[name]
            _check(weight)
            gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            growth = GROWTH[self._config.name](gradient, generator=generator)
            old = mask.bool()
            new = move(weight, old, growth, fraction, generator=generator)
            mask.copy_(new)
            _reset(self._optimizer, weight, new & ~old)
        self._mask.apply()


@final
class Gradual:
    """The mask closes over a part of the stage, by magnitude, on the cubic schedule."""

    def __init__(self, mask: FixedMask, config: PruningConfig, density: float, seed: int) -> None:
        self._mask = mask
        self._config = config
        self._density = density
        self._seed = seed

    def before_forward(self, generator: torch.Generator) -> None:
        """Nothing."""

    def before_step(self, time: float, step: int) -> bool:
        """Close the mask a little further, when it is time; once more just after the end."""
        schedule = self._config.schedule
        step_time = time / step if step else 0.0
        if time + step_time >= schedule.end:  # no later step is before the end
            density = self._density
        else:
            density = cubic_density(time, schedule.start, schedule.end, 1.0, self._density)
        if density == self._density or (time >= schedule.start and step % schedule.every == 0):
            self._close(density, step)
        return True

    def after_step(self) -> None:
        """Zero what was pruned."""
        self._mask.apply()

    def before_evaluation(self) -> None:
        """Nothing: the weights are as they are used."""

    def measure(self) -> Metrics:
        """The density so far."""
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
            _check(weight)
        masks = allocation.unstructured(
            {name: weight.detach().abs() for name, weight in self._mask.weights.items()},
            count,
            allocation=self._config.allocation,
            dense=allocation.dense_layer_names(list(self._mask.masks), self._config.dense_layers),
            alive={name: mask.bool() for name, mask in self._mask.masks.items()},
            generator=torch.Generator().manual_seed(seed_of(self._seed, "gradual", step)),
        )
        for name, mask in masks.items():
            self._mask.masks[name].copy_(mask)
        self._mask.apply()


def _check(weight: Tensor) -> None:
    """Raise DivergedError where a mask would have to be chosen among NaN."""
    if not torch.isfinite(weight).all():
        raise DivergedError


def _reset(optimizer: torch.optim.Optimizer, weight: Tensor, where: Tensor) -> None:
    """Zero the per-weight optimizer state (momentum, moments) at the `where` entries."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0.0)
