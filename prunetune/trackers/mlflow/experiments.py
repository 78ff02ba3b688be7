"""Where in MLflow a sweep's runs are, and what is written and read there beside a sweep's own course."""

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
    """Where a sweep's runs are."""

    uri: str
    experiment: str
    artifacts: str | None  # for an experiment that is made; None leaves it to the server


def place(config: Config) -> Place:
    """`tracking` of a configuration.

    By default the server of MLFLOW_TRACKING_URI, else SQLite in the run folder (`runs/` for remote storage).
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
    """Raise UserError where MLflow knows no such kind of place. Servers and databases pass, there or away."""
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
    """Every hyperparameter of a configuration by its dotted name."""
    return space.flatten({key: tree[key] for key in determining_fields() if tree.get(key) is not None})


def config_of_run(run_id: str, uri: str | None, storage: str) -> tuple[str, str] | None:
    """(text of the configuration, tracking URI) logged with a trial's run; None where no such run is found.

    Looks at `uri`, else at MLFLOW_TRACKING_URI and every `<storage>/*/mlflow.db`.
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
    """Log a finished production training as a run of its own; its id. Raises what MLflow raises."""
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
            client.set_terminated(run_id, "FAILED")  # not RUNNING for ever
        raise
    client.set_terminated(run_id)
    return run_id


def prepare_client() -> None:
    """Leave what MLflow says to its errors, and how long to try to the caller, not the HTTP client."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def experiment_id(client: MlflowClient, where: Place) -> str:
    """The id of the experiment; it is made where there is none, and restored where it was deleted."""
    found = client.get_experiment_by_name(where.experiment)
    if found is not None:
        if found.lifecycle_stage == "deleted":  # else nothing can be logged there
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    return str(client.create_experiment(where.experiment, artifact_location=where.artifacts))


def is_refusal(error: Exception) -> bool:
    """Whether trying again is of no use: not a server that is away, busy or broken."""
    if isinstance(error, MlflowException):
        return bool(error.get_http_status_code() < 500 and error.get_http_status_code() != 429)
    return not isinstance(error, OSError | OperationalError | InterfaceError)
