"""A Ray actor that holds each worker's assignments: the driver writes them, the workers read them.

The actor's process imports little more than this module, and not PyTorch, so that it starts within a second.
"""

from __future__ import annotations

from typing import Any, final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunetune.execution.assignment import Assignment


class _Board:
    """The actor's class: it maps each worker to its assignments, or to None when no work is left for it."""

    def __init__(self) -> None:
        self._assignments: dict[str, list[Assignment] | None] = {}

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        self._assignments[worker] = assignments

    def read(self, worker: str) -> list[Assignment] | None:
        return self._assignments.get(worker, [])


@final
class Roster:
    """A handle to the assignments of all workers; they outlive a worker's process."""

    def __init__(self, board: Any) -> None:
        self._board = board

    @classmethod
    def start(cls) -> Roster:
        """Start the actor, in a process of its own that takes no CPU from the trials.

        It runs on the driver's node, because any other node may leave the cluster during the sweep.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote())

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        """Replace the worker's assignments; None tells the worker that no work is left for it."""
        ray.get(self._board.write.remote(worker, assignments))

    def assignments(self, worker: str) -> list[Assignment] | None:
        """Return the trials that the worker should be running; None if the worker is no longer needed."""
        assigned: list[Assignment] | None = ray.get(self._board.read.remote(worker))
        return assigned
