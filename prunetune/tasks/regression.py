"""To say a number, or several."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.data import Form
from prunetune.errors import UserError
from prunetune.tasks.metric import Metric
from prunetune.tasks.task import Affine, Task

RMSE = Metric("rmse", "RMSE", maximize=False)
"""The root of the mean squared error, in the target's own unit."""


class Regression(Task):
    """Mean squared error of standardised targets; judged by the root of it, in the targets' own unit.

    Targets are numbers (N, T). The network's outputs (B, T) are standardised too: by the training targets'
    mean and deviation per column.
    """

    metric: ClassVar[Metric] = RMSE
    targets: ClassVar[str] = "numbers"
    what: ClassVar[str] = "target columns"

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        if form.target_mean is None or form.target_std is None:
            raise UserError(
                "task = 'regression': the data's targets are classes; take task: classification, "
                "or data with numbers"
            )
        self._mean, self._std = form.target_mean, form.target_std

    @property
    def outputs(self) -> int:
        """One per target column."""
        return len(self._mean)

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized inputs, standardised targets."""
        return self.form.normalize(inputs), (targets - self._mean) / self._std

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        """The mean squared error over examples and columns; there are no labels to smooth."""
        return F.mse_loss(outputs, targets)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared errors by column, in the targets' own unit, and the number of examples."""
        errors = (outputs - targets).double() * self._std.double()
        squares = errors.square().sum(0)
        return torch.cat([squares, torch.full_like(squares[:1], len(targets))])

    def score(self, sums: Tensor) -> float:
        """The root of the mean over examples and columns."""
        *squares, count = sums.tolist()
        return math.sqrt(sum(squares) / (count * len(squares)))

    def chance(self, targets: Tensor) -> float:
        """That of always saying the split's mean: the targets' standard deviation."""
        return math.sqrt(float(targets.double().var(0, correction=0).mean()))

    def after(self) -> nn.Module:
        """From standardised answers to those in the targets' own unit."""
        return Affine(self._std, self._mean)
