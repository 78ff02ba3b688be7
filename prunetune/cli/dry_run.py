"""Prints what `prunetune.sweep --dry-run` shows: the search space, the trials and the epochs."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from prunetune import checks
from prunetune.config import space
from prunetune.config.canonical import is_active, kept
from prunetune.config.document import Document
from prunetune.config.reading import sweep_from_document
from prunetune.config.schema import Config
from prunetune.search import branching
from prunetune.stages.plan import most_epochs
from prunetune.sweeping.opening import configurations


def show(source: Document, console: Console) -> None:
    """Print the search space, the trials and the epochs; load data only if the source's name says too little.

    Raises UserError where the file is wrong, or where models do not fit the data.
    """
    template, config = sweep_from_document(source)
    console.print(_parameters(template, config.name), markup=False)
    console.print(_fixed(template), markup=False)
    form = checks.form_of_data(config, source)
    fits = checks.Checks(source)
    weights = fits.model(config, form)
    for found in configurations(template, source):
        fits.model(found, form)
    task = fits.task(config, form)
    kind = "images" if len(form.shape) == 3 else "inputs"
    lines = [
        f"data: {config.data.name}, {kind} {form.shape}, {task.outputs} {task.what}",
        f"model: {config.model.name}, {weights:,} prunable weights",
        *(
            f"  density {density:g} (sparsity {100 * (1 - density):g} %) keeps {kept(density, weights):,}"
            for density in config.densities
        ),
        *_work(template, config),
    ]
    for line in lines:
        console.print(line, highlight=False)


def _parameters(template: dict[str, Any], name: str) -> Table:
    parameters = space.parameters(template, is_active)
    table = Table(title=f"{name}: {len(parameters)} searched parameters", title_justify="left")
    table.add_column("parameter")
    table.add_column("distribution")
    for parameter, distribution in parameters.items():
        table.add_row(parameter, str(distribution))
    return table


def _fixed(template: dict[str, Any]) -> Table:
    table = Table(title="fixed", title_justify="left")
    table.add_column("key")
    table.add_column("value")
    for key, value in space.leaves(template).items():
        if not isinstance(value, space.Distribution):
            table.add_row(key, "null" if value is None else str(value))
    return table


def _work(template: dict[str, Any], config: Config) -> list[str]:
    """Return lines that say how many trials, pre-trained networks and epochs the sweep has."""
    search, densities = config.search, len(config.densities)
    finite = space.enumerate_finite(template, is_active)
    per_density = min(search.trials_per_density, len(finite) if finite is not None else 10**9)
    pre, rounds, post = most_epochs(template)
    stages = [pre, rounds, post] if rounds else [pre, post]
    trials = per_density * densities
    lines = [
        f"{per_density} trials at each of {densities} densities: {trials} trials, at most "
        f"{trials * sum(stages):,} epochs ({' + '.join(map(str, stages))} per trial)"
        + (" before early stopping" if search.early_stopping else "")
    ]
    if pre and search.exploration < 1:
        share = densities * math.ceil(search.exploration * per_density)
        explored = min(trials, max(branching.NETWORKS_FIRST, share))
        lines.append(
            f"about {explored} networks are pre-trained and the other trials branch from them "
            f"(search.exploration = {search.exploration:g}): "
            f"about {explored * pre + trials * (rounds + post):,} epochs"
        )
    return lines
