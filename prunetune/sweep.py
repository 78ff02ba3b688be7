"""`python -m prunetune.sweep CONFIG [dotted.key=value …]`: search, per density, to one configuration each."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from prunetune.cli import process

    process.begin()

import argparse
import functools
import math
import uuid
from typing import Any

from rich.table import Table

from prunetune import data as datasets
from prunetune import pipeline, tasks
from prunetune.cli import commands, process
from prunetune.config import document, space
from prunetune.config.canonical import digest, is_active, kept
from prunetune.config.document import Document
from prunetune.config.reading import sweep_from_document, validate
from prunetune.config.schema import Config, DataConfig
from prunetune.errors import UserError
from prunetune.records import ledger as ledgers
from prunetune.records import report as reporting
from prunetune.records import results, retention
from prunetune.records.ledger import Ledger, Problem
from prunetune.search import branching
from prunetune.stages.plan import most_epochs
from prunetune.stages.stage import FORMAT
from prunetune.store import Store


def main(arguments: list[str], steps: pipeline.Steps = pipeline.steps) -> int:
    """The command; returns its exit code. `steps` is what a trial runs."""
    try:
        return _main(arguments, steps)
    except KeyboardInterrupt:  # before the first trial, after the last one, or a second time
        again = commands.command_line("sweep", arguments)
        print(f"interrupted; everything finished so far is kept. To go on:\n  {again}", flush=True)
        return commands.EXIT_INTERRUPTED


def _main(arguments: list[str], steps: pipeline.Steps) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prunetune.sweep",
        description="Search a configuration per density. Running the same command again goes on where it "
        "stopped; raising search.trials_per_density extends a finished sweep.",
    )
    commands.add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the space and the work, and stop")
    parser.add_argument(
        "--gc",
        action="store_true",
        help="run no trial; remove from the store what this sweep does not keep (keep: in the file) and "
        "nobody refers to; with --dry-run only say what",
    )
    given = parser.parse_intermixed_args(arguments)

    source = document.override(document.read(given.config), given.overrides)
    template, config = sweep_from_document(source)
    if given.dry_run and not given.gc:
        return _dry_run(template, config, source)

    data = commands.located(source, lambda: datasets.load(config.data))
    variants = _variants(template, source)
    for variant in variants:
        there = commands.located(source, functools.partial(datasets.load, variant.data))
        commands.check_model(variant, source, there.form)
    sources = sorted({variant.model.code or "" for variant in variants})
    if (task_code := config.task.code) is not None:
        sources.append(task_code)
    code = digest(FORMAT, data.digest, sources)
    problem = Problem.of(template, code, _data_digest)
    store = Store(config.storage).sub(config.name)
    if given.gc and store.read_record("sweep") is None:
        raise UserError(f"{store.path('')}: no sweep was run here, so there is nothing to remove")
    ledgers.check_storage(store)
    with ledgers.exclusive(store):
        if given.gc:
            return _collect_garbage(config, problem, Ledger(store), dry_run=given.dry_run)
        return _sweep(config, problem, store, source, arguments, steps)


def _sweep(
    config: Config,
    problem: Problem,
    store: Store,
    source: Document,
    arguments: list[str],
    steps: pipeline.Steps,
) -> int:
    # Ray, Optuna and MLflow take seconds to import: not for a message about a typo.
    with process.importing():
        from prunetune.execution.ray_tune import RayTune
        from prunetune.execution.seam import Trials
        from prunetune.search.queue import SweepSearch
        from prunetune.trackers import live as progress
        from prunetune.trackers.mlflow import experiments
        from prunetune.trackers.mlflow import tracker as tracking

    console = commands.console()
    ledger = Ledger(store)
    header = _open(store, config, problem, ledger, console)
    stages = Store(config.storage).sub("store")
    search = SweepSearch(config, problem, ledger, lambda key: stages.has("stages", key))
    trials = len(search)
    place = experiments.place(config)
    experiments.check(place)
    tracker = tracking.Tracker(place, header["sweep_id"], config.name)
    interrupted, status = False, "failed"
    records = ledger.fitting(problem)
    storage = Store(config.storage)
    keeper = retention.Retention(
        config.keep, ledger, records, storage.sub("store"), retention.References(storage, config.name)
    )
    try:
        tracker.begin(source.tree, records)
        if trials:
            finished = sum(r.finished for r in records)
            console.print(
                f"{config.name}: {trials} trials to run"
                + (f", {finished} finished before" if finished else "")
                + f"; results in {store.path('')}",
                soft_wrap=True,
                highlight=False,
            )
            with progress.Progress(console, search, config.densities, config.name, problem.metric) as view:
                interrupted = RayTune().run(
                    Trials(commands.absolute(config), problem, search, [tracker, view, keeper], steps, source)
                )
        status = "interrupted" if interrupted else "finished"
    finally:
        records = ledger.fitting(problem)
        best = results.best_records(records)
        tracker.finish(
            status,
            {f"best_{problem.metric.val}_density_{d:g}": r.val for d, r in best.items() if r.val is not None},
            {
                f"best/{ledgers.density_name(d)}.yaml": results.best_yaml(r, config, {})
                for d, r in best.items()
            },
        )
        unwritten = tracker.close()
        finished_records = [record for record in records if record.status != "running"]
        results.write(store, finished_records, tracker.run_ids, config)
        written = reporting.write_report(store, config.name)

    keys = keeper.apply(going_on=interrupted)
    if keys is not None and not interrupted:
        store.write_record("sweep", {**header, "kept": sorted(keys)})

    console.print(progress.results_table(results.rows(finished_records, problem.metric)))
    failed = [record for record in finished_records if record.status == "failed"]
    if failed:
        first = (failed[0].error or "").strip().splitlines()
        console.print(
            f"{len(failed)} trials failed and will be tried again by the same command; the first: "
            f"{first[-1] if first else 'no message'}",
            markup=False,
        )
    if unwritten:
        console.print(
            f"MLflow at {place.uri}: {unwritten} entries could not be written (above, why); "
            "the same command tries again",
            markup=False,
        )
    again = commands.command_line("sweep", arguments)
    if interrupted:
        console.print(
            f"interrupted; everything finished so far is kept. To go on:\n  {again}",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )
        return commands.EXIT_INTERRUPTED
    for density, record in best.items():
        if record.cut_layers:
            console.print(
                f"warning: at density {density:g} the best network is cut through: no weight of "
                f"{', '.join(record.cut_layers)} is on a path from input to output",
                markup=False,
            )
    for density in sorted(best, reverse=True):
        path = store.path(f"best/{ledgers.density_name(density)}.yaml")
        train = commands.command_line("train", [path])
        console.print(f"  {train}", markup=False, soft_wrap=True, highlight=False)
    for path in written:
        console.print(f"  {path}", markup=False, soft_wrap=True, highlight=False)
    at_server = place.uri.startswith(("http://", "https://"))
    look = f"MLflow: {place.uri}" if at_server else f"mlflow ui --backend-store-uri {place.uri}"
    console.print(f"  {look}", markup=False, soft_wrap=True, highlight=False)
    return commands.EXIT_OK if best else commands.EXIT_FAILED


def _open(store: Store, config: Config, problem: Problem, ledger: Ledger, console: Any) -> dict[str, Any]:
    """The sweep's header in the store; says what a changed search space means."""
    header = store.read_record("sweep")
    if not isinstance(header, dict):
        header = {"sweep_id": uuid.uuid4().hex}
    elif header.get("space") != problem.hash:
        past = [record for record in ledger.records() if record.finished]
        fit = sum(problem.fit(record) is not None for record in past)
        console.print(f"the search space of {config.name} has changed since the last run:", markup=False)
        for line in problem.changes(header.get("described", {})):
            console.print(f"  {line}", markup=False, soft_wrap=True, highlight=False)
        console.print(
            f"{fit} of {len(past)} finished trials still fit: Optuna knows them as past results, and they "
            f"can be best; the others stay in {store.path('trials')}, out of the results. "
            f"{config.search.trials_per_density} trials per density are run in the new space.",
            markup=False,
        )
    # Until it says what it has kept, other sweeps spare all that its trials may need.
    header.update(space=problem.hash, described=problem.described, kept=None)
    store.write_record("sweep", header)
    return header


def _collect_garbage(config: Config, problem: Problem, ledger: Ledger, *, dry_run: bool) -> int:
    """Say what of the store goes and what stays, by sort."""
    from prunetune.records import garbage
    from prunetune.search.queue import SweepSearch

    found = garbage.find(config, problem, ledger, missing=len(SweepSearch(config, problem, ledger)))
    if not dry_run:
        found.remove()
    console = commands.console()
    for title, items in (("would go" if dry_run else "removed", found.garbage), ("kept", found.staying)):
        table = Table(title=title, title_justify="left")
        table.add_column(Store(config.storage).sub("store").path(""), overflow="fold")
        for name in ("number", "MB"):
            table.add_column(name, justify="right")
        for what, number, size in garbage.totals(items):
            table.add_row(what, f"{number:,}", f"{size / 1e6:,.1f}")
        table.add_section()
        table.add_row("all", f"{len(items):,}", f"{sum(item.size for item in items) / 1e6:,.1f}")
        console.print(table, markup=False)
    if not found.finished:
        console.print(f"{config.name} has trials to run: what they may start from stays", markup=False)
    return commands.EXIT_OK


@functools.cache
def _data_digest(config: DataConfig) -> str:
    return datasets.load(config).digest


def _variants(template: dict[str, Any], source: Document) -> list[Config]:
    """A configuration for each different model, data set and set of soft pieces that the space can reach."""
    seen: dict[str, Config] = {}
    for assignment in space.assignments(template, is_active):
        config = validate(space.at(template, assignment, is_active), source)
        post = config.post_pruning
        soft = post.soft_activation is None, post.soft_skip is None
        data = config.data.model_copy(update={"batch_size": 1, "augmentation": None})
        key = repr((config.model, data, soft, config.pruning))
        seen.setdefault(key, config)
    return list(seen.values())


def _dry_run(template: dict[str, Any], config: Config, source: Document) -> int:
    """Print the resolved space, the trials and the epochs; nothing is loaded that the names alone tell."""
    console = commands.console()
    parameters = space.parameters(template, is_active)
    table = Table(title=f"{config.name}: {len(parameters)} searched parameters", title_justify="left")
    table.add_column("parameter")
    table.add_column("distribution")
    for name, distribution in parameters.items():
        table.add_row(name, str(distribution))
    console.print(table, markup=False)
    fixed = {
        key: value
        for key, value in space.leaves(template).items()
        if not isinstance(value, space.Distribution)
    }
    values = Table(title="fixed", title_justify="left")
    values.add_column("key")
    values.add_column("value")
    for key, value in fixed.items():
        values.add_row(key, "null" if value is None else str(value))
    console.print(values, markup=False)

    try:
        form = datasets.form_of(config.data)
    except UserError as error:
        raise UserError(f"{source.where('data.root')}: {error}") from None
    weights = 0
    for variant in _variants(template, source):
        weights = commands.check_model(variant, source, form)
    finite = space.enumerate_finite(template, is_active)
    per_density = min(config.search.trials_per_density, len(finite) if finite is not None else 10**9)
    pre, rounds, post = most_epochs(template)
    stages = [pre, rounds, post] if rounds else [pre, post]
    trials = per_density * len(config.densities)
    task = tasks.make(config.task, form)
    kind = "images" if len(form.shape) == 3 else "inputs"
    console.print(
        f"data: {config.data.name}, {kind} {form.shape}, {task.outputs} {task.what}", highlight=False
    )
    console.print(f"model: {config.model.name}, {weights:,} prunable weights", highlight=False)
    for density in config.densities:
        console.print(
            f"  density {density:g} (sparsity {100 * (1 - density):g} %) keeps {kept(density, weights):,}",
            highlight=False,
        )
    stop = config.search.early_stopping
    console.print(
        f"{per_density} trials at each of {len(config.densities)} densities: {trials} trials, at most "
        f"{trials * sum(stages):,} epochs ({' + '.join(map(str, stages))} per trial)"
        + (" before early stopping" if stop else ""),
        highlight=False,
    )
    if pre and config.search.exploration < 1:
        explored = min(
            trials,
            max(
                branching.NETWORKS_FIRST,
                len(config.densities) * math.ceil(config.search.exploration * per_density),
            ),
        )
        console.print(
            f"about {explored} networks are pre-trained and the other trials branch from them "
            f"(search.exploration = {config.search.exploration:g}): "
            f"about {explored * pre + trials * (rounds + post):,} epochs",
            highlight=False,
        )
    return commands.EXIT_OK


if __name__ == "__main__":
    process.end(commands.run(main))
