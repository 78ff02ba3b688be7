"""How MLflow loads a saved network: the `loader_module` of its model, so nothing is pickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prunetune.export.files import SparseModel, load_model


class Predictor:
    """MLflow's python-function interface."""

    def __init__(self, model: SparseModel) -> None:
        self._model = model

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> np.ndarray[Any, Any]:
        """Pixels 0–255 (N, C, H, W) to class probabilities (N, classes) float32."""
        with torch.no_grad():
            probabilities = self._model(torch.as_tensor(np.asarray(images)))
        return np.asarray(probabilities.numpy())


def _load_pyfunc(path: str) -> Predictor:
    """Called by `mlflow.pyfunc.load_model` with the folder of the saved network."""
    return Predictor(load_model(path))
