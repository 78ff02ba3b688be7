"""The folder of a trained network: `model.safetensors` and `model.json`, nothing that unpickles code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from prunetune import tasks
from prunetune.config.schema import Config, ModelConfig, TaskConfig
from prunetune.data import Dataset, Form
from prunetune.errors import UserError

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
_FORMAT = 1


class SparseModel(nn.Module):
    """A trained network with what is before and after it: data as they are stored in, answers out.

    `before` brings inputs to what the network takes, `after` its outputs to answers that people can use.
    """

    def __init__(self, network: nn.Module, task: tasks.Task) -> None:
        super().__init__()
        self.before = task.before()
        self.network = network
        self.after = task.after()
        self.input_shape = task.form.shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Classification of images: pixels 0–255 (B, C, H, W), of any number type, to probabilities.

        Regression of columns: numbers (B, F) in their own units to numbers (B, T) in the targets' own. Raises
        ValueError for inputs of another shape than the network was trained on.
        """
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise ValueError(
                f"inputs: shape {tuple(inputs.shape)}; (N, {', '.join(map(str, self.input_shape))}) is needed"
            )
        answers: Tensor = self.after(self.network(self.before(inputs)))
        return answers


def save_model(folder: Path, config: Config, state: dict[str, Tensor], data: Dataset) -> None:
    """Write a network's parameters and buffers, and what is needed to build and feed it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _replace(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    description = {
        "format": _FORMAT,
        "task": config.tree()["task"],
        "model": config.tree()["model"],
        "density": config.density,
        **data.form.plain(),
    }
    _replace(folder / DESCRIPTION, json.dumps(description, indent=1).encode())


def load_model(folder: str | Path) -> SparseModel:
    """The network that `prunetune.train` saved in a folder, in evaluation mode, on the CPU.

    Raises UserError where the folder does not hold one.
    """
    root = Path(folder)
    try:
        description: dict[str, Any] = json.loads((root / DESCRIPTION).read_text())
        tensors = safetensors.torch.load_file(root / WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: holds no saved model: {error}") from None
    if description.get("format") != _FORMAT:
        raise UserError(f"{root / DESCRIPTION}: format {description.get('format')} is not known here")
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(description["model"])
    named = description.get("task", "classification")  # what earlier versions saved
    task = tasks.make(TypeAdapter(TaskConfig).validate_python(named), Form.read(description))
    network = tasks.network(config, task, seed=0)
    network.load_state_dict(tensors)
    return SparseModel(network, task).eval()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
