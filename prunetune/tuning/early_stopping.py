"""Asynchronous successive halving within each density, on post-pruning validation accuracy only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from prunetune.schema import Config, EarlyStoppingConfig
from prunetune.tuning.driver_only import DriverOnly
from prunetune.tuning.ledger import TrialRecord


class PerDensityAsha(DriverOnly, FIFOScheduler):  # type: ignore[misc]
    """One of Ray's ASHA schedulers per density, fed with post-pruning results alone.

    A single ASHA would rank a trial at density 0.001 against one at 0.1, and a pre-pruning accuracy
    against one after pruning.
    """

    def __init__(self, config: Config, past: list[TrialRecord], longest: int) -> None:
        """`past` are trials whose curves fill the rungs; `longest` is the most post-pruning epochs."""
        super().__init__()
        self._by_density = {
            density: _asha(config.search.early_stopping, longest) for density in config.densities
        }
        for record in past:
            self._remember(record)

    def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
        """Nothing to set: the metric is fixed."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter a trial into its density's bracket."""
        asha = self._of(trial)
        if asha is not None:
            asha.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop or go on, after a post-pruning epoch."""
        asha = self._of(trial)
        if asha is None or "post_epoch" not in result or result.get("done"):
            return str(TrialScheduler.CONTINUE)
        decision = str(asha.on_trial_result(tune_controller, trial, result))
        # A rung at the very end compares, but there is nothing left to save.
        return str(TrialScheduler.CONTINUE) if result.get("last") else decision

    def _of(self, trial: Any) -> AsyncHyperBandScheduler | None:
        return self._by_density[trial.config["density"]]

    def _remember(self, record: TrialRecord) -> None:
        asha = self._by_density.get(record.density)
        if asha is None:
            return
        trial = SimpleNamespace(trial_id=record.uid)
        asha.on_trial_add(None, trial)
        for metrics in record.curve:
            if "post_epoch" in metrics:
                asha.on_trial_result(None, trial, metrics)


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
