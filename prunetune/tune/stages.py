"""The store as one trial's pipeline sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from prunetune.errors import WorkError
from prunetune.store import Artefact, Artefacts, Kind
from prunetune.tune.inheritance import Inheritance, UnderWay


@final
class TrialStages:
    """Finished stages under the keys of an inheritance, in the store; the epoch under way, in memory.

    The pipeline offers every epoch. It is held by reference: until the next one is trained the tensors are
    those of the epoch, so it costs nothing unless a checkpoint is asked for.
    """

    def __init__(self, store: Artefacts, inheritance: Inheritance, under_way: UnderWay | None) -> None:
        self._store = store
        self.inheritance = inheritance
        self.under_way = under_way
        self.finished: set[str] = set()
        """The keys, as the configuration has them, of the stages that were found or stored."""

    def load(self, kind: Kind, key: str) -> Artefact | None:
        """As `Store.load`. Raises WorkError for a stage that was taken over and is there no more."""
        stored = self.inheritance.stored_as(key)
        epoch = self.under_way
        if kind == "checkpoints" and epoch is not None and epoch.key == key:
            # The pipeline goes on with the list that it gets.
            return Artefact(dict(epoch.tensors), {**epoch.meta, "curve": list(epoch.meta["curve"])})
        found = self._store.load(kind, stored)
        if kind == "checkpoints":  # of a sweep or a training that was interrupted
            self.under_way = None if found is None else UnderWay(key, found.tensors, found.meta)
        elif found is not None:
            self.finished.add(key)
        elif key in self.inheritance.taken:
            # To compute it anew would put this configuration's result under the other's key.
            raise WorkError(
                f"stages/{stored}: this trial took it over from another; it is not in the store any more"
            )
        return found

    def save(self, kind: Kind, key: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """As `Store.save`; an epoch stays in memory."""
        if kind == "checkpoints":
            self.under_way = UnderWay(key, dict(tensors), meta)
            return
        self._store.save(kind, self.inheritance.stored_as(key), tensors, meta)
        self.finished.add(key)

    def delete(self, kind: Kind, key: str) -> None:
        """As `Store.delete`; an epoch is forgotten, too."""
        if kind == "checkpoints" and self.under_way is not None and self.under_way.key == key:
            self.under_way = None
        self._store.delete(kind, self.inheritance.stored_as(key))
