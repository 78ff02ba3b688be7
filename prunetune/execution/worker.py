"""The pipeline as a Ray Tune trainable: a worker that runs one or several trials of a sweep side by side.

Ray schedules workers, not trials: a worker stays, with its imports and its data, while trials come and go on
it. Which ones, the driver says (`roster.py`); how far they are is in the store. So nothing is lost with a
worker but the epoch it was at.
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
"""So often, every `_LOOK_SECONDS`, one that cannot run trials looks for the end before it examines its node
again."""


@final
class Worker(tune.Trainable):  # type: ignore[misc]
    """Runs the trials that the roster has for it.

    A result holds `members`, the `News` of each trial. A worker whose node cannot run this sweep runs no
    trial and says why: `unfit`, with its `node`.
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
        self._roster = roster
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._crew = Crew(sweep, steps, self._device)
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
        """Go on as far as a crew's step (`crew.py`)."""
        wanted = self._roster.assignments(self._name)
        if wanted is None:
            return {"members": [], DONE: True}
        if self._unfit:
            return self._stay_out()
        self._crew.take(wanted)
        if self._crew.is_idle:
            time.sleep(_IDLE_SECONDS)  # a stage that the next trial needs is being computed elsewhere
            return {"members": []}
        members = self._crew.step()
        if self._device != "cpu" and self._crew.has_failed:
            self._check_device()
        return {"members": members}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: where each trial is, is in the store."""

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the pipeline finds its epochs in the store by itself."""

    def cleanup(self) -> None:
        """Let go of the trials."""
        self._crew.take([])

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
                time.sleep(_LOOK_SECONDS)
                if self._roster.assignments(self._name) is None:
                    return told
            self._unfit = self._examine()
        self._told = True
        return told

    def _check_device(self) -> None:
        """Raise where a CUDA error has ended the process' context: then Tune starts a new process."""
        torch.cuda.empty_cache()
        torch.zeros(1, device=self._device).item()
