"""Turns workers' reports into trial records: the one place where a trial's outcome is decided."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import final

from prunetune.engine.epoch import Epoch
from prunetune.errors import WorkError
from prunetune.execution.crew import News
from prunetune.execution.dispatcher import Dispatcher
from prunetune.records.trial import TrialRecord
from prunetune.search.early_stopping import EarlyStopping
from prunetune.search.queue import SweepSearch
from prunetune.store import Store
from prunetune.trackers.tracker import Listener

logger = logging.getLogger(__name__)

_HOPELESS = 3
"""End the sweep after this many failed trials if no trial has ever succeeded: others would fail alike."""
_BROKEN = 20
"""End the sweep after this many failed trials in a row if one has succeeded before: something broke since."""
_RETRIES = 3
"""How often a trial may lose its worker (a spot machine, an out-of-memory kill) without a new epoch."""
_SETBACKS = 5
"""End the sweep if one worker was lost this often before any trial had a result, without a new epoch."""


@final
class Referee:
    """Turns workers' reports into trial records, and tells the search and the listeners.

    The search writes the records to the ledger. Workers have names, and the dispatcher tells them what to
    run. The executor (Ray Tune or this process) calls a method here when a worker starts, reports or is lost.
    """

    def __init__(
        self,
        search: SweepSearch,
        dispatcher: Dispatcher,
        early_stopping: EarlyStopping,
        store: Store,
        listeners: Sequence[Listener],
    ) -> None:
        """`store` is the part of the store that holds the stages' results."""
        self._search = search
        self._dispatcher = dispatcher
        self._early_stopping = early_stopping
        self._store = store
        self._listeners = listeners
        self._begun: dict[str, float] = {}
        self._up: set[str] = set()  # the workers that have started and were not lost
        self._told: set[str] = set()
        self._losses: Counter[str] = Counter()
        self._setbacks: Counter[str] = Counter()
        self._failures = 0
        self._errors: list[str] = []
        self._has_past = bool(search.past)
        self._results = 0

    def arrived(self, worker: str) -> None:
        """Give trials to a worker that has started, for the first time or after it was lost."""
        self._up.add(worker)
        self._fill(worker)

    def heard(self, worker: str, members: Sequence[News], *, leaves: bool = False) -> None:
        """Record the news of a worker's trials and assign new trials to it, unless the worker `leaves`."""
        self._dispatcher.rate(worker, fit=True)
        self._take(worker, members)
        if not leaves:
            self._fill(worker)

    def refused(self, worker: str, node: str, problems: Sequence[str]) -> None:
        """Take the trials from a worker whose node cannot run this sweep; `problems` are the reasons."""
        self._dispatcher.rate(worker, fit=False)
        for problem in problems:
            self._warn(f"{node}: no trial is run on this node: {problem}")
        self._set_back(worker, "; ".join(problems), lost=self._dispatcher.give_back(worker))
        self._fill(worker)

    def lost(self, worker: str, error: str) -> None:
        """Return a lost worker's trials to the search; a trial that has lost too many workers has failed."""
        if worker not in self._up:
            self._warn(f"a worker could not start, and is tried again: {_last_line(error)}")
        self._up.discard(worker)
        for record in self._dispatcher.on(worker):
            self._losses[record.uid] += 1
            if self._losses[record.uid] > _RETRIES:
                record.status, record.error = "failed", error
                self._end(worker, record)
        self._set_back(worker, error, lost=self._dispatcher.give_back(worker))

    def given_up(self, worker: str, error: str) -> None:
        """Record the trials of a worker that will not be restarted as failed."""
        for record in self._dispatcher.on(worker):
            record.status, record.error = "failed", error
            self._end(worker, record)

    def check(self) -> None:
        """Raise WorkError if the sweep is hopeless (`is_hopeless`), with the last error."""
        if self.is_hopeless:
            what = (
                f"the {'last' if self._results else 'first'} {self._failures} trials failed"
                if self._failures >= self._most_failures
                else f"{self._setbacks.total()} times a worker was lost before any trial had a result"
            )
            raise WorkError(f"{what}, the last one with:\n{self._errors[-1].strip()}")

    @property
    def is_hopeless(self) -> bool:
        """Whether so many trials have failed, or workers been lost, that going on makes no sense."""
        # Count per worker: one lost node can kill many workers at once.
        lost_for_nothing = max(self._setbacks.values(), default=0) >= _SETBACKS and all(
            self._setbacks[worker] for worker in self._up
        )
        return self._failures >= self._most_failures or (self._results == 0 and lost_for_nothing)

    @property
    def _most_failures(self) -> int:
        return _BROKEN if self._results or self._has_past else _HOPELESS

    def _take(self, worker: str, members: Sequence[News]) -> None:
        for news in members:
            record = self._dispatcher.record(worker, news["uid"])
            if record is None:  # the trial was stopped in the meantime
                continue
            is_stopped = self._take_epochs(record, news["epochs"])
            if "status" in news:
                record.take(news)
                self._end(worker, record)
            elif is_stopped:
                self._stop(record, news["epochs"][-1].key)
                self._end(worker, record)

    def _take_epochs(self, record: TrialRecord, epochs: list[Epoch]) -> bool:
        """Add new epochs to the record's curve; return whether early stopping ends the trial."""
        # A trial whose worker was lost is replayed from the store, so some epochs are reported twice.
        seen = record.curve[-1].epoch if record.curve else 0
        fresh = [epoch for epoch in epochs if epoch.epoch > seen]
        if not fresh:
            return False
        self._setbacks.clear()
        self._losses.pop(record.uid, None)
        record.curve.extend(fresh)
        self._search.progressed(record)
        for listener in self._listeners:
            listener.epochs(record, record.curve[-len(fresh) :])
        return any(self._early_stopping.stops(record, epoch) for epoch in fresh)

    def _stop(self, record: TrialRecord, key: str) -> None:
        record.status = "stopped"
        record.val = record.curve[-1].metrics[f"val_{record.metric}"]
        self._store.delete("checkpoints", key)  # a stopped trial is never resumed

    def _fill(self, worker: str) -> None:
        """Assign new trials to a worker that has room, and tell the listeners of those that start."""
        for record in self._dispatcher.fill(worker):
            if record.uid not in self._begun:  # a trial that continues after a lost worker has begun before
                self._begun[record.uid] = time.monotonic()
                for listener in self._listeners:
                    listener.started(record)

    def _set_back(self, worker: str, error: str, lost: list[TrialRecord]) -> None:
        """Count a failure only if the worker held trials, or if nothing else is running."""
        if lost or not self._dispatcher.running:
            self._setbacks[worker] += 1
            self._errors.append(error)

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)

    def _end(self, worker: str, record: TrialRecord) -> None:
        self._dispatcher.remove(worker, record)
        record.count_epochs()
        record.seconds = time.monotonic() - self._begun.pop(record.uid)
        if record.status == "failed":
            self._failures += 1
            self._errors.append(record.error or "")
        else:
            self._results += 1
            self._failures = 0
        self._search.tell(record)
        self._early_stopping.ended(record)
        for listener in self._listeners:
            listener.ended(record)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()
