"""A worker as a Ray Tune trainable: it runs one or several trials of a sweep side by side.

Ray schedules workers, not trials: a worker keeps its imports and its data while it runs one trial after the
other. The driver says which trials it runs (`roster.py`), and their progress is kept in the store. So a lost
worker costs only the epochs that it was training.
"""

from __future__ import annotations

import time
from typing import Any, final

import ray
import torch
from ray import tune
from ray.tune.result import DONE

from prunetune import data as datasets
from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.engine.precision import prepare_process
from prunetune.execution.cluster import node_check
from prunetune.execution.crew import Crew
from prunetune.execution.roster import Roster
from prunetune.pipeline import Steps

_IDLE_SECONDS = 0.1
_LOOK_SECONDS = 0.5
_UNFIT_LOOKS = 20
"""How often, every `_LOOK_SECONDS`, a worker on an unfit node looks whether the sweep is over before it
examines the node again."""


@final
class Worker(tune.Trainable):  # type: ignore[misc]
    """Runs the trials that the roster assigns to it.

    Each result holds `members`, the `News` of each trial. A worker whose node cannot run this sweep runs no
    trial; its result holds the reasons, `unfit`, and the address of its `node`.
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
        """Prepare the worker's process, and examine its node.

        `sweep` is the sweep's configuration, with absolute paths; `steps` is the pipeline that a trial runs.
        `shipped` refers to `Dataset.arrays()` in Ray's object store, which Ray copies to each node once;
        without it the data are read from files. `expectation` is what a node must have (`node_check`).
        """
        prepare_process(threads)
        self._name = config["worker"]
        self._roster = roster
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._crew = Crew(sweep, steps, self._device)
        self._expectation = expectation
        self._unfit, self._told = self._examine(), False
        if shipped:
            datasets.provide(sweep.data, Dataset.from_arrays(ray.get(shipped[0])))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Give this process the name of another worker, so that Ray Tune can reuse it."""
        self.cleanup()
        self._name = new_config["worker"]
        return True

    def step(self) -> dict[str, Any]:
        """Take the assignments from the roster, and train the trials for one step (`Crew.step`)."""
        wanted = self._roster.assignments(self._name)
        if wanted is None:
            return {"members": [], DONE: True}
        if self._unfit:
            return self._stay_out()
        self._crew.take(wanted)
        if self._crew.is_idle:
            time.sleep(_IDLE_SECONDS)  # the next trial waits for a stage that another worker computes
            return {"members": []}
        members = self._crew.step()
        if self._device != "cpu" and self._crew.has_failed:
            self._check_device()
        return {"members": members}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: the trials' progress is kept in the store."""

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: the pipeline itself finds a trial's epochs in the store."""

    def cleanup(self) -> None:
        """Abandon the running trials; their finished epochs stay in the store."""
        self._crew.take([])

    def _examine(self) -> list[str]:
        """Return what keeps this node from running trials; it may have joined after the preflight check."""
        return (
            [] if self._expectation is None else [text for _, text in node_check.examine(self._expectation)]
        )

    def _stay_out(self) -> dict[str, Any]:
        """Report why the node is unfit; later calls wait, watch for the sweep's end, and examine it again."""
        told = {"members": [], "unfit": self._unfit, "node": ray.util.get_node_ip_address()}
        if self._told:
            for _ in range(_UNFIT_LOOKS):
                time.sleep(_LOOK_SECONDS)
                if self._roster.assignments(self._name) is None:
                    return told
            self._unfit = self._examine()
        self._told = True
        return told

    def _check_device(self) -> None:
        """Raise if a CUDA error has broken the process's context, so that Tune starts a new process."""
        torch.cuda.empty_cache()
        torch.zeros(1, device=self._device).item()
