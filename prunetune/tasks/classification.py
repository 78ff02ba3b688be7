"""Classification: predict the class of each example."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.data import Form
from prunetune.errors import UserError
from prunetune.tasks.metric import ACCURACY, Metric
from prunetune.tasks.task import Task


class Classification(Task):
    """Predict a class: the loss is cross-entropy, the metric is accuracy.

    Targets are classes (N,), or (N, L) for a class at each position of a sequence. Outputs are logits
    (B, classes) or (B, L, classes).
    """

    metric: ClassVar[Metric] = ACCURACY
    gives_logits: ClassVar[bool] = True

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        if form.classes is None:
            raise UserError(
                "task = 'classification': the data's targets are numbers; take task: regression, "
                "or data with classes"
            )
        self._classes = form.classes

    @property
    def outputs(self) -> int:
        """The number of the network's outputs: one per class."""
        return self._classes

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        """The mean cross-entropy; label smoothing α spreads a share α of each label over all classes."""
        logits, labels = outputs.flatten(0, -2), targets.flatten()
        if not isinstance(smoothing, Tensor):
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        log_p = F.log_softmax(logits, 1)
        loss = -log_p.gather(1, labels[:, None]).mean()
        return (1 - smoothing) * loss - smoothing * log_p.mean()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (number of right answers, number of answers) of a batch."""
        right = (outputs.argmax(-1) == targets).sum().double()
        return torch.stack([right, torch.full_like(right, targets.numel())])

    def score(self, sums: Tensor) -> float:
        """The accuracy in [0, 1]: the share of right answers."""
        right, count = sums.tolist()
        return float(right / count)

    def chance(self, targets: Tensor) -> float:
        """The accuracy of always answering the most frequent class."""
        return float(targets.flatten().bincount().max()) / targets.numel()

    def sample(self, targets: Tensor, order: Tensor, per_class: int) -> Tensor:
        """Return the indices of `per_class` examples of each class, or fewer where a class has fewer.

        Sequences have no single class: for them it returns as many examples as for ten classes.
        """
        if targets.dim() > 1:
            return super().sample(targets, order, per_class)
        labels = targets[order]
        return torch.cat([order[labels == c][:per_class] for c in range(self._classes)])

    def after(self) -> nn.Module:
        """The module that turns the logits of an exported network into probabilities."""
        return nn.Softmax(-1)
