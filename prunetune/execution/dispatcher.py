"""Decides, in the driver, which trials each worker runs."""

from __future__ import annotations

import math
from typing import final

from prunetune.execution.assignment import Assignment, Board
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch


@final
class Dispatcher:
    """Assigns trials to workers only when they are free, so that a proposal can use all results so far."""

    def __init__(self, search: SweepSearch, board: Board, *, per_worker: int, most: int | None) -> None:
        """A worker runs up to `per_worker` trials side by side, all workers together at most `most`."""
        self._search = search
        self._board = board
        self._per_worker = per_worker
        self._most = most
        self._by_worker: dict[str, dict[str, TrialRecord]] = {}
        self._unfit: set[str] = set()

    def record(self, worker: str, uid: str) -> TrialRecord | None:
        """Return the trial's record if it is assigned to the worker, else None."""
        return self._by_worker.get(worker, {}).get(uid)

    def on(self, worker: str) -> list[TrialRecord]:
        """Return the trials that are assigned to the worker."""
        return list(self._by_worker.get(worker, {}).values())

    def remove(self, worker: str, record: TrialRecord) -> None:
        """Remove a trial that has ended, or is to be stopped, from its worker."""
        self._by_worker[worker].pop(record.uid)

    def give_back(self, worker: str) -> list[TrialRecord]:
        """Give the trials of a worker that was lost or cannot run them back to the search; return them."""
        records = self.on(worker)
        for record in records:
            self.remove(worker, record)
            self._search.give_back(record)
        self._board.write(worker, [])
        return records

    def rate(self, worker: str, *, fit: bool) -> None:
        """Note whether the worker's node can run trials; an unfit worker is given none."""
        if fit:
            self._unfit.discard(worker)
        else:
            self._unfit.add(worker)

    def fill(self, worker: str) -> list[TrialRecord]:
        """Assign new trials until the worker is full, and publish its assignments; return the new trials."""
        running = self._by_worker.setdefault(worker, {})
        started: list[TrialRecord] = []
        if worker in self._unfit:
            # Keep the unfit worker alive while there is work, so that Ray does not start another on its node.
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
        """How many workers the running and the remaining trials could keep busy, plus the unfit workers."""
        trials = self.running + len(self._search)
        return math.ceil(min(trials, self._most or trials) / self._per_worker) + len(self._unfit)

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended, so that no worker, running or waiting for a slot, is needed."""
        return not self.running and not len(self._search)

    @property
    def running(self) -> int:
        """How many trials are assigned to workers."""
        return sum(len(running) for running in self._by_worker.values())
