"""Turns records into a sweep's results: the table of trials, and the best configuration per density."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunetune.config import document
from prunetune.config.canonical import determining_fields
from prunetune.config.component import Component
from prunetune.config.schema import Config
from prunetune.config.sections import section_at
from prunetune.config.space import flatten
from prunetune.records.ledger import density_name
from prunetune.records.trial import TrialRecord, trial_config
from prunetune.records.winners import Outcome, winners
from prunetune.store import Store
from prunetune.tasks import ACCURACY, Metric, metric_of

_MORE_COLUMNS = (
    "nonzero",
    "effective_density",
    "status",
    "branched",
    "network",
    "epochs_run",
    "epochs_reused",
    "seconds",
    "mlflow_run_id",
)


def result_columns(metric: Metric) -> tuple[str, ...]:
    """The columns of `results.parquet` with a trial's outcome: the metric on both splits, and the others."""
    return metric.val, metric.test, *_MORE_COLUMNS


RESULT_COLUMNS = result_columns(ACCURACY)
"""The outcome columns of a classification task."""


def best_records(records: Iterable[TrialRecord]) -> dict[float, TrialRecord]:
    """The best trial at each density, as `winners` defines it."""
    return winners(records, lambda r: Outcome(r.density, r.number, r.status, r.score, r.nonzero))


@dataclass(frozen=True)
class Row:
    """The row of one density in the final table."""

    density: float
    best: TrialRecord | None
    statuses: Counter[str]
    metric: Metric = ACCURACY

    def cells(self) -> list[str]:
        """As text: density, sparsity, val, test, nonzero, effective density, status, trial, trial counts."""
        best = self.best
        trials = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        start = [f"{self.density:g}", f"{100 * (1 - self.density):g} %"]
        if best is None:
            return [*start, "", "", "", "", "no result", "", trials]
        return [
            *start,
            self.metric.text(best.val),
            self.metric.text(best.test),
            "" if best.nonzero is None else f"{best.nonzero:,}",
            "" if best.effective_density is None else f"{best.effective_density:.2g}",
            best.status,
            f"#{best.number}",
            trials,
        ]


def rows(records: list[TrialRecord], metric: Metric = ACCURACY) -> list[Row]:
    """The rows of the final table, by density from high to low."""
    best = best_records(records)
    return [
        Row(density, best.get(density), Counter(r.status for r in records if r.density == density), metric)
        for density in sorted({record.density for record in records}, reverse=True)
    ]


def trials_frame(records: list[TrialRecord], run_ids: Mapping[str, str], base: Config) -> pd.DataFrame:
    """A table with a row per trial: density, trial, hyperparameters by dotted name, and `result_columns`.

    A column for each density of the sweep has the value of the trial's pre-pruned `network` right after
    pruning to that density (`TrialRecord.one_shot`), where it was measured. The table's `attrs`, which
    parquet files keep, hold the metric, so that a report can be made from the table alone.
    """
    table, metric = [], metric_of(base)
    one_shot = {metric.one_shot(density): density for density in base.densities}
    columns = (*result_columns(metric), *one_shot)
    for record in records:
        tree = trial_config(record, base).tree()
        values = flatten({key: tree[key] for key in determining_fields()})
        parameters = {_column(key): value for key, value in values.items()}
        results = {name: getattr(record, name, None) for name in columns}
        results |= {metric.val: record.val, metric.test: record.test}
        for name, density in one_shot.items():
            score = record.one_shot(density)
            results[name] = None if score is None else metric.value(score)
        results["mlflow_run_id"] = run_ids.get(record.uid)
        table.append({"density": record.density, "trial": record.number, **parameters, **results})
    frame = pd.DataFrame(table)
    frame = frame.drop(columns=[name for name in one_shot if name in frame and frame[name].isna().all()])
    for name in frame.columns:
        # A section that is null in some trials (`mask: null` beside `mask.lambda1`) has an empty column.
        if frame[name].isna().all() and any(other.startswith(f"{name}.") for other in frame.columns):
            frame = frame.drop(columns=name)
        elif name not in columns and frame[name].map(type).nunique() > 1:
            frame[name] = _one_type(frame[name])
    ordered = [name for name in frame.columns if name not in columns]
    frame = frame[[*ordered, *(name for name in columns if name in frame.columns)]]
    frame.attrs["metric"] = metric.plain()
    return frame


def write(store: Store, records: list[TrialRecord], run_ids: Mapping[str, str], base: Config) -> None:
    """Write `results.parquet` and `best/density-<d>.yaml` into the sweep's folder."""
    best = best_records(records)
    for name in store.names("best"):  # left by an earlier space
        if name.removesuffix(".yaml") not in {density_name(density) for density in best}:
            store.delete_file(f"best/{name}")
    if not records:
        store.delete_file("results.parquet")
        return
    buffer = io.BytesIO()
    trials_frame(records, run_ids, base).to_parquet(buffer, index=False)
    store.write_file("results.parquet", buffer.getvalue())
    for density, record in best.items():
        store.write_file(f"best/{density_name(density)}.yaml", best_yaml(record, base, run_ids).encode())


def best_yaml(record: TrialRecord, base: Config, run_ids: Mapping[str, str]) -> str:
    """A configuration file for `prunetune.train`, with a comment that names the trial it comes from."""
    metric = metric_of(base)
    lines = [
        f"# The best of sweep {base.name!r} at density {record.density:g}: trial {record.number}, "
        f"validation {metric.text(record.val)}, test {metric.text(record.test)}.",
    ]
    if record.status == "collapsed":
        lines.append("# No trial did better than chance at this density.")
    if record.uid in run_ids:
        lines.append(f"# MLflow run {run_ids[record.uid]}")
    return "\n".join(lines) + "\n" + document.dump(trial_config(record, base).tree())


@functools.cache
def _column(key: str) -> str:
    """Return the column for a dotted key.

    Where the name of some component is all that is written (`pruning.criterion: magnitude`), the names of the
    others are in the same column, so that `magnitude` and `grasp` with a temperature are values of one
    hyperparameter. All masks have options, so theirs stays `pre_pruning.mask.method`.
    """
    path, _, field = key.rpartition(".")
    section = section_at(path)
    if section is None or not issubclass(section, Component) or field != section.key:
        return key
    kind, alone = section.kind, section.model_fields.keys() == {"name"}
    return path if alone and any(not kind.options(name).model_fields for name in kind.names) else key


def _one_type(column: pd.Series[Any]) -> pd.Series[Any]:
    """Convert numbers to floats and other mixed values to text, because a parquet column has one type."""
    present = column[column.notna()]
    if present.map(lambda value: isinstance(value, int | float) and not isinstance(value, bool)).all():
        return column.astype(float)
    if present.map(type).nunique() > 1:
        return column.map(lambda value: value if value is None or value != value else str(value))
    return column
