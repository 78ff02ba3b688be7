"""Tells Ray Tune how many workers to run: as many as have trials to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from ray.tune.search import Searcher

from prunetune.execution.driver_only import DriverOnly
from prunetune.search.queue import SweepSearch


@final
class WorkerSearcher(DriverOnly, Searcher):  # type: ignore[misc]
    """Asks Ray Tune for workers while there is work for them; a `Dispatcher` assigns trials to workers."""

    def __init__(self, search: SweepSearch, useful: Callable[[], int]) -> None:
        """`useful()` returns how many workers could be busy now; Ray Tune is asked for no more than that."""
        super().__init__(metric="score", mode="max")
        self._search = search
        self._useful = useful
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return a new worker's configuration, None while there are enough workers, or FINISHED."""
        if not len(self._search):
            return Searcher.FINISHED
        if len(self._live) >= self._useful():
            return None
        self._live.add(trial_id)
        return {"worker": trial_id}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Note that a worker has ended; its trials may go on at other workers."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep is resumed from the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep is resumed from the ledger."""
