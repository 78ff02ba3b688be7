"""The store that a trial's pipeline uses: it translates keys, and keeps the running epoch in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from prunetune.errors import WorkError
from prunetune.store import Artefact, Artefacts, Kind
from prunetune.tune.inheritance import Inheritance, UnderWay


@final
class TrialStages:
    """A store for one trial: finished stages go to `store`, under the inheritance's keys, epochs to memory.

    The pipeline saves every epoch. Only references to its tensors are kept: they hold the epoch's values
    until the next epoch is trained, so an epoch costs nothing unless Tune asks for a checkpoint.
    """

    def __init__(self, store: Artefacts, inheritance: Inheritance, under_way: UnderWay | None) -> None:
        self._store = store
        self.inheritance = inheritance
        self.under_way = under_way
        self.finished: set[str] = set()
        """The configuration's keys of the stages that were found in the store or saved."""

    def load(self, kind: Kind, key: str) -> Artefact | None:
        """Load as `Store.load` does. Raises WorkError for an inherited stage that the store no longer has."""
        stored = self.inheritance.stored_as(key)
        epoch = self.under_way
        if kind == "checkpoints" and epoch is not None and epoch.key == key:
            # Copy the list, because the pipeline appends to it.
            return Artefact(dict(epoch.tensors), {**epoch.meta, "curve": list(epoch.meta["curve"])})
        found = self._store.load(kind, stored)
        if kind == "checkpoints":  # left by an interrupted sweep or training
            self.under_way = None if found is None else UnderWay(key, found.tensors, found.meta)
        elif found is not None:
            self.finished.add(key)
        elif key in self.inheritance.taken:
            # Computing it again would store this configuration's result under the other configuration's key.
            raise WorkError(
                f"stages/{stored}: this trial took it over from another; it is not in the store any more"
            )
        return found

    def save(self, kind: Kind, key: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Save a stage as `Store.save` does; keep an epoch in memory."""
        if kind == "checkpoints":
            self.under_way = UnderWay(key, dict(tensors), meta)
            return
        self._store.save(kind, self.inheritance.stored_as(key), tensors, meta)
        self.finished.add(key)

    def delete(self, kind: Kind, key: str) -> None:
        """Delete as `Store.delete` does, and forget the epoch in memory."""
        if kind == "checkpoints" and self.under_way is not None and self.under_way.key == key:
            self.under_way = None
        self._store.delete(kind, self.inheritance.stored_as(key))
