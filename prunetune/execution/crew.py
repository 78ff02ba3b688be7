"""Trials under way side by side, in this process: what a worker does, whoever runs the worker."""

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
    """What a trial has done since it was asked last: new `epochs`, of the trial with this `uid`.

    Of one that has ended also `status`, and what the pipeline found; or `failed`, and the `error`.
    """

    uid: str
    epochs: list[Epoch]
    status: str
    error: str


@final
class Crew:
    """Runs the trials that it is told to, as far as one step; where they are is in the store."""

    def __init__(self, sweep: Config, steps: Steps, device: str) -> None:
        """`sweep` says where everything is (absolute paths); `steps` is what a trial runs."""
        self._sweep = sweep
        self._steps = steps
        self._device = device
        self._store = Store(sweep.storage)
        self._running: dict[str, _Running] = {}

    @property
    def is_idle(self) -> bool:
        """Whether it has no trial."""
        return not self._running

    @property
    def has_failed(self) -> bool:
        """Whether one of its trials has raised."""
        return any(trial.failed for trial in self._running.values())

    def take(self, wanted: list[Assignment]) -> None:
        """Drop the trials that are not wanted any more, start those that are new.

        Raises WorkError where the record of one is not in the store, or is another trial's.
        """
        uids = {assignment["uid"] for assignment in wanted}
        for uid in [uid for uid in self._running if uid not in uids]:
            self._running.pop(uid).close()
        for assignment in wanted:
            if assignment["uid"] not in self._running:
                self._running[assignment["uid"]] = _Running(assignment, self._begin(assignment))

    def step(self) -> list[News]:
        """Go on by one post-pruning epoch of each trial, or by the pre-pruning epochs of half a second.

        Early stopping sees every post-pruning epoch, so what it decides does not depend on the time.
        """
        begun = time.monotonic()
        while time.monotonic() - begun < _BATCH_SECONDS:
            trials = self._running.values()
            for trial in trials:
                if trial.work is None:  # one that has an epoch to train waits for the others
                    trial.advance()
            if any(trial.has_news for trial in trials):
                break
            vectorized.run_together([trial.work for trial in trials if trial.work])
            for trial in trials:
                trial.work = None  # run, or about to be: alone, when it goes on
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
        )


@final
class _Running:
    """One trial under way: a generator of epochs and reports, and what of it is not reported yet."""

    def __init__(self, assignment: Assignment, steps: Generator[Step, None, PipelineResult]) -> None:
        self._uid = assignment["uid"]
        self._steps = steps
        self._epochs: list[Epoch] = []
        self._end: dict[str, Any] = {}
        self.work: EpochWork | None = None

    @property
    def has_news(self) -> bool:
        """Whether the driver should know at once: it has ended, or finished a post-pruning epoch."""
        return bool(self._end) or any(epoch.post_epoch is not None for epoch in self._epochs)

    @property
    def failed(self) -> bool:
        """Whether it has raised."""
        return self._end.get("status") == "failed"

    def advance(self) -> None:
        """Go on to the next epoch that is to be trained, past one that was, or to the end."""
        is_waiting = False
        while not self._end and not is_waiting:
            try:
                step = next(self._steps)
            except StopIteration as end:
                metrics = end.value.metrics()
                for known in ("density", "epochs_run", "epochs_reused"):  # to the driver
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
        """What happened since it was asked last."""
        epochs, self._epochs = self._epochs, []
        return {"uid": self._uid, "epochs": epochs, **self._end}  # type: ignore[typeddict-item]

    def close(self) -> None:
        """Leave it; what is finished of it is in the store."""
        self._steps.close()
