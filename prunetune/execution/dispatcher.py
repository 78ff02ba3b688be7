"""Which trials each worker runs: decided here, by the driver."""

from __future__ import annotations

import math
from typing import final

from prunetune.execution.assignment import Assignment, Board
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch


@final
class Dispatcher:
    """Assigns trials to workers as they become free: as late as possible, so that all results count."""

    def __init__(self, search: SweepSearch, board: Board, *, per_worker: int, most: int | None) -> None:
        """`per_worker` trials run side by side on a worker, at most `most` in all."""
        self._search = search
        self._board = board
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
        self._board.write(worker, [])
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
            self._board.write(worker, [] if len(self._search) else None)
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
        self._board.write(worker, assignments if is_needed else None)
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
