"""Reads and writes a trained network as `model.safetensors` and `model.json`; nothing is unpickled."""

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
    """A trained network that takes inputs as the data set stores them, and returns usable answers.

    The module `before` turns stored inputs into the network's inputs, such as by normalizing them; `after`
    turns the network's outputs into answers, such as probabilities.
    """

    def __init__(self, network: nn.Module, task: tasks.Task) -> None:
        super().__init__()
        self.before = task.before()
        self.network = network
        self.after = task.after()
        self.input_shape = task.form.shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Map stored inputs (B, …) to the task's answers.

        A classifier of images takes pixels 0–255 (B, C, H, W) of any number type, and returns probabilities
        (B, classes). A regression on columns takes numbers (B, F) in their own units, and returns numbers
        (B, T) in the targets' units. Raises ValueError for inputs of another shape than the network was
        trained on.
        """
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise ValueError(
                f"inputs: shape {tuple(inputs.shape)}; (N, {', '.join(map(str, self.input_shape))}) is needed"
            )
        answers: Tensor = self.after(self.network(self.before(inputs)))
        return answers


def save_model(folder: Path, config: Config, state: dict[str, Tensor], data: Dataset) -> None:
    """Write a network's parameters and buffers, and the description needed to build it and its inputs."""
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
    """Load the network that `prunetune.train` saved in a folder, in evaluation mode, on the CPU.

    Raises UserError where the folder does not hold a saved network.
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
    named = description.get("task", "classification")  # the task of networks saved by earlier versions
    task = tasks.make(TypeAdapter(TaskConfig).validate_python(named), Form.read(description))
    network = tasks.network(config, task, seed=0)
    network.load_state_dict(tensors)
    return SparseModel(network, task).eval()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
