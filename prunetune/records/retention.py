"""Decides which stages of a sweep the store keeps (`keep:` in its file), and deletes the others.

Results are in the ledger and always stay. This module is about stored networks and masks: it keeps those of
the best trials, and those from which other trials may still start.
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
"""To delete more keys than this, list the store once instead of asking it for each key."""


def kept_keys(records: Collection[TrialRecord], policy: KeepConfig, *, going_on: bool) -> set[str]:
    """The keys of the stages that a sweep with these records keeps; `going_on` if it has trials to run.

    It keeps all stages of the best trial at each density (`results.best_records`), so that the network can be
    trained further and examined, and all stages of unfinished trials, because failed ones are tried again. Of
    other trials it keeps only the stages from which further trials may start, while there are any to run.
    """
    best = {record.uid for record in results.best_records(records).values()}
    shared = going_on or policy.pre_pruning == "always"
    kept: set[str] = set()
    for record in records:
        has_network = record.finished and record.status != "stopped"
        whole = not record.finished or record.uid in best or (policy.post_pruning == "all" and has_network)
        kept.update(record.keys.values() if whole else record.shared if shared else ())
        # Trials at other densities may start from these.
        kept.update(record.watched if shared or not record.finished else ())
    return kept


def all_keys(records: Iterable[TrialRecord]) -> set[str]:
    """All keys that these records name."""
    return {key for record in records for key in (*record.keys.values(), *record.watched)}


class References:
    """The keys that all other sweeps and all trainings in a storage refer to.

    A finished sweep refers to the keys that it has kept, which its header lists (`kept`). A running or
    interrupted sweep may need every key that its records name. A training (`run_pipeline`,
    `prunetune.train`) refers to its stages until its record, below `<name>/trained`, is deleted.
    """

    def __init__(self, storage: Store, sweep: str) -> None:
        """`sweep` is the name of the sweep that is left out."""
        self._storage = storage
        self._sweep = sweep
        self._seen: dict[str, set[str]] = {}

    def keys(self) -> set[str]:
        """Return the keys as of now. Each record is read only once, because its keys never change."""
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
            watched = body.get("watched", []) if isinstance(body, dict) else []
            self._seen[place] = {*keys.values(), *watched}
        return self._seen[place]


class Retention:
    """A `Listener` that deletes the stages which the sweep does not keep, whenever a trial has ended.

    The stages to delete follow from the ledger alone, so those that a killed driver has not deleted are
    deleted after the next trial that ends.
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

        Stages of earlier spaces stay, because the space may be changed back; `--gc` deletes them.
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
        """Note that the trial's stages are written to the store, perhaps again."""
        self._gone -= all_keys([record])

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Do nothing: stages are deleted only when a trial ends."""

    def ended(self, record: TrialRecord) -> None:
        """Delete the stages that are not kept, now that the trial may have become the best at its density."""
        self.apply(going_on=True)

    def apply(self, *, going_on: bool) -> set[str] | None:
        """Delete the stages that are not kept; return the kept keys, or None where deleting failed."""
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
        except Exception as error:  # any error of a filesystem: failing to delete must not end a sweep
            if not self._failed:
                logger.warning("%s: what is not kept cannot be removed: %s", self._store.location, error)
            self._failed = True
            return None
        return kept
