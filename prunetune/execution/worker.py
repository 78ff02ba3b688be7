"""The pipeline as a Ray Tune trainable: a worker that runs one or several trials of a sweep side by side.

Ray schedules workers, not trials: a worker stays, with its imports and its data, while trials come and go on
it. Which ones, the driver says (`roster.py`); how far they are is in the store. So nothing is lost with a
worker but the epoch it was at.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator
from typing import Any, final

import ray
import torch
from ray import tune
from ray.tune.result import DONE

from prunetune import data as datasets
from prunetune import pipeline, vectorized
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork
from prunetune.engine.precision import prepare_process
from prunetune.errors import WorkError
from prunetune.execution.cluster import node_check
from prunetune.execution.roster import Assignment, Roster
from prunetune.pipeline import PipelineResult, Steps
from prunetune.records.ledger import TrialRecord, record_name, trial_config
from prunetune.stages.stage import Step
from prunetune.store import Store

_BATCH_SECONDS = 0.5
_IDLE_SECONDS = 0.1
_UNFIT_LOOKS = 20
"""So often a worker that cannot run trials looks for the end before it examines its node again."""


@final
class Worker(tune.Trainable):  # type: ignore[misc]
    """Runs the trials that the roster has for it.

    A result holds `members`, for each trial a mapping with its `uid` and `epochs`, those since the last
    result; of one that has ended also `status` and what the pipeline found, or `failed` and the `error`.
    A worker whose node cannot run this sweep runs no trial and says why: `unfit`, with its `node`.
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: Config,
        threads: int,
        roster: Roster,
        steps: Steps = pipeline.steps,
        shipped: list[Any] | None = None,
        expectation: dict[str, Any] | None = None,
    ) -> None:
        """`sweep` says where everything is; `steps` is what a trial runs.

        `shipped` refers to `Dataset.arrays()` in Ray's object store, which fetches them once per node;
        without it the data are read from files. `expectation` is what a node must have (`node_check`).
        """
        prepare_process(threads)
        self._name = config["worker"]
        self._sweep = sweep
        self._roster = roster
        self._steps = steps
        self._store = Store(sweep.storage)
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._running: dict[str, _Running] = {}
        self._expectation = expectation
        self._unfit, self._told = self._examine(), False
        if shipped:
            datasets.provide(sweep.data, Dataset.from_arrays(ray.get(shipped[0])))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same process is another worker from now on."""
        self.cleanup()
        self._name = new_config["worker"]
        return True

    def step(self) -> dict[str, Any]:
        """Go on by one post-pruning epoch of each trial, or by the pre-pruning epochs of half a second.

        Early stopping sees every post-pruning epoch, so what it decides does not depend on the time.
        """
        wanted = self._roster.assignments(self._name)
        if wanted is None:
            return {"members": [], DONE: True}
        if self._unfit:
            return self._stay_out()
        self._take(wanted)
        if not self._running:
            time.sleep(_IDLE_SECONDS)  # a stage that the next trial needs is being computed elsewhere
            return {"members": []}
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
        if self._device != "cpu" and any(trial.failed for trial in self._running.values()):
            self._check_device()
        return {"members": [trial.news() for trial in self._running.values()]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: where each trial is, is in the store."""

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the pipeline finds its epochs in the store by itself."""

    def cleanup(self) -> None:
        """Let go of the trials."""
        self._take([])

    def _take(self, wanted: list[Assignment]) -> None:
        """Drop the trials that are not wanted any more, start those that are new."""
        uids = {assignment["uid"] for assignment in wanted}
        for uid in [uid for uid in self._running if uid not in uids]:
            self._running.pop(uid).close()
        for assignment in wanted:
            if assignment["uid"] not in self._running:
                self._running[assignment["uid"]] = _Running(assignment, self._begin(assignment))

    def _examine(self) -> list[str]:
        """What keeps this node from running trials: it may have joined after all nodes were asked."""
        return (
            [] if self._expectation is None else [text for _, text in node_check.examine(self._expectation)]
        )

    def _stay_out(self) -> dict[str, Any]:
        """Say so; look again after a while, for a storage may come back, and for that the end may come."""
        told = {"members": [], "unfit": self._unfit, "node": ray.util.get_node_ip_address()}
        if self._told:
            for _ in range(_UNFIT_LOOKS):
                time.sleep(_BATCH_SECONDS)
                if self._roster.assignments(self._name) is None:
                    return told
            self._unfit = self._examine()
        self._told = True
        return told

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

    def _check_device(self) -> None:
        """Raise where a CUDA error has ended the process' context: then Tune starts a new process."""
        torch.cuda.empty_cache()
        torch.zeros(1, device=self._device).item()


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

    def news(self) -> dict[str, Any]:
        """What happened since it was asked last."""
        epochs, self._epochs = self._epochs, []
        return {"uid": self._uid, "epochs": epochs, **self._end}

    def close(self) -> None:
        """Leave it; what is finished of it is in the store."""
        self._steps.close()
