"""Reads a sweep's file, and checks it against its data and models before any trial is run."""

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
    """A sweep that has been checked and can be run.

    `store` is the sweep's own folder; `config` has one value for each distribution.
    """

    source: Document
    config: Config
    problem: Problem
    store: Store

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the context, hold the sweep's lock, so that no other process on this machine runs it.

        Raises UserError where another process holds it, or where the sweep's folder cannot be written.
        """
        ledgers.check_storage(self.store)
        with lock.exclusive(self.store):
            yield


def read(
    given: str | Path | Mapping[str, Any] | Document,
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Document:
    """Read a sweep's configuration from a file's path, a mapping or a document, and apply `overrides`.

    Overrides are a mapping by dotted key, or texts `dotted.key=value`. Raises UserError where the file cannot
    be read.
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
    """Check a sweep: load its data, and build its models for assignments that represent the whole space.

    The data are loaded again, because files may have been edited since an earlier sweep in this process.
    Raises UserError for everything that is wrong with the file or the data, or where they do not fit.
    """
    template, config = sweep_from_document(source)
    datasets.forget()
    _data_digest.cache_clear()
    data = checks.load_data(config, source)
    if not config.search.sampler.kind.is_built_in(config.search.sampler.name):
        config.search.sampler.make(seed=0)  # so that what is wrong with it is said before the first trial
    code: set[str] = set()
    fits = checks.Checks(source)
    for found in configurations(template, source):
        there = checks.load_data(found, source)
        fits.model(found, there.form)
        code |= own_code(found) or {""}
    problem = Problem.of(template, digest(FORMAT, data.digest, sorted(code)), _data_digest)
    return Opened(source, config, problem, Store(config.storage).sub(config.name))


def configurations(template: dict[str, Any], source: Document) -> Iterator[Config]:
    """Yield configurations of a space in which every parameter takes each of its probes at least once."""
    for assignment in space.assignments(template, is_active):
        yield validate(space.at(template, assignment, is_active), source)


@functools.cache
def _data_digest(config: DataConfig) -> str:
    return datasets.load(config).digest
