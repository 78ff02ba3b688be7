"""A task of one's own, as a user would write it: judged by the mean accuracy over the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.tasks import Classification, Metric


class Balanced(Classification):
    """`temper`, an option, divides the logits in the loss."""

    metric = Metric("balanced_accuracy", "balanced accuracy", percent=True)

    def __init__(self, form, *, temper: float = 1.0):
        super().__init__(form)
        self.temper = temper

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        return super().loss(outputs / self.temper, targets, smoothing)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        classes = torch.arange(self.outputs, device=targets.device)
        is_class = targets[:, None] == classes
        is_right = is_class & (outputs.argmax(1) == targets)[:, None]
        return torch.cat([is_right.sum(0), is_class.sum(0)]).double()

    def score(self, sums: Tensor) -> float:
        right, all_of_class = sums.view(2, -1)
        is_there = all_of_class > 0
        return float((right[is_there] / all_of_class[is_there]).mean())

    def chance(self, targets: Tensor) -> float:
        return 1 / len(targets.unique())
