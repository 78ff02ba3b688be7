"""Dynamic sparse training: masks that move while the network trains, at a constant density per layer."""

from __future__ import annotations

from typing import Annotated, Protocol, final

import torch
from pydantic import Field
from torch import Tensor

from prunetune.engine.constraint import Metrics
from prunetune.engine.seeds import seed_of
from prunetune.methods.finite import check_finite
from prunetune.sparsity.dynamic import drop_fraction, move, rigl_growth, set_growth
from prunetune.sparsity.masks import FixedMask

Every = Annotated[int, Field(ge=1, description="steps between updates")]
Alpha = Annotated[float, Field(gt=0, le=1, description="share dropped at the first update, cosine to 0")]
End = Annotated[float, Field(gt=0, le=1, description="share of the stage after which the mask rests")]


@final
class RigL:
    """RigL (Evci et al., arXiv 1911.11134): drops the smallest weights, grows where the gradient is largest.

    An update replaces the optimizer's step. Grown weights start at 0, and their optimizer state is reset.
    """

    def __init__(
        self,
        mask: FixedMask,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        every: Every = 100,
        alpha: Alpha = 0.3,
        end: End = 0.75,
    ) -> None:
        self._mask = mask
        self._every, self._end = every, end
        self._update = _Update(mask, optimizer, rigl_growth, alpha=alpha, end=end, seed=seed)

    def before_forward(self, generator: torch.Generator) -> None:
        """Do nothing: pruned weights need no preparation."""

    def before_step(self, time: float, step: int) -> bool:
        """Move the mask if an update is due; return whether the optimizers shall step instead."""
        if not _is_due(time, step, self._every, self._end):
            return True
        self._update(time, step)
        return False

    def after_step(self) -> None:
        """Set the weights outside of the mask to zero."""
        self._mask.apply()

    def before_evaluation(self) -> None:
        """Do nothing: the network is evaluated with the weights that are trained."""

    def measure(self) -> Metrics:
        """Return no metrics: the density is constant."""
        return {}


@final
class Set:
    """SET (Mocanu et al., arXiv 1707.04780): drops the smallest weights, grows as many at random.

    An update follows the optimizer's step. Grown weights start at 0, and their optimizer state is reset.
    """

    def __init__(
        self,
        mask: FixedMask,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        every: Every = 100,
        alpha: Alpha = 0.3,
        end: End = 0.75,
    ) -> None:
        self._mask = mask
        self._every, self._end = every, end
        self._update = _Update(mask, optimizer, set_growth, alpha=alpha, end=end, seed=seed)
        self._due: tuple[float, int] | None = None

    def before_forward(self, generator: torch.Generator) -> None:
        """Do nothing: pruned weights need no preparation."""

    def before_step(self, time: float, step: int) -> bool:
        """Note whether an update is due after this step; the optimizers always step."""
        self._due = (time, step) if _is_due(time, step, self._every, self._end) else None
        return True

    def after_step(self) -> None:
        """Set the weights outside of the mask to zero, and move the mask if an update is due."""
        self._mask.apply()
        if self._due is not None:
            self._update(*self._due)
            self._due = None

    def before_evaluation(self) -> None:
        """Do nothing: the network is evaluated with the weights that are trained."""

    def measure(self) -> Metrics:
        """Return no metrics: the density is constant."""
        return {}


class Growth(Protocol):
    """A function that ranks inactive weights by their gradient; those with the highest ranks grow."""

    def __call__(self, gradient: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return a rank for each weight, in the shape of the gradient."""


@final
class _Update:
    """An update of the mask, in which each layer drops its smallest weights and grows as many others.

    Its random numbers are drawn from the seed and the step, so that a resumed run draws the same.
    """

    def __init__(
        self,
        mask: FixedMask,
        optimizer: torch.optim.Optimizer,
        growth: Growth,
        *,
        alpha: float,
        end: float,
        seed: int,
    ) -> None:
        self._mask = mask
        self._optimizer = optimizer
        self._growth = growth
        self._alpha, self._end = alpha, end
        self._seed = seed

    @torch.no_grad()
    def __call__(self, time: float, step: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(self._seed, "dynamic", step))
        fraction = drop_fraction(time, self._end, self._alpha)
        for name, mask in self._mask.masks.items():
            weight = self._mask.weights[name]
            check_finite(weight)
            gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            growth = self._growth(gradient, generator=generator)
            old = mask.bool()
            new = move(weight, old, growth, fraction, generator=generator)
            mask.copy_(new)
            _reset(self._optimizer, weight, new & ~old)
        self._mask.apply()


def _is_due(time: float, step: int, every: int, end: float) -> bool:
    return step > 0 and step % every == 0 and time < end


def _reset(optimizer: torch.optim.Optimizer, weight: Tensor, where: Tensor) -> None:
    """Set the optimizer's state (momentum, moments) to zero for the weights in the mask `where`."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0.0)
