"""Run several trials side by side in this process: the body of every worker, with Ray or without."""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator
from typing import Any, TypedDict, final

from prunetune import vectorized
from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork
from prunetune.errors import WorkError
from prunetune.execution.assignment import Assignment
from prunetune.pipeline import PipelineResult, Steps
from prunetune.records.ledger import record_name
from prunetune.records.trial import TrialRecord, trial_config
from prunetune.stages.stage import Step
from prunetune.store import Store

_BATCH_SECONDS = 0.5


class News(TypedDict, total=False):
    """What the trial with this `uid` has done since the last `News` of it: its new `epochs`.

    For a trial that has ended it also holds `status` and the metrics of the pipeline's result; for one that
    raised an exception, the status `failed` and the traceback as `error`.
    """

    uid: str
    epochs: list[Epoch]
    status: str
    error: str


@final
class Crew:
    """Runs the trials assigned to it, one step at a time; their progress is kept in the store."""

    def __init__(self, sweep: Config, steps: Steps, device: str) -> None:
        """`sweep` is the sweep's configuration with absolute paths; a trial runs the pipeline `steps`."""
        self._sweep = sweep
        self._steps = steps
        self._device = device
        self._store = Store(sweep.storage)
        self._running: dict[str, _Running] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no trial is running here."""
        return not self._running

    @property
    def has_failed(self) -> bool:
        """Whether one of the running trials has raised an exception."""
        return any(trial.failed for trial in self._running.values())

    def take(self, wanted: list[Assignment]) -> None:
        """Drop the running trials that `wanted` does not list, and start those that it lists anew.

        Raises WorkError where a trial's record is missing from the store, or belongs to another trial.
        """
        uids = {assignment["uid"] for assignment in wanted}
        for uid in [uid for uid in self._running if uid not in uids]:
            self._running.pop(uid).close()
        for assignment in wanted:
            if assignment["uid"] not in self._running:
                self._running[assignment["uid"]] = _Running(assignment, self._begin(assignment))

    def step(self) -> list[News]:
        """Train every trial for one post-pruning epoch, or for the pre-pruning epochs of half a second.

        The driver hears of every post-pruning epoch before the next one starts, so that early stopping's
        decisions do not depend on timing.
        """
        begun = time.monotonic()
        while time.monotonic() - begun < _BATCH_SECONDS:
            trials = self._running.values()
            for trial in trials:
                if trial.work is None:  # a trial whose next epoch is ready waits for the others
                    trial.advance()
            if any(trial.has_news for trial in trials):
                break
            vectorized.run_together([trial.work for trial in trials if trial.work])
            for trial in trials:
                trial.work = None  # trained together above, or trained alone when `advance` resumes it
        return [trial.news() for trial in self._running.values()]

    def _begin(self, assignment: Assignment) -> Generator[Step, None, PipelineResult]:
        name = record_name(assignment["density"], assignment["number"])
        body = self._store.sub(self._sweep.name).read_record(name)
        if body is None:
            raise WorkError(f"{name}: the trial's record is not in the store")
        if body["uid"] != assignment["uid"]:
            raise WorkError(f"{name}: is another trial's record; does another process run this sweep, too?")
        return self._steps(
            trial_config(TrialRecord.read(body), self._sweep),
            store=self._store.sub("store"),
            device=self._device,
            owner=assignment["uid"],
            also=self._sweep.densities,
        )


@final
class _Running:
    """One running trial: its generator of steps, and the epochs and the outcome not yet reported."""

    def __init__(self, assignment: Assignment, steps: Generator[Step, None, PipelineResult]) -> None:
        self._uid = assignment["uid"]
        self._steps = steps
        self._epochs: list[Epoch] = []
        self._end: dict[str, Any] = {}
        self.work: EpochWork | None = None

    @property
    def has_news(self) -> bool:
        """Whether the driver must hear now: the trial has ended, or has finished a post-pruning epoch."""
        return bool(self._end) or any(epoch.post_epoch is not None for epoch in self._epochs)

    @property
    def failed(self) -> bool:
        """Whether the trial has raised an exception."""
        return self._end.get("status") == "failed"

    def advance(self) -> None:
        """Resume the trial until an epoch must be trained, an epoch has been trained, or the trial ends."""
        is_waiting = False
        while not self._end and not is_waiting:
            try:
                step = next(self._steps)
            except StopIteration as end:
                metrics = end.value.metrics()
                for known in ("density", "epochs_run", "epochs_reused"):  # the driver has these already
                    del metrics[known]
                self._end = metrics
            except Exception:
                self._end = {"status": "failed", "error": traceback.format_exc()}
            else:
                if isinstance(step, EpochWork):
                    self.work, is_waiting = step, True
                else:
                    self._epochs.append(step)
                    is_waiting = not step.reused

    def news(self) -> News:
        """Return what happened since the last call."""
        epochs, self._epochs = self._epochs, []
        return {"uid": self._uid, "epochs": epochs, **self._end}  # type: ignore[typeddict-item]

    def close(self) -> None:
        """Abandon the trial; its finished epochs stay in the store."""
        self._steps.close()
