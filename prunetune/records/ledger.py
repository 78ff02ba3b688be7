"""Trials of a sweep, one record each in the store: what was proposed, and what came of it.

The driver writes a record when a trial is proposed and again when it ends. So a driver that dies loses no
proposal, and Optuna's studies, early stopping's rungs and MLflow's runs can be rebuilt from here.
"""

from __future__ import annotations

import dataclasses
import getpass
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from prunetune.config import space
from prunetune.config.canonical import configuration_hash, determining_fields, digest, is_active
from prunetune.config.document import Document
from prunetune.config.reading import validate
from prunetune.config.schema import DOES_NOT_DETERMINE, Config, DataConfig, TaskConfig
from prunetune.engine.epoch import Epoch
from prunetune.errors import ConfigError, UserError
from prunetune.stages.plan import Plan, plan
from prunetune.store import Store
from prunetune.tasks import ACCURACY, Metric, accuracy

_locks: Any
try:
    import fcntl

    _locks = fcntl
except ImportError:  # Windows
    _locks = None

Status = Literal["running", "complete", "stopped", "collapsed", "diverged", "failed"]
"""`stopped` by early stopping; `collapsed` and `diverged` are results; `failed` raised or lost workers."""

FINISHED: tuple[Status, ...] = ("complete", "stopped", "collapsed", "diverged")
"""What is not tried again when the same command runs again."""


_OUTCOME = ("status", "nonzero", "effective_density", "cut_layers", "error")
"""What a trial gives, beside the metric."""


@dataclass
class TrialRecord:
    """One trial. `uid` is unique over all sweeps; `number` counts within a density, over all spaces.

    `code` stands for what a configuration does not say (`Problem.code`). `keys` are the store's keys of all
    that its stages may store, by name; `shared` are those of them that other trials may start from, `network`
    is the pre-pruned network's, if one is trained, and `network_density` the density that it is for, where
    its mask aims at one (`stages.plan`). `branched` says that it was proposed as a branch of a pre-pruned
    network that was there. `params` are the values by Optuna's names, `tree` is the whole configuration.
    `val` and `test` are the values of the `metric` with this name on the two splits.
    `epochs_run` were trained by this trial, `epochs_reused` by another one.
    """

    uid: str
    density: float
    number: int
    space: str
    params: dict[str, Any]
    tree: dict[str, Any]
    code: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    network: str | None = None
    network_density: float | None = None
    branched: bool = False
    status: Status = "running"
    metric: str = ACCURACY.name
    maximize: bool = True
    """Whether the higher metric is the better one."""
    val: float | None = None
    test: float | None = None
    nonzero: int | None = None
    effective_density: float | None = None
    cut_layers: list[str] = field(default_factory=list)
    epochs_run: int = 0
    epochs_reused: int = 0
    seconds: float = 0.0
    curve: list[Epoch] = field(default_factory=list)
    error: str | None = None

    @property
    def score(self) -> float | None:
        """The validation value by which trials are compared: higher is better. None without a value."""
        if self.val is None or math.isnan(self.val):
            return None
        return self.val if self.maximize else -self.val

    @property
    def val_accuracy(self) -> float | None:
        """`val`, where that is an accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric, self.val)

    @property
    def test_accuracy(self) -> float | None:
        """`test`, where that is an accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric, self.test)

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.status in FINISHED

    @property
    def config(self) -> Config:
        """The configuration as it was recorded. Raises ConfigError for one of an older schema."""
        return validate({**self.tree, "densities": [self.density]}, _RECORDED)

    @property
    def config_hash(self) -> str:
        """The hash of what the trial computes: equal for equal configurations, wherever they run."""
        return configuration_hash(self.config)

    def count_epochs(self) -> None:
        """Set how many epochs this trial has trained: an interrupted one finds its own in the store."""
        self.epochs_run = sum(epoch.owner == self.uid for epoch in self.curve)
        self.epochs_reused = len(self.curve) - self.epochs_run

    def take(self, outcome: Mapping[str, Any]) -> None:
        """Set what the trial gave, from values by name as `PipelineResult.metrics` has them."""
        for name in _OUTCOME:
            if name in outcome:
                setattr(self, name, outcome[name])
        self.val = outcome.get(f"val_{self.metric}")
        self.test = outcome.get(f"test_{self.metric}")

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "curve": [epoch.plain() for epoch in self.curve]}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> TrialRecord:
        """The inverse of `plain`; fields of another version are left out.

        Earlier versions knew no metric but accuracy, and had it under `val_accuracy` and `test_accuracy`.
        """
        if "metric" not in data:
            data = {**data, "val": data.get("val_accuracy"), "test": data.get("test_accuracy")}
        known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        return cls(**{**known, "curve": [Epoch.read(epoch) for epoch in data.get("curve", [])]})


class Ledger:
    """The records of one sweep, below `<storage>/<name>/trials`."""

    def __init__(self, store: Store) -> None:
        """`store` is the sweep's own folder."""
        self._store = store
        self._records: dict[str, TrialRecord] = {}
        for folder in density_folders(store):
            for name in store.records(folder):
                body = store.read_record(name)
                if body is not None:
                    record = TrialRecord.read(body)
                    self._records[record.uid] = record

    def records(self) -> list[TrialRecord]:
        """All records, by density from high to low and number."""
        return sorted(self._records.values(), key=lambda r: (-r.density, r.number))

    def fitting(self, problem: Problem) -> list[TrialRecord]:
        """The records of this problem's space, and the finished ones of earlier spaces that fit it."""
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
    ) -> TrialRecord:
        """A new record with the next number at this density, published."""
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
            metric=problem.metric.name,
            maximize=problem.metric.maximize,
        )
        self.publish(record)
        return record

    def next_number(self, density: float) -> int:
        """The number that the next trial at this density will have."""
        return 1 + max((r.number for r in self._records.values() if r.density == density), default=-1)

    def publish(self, record: TrialRecord) -> None:
        """Write a record as it is now."""
        self._records[record.uid] = record
        self._store.write_record(record_name(record.density, record.number), record.plain())


def _no_digest(data: DataConfig) -> str:
    return ""


@dataclass(frozen=True)
class Problem:
    """What a sweep searches: the template, its hash, and a description of each part for people.

    `code` is a digest of what determines results beside the configuration: a user's own model code, the
    data's content, this project's version of the computation. `data_digest` gives `Dataset.digest` of the
    data of a trial: the space may contain several.
    """

    template: dict[str, Any]
    hash: str
    described: dict[str, str]
    code: str = ""
    data_digest: Callable[[DataConfig], str] = _no_digest

    @classmethod
    def of(
        cls, template: dict[str, Any], code: str = "", data_digest: Callable[[DataConfig], str] = _no_digest
    ) -> Problem:
        """The problem of a template: all in it that determines results."""
        described = {
            key: str(value) if isinstance(value, space.Distribution) else repr(value)
            for key, value in space.leaves(_determining(template)).items()
            if value is not None
        }
        if code:
            described["(content of the data, and code)"] = code[:12]
        return cls(template, digest(_plain(_determining(template)), code), described, code, data_digest)

    @cached_property
    def metric(self) -> Metric:
        """What trials are compared by; it is the same for all of a space."""
        named = self.template.get("task", "classification")
        if isinstance(named, dict):  # options may be searched, the name may not
            named = named["name"]
        metric: Metric = TaskConfig.kind.find(named).metric
        return metric

    def stages(self, tree: dict[str, Any], density: float) -> Plan:
        """The stages of a configuration."""
        config = validate({**tree, "densities": [density]}, _RECORDED)
        return plan(config, self.data_digest(config.data))

    def fit(self, record: TrialRecord) -> dict[str, Any] | None:
        """The record's parameters in this space, or None where it is not one of its points."""
        if record.code != self.code:
            return None
        try:
            config = record.config
        except ConfigError:  # recorded under an older schema
            return None
        wanted = configuration_hash(config)
        for params in space.recover(self.template, config.tree(), is_active):
            tree = space.at(self.template, params, is_active)
            found = validate({**tree, "densities": [record.density]}, _RECORDED)
            if configuration_hash(found) == wanted:
                return params
        return None

    def changes(self, old: dict[str, str]) -> list[str]:
        """What differs from an earlier description, a line each."""
        lines = []
        for key in sorted({*old, *self.described}):
            before, now = old.get(key), self.described.get(key)
            if before != now:
                lines.append(f"{key}: was {before or 'not set'}, is now {now or 'not set'}")
        return lines


_RECORDED = Document("a recorded trial", {})


def density_name(density: float) -> str:
    """`density-0.01`, as files and folders are named."""
    return f"density-{density:.12g}"


def record_name(density: float, number: int) -> str:
    """Where a trial's record is, in the sweep's folder."""
    return f"trials/{density_name(density)}/{number:05d}"


def trial_config(record: TrialRecord, base: Config) -> Config:
    """A record's configuration, with today's say in what does not determine its results."""
    tree, today = {**record.tree}, base.tree()
    for key in DOES_NOT_DETERMINE:
        parent, _, field = key.rpartition(".")
        if parent:
            tree[parent] = {**tree[parent], field: today[parent][field]}
        else:
            tree[field] = today[field]
    return validate({**tree, "densities": [record.density]}, _RECORDED)


def is_at_density(epoch: Epoch, density: float) -> bool:
    """Whether an epoch says something of the network at the density: it was pruned, to its end."""
    return epoch.post_epoch is not None and epoch.metrics.get("density_now", 0.0) <= density


def density_folders(store: Store) -> list[str]:
    """The folders of a sweep's records, one per density."""
    return [f"trials/{name}" for name in store.folders("trials")]


def _determining(template: dict[str, Any]) -> dict[str, Any]:
    """The part of a template that determines results."""
    found = {key: template[key] for key in determining_fields() if key in template}
    for key in DOES_NOT_DETERMINE:
        parent, _, field = key.rpartition(".")
        if isinstance(found.get(parent), dict):
            found[parent] = {name: value for name, value in found[parent].items() if name != field}
    return found


def _plain(node: Any) -> Any:
    """A template as data that can be hashed."""
    if isinstance(node, space.Choice):
        return {"choice": [_plain(option) for option in node.options]}
    if isinstance(node, space.Uniform | space.Int):
        return {type(node).__name__: [node.low, node.high]}
    if isinstance(node, dict):
        return {key: _plain(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_plain(child) for child in node]
    return node


@contextmanager
def exclusive(store: Store) -> Iterator[None]:
    """One driver per sweep: two would number and record each other's trials.

    Raises UserError where another process on this machine holds the sweep; for remote storage the lock is in
    the machine's folder for temporary files. Where the system has no such locks, nothing is held.
    """
    path = store.local_path(".lock")
    if path is None:
        name = f"prunetune-{getpass.getuser()}-{digest(store.path(''))}.lock"
        path = os.path.join(tempfile.gettempdir(), name)
    if _locks is None:
        yield
        return
    with open(path, "a+") as file:
        try:
            _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{store.path('')}: another process ({file.read().strip() or 'unknown'}) runs this sweep; "
                "wait for it, or give another name (name=…)"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


def check_storage(store: Store) -> None:
    """Raise UserError unless a record can be written, read back and deleted."""
    name = f"probe-{uuid.uuid4().hex}"
    store.write_record(name, 1)
    if store.read_record(name) != 1:
        raise UserError(f"storage: {store.path(name)} was written but could not be read back")
    store.delete_file(f"{name}.json")
