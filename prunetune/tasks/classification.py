"""To name the class."""

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
    """Cross-entropy; judged by the share of right answers. Targets (N,), or (N, L) for a class at each place.

    Outputs are logits (B, classes) or (B, L, classes).
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
        """One per class."""
        return self._classes

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        """The cross-entropy; with label smoothing α against (1 − α) of the class and α of all alike."""
        logits, labels = outputs.flatten(0, -2), targets.flatten()
        if not isinstance(smoothing, Tensor):
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        log_p = F.log_softmax(logits, 1)
        loss = -log_p.gather(1, labels[:, None]).mean()
        return (1 - smoothing) * loss - smoothing * log_p.mean()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Right answers, and all."""
        right = (outputs.argmax(-1) == targets).sum().double()
        return torch.stack([right, torch.full_like(right, targets.numel())])

    def score(self, sums: Tensor) -> float:
        """The share of right answers."""
        right, count = sums.tolist()
        return float(right / count)

    def chance(self, targets: Tensor) -> float:
        """That of always naming the most frequent class."""
        return float(targets.flatten().bincount().max()) / targets.numel()

    def sample(self, targets: Tensor, order: Tensor, per_class: int) -> Tensor:
        """The same number of each class, fewer where there are not so many; by class.

        Of sequences, which are of no class: as many as of ten classes.
        """
        if targets.dim() > 1:
            return super().sample(targets, order, per_class)
        labels = targets[order]
        return torch.cat([order[labels == c][:per_class] for c in range(self._classes)])

    def after(self) -> nn.Module:
        """From logits to probabilities."""
        return nn.Softmax(-1)
