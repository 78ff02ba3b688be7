"""The command `python -m prunetune.train CONFIG|--run-id ID [dotted.key=value …]`: train a configuration."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from prunetune.cli import process

    process.begin()

import argparse
from pathlib import Path

from rich.console import Console

from prunetune import checks
from prunetune.cli import commands, summary, training
from prunetune.config.document import Document
from prunetune.config.reading import absolute, from_document
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.data.batches import batch_length
from prunetune.engine.precision import prepare_process
from prunetune.errors import UserError, WorkError
from prunetune.pipeline import PipelineResult, run_pipeline
from prunetune.tasks import metric_of


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    given = _parser().parse_intermixed_args(arguments)
    source = training.source(given.config, given.overrides, given.run_id, given.tracking_uri)
    config = absolute(from_document(source))
    if given.workers < 1:
        raise UserError(f"command line: --workers {given.workers}: must be at least 1")
    prepare_process(max(1, int(config.resources.cpus)))  # as many threads as a trial had
    data = checks.load_data(config, source)
    _check_workers(given.workers, config, source, data)
    weights = checks.Checks(source).model(config, data.form)
    console = commands.console()
    console.print(
        f"{config.name}: {config.model.name} with {weights:,} prunable weights on {config.data.name}, "
        f"density {config.density:g}",
        highlight=False,
    )
    try:
        result = _run(config, console, given.workers)
    except KeyboardInterrupt:
        summary.training_interrupted(console, commands.command_line("train", arguments))
        return commands.EXIT_INTERRUPTED
    if result.status == "diverged" or result.val is None or not result.masks:
        raise WorkError(f"training ended as {result.status}; there is no network to save")
    output = given.output or training.default_output(config)
    saved = training.save(output, config, result, data)
    run_id = training.track(config, result, output)
    summary.training(console, result, weights, saved, run_id)
    return commands.EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(
        "train",
        "Train one configuration, such as a sweep's best/density-….yaml, in this process, or "
        "data-parallel with --workers. What the store has already, stages or epochs, is not trained again.",
        example="runs/digits/best/density-0.1.yaml post_pruning.epochs=100",
    )
    commands.add_config_arguments(parser, required=False)
    parser.add_argument("--run-id", help="take the configuration of this MLflow run instead of a file")
    parser.add_argument("--tracking-uri", help="where --run-id is (default: MLFLOW_TRACKING_URI, runs/*/)")
    parser.add_argument("--output", type=Path, help="folder (default: <storage>/<name>/trained/density-<d>)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="share every batch among N workers on the Ray cluster, or on this machine (default: 1, no Ray)",
    )
    return parser


def _check_workers(workers: int, config: Config, source: Document, data: Dataset) -> None:
    if workers > (examples := batch_length(data, config.data.batch_size)):
        rule = f"a batch has {examples} examples; --workers {workers} are too many for it"
        raise source.problem("data.batch_size", rule, config.data.batch_size)


def _run(config: Config, console: Console, workers: int) -> PipelineResult:
    def report(**metrics: object) -> None:
        console.print(summary.epoch(metrics, metric_of(config)), highlight=False)

    owner = f"train {config.name}"
    if workers == 1:
        return run_pipeline(config, report=report, owner=owner)
    from prunetune.execution import data_parallel  # Ray takes seconds to import

    return data_parallel.run(config, workers, report, owner)


if __name__ == "__main__":
    process.end(commands.run(main))
