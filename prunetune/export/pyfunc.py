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

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> np.ndarray[Any, Any]:
        """Inputs as they are stored (N, …) to float32: class probabilities, or numbers (N, T)."""
        with torch.no_grad():
            answers = self._model(torch.as_tensor(np.asarray(inputs)))
        return np.asarray(answers.numpy())


def _load_pyfunc(path: str) -> Predictor:
    """Called by `mlflow.pyfunc.load_model` with the folder of the saved network."""
    return Predictor(load_model(path))
