"""Makes tables and figures from a sweep's `results.parquet`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pandas as pd

from prunetune.config.canonical import determining_fields
from prunetune.records import networks
from prunetune.records.figures import over_density
from prunetune.records.winners import Outcome, winners
from prunetune.store import Store
from prunetune.tasks import ACCURACY, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def best_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the best trials (`winners`), one per density, sorted by density from high to low."""
    metric = metric_in(frame)

    def outcome(index: int) -> Outcome:
        row: dict[Any, Any] = frame.loc[index].to_dict()
        value, nonzero = row[metric.val], row["nonzero"]
        return Outcome(
            row["density"],
            row["trial"],
            row["status"],
            metric.score(value) if pd.notna(value) else None,
            int(nonzero) if pd.notna(nonzero) else None,
        )

    found = winners(frame.index, outcome)
    return frame.loc[[found[density] for density in sorted(found, reverse=True)]]


def markdown(frame: pd.DataFrame, title: str) -> str:
    """A Markdown page: the best trial per density, trial counts by status, the winners' hyperparameters."""
    best, metric = best_rows(frame), metric_in(frame)
    lines = [f"# {title}", "", "## Best per density", ""]
    header = ["density", "sparsity", "val", "test", "nonzero", "effective density", "status", "trial"]
    lines += _table(
        header,
        [
            [
                f"{row['density']:g}",
                f"{100 * (1 - row['density']):g} %",
                metric.text(row[metric.val]),
                metric.text(row[metric.test]),
                f"{int(row['nonzero']):,}",
                f"{row['effective_density']:.3g}",
                row["status"],
                str(row["trial"]),
            ]
            for row in _records(best)
        ],
    )
    chosen = f"Chosen by validation {metric.noun}; test {metric.noun} played no part."
    lines += ["", chosen, "", "## Trials", ""]
    counts = frame.groupby(["density", "status"]).size().unstack(fill_value=0).sort_index(ascending=False)
    lines += _table(
        ["density", *counts.columns, "epochs run", "epochs reused"],
        [
            [
                f"{density:g}",
                *(str(int(count)) for count in row),
                str(int(frame.loc[frame["density"] == density, "epochs_run"].sum())),
                str(int(frame.loc[frame["density"] == density, "epochs_reused"].sum())),
            ]
            for density, row in zip(counts.index, counts.to_numpy(), strict=True)
        ],
    )
    searched = searched_columns(frame)
    if searched and len(best):
        lines += ["", "## What the winners use", ""]
        lines += _table(
            ["", *(f"{density:g}" for density in best["density"])],
            [[f"`{name}`", *(_cell(value) for value in best[name])] for name in searched],
        )
    lines += networks.section(frame, best, metric)
    return "\n".join(lines) + "\n"


def comparison(frames: dict[str, pd.DataFrame]) -> str:
    """A Markdown table that compares sweeps: a row per sweep, a column per density.

    For each sweep and density the configuration with the best mean validation value over its seeds is
    chosen. The cell shows the mean ± standard deviation (ddof 1) of its test value, and the number of seeds
    in brackets. Percentages have no % sign.
    """
    densities = sorted({float(d) for frame in frames.values() for d in frame["density"]}, reverse=True)
    rows = [
        [name, *(_over_seeds(frame[frame["density"] == density], metric_in(frame)) for density in densities)]
        for name, frame in frames.items()
    ]
    return "\n".join(_table(["sweep", *(f"d = {d:g}" for d in densities)], rows)) + "\n"


def _over_seeds(trials: pd.DataFrame, metric: Metric) -> str:
    done = trials[trials["status"].isin(["complete", "collapsed"]) & trials[metric.test].notna()]
    if not len(done):
        return ", ".join(sorted(set(trials["status"])))
    configuration = [name for name in hyperparameters(done) if name != "seed"]
    # Group by text: values may be lists, or missing where a section is null.
    groups = done.groupby(done[configuration].apply(lambda row: repr(row.tolist()), axis=1), sort=False)
    scores = groups[metric.val].mean().map(metric.score)
    best = done.loc[groups.groups[scores.idxmax()], metric.test].map(metric.shown)
    form = ".1f" if metric.percent else ".3g"
    spread = f" ± {best.std():{form}}" if len(best) > 1 else ""
    return f"{best.mean():{form}}{spread} ({len(best)})"


def read_results(store: Store) -> pd.DataFrame | None:
    """Read a sweep's `results.parquet`; None where there is none."""
    raw = store.read_file("results.parquet")
    return None if raw is None else pd.read_parquet(io.BytesIO(raw))


def metric_in(frame: pd.DataFrame) -> Metric:
    """The metric by which a table's trials are compared; accuracy where the table does not name one."""
    plain = frame.attrs.get("metric")
    return ACCURACY if plain is None else Metric.read(plain)


def searched_columns(frame: pd.DataFrame) -> list[str]:
    """The hyperparameters that differ between trials."""
    return [name for name in hyperparameters(frame) if frame[name].astype(str).nunique() > 1]


def hyperparameters(frame: pd.DataFrame) -> list[str]:
    """The columns that are values of the configuration, such as `precision` and `pre_pruning.epochs`."""
    sections = determining_fields()
    return [name for name in frame.columns if name.partition(".")[0] in sections]


def metric_figure(frame: pd.DataFrame, title: str) -> bytes:
    """A PNG figure of the metric over density: all trials on validation, the best also on test."""
    best, metric = best_rows(frame), metric_in(frame)
    done = frame[frame[metric.val].notna()]

    def draw(axes: Axes) -> None:
        for status, marker, colour in (
            ("complete", "o", "tab:blue"),
            ("stopped", "x", "tab:gray"),
            ("collapsed", "v", "tab:red"),
        ):
            some = done[done["status"] == status]
            if len(some):
                axes.scatter(
                    some["density"],
                    some[metric.val].map(metric.shown),
                    s=22,
                    marker=marker,
                    color=colour,
                    alpha=0.4,
                    label=f"trials, {status} (validation)",
                )
        axes.plot(
            best["density"], best[metric.val].map(metric.shown), color="tab:blue", label="best (validation)"
        )
        axes.plot(
            best["density"],
            best[metric.test].map(metric.shown),
            color="tab:orange",
            linestyle="--",
            marker="s",
            label="the same (test)",
        )

    return over_density(draw, best["density"], metric.axis, title)


def write_report(store: Store, name: str) -> list[str]:
    """Write `report/` into a sweep's folder from its `results.parquet`; return the paths, [] without one."""
    frame = read_results(store)
    if frame is None:
        return []
    store.write_file("report/summary.md", markdown(frame, f"Sweep {name}").encode())
    written = ["report/summary.md"]
    metric = metric_in(frame)
    if frame[metric.val].notna().any():
        figure = f"report/{metric.name}.png"
        store.write_file(figure, metric_figure(frame, name))
        written.append(figure)
        drawn = networks.figure(frame, best_rows(frame), metric, name)
        if drawn is not None:
            store.write_file("report/networks.png", drawn)
            written.append("report/networks.png")
    return [store.path(path) for path in written]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3g}"
    return "" if value is None else str(value)
