"""Saves a trained network as an MLflow model, which `mlflow.pyfunc.load_model` and MLflow's servers load."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor

from prunetune import export, tasks
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.trackers.mlflow import experiments
from prunetune.version import __version__


def save(folder: Path, config: Config, state: dict[str, Tensor], data: Dataset) -> Path:
    """Write `mlflow_model` into an existing folder, replacing an earlier one; return its path.

    The model takes inputs as the data set stores them, such as pixels 0-255 (N, C, H, W), and returns the
    task's answers, such as probabilities (N, classes). Raises OSError where the folder cannot be written.
    """
    experiments.prepare_client()
    example = data.test.inputs[:2].cpu().numpy()
    task = tasks.make(config.task, data.form)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(example.dtype, (-1, *data.shape))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, *task.output_shape))]),
    )
    final = folder / "mlflow_model"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        saved = Path(scratch, "saved")
        export.save_model(saved, config, state, data)
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
    return final
