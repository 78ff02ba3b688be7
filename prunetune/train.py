"""`python -m prunetune.train CONFIG|--run-id ID [dotted.key=value …]`: one configuration at full budget."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from prunetune.cli import process

    process.begin()

import argparse
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from prunetune import data as datasets
from prunetune import export as deploy
from prunetune import tasks
from prunetune.cli import commands
from prunetune.config import document
from prunetune.config.document import Document
from prunetune.config.reading import from_document
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.data.batches import batch_length
from prunetune.engine.precision import prepare_process
from prunetune.errors import UserError, WorkError
from prunetune.pipeline import PipelineResult, run_pipeline
from prunetune.store import Store
from prunetune.tasks import metric_of


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prunetune.train",
        description="Train one configuration, such as a sweep's best/density-….yaml, in this process, or "
        "data-parallel with --workers. What the store has already, stages or epochs, is not trained again.",
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
    given = parser.parse_intermixed_args(arguments)

    source = _source(given)
    config = commands.absolute(from_document(source))
    if given.workers < 1:
        raise UserError(f"command line: --workers {given.workers}: must be at least 1")
    prepare_process(max(1, int(config.resources.cpus)))  # as many threads as a trial had
    data = commands.located(source, lambda: datasets.load(config.data))
    if given.workers > (examples := batch_length(data, config.data.batch_size)):
        rule = f"a batch has {examples} examples; --workers {given.workers} are too many for it"
        raise source.problem("data.batch_size", rule, config.data.batch_size)
    weights = commands.check_model(config, source, data.form)
    output = given.output or _default_output(config)
    console = commands.console()
    console.print(
        f"{config.name}: {config.model.name} with {weights:,} prunable weights on {config.data.name}, "
        f"density {config.density:g}",
        highlight=False,
    )
    try:
        result = _run(config, console, given.workers)
    except KeyboardInterrupt:
        again = commands.command_line("train", arguments)
        console.print(
            "interrupted; finished stages and the newest epoch checkpoint are kept. To go on:\n  " + again,
            markup=False,
            soft_wrap=True,
            highlight=False,
        )
        return commands.EXIT_INTERRUPTED
    if result.status == "diverged" or result.val is None or not result.masks:
        raise WorkError(f"training ended as {result.status}; there is no network to save")
    _save(output, config, result, data)
    run_id = _track(config, result, output)

    console.print(
        f"{result.status}: validation {result.metric.text(result.val)}, "
        f"test {result.metric.text(result.test)}, {result.nonzero:,} of {weights:,} weights, "
        f"effective density {result.effective_density:.3g}; {result.epochs_run} epochs trained, "
        f"{result.epochs_reused} taken from the store",
        highlight=False,
        soft_wrap=True,
    )
    for path in (output / deploy.files.WEIGHTS, output / "config.yaml", output / "metrics.json"):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print(
        f"  mlflow.pyfunc.load_model({str(output / 'mlflow_model')!r})", highlight=False, soft_wrap=True
    )
    if run_id:
        console.print(f"  MLflow run {run_id}", highlight=False)
    return commands.EXIT_OK


def _source(given: argparse.Namespace) -> Document:
    """The configuration's document: a file's, or a run's."""
    if given.run_id is None:
        if given.config is None:
            raise UserError("command line: a CONFIG file or --run-id is needed")
        return document.override(document.read(given.config), given.overrides)
    # With --run-id the first positional argument is an override, too.
    overrides = ([given.config] if given.config else []) + given.overrides
    from prunetune.trackers.mlflow import experiments

    found = experiments.config_of_run(given.run_id, given.tracking_uri, "runs")
    if found is None:
        raise UserError(
            f"command line: --run-id {given.run_id}: no run of a trial with a configuration; "
            "give the server or the sweep's database with --tracking-uri"
        )
    text, uri = found
    return document.override(document.parse(text, f"{uri} run {given.run_id}"), overrides)


def _run(config: Config, console: Console, workers: int) -> PipelineResult:
    metric = metric_of(config)

    def report(**metrics: Any) -> None:
        mask = f"  mask {metrics['mask_density']:.4f}" if "mask_density" in metrics else ""
        console.print(
            f"  {metrics['stage']:<12} epoch {metrics['stage_epoch']:>3}  loss {metrics['train_loss']:.4f}  "
            f"val {metric.text(metrics[metric.val])}{mask}" + ("  (stored)" if metrics["reused"] else ""),
            highlight=False,
        )

    owner = f"train {config.name}"
    if workers == 1:
        return run_pipeline(config, report=report, owner=owner)
    from prunetune.execution import data_parallel as distributed  # Ray takes seconds to import

    return distributed.run(config, workers, report, owner)


def _default_output(config: Config) -> Path:
    folder = Store(config.storage).sub(config.name).local_path(f"trained/density-{config.density:.12g}")
    return Path(folder) if folder else Path("trained", config.name, f"density-{config.density:.12g}")


def _save(output: Path, config: Config, result: PipelineResult, data: Dataset) -> None:
    """The network, its configuration and metrics, and the same network as an MLflow model."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from prunetune import __version__
    from prunetune.trackers.mlflow import experiments

    experiments.prepare_client()
    try:
        deploy.save_model(output, config, result.state, data)
        (output / "config.yaml").write_text(document.dump(config.tree()), encoding="utf-8")
        (output / "metrics.json").write_text(json.dumps(result.metrics(), indent=1) + "\n")
        example = data.test.inputs[:2].cpu().numpy()
        task = tasks.make(config.task, data.form)
        signature = ModelSignature(
            inputs=Schema([TensorSpec(example.dtype, (-1, *data.shape))]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, *task.output_shape))]),
        )
        final = output / "mlflow_model"
        with tempfile.TemporaryDirectory(dir=output) as scratch:
            saved = Path(scratch, "saved")
            deploy.save_model(saved, config, result.state, data)
            mlflow.pyfunc.save_model(
                path=str(Path(scratch, "model")),
                loader_module="prunetune.export.pyfunc",
                data_path=str(saved),
                signature=signature,
                input_example=example,
                pip_requirements=[f"prunetune=={__version__}"],
            )
            shutil.rmtree(final, ignore_errors=True)
            Path(scratch, "model").rename(final)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None


def _track(config: Config, result: PipelineResult, output: Path) -> str | None:
    """A run in MLflow with parameters, results and files; None, with a warning, where MLflow is away."""
    from prunetune.trackers.mlflow import experiments

    try:
        return experiments.log_training(config, result.metrics(), output)
    except Exception as error:  # the network is trained and saved; its log must not undo that
        logging.getLogger(__name__).warning("MLflow could not be written: %s", error)
        return None


if __name__ == "__main__":
    process.end(commands.run(main))
