"""What each worker is to run: written by the driver, read by the workers.

The actor between them imports little more than this module: without PyTorch it is there in a second.
"""

from __future__ import annotations

from typing import Any, final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunetune.execution.assignment import Assignment


class _Board:
    """The assignments by worker, in a Ray actor that driver and workers reach; None: nothing is left."""

    def __init__(self) -> None:
        self._assignments: dict[str, list[Assignment] | None] = {}

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        self._assignments[worker] = assignments

    def read(self, worker: str) -> list[Assignment] | None:
        return self._assignments.get(worker, [])


@final
class Roster:
    """A worker's view: what it should be running now. It stays valid when the worker's process is lost."""

    def __init__(self, board: Any) -> None:
        self._board = board

    @classmethod
    def start(cls) -> Roster:
        """A new one, in a process of its own that takes no CPU from the trials.

        On the driver's node: any other may leave the cluster while the sweep goes on.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote())

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        """Publish; the worker's next `assignments` are these."""
        ray.get(self._board.write.remote(worker, assignments))

    def assignments(self, worker: str) -> list[Assignment] | None:
        """What the worker should be running; None where it is not needed any more."""
        assigned: list[Assignment] | None = ray.get(self._board.read.remote(worker))
        return assigned
