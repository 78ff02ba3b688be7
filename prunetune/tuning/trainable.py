"""The pipeline as a Ray Tune trainable: one step is one epoch, a checkpoint is a reference into the store."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from prunetune import pipeline
from prunetune.errors import WorkError
from prunetune.pipeline import PipelineResult
from prunetune.schema import Config
from prunetune.store import Store
from prunetune.tuning.ledger import TrialRecord, record_name, trial_config

_REFERENCE = "reference.json"
_BATCH_SECONDS = 0.5


class PipelineTrainable(tune.Trainable):  # type: ignore[misc]
    """Runs trials, one after the other, in a worker process that keeps its imports and its data.

    `config` has the `uid`, `density` and `number` of a trial; what it is stands in its record in the
    store. A result holds `reports`, the epochs since the last result, and the newest epoch's values beside
    it; the last result has `status` and what the pipeline found, or `failed` and the `error`.
    """

    def setup(self, config: dict[str, Any], sweep: Config, threads: int) -> None:
        """Start the first trial of this process; `sweep` says where everything is."""
        torch.set_num_threads(threads)
        self._sweep = sweep
        self._seen, self._stage = 0, ""
        self._store = Store(sweep.storage)
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next trial in the same process."""
        self._steps.close()
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Go on by one post-pruning epoch, or by the pre-pruning epochs of half a second.

        Early stopping sees every post-pruning epoch, so what it decides does not depend on the time.
        """
        reports: list[dict[str, Any]] = []
        begun = time.monotonic()
        while True:
            try:
                report = next(self._steps)
            except StopIteration as end:
                return self._final(end.value, reports)
            except Exception:
                if not self._healthy():
                    raise  # Tune tries the trial again, in a new process
                return {
                    "status": "failed",
                    "error": traceback.format_exc(),
                    "epoch": self._seen,
                    "reports": reports,
                    DONE: True,
                }
            if report["epoch"] <= self._seen:
                continue  # reported before this trial moved to another worker
            self._seen = report["epoch"]
            reports.append(report)
            boundary = report["stage"] != self._stage
            self._stage = report["stage"]
            if report["checkpointed"] or boundary:
                return {**report, "reports": reports, SHOULD_CHECKPOINT: True}
            if report["stage"] == "post_pruning" or time.monotonic() - begun > _BATCH_SECONDS:
                return {**report, "reports": reports}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write where the trial is; its tensors are in the store already."""
        Path(checkpoint_dir, _REFERENCE).write_text(
            json.dumps({"uid": self._uid, "epoch": self._seen, "stage": self._stage})
        )

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from there: the pipeline finds its epochs in the store by itself."""
        reference = json.loads(Path(checkpoint_dir, _REFERENCE).read_text())
        self._seen, self._stage = reference["epoch"], reference["stage"]

    def cleanup(self) -> None:
        """Let go of the trial."""
        self._steps.close()

    def _start(self, config: dict[str, Any]) -> None:
        name = record_name(config["density"], config["number"])
        body = self._store.sub(self._sweep.name).read_record(name)
        if body is None:
            raise WorkError(f"{name}: the trial's record is not in the store")
        self._uid = config["uid"]
        self._seen = 0
        self._stage = ""
        self._steps: Generator[dict[str, Any], None, PipelineResult] = pipeline.run(
            trial_config(TrialRecord(**body), self._sweep),
            store=self._store.sub("store"),
            device=self._device,
            owner=self._uid,
        )

    def _healthy(self) -> bool:
        """Whether this process can go on after an exception; a CUDA error may have ended its context."""
        if self._device == "cpu":
            return True
        try:
            torch.cuda.empty_cache()
            torch.zeros(1, device=self._device).item()
        except RuntimeError:
            return False
        return True

    def _final(self, result: PipelineResult, reports: list[dict[str, Any]]) -> dict[str, Any]:
        metrics = result.metrics()
        del metrics["density"]  # asked for; in the trial's configuration
        return {**metrics, "epoch": self._seen, "reports": reports, DONE: True}
