"""Finds what `prunetune.sweep --gc` deletes: files of the store that are not kept and not referred to."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from prunetune.config.schema import Config
from prunetune.errors import UserError
from prunetune.records import retention
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.store import File, Kind, Store

MIN_AGE = timedelta(hours=1)
"""Unreferenced files younger than this stay: a process may be writing them, and their record may follow."""

KINDS: tuple[Kind, ...] = ("stages", "checkpoints")

_EARLIER = "objects"
"""The folder in which earlier versions kept their blobs; today's manifests do not name them."""

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")

Fate = Literal["stays", "goes", "goes when old"]


@dataclass(frozen=True)
class Item:
    """Files that are deleted or kept together: a description, their names in the store, their bytes."""

    what: str
    names: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Owners:
    """Sorts the store's keys by owner.

    The sweep keeps the keys in `kept` and no longer needs those in `dropped` (key -> stage's name); other
    sweeps and trainings refer to those in `others`.
    """

    kept: Collection[str]
    dropped: Mapping[str, str]
    others: Collection[str]

    def of(self, key: str) -> tuple[str, Fate]:
        """Return (a description of the key's owner, whether the key's files stay or go)."""
        if key in self.kept:
            return "of this sweep", "stays"
        if key in self.others:
            return "of other sweeps and trainings", "stays"
        if key in self.dropped:
            return f"{self.dropped[key]}, not kept", "goes"
        return "stages nobody refers to", "goes when old"


@dataclass(frozen=True)
class Found:
    """The items of a storage that are to be deleted (`garbage`) and that stay.

    `finished` says that the sweep has no trials to run; `header` is the sweep's new header; `leftovers` are
    temporary files in the sweep's own folder.
    """

    garbage: list[Item]
    staying: list[Item]
    finished: bool
    store: Store
    sweep: Store
    header: dict[str, Any]
    leftovers: list[str]

    def remove(self) -> None:
        """Delete the garbage, each artefact's manifest first."""
        self.sweep.write_record("sweep", self.header)
        for item in self.garbage:
            for name in item.names:
                self.store.delete_file(name)
        for name in self.leftovers:
            self.sweep.delete_file(name)


def find(config: Config, problem: Problem, ledger: Ledger, *, missing: int) -> Found:
    """Find what the sweep does not keep, and what nothing refers to. The caller holds the sweep's lock.

    `missing` is how many trials the sweep would run if it went on, failed ones included. Nothing is deleted.

    Raises UserError where the sweep's last run had another space, from which follows what it keeps.
    """
    header = ledger.store.read_record("sweep")
    if not isinstance(header, dict) or header.get("space") != problem.hash:
        described = header.get("described", {}) if isinstance(header, dict) else {}
        raise UserError(
            f"{ledger.store.path('')}: its last run had another search space, from which follows what it "
            "keeps. Give the same file and overrides, or run the sweep first. What differs:\n  "
            + "\n  ".join(problem.changes(described))
        )
    storage = Store(config.storage)
    store = storage.sub("store")
    files = listing(store)  # read before the references, so that it lists no file whose record comes later
    records = ledger.fitting(problem)
    # A failed trial keeps its own stages until it is tried again, but the sweep counts as finished.
    failed = sum(r.status == "failed" and r.density in config.densities for r in records)
    finished = missing <= failed
    kept = retention.kept_keys(records, config.keep, going_on=not finished)
    dropped = {key: "branch" for record in ledger.records() for key in record.watched}
    dropped |= {key: name for record in ledger.records() for name, key in record.keys.items()}
    others = retention.References(storage, config.name).keys()
    garbage, staying = survey(store, files, Owners(kept, dropped, others))
    return Found(
        garbage,
        staying,
        finished,
        store,
        ledger.store,
        {**header, "kept": sorted(kept) if finished else None},
        temporary(ledger.store.files("", recursive=True)),
    )


Listing = Mapping[str, list[File]]
"""Maps each folder of the store to its files."""


def listing(store: Store) -> Listing:
    """List all files of the store."""
    return {folder: store.files(folder) for folder in (*KINDS, "damaged", _EARLIER)}


def survey(store: Store, files: Listing, owners: Owners) -> tuple[list[Item], list[Item]]:
    """Sort the store's files into (items to delete, items that stay).

    Stages without a reference are deleted when they are older than `MIN_AGE`; if the filesystem does not tell
    a file's age, it stays. The same holds for blobs without a manifest, manifests without a blob, temporary
    files, and entries set aside as damaged.
    """
    now = datetime.now(UTC)
    garbage: list[Item] = []
    staying: list[Item] = []
    for folder, what, fate, group in _groups(store, files, owners):
        names, size = tuple(f"{folder}/{file.name}" for file in group), sum(file.size for file in group)
        if fate == "goes" or (fate == "goes when old" and all(_is_old(file, now) for file in group)):
            garbage.append(Item(what, names, size))
        else:
            staying.append(Item(what if fate == "stays" else f"{what}, new", names, size))
    return garbage, staying


def temporary(files: Iterable[File]) -> list[str]:
    """Names of old temporary files, left by killed processes in a sweep's own folder."""
    now = datetime.now(UTC)
    return [file.name for file in files if _TEMPORARY.search(file.name) and _is_old(file, now)]


def totals(items: Collection[Item]) -> list[tuple[str, int, int]]:
    """Count items by description: (description, number of items, bytes), sorted by description."""
    sizes: dict[str, list[int]] = {}
    for item in items:
        sizes.setdefault(item.what, []).append(item.size)
    return [(what, len(of_it), sum(of_it)) for what, of_it in sorted(sizes.items())]


def _groups(store: Store, files: Listing, owners: Owners) -> Iterator[tuple[str, str, Fate, list[File]]]:
    """Yield (folder, description, fate, files) for every group of files in the store."""
    finished = {file.name.removesuffix(".json") for file in files["stages"]}
    for kind in KINDS:
        for key, group in _by_key([file for file in files[kind] if not _TEMPORARY.search(file.name)]):
            artefact, loose = _artefact(store, kind, key, group)
            if len(artefact) == 2:
                what, fate = owners.of(key)
                if kind == "checkpoints":
                    what = "checkpoints"
                    if key in finished and fate == "stays":  # a crash came before the checkpoint was deleted
                        fate = "goes when old"
                yield kind, what, fate, artefact
            elif artefact:
                yield kind, "manifests without a blob", "goes when old", artefact
            for file in loose:
                yield kind, "blobs without a manifest", "goes when old", [file]
    for folder, found in files.items():
        for file in found:
            if _TEMPORARY.search(file.name):
                yield folder, "temporary files", "goes when old", [file]
            elif folder == "damaged":
                yield folder, "damaged entries", "goes when old", [file]
            elif folder == _EARLIER:
                yield folder, "blobs of an earlier version", "goes when old", [file]


def _by_key(files: list[File]) -> Iterator[tuple[str, list[File]]]:
    groups: dict[str, list[File]] = {}
    for file in files:
        groups.setdefault(file.name.partition(".")[0], []).append(file)
    yield from groups.items()


def _artefact(store: Store, kind: Kind, key: str, group: list[File]) -> tuple[list[File], list[File]]:
    """Split a key's files into ([the manifest and its blob, as far as they exist], [other blobs])."""
    manifest = [file for file in group if file.name == f"{key}.json"]
    blobs = [file for file in group if file.name != f"{key}.json"]
    if not manifest:
        return [], blobs
    name = blobs[0].name if len(blobs) == 1 else store.blob(kind, key)
    return [*manifest, *(f for f in blobs if f.name == name)], [f for f in blobs if f.name != name]


def _is_old(file: File, now: datetime) -> bool:
    return file.modified is not None and now - file.modified >= MIN_AGE
