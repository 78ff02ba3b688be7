"""What happens to the weights around a step, beside the optimizer: the hooks that the loop calls.

A mask method (`methods/`) is a constraint. One that several trials can run as one batched program also says
how: its class has a function `batched`, see `Batched`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

Metrics = dict[str, float]


class DivergedError(Exception):
    """The loss or the weights are no longer finite."""


class Constraint(Protocol):
    """The hooks around a training step, in the order in which they are called."""

    def before_forward(self, generator: torch.Generator) -> None:
        """Prepare the weights that the model computes with; `generator` is on their device."""

    def before_step(self, time: float, step: int) -> bool:
        """Turn the model's gradients into the optimizer's; whether the optimizers are to step.

        `time` is the share of the stage done, `step` counts from 0 over the stage.
        """

    def after_step(self) -> None:
        """Bring the weights back to where they may be."""

    def before_evaluation(self) -> None:
        """Prepare the weights for evaluation."""

    def measure(self) -> Metrics:
        """What to report of it after an epoch, by name."""


@dataclass(frozen=True)
class Rows:
    """The weights of K trials of one model, a row each, prunable weights first.

    `values` (K, n) are what the optimizers step. The first `prunable` of the n columns are the prunable
    weights, in the order of `sparsity.masks.prunable`.
    """

    values: Tensor
    prunable: int


class Batched(Protocol):
    """The constraints of K trials as one, over the rows of their weights.

    It comes from the function `batched(constraints, rows)` of the constraints' class, which gives None where
    these constraints cannot run together. What a trial computes must be what it computes alone, within float
    tolerance.
    """

    used: Tensor
    """(K, n): what the models compute with; may be `Rows.values` itself."""
    draws: bool
    """Whether each step needs uniform numbers in [0, 1), one for each prunable weight."""

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Numbers that change from step to step: lists of one per trial, for each trial's share of the stage.

        They come back on the device, as `now`, (V, K).
        """

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        """Prepare `used`; `uniform` is (prunable,), or (K, prunable) where trials draw differently."""

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        """Change `gradient` (K, n) in place; `factor` (K, 1) scales the learning rates."""

    def after_step(self, now: Tensor) -> None:
        """Bring the rows back to where they may be."""

    def before_evaluation(self) -> None:
        """Prepare `used` for evaluation."""

    def measure(self) -> list[Metrics]:
        """What to report of each trial."""

    def write_back(self) -> None:
        """Put what it holds beside the rows into the trials' own constraints."""


@final
class Unconstrained:
    """A dense network: nothing beside the optimizer."""

    def before_forward(self, generator: torch.Generator) -> None:
        """Nothing."""

    def before_step(self, time: float, step: int) -> bool:
        """Nothing."""
        return True

    def after_step(self) -> None:
        """Nothing."""

    def before_evaluation(self) -> None:
        """Nothing."""

    def measure(self) -> Metrics:
        """Nothing."""
        return {}

    @staticmethod
    def batched(constraints: Sequence[Any], rows: Rows) -> Batched:
        """Nothing to do for any of the trials."""
        return BatchedUnconstrained(rows)


@final
class BatchedUnconstrained:
    """Dense networks."""

    draws = False

    def __init__(self, rows: Rows) -> None:
        self.used = rows.values

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Nothing changes."""
        return []

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        """Nothing."""

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        """Nothing."""

    def after_step(self, now: Tensor) -> None:
        """Nothing."""

    def before_evaluation(self) -> None:
        """Nothing."""

    def measure(self) -> list[Metrics]:
        """Nothing."""
        return [{} for _ in self.used]

    def write_back(self) -> None:
        """Nothing."""
