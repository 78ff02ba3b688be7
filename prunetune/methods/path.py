"""A Bernoulli mask that passes through every density in one run; a controller sets λ2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, final

import torch
from pydantic import Field
from torch import Tensor, nn

from prunetune.engine.constraint import Batched, Metrics, Rows
from prunetune.methods.bernoulli import (
    BatchedBernoulli,
    Control,
    Lambda1,
    Start,
    mask_optimizer,
    measured,
    tensors_of,
)
from prunetune.sparsity.control import controlled, initial_state, log_path
from prunetune.sparsity.masks import LearnableMask

Lowest = Annotated[
    float, Field(gt=0, le=1, description="the lowest density; give it if lower ones may be added to the file")
]
Factor = Annotated[float, Field(gt=0, description="the mean of M at the end, as a multiple of `lowest`")]
Power = Annotated[float, Field(ge=1, description="1: ρ falls geometrically; more: slowly in the end")]
Opening = Annotated[float, Field(gt=0, lt=1, description="share of the stage until the mean is `start`")]
PathStart = Annotated[float, Field(gt=0, le=1, description="the mean of M after the opening")]
End = Annotated[float, Field(gt=0, le=1, description="share of the stage after which the path is constant")]
Travel = Annotated[
    float, Field(gt=0, description="Adam's step size for M times the steps of the stage; at most 0.05 a step")
]
Gain = Annotated[float, Field(gt=0, description="change of log λ2 per stage and unit of log ρ − log ρ*")]
Proportional = Annotated[
    float, Field(ge=0, description="part of log λ2 that is a multiple of log ρ − log ρ*")
]

_LONGEST_STEP = 0.05
"""The largest step size of M: with larger ones, in stages of a few steps, the whole mask closes at once."""


@final
class Path:
    """A Bernoulli mask (paper, section 3.1) whose mean follows a path through all densities of a sweep.

    The prescribed mean of M, which is the expected density, falls from `initial` to `start` during the
    opening of the stage, and then to `factor` times the lowest density, fast at first and slowly in the end
    (`sparsity.control.log_path`). A controller sets λ2 after every step so that the mean follows this path
    (`sparsity.control.controlled`); λ2 is not a hyperparameter. One network passes through every density, and
    with `pruning.from_epoch: best` it serves all of them. The default of `lowest` is the lowest density of
    the file. `steps` is the number of training steps of the stage; Adam's step size for M is
    `travel / steps`, at most 0.05, so that a path suits stages of any length.
    """

    aims_at_density = False
    from_densities = {"lowest": min}  # noqa: RUF012
    """Options that are computed from the densities of the file if they are not given."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        steps: int,
        lowest: Lowest,
        factor: Factor = 0.9,
        start: PathStart = 0.3,
        opening: Opening = 0.1,
        end: End = 0.95,
        power: Power = 2.0,
        gain: Gain = 60.0,
        proportional: Proportional = 4.0,
        lambda1: Lambda1 = 0.0,
        initial: Start = 0.9,
        travel: Travel = 12.0,
    ) -> None:
        self.mask = LearnableMask(weights, initial=initial)
        self.parameters = [self.mask.theta]
        self.optimizers = [mask_optimizer(self.mask, min(travel / steps, _LONGEST_STEP))]
        final = min(factor * lowest, 1.0)
        self.goal = log_path(initial, start, final, opening=opening, end=end, power=power)
        # On the device, so that no step waits for a copy.
        self.state = initial_state().to(self.mask.mask.device)
        self.tensors = {**tensors_of(self.mask), "prunetune:control": self.state}
        self.lambda1 = lambda1
        self.gain, self.proportional = gain, proportional
        self._time = 0.0

    def before_forward(self, generator: torch.Generator) -> None:
        """Draw a new B."""
        self.mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Set the gradients of θ and M."""
        self._time = time
        self.mask.take_gradients(self.lambda1, self.state[2].exp())
        return True

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring M back into [0, 1], and update λ2."""
        self.mask.clip()
        distance = self.mask.mask.mean().clamp(min=1e-7).log() - self.goal(self._time)
        moved = controlled(self.state, distance, self._time, gain=self.gain, proportional=self.proportional)
        self.state.copy_(moved)

    def before_evaluation(self) -> None:
        """Use θ⊙M as the weights."""
        self.mask.expect()

    def measure(self) -> Metrics:
        """Return `mask_density`, `mask_open` and `lambda2`."""
        return {**measured(self.mask), "lambda2": float(self.state[2].exp())}

    @staticmethod
    def batched(constraints: Sequence[Path], rows: Rows) -> Batched:
        """Combine the masks of K trials, one row per trial, each with its own λ2."""
        return BatchedBernoulli(constraints, rows, _Followed(constraints))


@final
class _Followed(Control):
    """The control of `Path`: a controller per trial."""

    def __init__(self, constraints: Sequence[Path]) -> None:
        super().__init__(constraints)
        self._state = torch.stack([c.state for c in constraints])  # (K, 3)
        device = self._state.device
        self._gain = torch.tensor([c.gain for c in constraints], device=device)
        self._proportional = torch.tensor([c.proportional for c in constraints], device=device)

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Return the prescribed log ρ* and the time of each trial."""
        return [[c.goal(t) for c, t in zip(self._constraints, times, strict=True)], list(times)]

    def lambda2(self, now: Tensor) -> Tensor:
        return self._state[:, 2].exp()

    def after_step(self, masks: Tensor, now: Tensor) -> None:
        super().after_step(masks, now)
        distance = masks.mean(1).clamp(min=1e-7).log() - now[0]
        moved = controlled(self._state, distance, now[1], gain=self._gain, proportional=self._proportional)
        self._state.copy_(moved)

    def measure(self) -> list[Metrics]:
        return [{"lambda2": value} for value in self._state[:, 2].exp().tolist()]

    def write_back(self) -> None:
        for constraint, state in zip(self._constraints, self._state, strict=True):
            constraint.state.copy_(state)
