"""The pre-pruned networks of a sweep: how good each is at every density, before and after post-pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from prunetune.records.figures import over_density
from prunetune.tasks import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LISTED = 12
"""The table lists so many networks, those of the winners first."""
_NAME = 8
"""A network is named by so many characters of its key."""


def one_shot_columns(frame: pd.DataFrame, metric: Metric) -> dict[float, str]:
    """The columns with values right after pruning, by density from high to low."""
    densities = sorted({float(density) for density in frame["density"]}, reverse=True)
    names = {density: metric.one_shot(density) for density in densities}
    return {density: name for density, name in names.items() if name in frame}


def by_network(frame: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """A table with a row per pre-pruned network (its key), and its values right after pruning by density."""
    columns = one_shot_columns(frame, metric)
    if not columns or "network" not in frame:
        return pd.DataFrame(columns=list(columns))
    # A trial that ended before its network's last epoch has no values; `first` skips missing ones.
    found = frame[frame["network"].notna()].groupby("network", sort=False)[list(columns.values())].first()
    return found.dropna(how="all").set_axis(list(columns), axis="columns")


def section(frame: pd.DataFrame, best: pd.DataFrame, metric: Metric) -> list[str]:
    """Lines of Markdown: each network right after pruning, and its best result; [] without such values."""
    found = by_network(frame, metric)
    if not len(found):
        return []
    winners = [network for network in best["network"] if network in found.index]
    order = [*dict.fromkeys(winners), *(network for network in found.index if network not in winners)]
    results, columns = _best_results(frame, metric), one_shot_columns(frame, metric)
    trials = frame["network"].value_counts()
    lines = ["", "## Pre-trained networks", ""]
    lines += ["| network | trials | " + " | ".join(f"{d:g}" for d in found.columns) + " |"]
    lines += ["|" + "---|" * (2 + len(found.columns))]
    for network in order[:_LISTED]:
        cells = [
            f"{metric.text(value)} → {metric.text(results.get((network, density))) or '–'}"
            for density, value in zip(columns, found.loc[network], strict=True)
        ]
        lines.append(f"| `{network[:_NAME]}` | {trials[network]} | " + " | ".join(cells) + " |")
    if len(order) > _LISTED:
        lines.append(f"\n{len(order) - _LISTED} other networks are not listed.")
    noun = metric.noun
    return [
        *lines,
        "",
        f"Validation {noun} right after pruning to a density → the best after post-pruning (–: not tried).",
    ]


def figure(frame: pd.DataFrame, best: pd.DataFrame, metric: Metric, title: str) -> bytes | None:
    """A PNG figure of the networks' metric right after pruning, over density; None without such values."""
    found = by_network(frame, metric)
    if not len(found):
        return None
    winners = {network for network in best["network"] if network in found.index}
    densities = list(one_shot_columns(frame, metric))

    def draw(axes: Axes) -> None:
        for used, colour, label in (
            (False, "tab:gray", "networks right after pruning"),
            (True, "tab:blue", "networks of the best trials, right after pruning"),
        ):
            some = [network for network in found.index if (network in winners) == used]
            for index, network in enumerate(some):
                values = [metric.shown(value) for value in found.loc[network]]
                axes.plot(
                    densities,
                    values,
                    color=colour,
                    marker=".",
                    alpha=0.9 if used else 0.35,
                    label=label if index == 0 else None,
                )
        axes.plot(
            best["density"],
            best[metric.val].map(metric.shown),
            color="tab:orange",
            linestyle="--",
            marker="s",
            label="best after post-pruning",
        )

    return over_density(draw, densities, f"{metric.axis} (validation)", title)


def _best_results(frame: pd.DataFrame, metric: Metric) -> dict[tuple[str, float], float]:
    """The best value after post-pruning by network and density, of trials that have one."""
    done = frame[frame[metric.val].notna() & frame["network"].notna()]
    scores = done[metric.val].map(metric.score)
    found = scores.groupby([done["network"], done["density"]]).max()
    return {(str(key[0]), float(key[1])): metric.value(found[key]) for key in found.index}
