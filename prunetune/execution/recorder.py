"""Translates Ray Tune's events into calls of the referee."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from ray.tune import Callback
from ray.tune.result import DONE

from prunetune.execution.driver_only import DriverOnly
from prunetune.execution.referee import Referee


@final
class Recorder(DriverOnly, Callback):  # type: ignore[misc]
    """Tells the referee what happens to workers. Tune calls a worker a trial: `trial` is Tune's object."""

    def __init__(self, referee: Referee) -> None:
        self._referee = referee

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the referee that a worker has started, for the first time or after it was lost."""
        self._referee.arrived(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass on the news of a worker's trials, or the reasons why its node cannot run any."""
        if unfit := result.get("unfit"):
            self._referee.refused(trial.trial_id, result["node"], unfit)
        else:
            self._referee.heard(trial.trial_id, result["members"], leaves=bool(result.get(DONE)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the referee that a worker's process was lost; Tune starts another process for the worker."""
        self._referee.lost(trial.trial_id, _last_failure(trial.error_file))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the referee that Tune will not restart a worker."""
        self._referee.given_up(trial.trial_id, _last_failure(trial.error_file))


def _last_failure(error_file: str | None) -> str:
    """Return the newest entry of the error file that Tune keeps for a worker on this machine."""
    try:
        text = Path(error_file or "").read_text()
    except OSError:
        return "the worker was lost"
    _, _, newest = text.rpartition("Failure # ")
    return newest.partition("\n")[2].strip() or "the worker was lost"
