"""The MLflow tracker: it writes a parent run for the sweep and a nested run per trial.

Everything logged is derived from the ledger. A thread of its own writes it from a queue, so that a slow or
unavailable tracking server does not delay the sweep; failed writes are retried until the sweep ends.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from prunetune.config import document
from prunetune.engine.epoch import Epoch
from prunetune.records.trial import TrialRecord
from prunetune.tasks import ACCURACY
from prunetune.trackers.mlflow import experiments
from prunetune.trackers.mlflow.artifacts import Artifacts

logger = logging.getLogger(__name__)

_SWEEP_TAG = "prunetune.sweep"
_TRIAL_TAG = "prunetune.trial"
_PARENT_TAG = "mlflow.parentRunId"
_METRICS_PER_BATCH = 900  # MLflow accepts at most 1000 at once


class Tracker:
    """Writes a sweep to MLflow. `run_ids` maps the uids of trials to the ids of their runs."""

    def __init__(
        self, where: experiments.Place, sweep_id: str, name: str, attempts_at_end: float = 20.0
    ) -> None:
        """`attempts_at_end` is how many seconds `close` keeps trying to reach an unavailable server."""
        experiments.prepare_client()
        self.run_ids: dict[str, str] = {}
        self.place = where
        self._sweep_id = sweep_id
        self._name = name
        self._patience = attempts_at_end
        self._described: set[str] = set()  # uids whose run has its parameters
        self._closed: set[str] = set()  # uids whose run was found finished or failed
        self._logged: dict[str, int] = {}  # uid -> the last epoch written
        self._stage: dict[str, str] = {}
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._closing = threading.Event()
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._parent = ""
        self._metric = ACCURACY.name
        self._unwritten = 0
        self._artifacts = Artifacts(where.uri)
        self._closed_at = math.inf
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def title(self) -> str:
        """The tracker's name in messages."""
        return f"MLflow at {self.place.uri}"

    @property
    def look(self) -> str:
        """A line that says how to view the runs: the server's address, or the command for a database."""
        at_server = self.place.uri.startswith(("http://", "https://"))
        return f"MLflow: {self.place.uri}" if at_server else f"mlflow ui --backend-store-uri {self.place.uri}"

    def begin(self, file: dict[str, Any], records: Sequence[TrialRecord]) -> None:
        """Open the parent run with the sweep's file as given, and update the trials' runs from the records.

        A finished trial without a run gets one. A run that a dead driver left RUNNING is closed, and opened
        again when its trial resumes.
        """
        text = document.dump(file)
        self._metric = records[0].metric if records else ACCURACY.name  # without records there are no runs

        def begin() -> None:
            self._connect()
            assert self._client is not None
            self._find_runs()
            self._client.set_tag(self._parent, "status", "running")
            self._artifacts.attach(self._client, self._parent, text, "sweep.yaml")

        self._queue.put(begin)
        for record in records:
            if record.status != "running":
                self._queue.put(lambda record=record: self._rebuild(record))  # type: ignore[misc]

    def started(self, record: TrialRecord) -> None:
        """Open the trial's run, or make one."""
        self._queue.put(lambda: self._open(record))

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Log the epochs' metrics, with the number of the epoch over all stages as the step."""
        now = int(time.time() * 1000)
        self._queue.put(lambda: self._log(record, [replace(epoch, time=now) for epoch in epochs]))

    def ended(self, record: TrialRecord) -> None:
        """Log the trial's results and status, and close its run."""
        self._queue.put(lambda: self._close_run(record))

    def finish(self, status: str, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """Close the parent run as finished, failed or interrupted; mark runs that are still open as KILLED.

        `summary` is logged as metrics, `files` as artifacts.
        """

        def finish() -> None:
            assert self._client is not None
            for uid in self._stage:
                self._client.set_terminated(self.run_ids[uid], "KILLED")
            for name, value in summary.items():
                self._client.log_metric(self._parent, name, value)
            for name, text in files.items():
                self._artifacts.attach(self._client, self._parent, text, name)
            self._artifacts.all_given(self._parent)
            self._client.set_tag(self._parent, "status", status)
            ended = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[status]
            self._client.set_terminated(self._parent, ended)

        self._queue.put(finish)

    def close(self) -> int:
        """Write all pending entries; return how many could not be written."""
        self._closed_at = time.monotonic()
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        return self._unwritten

    def _work(self) -> None:
        gave_up = False
        while (entry := self._queue.get()) is not None:
            if gave_up:
                self._unwritten += 1
                continue
            pause, since = 0.5, time.monotonic()
            while True:
                try:
                    entry()
                    break
                except Exception as error:  # an MLflow error must not stop the sweep
                    if experiments.is_refusal(error):
                        if not self._parent:  # no parent run: every other entry would be refused too
                            logger.warning("MLflow at %s refuses this sweep: %s", self.place.uri, error)
                            gave_up = True
                        else:
                            logger.warning("MLflow refused an entry: %s", error)
                        self._unwritten += 1
                        break
                    if time.monotonic() - max(since, self._closed_at) > self._patience:
                        logger.warning("MLflow at %s cannot be written: %s", self.place.uri, error)
                        gave_up = True
                        self._unwritten += 1
                        break
                    self._closing.wait(pause) if not self._closing.is_set() else time.sleep(pause)
                    pause = min(2 * pause, 30.0 if not self._closing.is_set() else 5.0)
        if self._client is not None and not gave_up:
            self._unwritten += self._artifacts.close(self._client, self._patience)

    def _connect(self) -> None:
        self._client = MlflowClient(self.place.uri)
        self._experiment_id = experiments.experiment_id(self._client, self.place)

    def _find_runs(self) -> None:
        """Find the sweep's parent run and its trials' runs by tag; make the parent run if it is missing."""
        assert self._client is not None
        found = self._search(f"tags.`{_SWEEP_TAG}` = '{self._sweep_id}'")
        parents = [run for run in found if _TRIAL_TAG not in run.data.tags]
        if parents:
            self._parent = parents[0].info.run_id
            self._client.update_run(self._parent, status="RUNNING")
        else:
            self._parent = self._client.create_run(
                self._experiment_id, run_name=self._name, tags={_SWEEP_TAG: self._sweep_id}
            ).info.run_id
        for run in found:
            self._artifacts.found(run)
            uid = run.data.tags.get(_TRIAL_TAG)
            if uid is None:
                continue
            self.run_ids[uid] = run.info.run_id
            self._logged[uid] = self._epochs_of(run)
            if run.info.status in ("FINISHED", "FAILED"):
                self._closed.add(uid)
            elif run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _epochs_of(self, run: Any) -> int:
        """The last epoch that a run has logged; its history is fetched only if the run was not closed."""
        assert self._client is not None
        counts = [run.data.metrics.get(name) for name in ("epochs_run", "epochs_reused")]
        if run.info.status == "FINISHED" and None not in counts:
            return int(sum(counts))
        history = self._client.get_metric_history(run.info.run_id, f"val_{self._metric}")
        return max((metric.step for metric in history), default=0)

    def _search(self, condition: str) -> list[Any]:
        assert self._client is not None
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs([self._experiment_id], condition, page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                return found

    def _rebuild(self, record: TrialRecord) -> None:
        """Write whatever MLflow lacks of a trial that has ended."""
        last = max((epoch.epoch for epoch in record.curve), default=0)
        if record.uid in self._closed and self._logged[record.uid] >= last:
            if self._artifacts.is_lacking(self.run_ids[record.uid]):
                self._attach_config(record)
                self._attach_error(record)
            return
        self._open(record)
        self._log(record, record.curve)
        self._close_run(record)

    def _open(self, record: TrialRecord) -> None:
        assert self._client is not None
        if record.uid in self.run_ids:
            self._client.update_run(self.run_ids[record.uid], status="RUNNING")
            self._client.set_tag(self.run_ids[record.uid], "status", "running")
        else:
            self.run_ids[record.uid] = self._client.create_run(
                self._experiment_id,
                run_name=f"d={record.density:g} #{record.number}",
                tags={
                    _SWEEP_TAG: self._sweep_id,
                    _TRIAL_TAG: record.uid,
                    _PARENT_TAG: self._parent,
                    "density": f"{record.density:g}",
                    "sparsity": f"{1 - record.density:g}",
                    "trial": str(record.number),
                    "config_hash": record.config_hash,
                    "branched": str(record.branched).lower(),
                    "status": "running",
                },
            ).info.run_id
        run_id = self.run_ids[record.uid]
        if record.uid not in self._described:
            parameters = {"density": record.density, **experiments.hyperparameters(record.tree)}
            self._client.log_batch(run_id, params=[Param(k, str(v)) for k, v in parameters.items()])
            self._attach_config(record)
            self._described.add(record.uid)
        self._stage[record.uid] = ""

    def _log(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        assert self._client is not None
        run_id, last = self.run_ids[record.uid], self._logged.get(record.uid, 0)
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), epoch.time or now, epoch.epoch)
            for epoch in epochs
            if epoch.epoch > last  # earlier ones were logged already, perhaps by an earlier driver
            for name, value in epoch.metrics.items()
        ]
        stage = epochs[-1].stage if epochs else ""
        tags = [RunTag("stage", stage)] if stage != self._stage.get(record.uid, "") else []
        for start in range(0, len(metrics) or len(tags), _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_BATCH], tags=tags)
        if epochs:
            self._logged[record.uid] = max(last, *(epoch.epoch for epoch in epochs))
            self._stage[record.uid] = stage

    def _close_run(self, record: TrialRecord) -> None:
        assert self._client is not None
        now, run_id = int(time.time() * 1000), self.run_ids[record.uid]
        last = max((epoch.epoch for epoch in record.curve), default=0)
        results = {
            f"final_val_{record.metric}": record.val,
            f"test_{record.metric}": record.test,
            "nonzero": record.nonzero,
            "effective_density": record.effective_density,
            "epochs_run": record.epochs_run,
            "epochs_reused": record.epochs_reused,
            "seconds": record.seconds,
        }
        self._client.log_batch(
            run_id,
            metrics=[Metric(k, float(v), now, last) for k, v in results.items() if v is not None],
            tags=[RunTag("status", record.status)],
        )
        self._attach_error(record)
        self._client.set_terminated(run_id, "FAILED" if record.status == "failed" else "FINISHED")
        self._stage.pop(record.uid, None)

    def _attach_config(self, record: TrialRecord) -> None:
        assert self._client is not None
        text = document.dump({**record.tree, "densities": [record.density]})
        self._artifacts.attach(self._client, self.run_ids[record.uid], text, "config.yaml")

    def _attach_error(self, record: TrialRecord) -> None:
        """Attach a failed trial's traceback, and note that all files of the run have been attached."""
        assert self._client is not None
        run_id = self.run_ids[record.uid]
        if record.error:
            self._artifacts.attach(self._client, run_id, record.error, "error.txt")
        self._artifacts.all_given(run_id)
