"""Ray Tune's events, as a referee wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from ray.tune import Callback
from ray.tune.result import DONE

from prunetune.execution.driver_only import DriverOnly
from prunetune.execution.referee import Referee


@final
class Recorder(DriverOnly, Callback):  # type: ignore[misc]
    """Passes on what happens to workers. To Ray Tune a worker is a trial: `trial` is one of Tune's."""

    def __init__(self, referee: Referee) -> None:
        self._referee = referee

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is there, perhaps again after it was lost."""
        self._referee.arrived(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """News of a worker's trials, or why it runs none."""
        if unfit := result.get("unfit"):
            self._referee.refused(trial.trial_id, result["node"], unfit)
        else:
            self._referee.heard(trial.trial_id, result["members"], leaves=bool(result.get(DONE)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker's process was lost; Tune starts another one for it."""
        self._referee.lost(trial.trial_id, _last_failure(trial.error_file))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is given up."""
        self._referee.given_up(trial.trial_id, _last_failure(trial.error_file))


def _last_failure(error_file: str | None) -> str:
    """The newest entry of a trial's error file, as Tune writes it on this machine."""
    try:
        text = Path(error_file or "").read_text()
    except OSError:
        return "the worker was lost"
    _, _, newest = text.rpartition("Failure # ")
    return newest.partition("\n")[2].strip() or "the worker was lost"
