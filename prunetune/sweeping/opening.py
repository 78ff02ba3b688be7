"""A sweep's file, read and checked against its data and models, before anything is run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune import checks
from prunetune import data as datasets
from prunetune.config import document, space
from prunetune.config.canonical import digest, is_active, own_code
from prunetune.config.document import Document
from prunetune.config.reading import sweep_from_document, validate
from prunetune.config.schema import Config, DataConfig
from prunetune.records import ledger as ledgers
from prunetune.records import lock
from prunetune.records.problem import Problem
from prunetune.stages.stage import FORMAT
from prunetune.store import Store


@dataclass(frozen=True)
class Opened:
    """A sweep that can be run. `store` is its own folder, `config` has one value for each distribution."""

    source: Document
    config: Config
    problem: Problem
    store: Store

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: nobody else on this machine runs the sweep, and its folder can be written.

        Raises UserError where that is not so.
        """
        ledgers.check_storage(self.store)
        with lock.exclusive(self.store):
            yield


def read(
    given: str | Path | Mapping[str, Any] | Document,
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Document:
    """A sweep's file, by its path, or what would stand in one; `overrides` by dotted key, or `key=value`.

    Raises UserError where it cannot be read.
    """
    if isinstance(given, Document):
        source = given
    elif isinstance(given, Mapping):
        source = Document("configuration", dict(given))
    else:
        source = document.read(given)
    if isinstance(overrides, Mapping):
        return document.assign(source, overrides.items(), "overrides")
    return document.override(source, overrides, "overrides")


def open_sweep(source: Document) -> Opened:
    """Check every assignment of the space that stands for the others; loads the data, builds the models.

    Raises UserError for all that is wrong with the file, the data, or how they fit each other.
    """
    template, config = sweep_from_document(source)
    data = checks.load_data(config, source)
    code: set[str] = set()
    fits = checks.Checks(source)
    for found in configurations(template, source):
        there = checks.load_data(found, source)
        fits.model(found, there.form)
        code |= own_code(found) or {""}
    problem = Problem.of(template, digest(FORMAT, data.digest, sorted(code)), _data_digest)
    return Opened(source, config, problem, Store(config.storage).sub(config.name))


def configurations(template: dict[str, Any], source: Document) -> Iterator[Config]:
    """Configurations of a space in which every parameter has each of its probes at least once."""
    for assignment in space.assignments(template, is_active):
        yield validate(space.at(template, assignment, is_active), source)


@functools.cache
def _data_digest(config: DataConfig) -> str:
    return datasets.load(config).digest
