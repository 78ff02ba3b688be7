"""The ledger of a sweep: one record per trial, in the sweep's folder of the storage.

The driver writes a record when a trial is proposed and again when it ends. So no proposal is lost when the
driver dies, and Optuna's studies, early stopping's rungs and MLflow's runs can be rebuilt from the ledger.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from prunetune.errors import UserError
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.store import Store


class Ledger:
    """The records of one sweep, below `<storage>/<name>/trials`."""

    def __init__(self, store: Store) -> None:
        """Read all records of a sweep; `store` is the sweep's own folder."""
        self._store = store
        self._records: dict[str, TrialRecord] = {}
        for folder in density_folders(store):
            for name in store.records(folder):
                body = store.read_record(name)
                if body is not None:
                    record = TrialRecord.read(body)
                    self._records[record.uid] = record

    def records(self) -> list[TrialRecord]:
        """All records, sorted by density from high to low, then by number."""
        return sorted(self._records.values(), key=lambda r: (-r.density, r.number))

    def fitting(self, problem: Problem) -> list[TrialRecord]:
        """The records of this problem's space, and finished ones of earlier spaces that are points of it."""
        return [
            record
            for record in self.records()
            if record.space == problem.hash or (record.finished and problem.fit(record) is not None)
        ]

    @property
    def store(self) -> Store:
        """The sweep's own folder."""
        return self._store

    def propose(
        self,
        problem: Problem,
        density: float,
        params: dict[str, Any],
        tree: dict[str, Any],
        *,
        branched: bool = False,
        also: Iterable[float] = (),
    ) -> TrialRecord:
        """Make a record with the next number at this density, and write it to the ledger.

        `also` are the densities whose branch points are found while the trial's network is trained.
        """
        number = self.next_number(density)
        stages = problem.stages(tree, density)
        record = TrialRecord(
            uuid.uuid4().hex,
            density,
            number,
            problem.hash,
            params,
            tree,
            problem.code,
            stages.keys,
            stages.shared,
            stages.network.key if stages.network else None,
            stages.network.density if stages.network else None,
            branched,
            problem.branch_points(tree, also),
            stages.final.masks.selection.label,
            metric=problem.metric.name,
            maximize=problem.metric.maximize,
        )
        self.publish(record)
        return record

    def next_number(self, density: float) -> int:
        """The number that the next trial at this density will have."""
        return 1 + max((r.number for r in self._records.values() if r.density == density), default=-1)

    def publish(self, record: TrialRecord) -> None:
        """Write the record's present state to the ledger."""
        self._records[record.uid] = record
        self._store.write_record(record_name(record.density, record.number), record.plain())


def density_name(density: float) -> str:
    """The name of a density in files and folders, such as `density-0.01`."""
    return f"density-{density:.12g}"


def record_name(density: float, number: int) -> str:
    """The name of a trial's record, relative to the sweep's folder."""
    return f"trials/{density_name(density)}/{number:05d}"


def density_folders(store: Store) -> list[str]:
    """The folders that hold a sweep's records, one per density."""
    return [f"trials/{name}" for name in store.folders("trials")]


def check_storage(store: Store) -> None:
    """Raise UserError unless a record can be written, read back and deleted."""
    name = f"probe-{uuid.uuid4().hex}"
    store.write_record(name, 1)
    if store.read_record(name) != 1:
        raise UserError(f"storage: {store.path(name)} was written but could not be read back")
    store.delete_file(f"{name}.json")
