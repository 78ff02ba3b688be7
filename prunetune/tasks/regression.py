"""Regression: predict one or several numbers for each example."""

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
    """Predict numbers: the loss is the mean squared error of standardised targets, the metric is RMSE.

    Targets are numbers (N, T). The network predicts them (B, T) standardised by the training targets' mean
    and standard deviation per column; RMSE is in the targets' own unit.
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
        """The number of the network's outputs: one per target column."""
        return len(self._mean)

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize the inputs and standardise the targets of a stored batch."""
        return self.form.normalize(inputs), (targets - self._mean) / self._std

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        """The mean squared error over examples and columns; `smoothing` has no meaning here."""
        return F.mse_loss(outputs, targets)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of squared errors per column, in the targets' unit, and the number of examples."""
        errors = (outputs - targets).double() * self._std.double()
        squares = errors.square().sum(0)
        return torch.cat([squares, torch.full_like(squares[:1], len(targets))])

    def score(self, sums: Tensor) -> float:
        """The RMSE: the root of the mean squared error over examples and columns."""
        *squares, count = sums.tolist()
        return math.sqrt(sum(squares) / (count * len(squares)))

    def chance(self, targets: Tensor) -> float:
        """The RMSE of always answering the split's mean, which is the targets' standard deviation."""
        return math.sqrt(float(targets.double().var(0, correction=0).mean()))

    def after(self) -> nn.Module:
        """The module that turns an exported network's standardised outputs into the targets' own unit."""
        return Affine(self._std, self._mean)
