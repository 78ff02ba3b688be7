"""The result of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from prunetune.config.schema import Config
from prunetune.records import results
from prunetune.records.ledger import density_name
from prunetune.records.trial import TrialRecord, trial_config
from prunetune.store import Store
from prunetune.tasks import Metric
from prunetune.trackers.group import Closed

if TYPE_CHECKING:
    from prunetune.search.study import Study


@dataclass(frozen=True)
class Best:
    """The best trial at a density; `run_pipeline` accepts its `config`, or `path`, the file that holds it."""

    config: Config
    record: TrialRecord
    path: str

    @property
    def val(self) -> float:
        """The metric's value on the validation split, by which the trial was chosen."""
        return self.record.val if self.record.val is not None else math.nan


@dataclass(frozen=True)
class SweepResult:
    """Everything that a sweep has found so far, in this run and in earlier ones.

    `folder` is the path or URI of the sweep's files. `interrupted` says that trials are left, which the same
    call would run. `trials` is the table of `results.parquet`, with a row per finished or failed trial.
    `best` maps each density to its best trial, and `studies` to its Optuna study. `metric` is the metric by
    which trials are compared. `records` are the complete records of the trials, `report` the files of the
    report, and `trackers` say how to view what each tracker has written.
    """

    folder: str
    interrupted: bool
    trials: pd.DataFrame
    best: Mapping[float, Best]
    studies: Mapping[float, Study] = field(repr=False)
    metric: Metric
    records: list[TrialRecord] = field(repr=False)
    report: list[str] = field(repr=False)
    trackers: list[Closed] = field(repr=False)


def best_of(records: list[TrialRecord], base: Config, store: Store) -> dict[float, Best]:
    """Return the best trial at each density, from high to low; `store` is the sweep's folder."""
    return {
        density: Best(trial_config(record, base), record, store.path(f"best/{density_name(density)}.yaml"))
        for density, record in sorted(results.best_records(records).items(), reverse=True)
    }
