"""Finds the configuration of a training, and saves and logs its network."""

from __future__ import annotations

import logging
from pathlib import Path

from prunetune.config import document
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.errors import UserError
from prunetune.export import saving
from prunetune.pipeline import PipelineResult
from prunetune.store import Store


def source(
    config: str | None, overrides: list[str], run_id: str | None, tracking_uri: str | None
) -> Document:
    """Read the configuration from a file, or from an MLflow run (`run_id`), and apply the overrides.

    Raises UserError where neither is given, or where there is no such run.
    """
    if run_id is None:
        if config is None:
            raise UserError("command line: a CONFIG file or --run-id is needed")
        return document.override(document.read(config), overrides)
    # With --run-id, the first positional argument is an override instead of a file.
    overrides = ([config] if config else []) + overrides
    from prunetune.trackers.mlflow import experiments

    found = experiments.config_of_run(run_id, tracking_uri, "runs")
    if found is None:
        raise UserError(
            f"command line: --run-id {run_id}: no run of a trial with a configuration; "
            "give the server or the sweep's database with --tracking-uri"
        )
    text, uri = found
    return document.override(document.parse(text, f"{uri} run {run_id}"), overrides)


def default_output(config: Config) -> Path:
    """The default folder for a trained network: in the sweep's folder, or `trained/` for remote storage."""
    folder = Store(config.storage).sub(config.name).local_path(f"trained/density-{config.density:.12g}")
    return Path(folder) if folder else Path("trained", config.name, f"density-{config.density:.12g}")


def save(output: Path, config: Config, result: PipelineResult, data: Dataset) -> list[Path]:
    """Save the network, its configuration, its metrics and an MLflow model of it; return their paths.

    Raises UserError where they cannot be written.
    """
    from prunetune.trackers.mlflow import model

    try:
        files = saving.save_training(output, config, result.state, result.metrics(), data)
        return [*files, model.save(output, config, result.state, data)]
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None


def track(config: Config, result: PipelineResult, output: Path) -> str | None:
    """Log parameters, results and files to MLflow; return the run's id.

    Returns None if MLflow is not among the trackers, or, after a warning, if it cannot be written.
    """
    if not config.tracking.uses_mlflow:
        return None
    from prunetune.trackers.mlflow import experiments

    try:
        return experiments.log_training(config, result.metrics(), output)
    except Exception as error:  # an MLflow error must not lose a trained network
        logging.getLogger(__name__).warning("MLflow could not be written: %s", error)
        return None
