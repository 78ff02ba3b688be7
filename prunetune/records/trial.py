"""One trial of a sweep: what was proposed, and what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prunetune.config.canonical import configuration_hash
from prunetune.config.document import Document
from prunetune.config.reading import validate
from prunetune.config.schema import DOES_NOT_DETERMINE, Config
from prunetune.engine.epoch import Epoch
from prunetune.tasks import ACCURACY, accuracy

Status = Literal["running", "complete", "stopped", "collapsed", "diverged", "failed"]
"""`stopped` by early stopping; `collapsed` and `diverged` are results; `failed` raised or lost workers."""

RECORDED = Document("a recorded trial", {})
"""What a message names where a recorded configuration is wrong."""

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
        return validate({**self.tree, "densities": [self.density]}, RECORDED)

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


def trial_config(record: TrialRecord, base: Config) -> Config:
    """A record's configuration, with today's say in what does not determine its results."""
    tree, today = {**record.tree}, base.tree()
    for key in DOES_NOT_DETERMINE:
        parent, _, field = key.rpartition(".")
        if parent:
            tree[parent] = {**tree[parent], field: today[parent][field]}
        else:
            tree[field] = today[field]
    return validate({**tree, "densities": [record.density]}, RECORDED)


def is_at_density(epoch: Epoch, density: float) -> bool:
    """Whether an epoch says something of the network at the density: it was pruned, to its end."""
    return epoch.post_epoch is not None and epoch.metrics.get("density_now", 0.0) <= density
