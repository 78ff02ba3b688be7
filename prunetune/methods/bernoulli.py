"""Learnable Bernoulli masks (arXiv 2312.01653, section 3.1), closed by a penalty or held at a density."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import vmap

from prunetune.engine.batched_optimizers import batched
from prunetune.engine.constraint import Batched, Metrics, Rows
from prunetune.sparsity import schedules
from prunetune.sparsity.dynamic import cubic_density, shift_to_count
from prunetune.sparsity.masks import LearnableMask

Lambda1 = Annotated[float, Field(ge=0, description="weight of Σ M(1−M)")]
Lambda2 = Annotated[float, Field(ge=0, description="weight of Σ M")]
Warmup = Annotated[float, Field(ge=0, le=1, description="share of the stage with λ2 rising from 0")]
TargetWarmup = Annotated[float, Field(gt=0, le=1, description="share of the stage until the target count")]
Start = Annotated[float, Field(gt=0, le=1, description="every M at the start")]
StepSize = Annotated[float, Field(gt=0, description="Adam's step size for M")]

_SHIFTS = vmap(shift_to_count)


@final
class Penalty:
    """Each step computes with θ⊙B, B ~ Bernoulli(M); the penalty λ1 Σ M(1−M) + λ2 Σ M is added to the loss.

    This is the paper's mask (paper, section 3.1), to which a warm-up of λ2 and an initial value are added. λ2
    rises linearly from 0 over the first share `lambda2_warmup` of the stage. Every M starts at `initial`, and
    Adam updates M with step size `lr`. Sums are over all prunable weights.
    """

    aims_at_density = False
    counts_when = {"lambda2_warmup": ("lambda2", lambda value: value > 0)}  # noqa: RUF012

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        lambda1: Lambda1 = 0.0,
        lambda2: Lambda2 = 0.0,
        lambda2_warmup: Warmup = 0.0,
        initial: Start = 0.5,
        lr: StepSize = 0.02,
    ) -> None:
        self.mask = LearnableMask(weights, initial=initial)
        self.parameters = [self.mask.theta]
        self.optimizers = [mask_optimizer(self.mask, lr)]
        self.tensors = tensors_of(self.mask)
        self.lambda1 = lambda1
        self._lambda2, self._warmup = lambda2, schedules.rise(lambda2_warmup)

    def lambda2(self, time: float) -> float:
        """Return λ2 when the share `time` of the stage is done."""
        return self._lambda2 * self._warmup(time)

    def before_forward(self, generator: torch.Generator) -> None:
        """Draw a new B, and put θ⊙B into the model."""
        self.mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Compute the gradients of θ and M from that of θ⊙B."""
        self.mask.take_gradients(self.lambda1, self.lambda2(time))
        return True

    def after_step(self) -> None:
        """Clip M to [0, 1]."""
        self.mask.clip()

    def before_evaluation(self) -> None:
        """Put θ⊙M into the model."""
        self.mask.expect()

    def measure(self) -> Metrics:
        """Return `mask_density` and `mask_open`, which say how sparse the mask is."""
        return measured(self.mask)

    @staticmethod
    def batched(constraints: Sequence[Penalty], rows: Rows) -> Batched:
        """Combine the masks of K trials, one row per trial."""
        return BatchedBernoulli(constraints, rows, _Pushed(constraints))


@final
class Target:
    """A Bernoulli mask (paper, section 3.1) whose expected number of open weights, Σ M, is prescribed.

    After every step M is projected onto the nearest M with that sum. The prescribed density falls on a cubic
    schedule from `initial` to the density asked for, over the first share `target_warmup` of the stage. So no
    λ2 must be tuned per density, but densities cannot share a pre-pruned network.
    """

    aims_at_density = True

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        density: float,
        lambda1: Lambda1 = 0.0,
        target_warmup: TargetWarmup = 0.7,
        initial: Start = 0.5,
        lr: StepSize = 0.02,
    ) -> None:
        self.mask = LearnableMask(weights, initial=initial)
        self.parameters = [self.mask.theta]
        self.optimizers = [mask_optimizer(self.mask, lr)]
        self.tensors = tensors_of(self.mask)
        self.lambda1 = lambda1
        self.target = partial(cubic_density, start=0.0, end=target_warmup, initial=initial, final=density)
        self._time = 0.0

    def before_forward(self, generator: torch.Generator) -> None:
        """Draw a new B, and put θ⊙B into the model."""
        self.mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Compute the gradients of θ and M from that of θ⊙B."""
        self.mask.take_gradients(self.lambda1, 0.0)
        self._time = time
        return True

    def after_step(self) -> None:
        """Project M onto [0, 1] and the prescribed sum."""
        self.mask.project(self.target(self._time))

    def before_evaluation(self) -> None:
        """Put θ⊙M into the model."""
        self.mask.expect()

    def measure(self) -> Metrics:
        """Return `mask_density` and `mask_open`, which say how sparse the mask is."""
        return measured(self.mask)

    @staticmethod
    def batched(constraints: Sequence[Target], rows: Rows) -> Batched:
        """Combine the masks of K trials, one row per trial."""
        return BatchedBernoulli(constraints, rows, _Aimed(constraints, rows))


class Control(ABC):
    """The part that makes the masks M (K, n) of K trials sparse."""

    def __init__(self, constraints: Sequence[Any]) -> None:
        """`constraints` are the trials' own, one per row of M."""
        self._constraints = constraints

    @abstractmethod
    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Return the scheduled values, as `Batched.schedule` does."""

    def lambda2(self, now: Tensor) -> Tensor | None:
        """Return λ2 of each trial (K,), or None if there is no penalty."""
        return None

    def after_step(self, masks: Tensor, now: Tensor) -> None:
        """Bring the masks back into [0, 1] after a step of their optimizer, in place."""
        masks.clamp_(0, 1)

    def measure(self) -> list[Metrics]:
        """Return the metrics of each trial besides those of its mask."""
        return [{} for _ in self._constraints]

    def write_back(self) -> None:
        """Copy the state, if there is any, into the trials' own constraints."""
        return


@final
class _Pushed(Control):
    """The control of `Penalty`: λ2 follows its schedule."""

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        return [[c.lambda2(t) for c, t in zip(self._constraints, times, strict=True)]]

    def lambda2(self, now: Tensor) -> Tensor:
        return now[0]


@final
class _Aimed(Control):
    """The control of `Target`: Σ M is set to its prescribed value."""

    def __init__(self, constraints: Sequence[Target], rows: Rows) -> None:
        super().__init__(constraints)
        self._prunable = rows.prunable

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        return [[c.target(t) * self._prunable for c, t in zip(self._constraints, times, strict=True)]]

    def after_step(self, masks: Tensor, now: Tensor) -> None:
        masks.sub_(_SHIFTS(masks, now[0])[:, None])
        super().after_step(masks, now)


@final
class BatchedBernoulli:
    """The Bernoulli masks of K trials; `control` makes them sparse."""

    draws = True

    def __init__(self, constraints: Sequence[Any], rows: Rows, control: Control) -> None:
        self.used = rows.values.clone()
        self._constraints = constraints
        self._rows = rows
        self._control = control
        self._masks = torch.stack([c.mask.mask.detach() for c in constraints])
        self._drawn = torch.empty(0)
        self._optimizer = batched(
            [c.optimizers[0] for c in constraints], [[c.mask.mask] for c in constraints], self._masks
        )
        self._lambda1 = torch.tensor([c.lambda1 for c in constraints], device=self.used.device)[:, None]

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Return the scheduled values of the control: the prescribed Σ M of each trial, or its λ2."""
        return self._control.schedule(times)

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        """Put θ⊙B into `used`."""
        assert uniform is not None
        n, values = self._rows.prunable, self._rows.values
        self._drawn = (uniform < self._masks).to(self.used.dtype)
        torch.mul(values[:, :n], self._drawn, out=self.used[:, :n])
        self.used[:, n:] = values[:, n:]

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        """Compute the gradients as `sparsity.masks.mask_gradients` does, with λ per row; then update M."""
        n = self._rows.prunable
        push = self._lambda1 * (1 - 2 * self._masks)
        if (lambda2 := self._control.lambda2(now)) is not None:
            push = push + lambda2[:, None]
        of_mask = push.addcmul_(gradient[:, :n], self._rows.values[:, :n])
        gradient[:, :n].mul_(self._drawn)
        self._optimizer.step(of_mask, factor)
        self._control.after_step(self._masks, now)

    def after_step(self, now: Tensor) -> None:
        """Do nothing: `before_step` has already updated and clipped M."""

    def before_evaluation(self) -> None:
        """Put θ⊙M into `used`."""
        self.used.copy_(self._rows.values)
        self.used[:, : self._rows.prunable].mul_(self._masks)

    def measure(self) -> list[Metrics]:
        """Return `mask_density` and `mask_open` of each trial."""
        density, is_open = self._masks.mean(1).tolist(), (self._masks > 0.5).float().mean(1).tolist()
        beside = self._control.measure()
        return [
            {"mask_density": d, "mask_open": o, **more}
            for d, o, more in zip(density, is_open, beside, strict=True)
        ]

    def write_back(self) -> None:
        """Copy M and the state of its optimizer into the trials' own masks and optimizers."""
        self._optimizer.write_back()
        self._control.write_back()
        for constraint, mask in zip(self._constraints, self._masks, strict=True):
            constraint.mask.mask.data.copy_(mask)


def mask_optimizer(mask: LearnableMask, lr: float) -> torch.optim.Optimizer:
    """Make the optimizer of M.

    It is always Adam, whatever optimizer the weights use: M's gradient g⊙θ differs by orders of magnitude
    between layers.
    """
    return torch.optim.Adam([mask.mask], lr=lr, fused=True)


def tensors_of(mask: LearnableMask) -> dict[str, Tensor]:
    """The tensors of a mask that a checkpoint must hold besides the model and the optimizers."""
    return {"prunetune:theta": mask.theta.detach(), "prunetune:mask": mask.mask.detach()}


def measured(mask: LearnableMask) -> Metrics:
    """Return `mask_density`, the mean of M (the expected density), and `mask_open`, the share of M > ½."""
    values = mask.mask.detach()
    return {"mask_density": float(values.mean()), "mask_open": float((values > 0.5).float().mean())}
