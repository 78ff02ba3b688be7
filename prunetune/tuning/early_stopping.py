"""Asynchronous successive halving within each density, on post-pruning validation accuracy only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, final

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from prunetune.schema import Config, EarlyStoppingConfig
from prunetune.tuning.ledger import TrialRecord


@final
class PerDensityAsha:
    """One of Ray's ASHA schedulers per density, fed with post-pruning results alone.

    A single ASHA would rank a trial at density 0.001 against one at 0.1, and a pre-pruning accuracy
    against one after pruning.
    """

    def __init__(self, config: Config, past: list[TrialRecord], longest: int) -> None:
        """`past` are trials whose curves fill the rungs; `longest` is the most post-pruning epochs."""
        self._by_density = {
            density: _asha(config.search.early_stopping, longest) for density in config.densities
        }
        self._trials: dict[str, SimpleNamespace] = {}
        for record in past:
            for report in record.curve:
                self.stops(record, report)

    def stops(self, record: TrialRecord, report: dict[str, Any]) -> bool:
        """Whether a trial is to end after this epoch of it. Each epoch may be told once, in their order."""
        asha = self._by_density[record.density]
        if asha is None or "post_epoch" not in report:
            return False
        trial = self._trials.get(record.uid)
        if trial is None:
            trial = self._trials[record.uid] = SimpleNamespace(trial_id=record.uid)
            asha.on_trial_add(None, trial)
        decision = asha.on_trial_result(None, trial, report)
        # A rung at the very end compares, but there is nothing left to save.
        return bool(decision == TrialScheduler.STOP) and not report.get("last")


def _asha(config: EarlyStoppingConfig | None, longest: int) -> AsyncHyperBandScheduler | None:
    if config is None or longest <= config.grace_epochs:
        return None
    return AsyncHyperBandScheduler(
        time_attr="post_epoch",
        metric="val_accuracy",
        mode="max",
        max_t=longest,
        grace_period=config.grace_epochs,
        reduction_factor=config.reduction_factor,
        stop_last_trials=False,
    )
