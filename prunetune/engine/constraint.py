"""The hooks that the training loop calls around each step, with which a mask method changes the weights.

A mask method (`methods/`) is a `Constraint`. If its class also has a function `batched` (see `Batched`),
several trials can be trained with it as one batched program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

Metrics = dict[str, float]


class DivergedError(Exception):
    """Raised when the loss or the weights are no longer finite."""


class Constraint(Protocol):
    """What a mask method does to the weights: hooks that the loop calls around each step, in this order."""

    def before_forward(self, generator: torch.Generator) -> None:
        """Prepare the weights for the forward pass, such as by drawing a mask from `generator`.

        `generator` is on the device of the weights.
        """

    def before_step(self, time: float, step: int) -> bool:
        """Change the gradients after the backward pass; return whether the optimizers shall step.

        `time` is the share of the stage that is done, in [0, 1); `step` counts from 0 over the whole stage.
        """

    def after_step(self) -> None:
        """Restore the constraint after the optimizers' step, such as by setting pruned weights to zero."""

    def before_evaluation(self) -> None:
        """Prepare the weights for evaluation, such as by putting the expected weights into the model."""

    def measure(self) -> Metrics:
        """Return the constraint's own metrics after an epoch, such as the density of its mask, by name."""


@dataclass(frozen=True)
class Rows:
    """The weights of K trials of one model, one row per trial.

    The optimizers update `values` (K, n). Its first `prunable` columns are the prunable weights, in the order
    of `sparsity.masks.prunable`.
    """

    values: Tensor
    prunable: int


class Batched(Protocol):
    """The constraints of K trials as one object that works on the rows of their weights.

    The function `batched(constraints, rows)` of the constraint's class makes it. Each trial must compute what
    it computes alone, within float tolerance.
    """

    used: Tensor
    """The weights (K, n) of the forward pass; may be `Rows.values` itself."""
    draws: bool
    """Whether each step needs random numbers, uniform in [0, 1), one for each prunable weight."""

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Return V lists of K numbers that change from step to step, such as regularization strengths.

        `times` has, for each trial, the share of its stage that is done. The hooks get the numbers as the
        tensor `now` (V, K) on the device.
        """

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        """Prepare `used` for the forward pass.

        `uniform` are the random numbers, (prunable,) or (K, prunable) where trials draw different ones; None
        if `draws` is false.
        """

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        """Change `gradient` (K, n) in place; `factor` (K, 1) are the factors of the learning rates."""

    def after_step(self, now: Tensor) -> None:
        """Restore the constraint in `Rows.values` after the optimizers' step."""

    def before_evaluation(self) -> None:
        """Prepare the weights `used` for evaluation."""

    def measure(self) -> list[Metrics]:
        """Return the metrics of each trial's constraint after an epoch, as `Constraint.measure` does."""

    def write_back(self) -> None:
        """Copy all state besides the rows, such as learnt masks, into the trials' own constraints."""


@final
class Unconstrained:
    """The constraint of a dense network: only the optimizer changes the weights."""

    def before_forward(self, generator: torch.Generator) -> None:
        """Do nothing: dense weights need no preparation."""

    def before_step(self, time: float, step: int) -> bool:
        """Leave the gradients as they are; every step is an ordinary one."""
        return True

    def after_step(self) -> None:
        """Do nothing: dense weights may have any value."""

    def before_evaluation(self) -> None:
        """Do nothing: a dense network is evaluated with the weights that are trained."""

    def measure(self) -> Metrics:
        """Return no metrics."""
        return {}

    @staticmethod
    def batched(constraints: Sequence[Any], rows: Rows) -> Batched:
        """Make the constraint of K dense networks."""
        return BatchedUnconstrained(rows)


@final
class BatchedUnconstrained:
    """The constraint of K dense networks: only the optimizer changes the weights."""

    draws = False

    def __init__(self, rows: Rows) -> None:
        self.used = rows.values

    def schedule(self, times: Sequence[float]) -> list[list[float]]:
        """Return no numbers: nothing changes from step to step."""
        return []

    def before_forward(self, uniform: Tensor | None, now: Tensor) -> None:
        """Do nothing: dense weights need no preparation."""

    def before_step(self, gradient: Tensor, factor: Tensor, now: Tensor) -> None:
        """Do nothing: the gradients stay as they are."""

    def after_step(self, now: Tensor) -> None:
        """Do nothing: dense weights may have any value."""

    def before_evaluation(self) -> None:
        """Do nothing: dense networks are evaluated with the weights that are trained."""

    def measure(self) -> list[Metrics]:
        """Return no metrics for any trial."""
        return [{} for _ in self.used]

    def write_back(self) -> None:
        """Do nothing: there is no state besides the rows."""
