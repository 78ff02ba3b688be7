"""What workers report, as records: the one place where a trial's outcome is decided and passed on."""

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
"""So many failures, and nothing but failures, end a sweep: the next hundred would fail the same way."""
_BROKEN = 20
"""So many failures in a row end it where something has worked before: something has broken since."""
_RETRIES = 3
"""A trial may lose its worker (a spot machine, an out-of-memory kill) this often without a new epoch."""
_SETBACKS = 5
"""A worker lost so often without an epoch from any, and no result yet, ends a sweep too."""


@final
class Referee:
    """Turns what workers report into records; tells the search, the ledger (through it) and the listeners.

    Workers have names, and are told by the dispatcher what to run. Whoever runs them, Ray or this process,
    says here when one is there, what is new of its trials, and when it was lost.
    """

    def __init__(
        self,
        search: SweepSearch,
        dispatcher: Dispatcher,
        early_stopping: EarlyStopping,
        store: Store,
        listeners: Sequence[Listener],
    ) -> None:
        """`store` holds the stages' results."""
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
        """A worker is there, perhaps again after it was lost: it is given trials."""
        self._up.add(worker)
        self._fill(worker)

    def heard(self, worker: str, members: Sequence[News], *, leaves: bool = False) -> None:
        """News of a worker's trials: new epochs, perhaps the last ones. One that `leaves` gets no more."""
        self._dispatcher.rate(worker, fit=True)
        self._take(worker, members)
        if not leaves:
            self._fill(worker)

    def refused(self, worker: str, node: str, problems: Sequence[str]) -> None:
        """A worker is on a node that cannot run this sweep, such as one that has joined later: why."""
        self._dispatcher.rate(worker, fit=False)
        for problem in problems:
            self._warn(f"{node}: no trial is run on this node: {problem}")
        self._set_back(worker, "; ".join(problems), lost=self._dispatcher.give_back(worker))
        self._fill(worker)

    def lost(self, worker: str, error: str) -> None:
        """A worker's process was lost. Its trials go on elsewhere, or on the one that comes in its place."""
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
        """A worker does not come back: its trials have failed."""
        for record in self._dispatcher.on(worker):
            record.status, record.error = "failed", error
            self._end(worker, record)

    def check(self) -> None:
        """Raise WorkError when nothing has worked so far, or not any more, and it was tried a few times."""
        if self.is_hopeless:
            what = (
                f"the {'last' if self._results else 'first'} {self._failures} trials failed"
                if self._failures >= self._most_failures
                else f"{self._setbacks.total()} times a worker was lost before any trial had a result"
            )
            raise WorkError(f"{what}, the last one with:\n{self._errors[-1].strip()}")

    @property
    def is_hopeless(self) -> bool:
        """Whether `check` would raise."""
        # By worker: a node that goes takes many with it, which says nothing of the next one.
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
            if record is None:  # it was stopped
                continue
            is_stopped = self._take_epochs(record, news["epochs"])
            if "status" in news:
                record.take(news)
                self._end(worker, record)
            elif is_stopped:
                self._stop(record, news["epochs"][-1].key)
                self._end(worker, record)

    def _take_epochs(self, record: TrialRecord, epochs: list[Epoch]) -> bool:
        """New epochs into the record's curve; whether early stopping ends the trial."""
        # A trial whose worker was lost is replayed from the store: some epochs come twice.
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
        self._store.delete("checkpoints", key)  # nobody will go on from it

    def _fill(self, worker: str) -> None:
        """New trials for a worker that has room."""
        for record in self._dispatcher.fill(worker):
            if record.uid not in self._begun:  # not one that goes on after its worker was lost
                self._begun[record.uid] = time.monotonic()
                for listener in self._listeners:
                    listener.started(record)

    def _set_back(self, worker: str, error: str, lost: list[TrialRecord]) -> None:
        """A worker has given nothing: of no account while others run trials, unless it had some itself."""
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
