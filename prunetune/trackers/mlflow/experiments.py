"""Finds a sweep's experiment in MLflow, reads configurations from it, and logs single trainings."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy.exc import InterfaceError, OperationalError

from prunetune.config import space
from prunetune.config.canonical import determining_fields
from prunetune.config.schema import Config
from prunetune.errors import UserError
from prunetune.store import Store


@dataclass(frozen=True)
class Place:
    """The tracking URI and the experiment that hold a sweep's runs."""

    uri: str
    experiment: str
    artifacts: str | None  # URI of the artifacts of a new experiment; None: the server chooses


def place(config: Config) -> Place:
    """Return the place that `tracking` of a configuration names.

    By default it is the server of MLFLOW_TRACKING_URI, else an SQLite file in the sweep's folder (or in
    `runs/<name>` for remote storage).
    """
    experiment = config.tracking.experiment or config.name
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return Place(uri, experiment, None)
    folder = Store(config.storage).sub(config.name).local_path("")
    root = Path(folder if folder is not None else Path("runs", config.name)).absolute()
    root.mkdir(parents=True, exist_ok=True)
    return Place(f"sqlite:///{root / 'mlflow.db'}", experiment, (root / "mlartifacts").as_uri())


def check(where: Place) -> None:
    """Raise UserError where MLflow cannot handle the URI. URIs of servers and databases pass untested."""
    if where.uri.startswith(("http://", "https://", "databricks", *DATABASE_ENGINES)):
        return
    try:
        MlflowClient(where.uri).search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        if isinstance(error, OSError) or is_refusal(error):
            raise UserError(
                f"tracking.uri (or MLFLOW_TRACKING_URI) = {where.uri!r}: {str(error).splitlines()[0]}"
            ) from None


def hyperparameters(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a configuration tree by their dotted names."""
    return space.flatten({key: tree[key] for key in determining_fields() if tree.get(key) is not None})


def config_of_run(run_id: str, uri: str | None, storage: str) -> tuple[str, str] | None:
    """Find a trial's run; return (text of its configuration, tracking URI), or None if there is no such run.

    Looks at `uri`, or without one at MLFLOW_TRACKING_URI and every `<storage>/*/mlflow.db`.
    """
    candidates = [uri] if uri else []
    if not uri:
        if mlflow.is_tracking_uri_set():
            candidates.append(mlflow.get_tracking_uri())
        candidates += [f"sqlite:///{path.absolute()}" for path in sorted(Path(storage).glob("*/mlflow.db"))]
    for candidate in candidates:
        try:
            MlflowClient(candidate).get_run(run_id)
            path = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="config.yaml", tracking_uri=candidate
            )
            return Path(path).read_text(encoding="utf-8"), candidate
        except (MlflowException, OSError):
            continue
    return None


def log_training(config: Config, metrics: dict[str, Any], files: Path) -> str:
    """Log a finished training as a run of its own; return the run's id. Raises MLflow's exceptions."""
    prepare_client()
    where = place(config)
    client = MlflowClient(where.uri)
    run_id = str(
        client.create_run(
            experiment_id(client, where),
            run_name=f"train d={config.density:g}",
            tags={"density": f"{config.density:g}", "stage": "production", "status": metrics["status"]},
        ).info.run_id
    )
    parameters = {"density": config.density, **hyperparameters(config.tree())}
    now = int(time.time() * 1000)
    try:
        client.log_batch(
            run_id,
            params=[Param(name, str(value)) for name, value in parameters.items()],
            metrics=[
                Metric(name, float(value), now, 0)
                for name, value in metrics.items()
                if isinstance(value, int | float)
            ],
        )
        client.log_artifacts(run_id, str(files))
    except Exception:
        with suppress(Exception):
            client.set_terminated(run_id, "FAILED")  # else the run would stay RUNNING
        raise
    client.set_terminated(run_id)
    return run_id


def prepare_client() -> None:
    """Silence MLflow's logs, and limit its HTTP client's retries, because the callers retry themselves."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def experiment_id(client: MlflowClient, where: Place) -> str:
    """Return the experiment's id; make the experiment if it is missing, restore it if it was deleted."""
    found = client.get_experiment_by_name(where.experiment)
    if found is not None:
        if found.lifecycle_stage == "deleted":  # else nothing can be logged there
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    return str(client.create_experiment(where.experiment, artifact_location=where.artifacts))


def is_refusal(error: Exception) -> bool:
    """Whether a retry is useless: the server refused, rather than being unavailable, busy or broken."""
    if isinstance(error, MlflowException):
        return bool(error.get_http_status_code() < 500 and error.get_http_status_code() != 429)
    return not isinstance(error, OSError | OperationalError | InterfaceError)
