"""Which trials end early: what compares badly or cannot catch up, within a density, after pruning.

One rule for all densities would rank a trial at density 0.001 against one at 0.1, and a pre-pruning accuracy
against one after pruning.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, final

import numpy as np

from prunetune.config.schema import Config, EarlyStoppingConfig
from prunetune.records.ledger import TrialRecord, is_at_density
from prunetune.search.asha import Rungs

Accuracies = list[float]
"""Validation accuracy by post-pruning epoch, from 1."""

_COMPLETE = 4
"""So many trials must be complete before others are held against what they gained."""


@final
class EarlyStopping:
    """Rungs of successive halving, and a record of complete trials per density."""

    def __init__(self, config: Config, past: list[TrialRecord], longest: int) -> None:
        """`past` are trials that ended before; `longest` is the most post-pruning epochs."""
        settings = config.search.early_stopping
        self._rules = (
            {density: _Rules(settings, longest) for density in config.densities}
            if settings is not None and longest > settings.grace_epochs
            else {}
        )
        for record in past:
            if record.density in self._rules:
                self._rules[record.density].take_past(record)

    def stops(self, record: TrialRecord, report: dict[str, Any]) -> bool:
        """Whether a trial is to end after this epoch of it. Each epoch may be told once, in their order."""
        if record.density not in self._rules or not is_at_density(report, record.density):
            return False
        is_stopped = self._rules[record.density].stops(record, report)
        # After the very last epoch there is nothing left to save.
        return is_stopped and not report.get("last")

    def ended(self, record: TrialRecord) -> None:
        """A trial has a result."""
        if record.density in self._rules:
            self._rules[record.density].ended(record)


class _Rules:
    """What is known at one density."""

    def __init__(self, settings: EarlyStoppingConfig, longest: int) -> None:
        self._settings = settings
        self._rungs = Rungs(grace=settings.grace_epochs, longest=longest, factor=settings.reduction_factor)
        self._complete: dict[int, list[Accuracies]] = defaultdict(list)  # by the epochs asked for

    def stops(self, record: TrialRecord, report: dict[str, Any]) -> bool:
        # Both are asked: ASHA's rungs want every trial that came to them.
        is_behind = self._rungs.is_behind(record.uid, report["post_epoch"], report["val_accuracy"])
        epoch, share = report["post_epoch"], self._settings.catch_up
        if is_behind or share is None or epoch < self._settings.grace_epochs:
            return is_behind
        return not can_catch_up(report["val_accuracy"], epoch, self._complete[_length(record)], share)

    def ended(self, record: TrialRecord) -> None:
        # One that collapsed gained nothing: by its like, slow starters would have no hope.
        if record.status == "complete":
            post = [report["val_accuracy"] for report in record.curve if "post_epoch" in report]
            self._complete[_length(record)].append(post)

    def take_past(self, record: TrialRecord) -> None:
        for report in record.curve:
            if is_at_density(report, record.density):
                self._rungs.is_behind(record.uid, report["post_epoch"], report["val_accuracy"])
        self.ended(record)


def can_catch_up(accuracy: float, epoch: int, complete: list[Accuracies], share: float) -> bool:
    """Whether a trial with this accuracy after this post-pruning epoch may still come to the best one.

    It is granted what the `share`-quantile of the complete trials, which are as long as it, gained from that
    epoch to their end. With less than four of them nothing is said against it.

    >>> complete = [[0.5, 0.9], [0.6, 0.9], [0.7, 0.95], [0.8, 0.9]]    # gains 0.4, 0.3, 0.25, 0.1
    >>> can_catch_up(0.56, 1, complete, 1.0), can_catch_up(0.54, 1, complete, 1.0)
    (True, False)
    """
    if len(complete) < _COMPLETE:
        return True
    gains = [curve[-1] - curve[epoch - 1] for curve in complete]
    best = max(curve[-1] for curve in complete)
    return bool(accuracy + np.quantile(gains, share) >= best)


def _length(record: TrialRecord) -> int:
    """For how many post-pruning epochs a trial is to train: only such are held against each other."""
    return int(record.tree["post_pruning"]["epochs"])
