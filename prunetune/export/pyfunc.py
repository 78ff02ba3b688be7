"""The `loader_module` with which MLflow loads a saved network, so that no code is pickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prunetune.export.files import SparseModel, load_model


class Predictor:
    """A loaded network with the interface of MLflow's python functions."""

    def __init__(self, model: SparseModel) -> None:
        self._model = model

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> np.ndarray[Any, Any]:
        """Map inputs as stored (N, …) to float32 answers: class probabilities, or numbers (N, T)."""
        with torch.no_grad():
            answers = self._model(torch.as_tensor(np.asarray(inputs)))
        return np.asarray(answers.numpy())


def _load_pyfunc(path: str) -> Predictor:
    """Load the network in a folder; `mlflow.pyfunc.load_model` calls this function by its name."""
    return Predictor(load_model(path))
