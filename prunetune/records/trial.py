"""The record of one trial: its configuration, its progress and its result."""

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
from prunetune.config.sections import expanded
from prunetune.engine.epoch import Epoch
from prunetune.tasks import ACCURACY, accuracy, one_shot_name

Status = Literal["running", "complete", "stopped", "collapsed", "diverged", "failed"]
"""`stopped`: by early stopping. `collapsed`, `diverged`: results. `failed`: an exception, or lost workers."""

RECORDED = Document("a recorded trial", {})
"""Stands for the file in messages about a recorded configuration that is wrong."""

FINISHED: tuple[Status, ...] = ("complete", "stopped", "collapsed", "diverged")
"""Trials with these statuses have a result, and are not run again when the same command is run again."""


_OUTCOME = ("status", "nonzero", "effective_density", "cut_layers", "error")
"""The fields of a trial's result, besides the metric's values."""


@dataclass
class TrialRecord:
    """One trial of a sweep.

    `uid` is unique over all sweeps; `number` counts the trials at a density, over all spaces. `space` is the
    `Problem.hash` for which the trial was proposed, `code` is `Problem.code`. `params` are the searched
    values by Optuna's names, `tree` is the whole configuration.

    `keys` maps the names of the trial's stages to their keys in the store; `shared` are the keys from which
    other trials may start; `network` is the key of the pre-pruned network, if one is trained, and
    `network_density` the density for which it is trained, if its mask aims at one (`stages.plan`). `branched`
    says that the trial was proposed as a branch of a pre-pruned network in the store. `watched` are the keys
    of the branch points for all densities of the sweep, which are found while the network is trained.
    `selection` is `Selection.label`, which says how the trial prunes.

    `val` and `test` are the values of the metric named `metric` on the two splits. `epochs_run` counts the
    epochs that this trial has trained, `epochs_reused` those that another trial has trained.
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
    watched: list[str] = field(default_factory=list)
    selection: str = ""
    status: Status = "running"
    metric: str = ACCURACY.name
    maximize: bool = True
    """Whether a higher value of the metric is better."""
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
        """The validation score by which trials are compared (higher is better), or None without a value."""
        if self.val is None or math.isnan(self.val):
            return None
        return self.val if self.maximize else -self.val

    def one_shot(self, density: float) -> float | None:
        """The best validation score of the trial's pre-pruned network right after pruning to a density.

        It is the best over the epochs of pre-pruning at which it was measured, or None without any.
        """
        name, sign = one_shot_name(self.metric, density, self.selection), 1 if self.maximize else -1
        found = [e.metrics[name] for e in self.curve if e.stage == "pre_pruning" and name in e.metrics]
        return max((sign * value for value in found if not math.isnan(value)), default=None)

    @property
    def val_accuracy(self) -> float | None:
        """`val`, if the metric is accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric, self.val)

    @property
    def test_accuracy(self) -> float | None:
        """`test`, if the metric is accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric, self.test)

    @property
    def finished(self) -> bool:
        """Whether the trial has a result."""
        return self.status in FINISHED

    @property
    def config(self) -> Config:
        """The configuration as it was recorded. Raises ConfigError where it follows an older schema."""
        return validate({**self.tree, "densities": [self.density]}, RECORDED)

    @property
    def config_hash(self) -> str:
        """The hash of all settings that determine the result; equal for equal ones on every machine."""
        return configuration_hash(self.config)

    def count_epochs(self) -> None:
        """Set `epochs_run` and `epochs_reused` by who trained each epoch: a resumed trial reuses its own."""
        self.epochs_run = sum(epoch.owner == self.uid for epoch in self.curve)
        self.epochs_reused = len(self.curve) - self.epochs_run

    def take(self, outcome: Mapping[str, Any]) -> None:
        """Set the result's fields from values by name, as `PipelineResult.metrics` returns them."""
        for name in _OUTCOME:
            if name in outcome:
                setattr(self, name, outcome[name])
        self.val = outcome.get(f"val_{self.metric}")
        self.test = outcome.get(f"test_{self.metric}")

    def plain(self) -> dict[str, Any]:
        """Convert the record to plain data, as it is stored."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "curve": [epoch.plain() for epoch in self.curve]}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Make a record from `plain` data; fields that only other versions have are left out.

        Earlier versions had accuracy as the only metric, under `val_accuracy` and `test_accuracy`.
        """
        if "metric" not in data:
            data = {**data, "val": data.get("val_accuracy"), "test": data.get("test_accuracy")}
        known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        return cls(**{**known, "curve": [Epoch.read(epoch) for epoch in data.get("curve", [])]})


def trial_config(record: TrialRecord, base: Config) -> Config:
    """A record's configuration, with today's values of the settings that do not determine results."""
    tree, today = {**record.tree}, base.tree()
    for key in DOES_NOT_DETERMINE:
        parent, _, field = key.rpartition(".")
        if parent:
            tree[parent] = {**expanded(parent, tree[parent]), field: today[parent][field]}
        else:
            tree[field] = today[field]
    return validate({**tree, "densities": [record.density]}, RECORDED)


def is_at_density(epoch: Epoch, density: float) -> bool:
    """Whether the epoch's network has this density: it is pruned, and its mask is at its final density."""
    return epoch.post_epoch is not None and epoch.metrics.get("density_now", 0.0) <= density
