"""Which trials each worker runs: decided by the driver, read by the workers."""

from __future__ import annotations

import math
from typing import Any, TypedDict, final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prunetune.tuning.driver_only import DriverOnly
from prunetune.tuning.ledger import TrialRecord
from prunetune.tuning.search import SweepSearch


class Assignment(TypedDict):
    """What a worker must know of a trial; the rest is in its record in the store."""

    uid: str
    density: float
    number: int


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


@final
class Dispatcher(DriverOnly):
    """Assigns trials to workers as they become free: as late as possible, so that all results count."""

    def __init__(self, search: SweepSearch, roster: Roster, *, per_worker: int, most: int | None) -> None:
        """`per_worker` trials run side by side on a worker, at most `most` in all."""
        self._search = search
        self._roster = roster
        self._per_worker = per_worker
        self._most = most
        self._by_worker: dict[str, dict[str, TrialRecord]] = {}
        self._unfit: set[str] = set()

    def record(self, worker: str, uid: str) -> TrialRecord | None:
        """The trial, if the worker is to run it."""
        return self._by_worker.get(worker, {}).get(uid)

    def on(self, worker: str) -> list[TrialRecord]:
        """The trials that a worker is to run."""
        return list(self._by_worker.get(worker, {}).values())

    def remove(self, worker: str, record: TrialRecord) -> None:
        """The trial has ended, or is to end."""
        self._by_worker[worker].pop(record.uid)

    def give_back(self, worker: str) -> list[TrialRecord]:
        """The trials of a worker that was lost, or cannot run them, go back to the search; which."""
        records = self.on(worker)
        for record in records:
            self.remove(worker, record)
            self._search.give_back(record)
        self._roster.write(worker, [])
        return records

    def rate(self, worker: str, *, fit: bool) -> None:
        """Whether a worker is on a node that can run trials; one that is not is given none."""
        if fit:
            self._unfit.discard(worker)
        else:
            self._unfit.add(worker)

    def fill(self, worker: str) -> list[TrialRecord]:
        """Assign as many new trials as there is room for, and publish; the new ones."""
        running = self._by_worker.setdefault(worker, {})
        started: list[TrialRecord] = []
        if worker in self._unfit:  # it holds a place where no other would fare better, while there is work
            self._roster.write(worker, [] if len(self._search) else None)
            return started
        while len(running) < self._per_worker and (self._most is None or self.running < self._most):
            record = self._search.next()
            if record is None:
                break
            running[record.uid] = record
            started.append(record)
        is_needed = running or self._search.waiting
        assignments: list[Assignment] = [
            {"uid": r.uid, "density": r.density, "number": r.number} for r in running.values()
        ]
        self._roster.write(worker, assignments if is_needed else None)
        return started

    def useful_workers(self) -> int:
        """How many workers the trials under way and those still to be started could keep busy."""
        trials = self.running + len(self._search)
        return math.ceil(min(trials, self._most or trials) / self._per_worker) + len(self._unfit)

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended: no worker is needed, such as those that wait for a place."""
        return not self.running and not len(self._search)

    @property
    def running(self) -> int:
        """How many trials are on workers."""
        return sum(len(running) for running in self._by_worker.values())
