"""What Ray Tune reports, as records: the one place where a trial's outcome is decided and passed on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from ray.tune import Callback

from prunetune.errors import WorkError
from prunetune.store import Store
from prunetune.tuning.driver_only import DriverOnly
from prunetune.tuning.ledger import TrialRecord
from prunetune.tuning.search import SweepSearch

_HOPELESS = 3
"""So many failures, and nothing but failures, end a sweep: the next hundred would fail the same way."""


class Listener(Protocol):
    """Somebody who wants to know: MLflow, the live view, retention."""

    def started(self, record: TrialRecord) -> None:
        """A trial is running."""

    def epochs(self, record: TrialRecord, reports: list[dict[str, Any]]) -> None:
        """It has finished these epochs."""

    def ended(self, record: TrialRecord) -> None:
        """It has ended; its status says how."""


class Recorder(DriverOnly, Callback):  # type: ignore[misc]
    """Turns Tune's events into records, tells the search, the ledger (through it) and the listeners."""

    def __init__(
        self,
        search: SweepSearch,
        records: dict[str, TrialRecord],
        store: Store,
        listeners: list[Listener],
    ) -> None:
        """`records` maps Ray's trial ids to records; `store` holds the stages' results."""
        self._search = search
        self._records = records
        self._store = store
        self._listeners = listeners
        self._begun: dict[str, float] = {}
        self._ended: set[str] = set()
        self._failures = 0
        self._results = len(search.past)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a worker takes the trial, also again after one was lost."""
        record = self._records[trial.trial_id]
        if record.uid not in self._begun:
            self._begun[record.uid] = time.monotonic()
            for listener in self._listeners:
                listener.started(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """New epochs; perhaps the last ones."""
        record = self._records[trial.trial_id]
        reports = [_plain(report) for report in result["reports"]]
        # After a worker was lost the trial goes on from its last checkpoint: some epochs come twice.
        seen = record.curve[-1]["epoch"] if record.curve else 0
        reports = [report for report in reports if report["epoch"] > seen]
        record.curve.extend(reports)
        if reports:
            for listener in self._listeners:
                listener.epochs(record, reports)
        if result.get("status") == "failed":
            record.status, record.error = "failed", result["error"]
            self._end(record)
        elif "status" in result:
            for name in (
                "status",
                "val_accuracy",
                "test_accuracy",
                "nonzero",
                "effective_density",
                "cut_layers",
                "epochs_run",
                "epochs_reused",
            ):
                setattr(record, name, result[name])
            self._end(record)
        elif result.get("done"):
            record.status = "stopped"
            record.val_accuracy = result["val_accuracy"]
            record.epochs_reused = sum(report["reused"] for report in record.curve)
            record.epochs_run = len(record.curve) - record.epochs_reused
            self._store.delete("checkpoints", result["key"])  # nobody will go on from it
            self._end(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial lost its worker more often than is allowed."""
        record = self._records[trial.trial_id]
        record.status = "failed"
        record.error = _last_failure(trial.error_file)
        self._end(record)

    def check(self) -> None:
        """Raise WorkError when every trial so far has failed, and there were a few."""
        if self._results == 0 and self._failures >= _HOPELESS:
            errors = [r.error for r in self._records.values() if r.error]
            raise WorkError(
                f"the first {self._failures} trials failed, the last one with:\n{(errors[-1] or '').strip()}"
            )

    @property
    def hopeless(self) -> bool:
        """Whether `check` would raise."""
        return self._results == 0 and self._failures >= _HOPELESS

    def _end(self, record: TrialRecord) -> None:
        if record.uid in self._ended:  # Tune runs a trial again when its worker dies while saving
            return
        self._ended.add(record.uid)
        record.seconds = time.monotonic() - self._begun.get(record.uid, time.monotonic())
        if record.status == "failed":
            self._failures += 1
        else:
            self._results += 1
        self._search.tell(record)
        for listener in self._listeners:
            listener.ended(record)


def _last_failure(error_file: str | None) -> str:
    """The newest entry of a trial's error file, as Tune writes it on this machine."""
    try:
        text = Path(error_file or "").read_text()
    except OSError:
        return "the worker was lost"
    _, _, newest = text.rpartition("Failure # ")
    return newest.partition("\n")[2].strip() or "the worker was lost"


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in report.items()
        if key not in ("stage_epoch", "last", "checkpointed", "key")
    }
