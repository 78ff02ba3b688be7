"""Bernoulli masks learnt with the weights (arXiv 2312.01653, section 3.1): pushed, or held at a count."""

from __future__ import annotations

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
    """Each step computes with θ⊙B, B ~ Bernoulli(M); λ1 Σ M(1−M) + λ2 Σ M is added to the loss.

    This is the paper's mask (paper, section 3.1), with a warm-up of λ2 and an initial value beyond it. λ2
    rises from 0 over the first `lambda2_warmup` of the stage; every M starts at `initial`, and Adam steps M
    with `lr`. Sums are over all prunable weights.
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
        self.optimizers = [_mask_optimizer(self.mask, lr)]
        self.tensors = _tensors(self.mask)
        self.lambda1 = lambda1
        self._lambda2, self._warmup = lambda2, schedules.rise(lambda2_warmup)

    def lambda2(self, time: float) -> float:
        """λ2 at a share of the stage."""
        return self._lambda2 * self._warmup(time)

    def before_forward(self, generator: torch.Generator) -> None:
        """A fresh B."""
        self.mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Gradients of θ and M."""
        self.mask.take_gradients(self.lambda1, self.lambda2(time))
        return True

    def after_step(self) -> None:
        """M back into [0, 1]."""
        self.mask.clip()

    def before_evaluation(self) -> None:
        """θ⊙M."""
        self.mask.expect()

    def measure(self) -> Metrics:
        """How sparse the mask is."""
        return _measure(self.mask)

    @staticmethod
    def batched(constraints: Sequence[Penalty], rows: Rows) -> Batched:
        """The masks of the trials, a row each."""
        return _BatchedBernoulli(constraints, rows, aims=False)


@final
class Target:
    """A Bernoulli mask (paper, section 3.1) whose expected number of open weights, Σ M, is set, not pushed.

    After every step M is projected on the count of the density asked for, which falls, on a cubic schedule,
    from the initial one over `target_warmup` of the stage. So no λ2 has to be found per density, but
    pre-pruning is not shared between densities.
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
        self.optimizers = [_mask_optimizer(self.mask, lr)]
        self.tensors = _tensors(self.mask)
        self.lambda1 = lambda1
        self.target = partial(cubic_density, start=0.0, end=target_warmup, initial=initial, final=density)
        self._time = 0.0

    def before_forward(self, generator: torch.Generator) -> None:
        """A fresh B."""
        self.mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Gradients of θ and M."""
        self.mask.take_gradients(self.lambda1, 0.0)
        self._time = time
        return True

    def after_step(self) -> None:
        """M back into [0, 1], at the target count."""
        self.mask.project(self.target(self._time))

    def before_evaluation(self) -> None:
        """θ⊙M."""
        self.mask.expect()

    def measure(self) -> Metrics:
        """How sparse the mask is."""
        return _measure(self.mask)

    @staticmethod
    def batched(constraints: Sequence[Target], rows: Rows) -> Batched:
        """The masks of the trials, a row each."""
        return _BatchedBernoulli(constraints, rows, aims=True)


@final
class _BatchedBernoulli:
    """Masks of K trials, pushed or held at a count."""

    draws = True

    def __init__(self, constraints: Sequence[Any], rows: Rows, *, aims: bool) -> None:
        self.used = rows.values.clone()
        self._constraints = constraints
        self._rows = rows
        self._aims = aims
        self._masks = torch.stack([c.mask.mask.detach() for c in constraints])
        self._drawn = torch.empty(0)
        self._optimizer = batched(
            [c.optimizers[0] for c in constraints], [[c.mask.mask] for c in constraints], self._masks
        )
        self._lambda1 = torch.tensor([c.lambda1 for c in constraints], device=self.used.device)[:, None]

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """The counts that are aimed at, or λ2."""
        pairs = list(zip(self._constraints, times, strict=True))
        if self._aims:
            return [[c.target(t) * self._rows.prunable for c, t in pairs]]
        return [[c.lambda2(t) for c, t in pairs]]

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        """Put θ⊙B into `used`."""
        assert uniform is not None
        n, values = self._rows.prunable, self._rows.values
        self._drawn = (uniform < self._masks).to(self.used.dtype)
        torch.mul(values[:, :n], self._drawn, out=self.used[:, :n])
        self.used[:, n:] = values[:, n:]

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        """As `sparsity.masks.mask_gradients`, with λ by row; then M's step."""
        n = self._rows.prunable
        push = self._lambda1 * (1 - 2 * self._masks)
        if not self._aims:
            push = push + now[0][:, None]
        of_mask = push.addcmul_(gradient[:, :n], self._rows.values[:, :n])
        gradient[:, :n].mul_(self._drawn)
        self._optimizer.step(of_mask, factor)
        if self._aims:
            self._masks.sub_(_SHIFTS(self._masks, now[0])[:, None])
        self._masks.clamp_(0, 1)

    def after_step(self, now: Tensor) -> None:
        """Nothing: M has been brought back already."""

    def before_evaluation(self) -> None:
        """Put θ⊙M into `used`."""
        self.used.copy_(self._rows.values)
        self.used[:, : self._rows.prunable].mul_(self._masks)

    def measure(self) -> list[Metrics]:
        """As `_measure`, by trial."""
        density, is_open = self._masks.mean(1).tolist(), (self._masks > 0.5).float().mean(1).tolist()
        return [{"mask_density": d, "mask_open": o} for d, o in zip(density, is_open, strict=True)]

    def write_back(self) -> None:
        """M and the state of its optimizer into the trials' own."""
        self._optimizer.write_back()
        for constraint, mask in zip(self._constraints, self._masks, strict=True):
            constraint.mask.mask.data.copy_(mask)


def _mask_optimizer(mask: LearnableMask, lr: float) -> torch.optim.Optimizer:
    # Adam whatever the weights use: M's gradient g⊙θ spans orders of magnitude between layers.
    return torch.optim.Adam([mask.mask], lr=lr, fused=True)


def _tensors(mask: LearnableMask) -> dict[str, Tensor]:
    """What a checkpoint must hold of a mask beside the model and the optimizers."""
    return {"prunetune:theta": mask.theta.detach(), "prunetune:mask": mask.mask.detach()}


def _measure(mask: LearnableMask) -> Metrics:
    """`mask_density`, the mean M, which is the expected density; `mask_open`, the share of M > ½."""
    values = mask.mask.detach()
    return {"mask_density": float(values.mean()), "mask_open": float((values > 0.5).float().mean())}
