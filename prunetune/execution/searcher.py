"""How many workers Ray Tune is given: as many as have something to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from ray.tune.search import Searcher

from prunetune.execution.driver_only import DriverOnly
from prunetune.search.queue import SweepSearch


@final
class WorkerSearcher(DriverOnly, Searcher):  # type: ignore[misc]
    """Gives Ray Tune workers while there is work for them; what they run is dispatched elsewhere."""

    def __init__(self, search: SweepSearch, useful: Callable[[], int]) -> None:
        """`useful` says how many workers could be busy now; a cluster is asked for no more nodes."""
        super().__init__(metric="score", mode="max")
        self._search = search
        self._useful = useful
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """A worker's configuration, None where there are enough, or FINISHED."""
        if not len(self._search):
            return Searcher.FINISHED
        if len(self._live) >= self._useful():
            return None
        self._live.add(trial_id)
        return {"worker": trial_id}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A worker has ended, which says nothing of its trials."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""
