"""What a sweep has come to."""

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
    """The best trial at a density: `run_pipeline` takes its configuration as it is; `path` is its file."""

    config: Config
    record: TrialRecord
    path: str

    @property
    def score(self) -> float:
        """The validation score by which it was chosen, as the task's metric has it."""
        return self.record.val if self.record.val is not None else math.nan


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found so far, in this run and in earlier ones.

    `trials` is the table of `results.parquet`, a row per finished or failed trial; `best` and `studies` are
    by density, `studies` as Optuna has them; `metric` is what trials are compared by. `folder` holds the
    sweep's files (a path, or a URI). `interrupted`: trials are left that the same call runs. `records` are
    the trials in full, `report` the files of the report, and `trackers` what each tracker has left.
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
    """The best trial of each density, from high to low; `store` is the sweep's folder."""
    return {
        density: Best(trial_config(record, base), record, store.path(f"best/{density_name(density)}.yaml"))
        for density, record in sorted(results.best_records(records).items(), reverse=True)
    }
