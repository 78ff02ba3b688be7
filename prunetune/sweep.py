"""The command `python -m prunetune.sweep CONFIG [dotted.key=value …]`: search a configuration per density."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from prunetune.cli import process

    process.begin()

import argparse
import importlib

from prunetune import pipeline
from prunetune.cli import commands, dry_run, process, summary
from prunetune.config import document
from prunetune.errors import UserError
from prunetune.store import Store
from prunetune.sweeping.opening import Opened, open_sweep


def main(arguments: list[str], steps: pipeline.Steps = pipeline.steps) -> int:
    """Run the command; return its exit code. `steps` is the pipeline that a trial runs."""
    try:
        return _main(arguments, steps)
    except KeyboardInterrupt:  # while no trial runs, or for the second time
        print(summary.interrupted(commands.command_line("sweep", arguments)), flush=True)
        return commands.EXIT_INTERRUPTED


def _main(arguments: list[str], steps: pipeline.Steps) -> int:
    given = _parser().parse_intermixed_args(arguments)
    source = document.override(document.read(given.config), given.overrides)
    console = commands.console()
    if given.dry_run and not given.gc:
        dry_run.show(source, console)
        return commands.EXIT_OK
    opened = open_sweep(source)
    if given.gc:
        return _collect_garbage(opened, dry_run=given.dry_run)
    # Ray, Optuna and MLflow take seconds to import, so mistakes in the file are reported before that.
    with process.importing():
        from prunetune.execution.ray_tune import RayTune
        from prunetune.sweeping import running

        if opened.config.tracking.uses_mlflow:
            importlib.import_module("prunetune.trackers.mlflow.tracker")
    result = running.run(opened, RayTune(), steps=steps, console=console)
    summary.sweep(console, result, arguments)
    if result.interrupted:
        return commands.EXIT_INTERRUPTED
    return commands.EXIT_OK if result.best else commands.EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(
        "sweep",
        "Search a configuration per density. Running the same command again goes on where it "
        "stopped; raising search.trials_per_density extends a finished sweep.",
        example="sweeps/digits.yaml search.trials_per_density=8",
    )
    commands.add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the space and the work, and stop")
    parser.add_argument(
        "--gc",
        action="store_true",
        help="run no trial; remove from the store what this sweep does not keep (keep: in the file) and "
        "nobody refers to; with --dry-run only say what",
    )
    return parser


def _collect_garbage(opened: Opened, *, dry_run: bool) -> int:
    """Delete, and print, what the sweep does not keep and nothing refers to; `dry_run` only prints it."""
    if opened.store.read_record("sweep") is None:
        raise UserError(f"{opened.store.path('')}: no sweep was run here, so there is nothing to remove")
    from prunetune.records import garbage
    from prunetune.records.ledger import Ledger
    from prunetune.search.queue import SweepSearch

    config, problem = opened.config, opened.problem
    with opened.held():
        ledger = Ledger(opened.store)
        found = garbage.find(config, problem, ledger, missing=len(SweepSearch(config, problem, ledger)))
        if not dry_run:
            found.remove()
    store = Store(config.storage).sub("store").path("")
    summary.garbage(commands.console(), config, found, store, dry_run=dry_run)
    return commands.EXIT_OK


if __name__ == "__main__":
    process.end(commands.run(main))
