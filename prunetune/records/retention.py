"""What the store keeps of a sweep (`keep:` in its file): the decision, and carrying it out while it runs.

Results are in the ledger and stay. This is about networks and masks: those that are handed over, and those
that other trials may still start from.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from prunetune.config.schema import KeepConfig
from prunetune.engine.epoch import Epoch
from prunetune.records import results
from prunetune.records.ledger import Ledger, density_folders
from prunetune.records.trial import TrialRecord
from prunetune.store import Store

logger = logging.getLogger(__name__)

_MANY = 8
"""For more keys than these, one listing of the store is cheaper than asking for each."""


def kept_keys(records: Collection[TrialRecord], policy: KeepConfig, *, going_on: bool) -> set[str]:
    """The store's keys that a sweep with these records keeps; `going_on`: it has trials to run.

    Everything of the best trial at each density, as `results.best_records` has it, so that it can be
    trained on, explained and extended; everything of unfinished trials (failed ones are tried again). Of
    the others only what further trials may start from, while there are any.
    """
    best = {record.uid for record in results.best_records(records).values()}
    shared = going_on or policy.pre_pruning == "always"
    kept: set[str] = set()
    for record in records:
        has_network = record.finished and record.status != "stopped"
        whole = not record.finished or record.uid in best or (policy.post_pruning == "all" and has_network)
        kept.update(record.keys.values() if whole else record.shared if shared else ())
    return kept


def all_keys(records: Iterable[TrialRecord]) -> set[str]:
    """Every key that these records name."""
    return {key for record in records for key in record.keys.values()}


class References:
    """The keys that others below a storage refer to: all sweeps but one, and trainings.

    A finished sweep refers to what it has kept, as its header says (`kept`). Of one that runs, or that was
    interrupted, everything that its records name may be needed. A training (`run_pipeline`,
    `prunetune.train`) refers to its stages until its record, below `<name>/trained`, is deleted.
    """

    def __init__(self, storage: Store, sweep: str) -> None:
        """`sweep` is the name of the one that is left out."""
        self._storage = storage
        self._sweep = sweep
        self._seen: dict[str, set[str]] = {}

    def keys(self) -> set[str]:
        """As of now. Each record is read once: its keys never change."""
        found: set[str] = set()
        for name in self._storage.folders(""):
            if name == "store":
                continue
            folder = self._storage.sub(name)
            for record in folder.records("trained"):
                found |= self._keys_of(name, folder, record)
            if name != self._sweep:
                found |= self._keys_of_sweep(name, folder)
        return found

    def _keys_of_sweep(self, name: str, folder: Store) -> set[str]:
        header = folder.read_record("sweep")
        if isinstance(header, dict) and isinstance(header.get("kept"), list):
            return set(header["kept"])
        records = [record for density in density_folders(folder) for record in folder.records(density)]
        return set().union(*(self._keys_of(name, folder, record) for record in records))

    def _keys_of(self, name: str, folder: Store, record: str) -> set[str]:
        place = f"{name}/{record}"
        if place not in self._seen:
            body = folder.read_record(record)
            keys = body.get("keys", {}) if isinstance(body, dict) else {}
            self._seen[place] = set(keys.values())
        return self._seen[place]


class Retention:
    """Removes from the store, whenever a trial has ended, what its sweep does not keep (a `Listener`).

    What is to be removed follows from the ledger alone, so what a killed driver has left goes with the next
    trial that ends.
    """

    def __init__(
        self,
        policy: KeepConfig,
        ledger: Ledger,
        fitting: Iterable[TrialRecord],
        store: Store,
        references: References,
    ) -> None:
        """`fitting` are the records that belong to today's space; `store` holds the stages.

        What earlier spaces have left is not touched: the space may be changed back. `--gc` removes it.
        """
        self._policy = policy
        self._ledger = ledger
        self._store = store
        self._references = references
        fit = {record.uid for record in fitting}
        self._earlier = [record for record in ledger.records() if record.uid not in fit]
        self._gone: set[str] = set()
        self._failed = False

    def started(self, record: TrialRecord) -> None:
        """Its keys come (back) into the store."""
        self._gone -= set(record.keys.values())

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Nothing."""

    def ended(self, record: TrialRecord) -> None:
        """It is the best of its density, or it is not."""
        self.apply(going_on=True)

    def apply(self, *, going_on: bool) -> set[str] | None:
        """Remove what is not kept; the keys that are, or None where the store did not allow it."""
        uids = {record.uid for record in self._earlier}
        records = [record for record in self._ledger.records() if record.uid not in uids]
        kept = kept_keys(records, self._policy, going_on=going_on)
        droppable = all_keys(records) - kept - all_keys(self._earlier) - self._gone
        try:
            if droppable:
                droppable -= self._references.keys()
            if len(droppable) > _MANY:
                present = set(self._store.keys("stages"))
                self._gone |= droppable - present
                droppable &= present
            for key in sorted(droppable):
                self._store.delete("stages", key)
                self._gone.add(key)
        except Exception as error:  # whatever a filesystem raises: a full store must not end a sweep
            if not self._failed:
                logger.warning("%s: what is not kept cannot be removed: %s", self._store.location, error)
            self._failed = True
            return None
        return kept
