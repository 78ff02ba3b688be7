"""The folder of a trained network: `model.safetensors` and `model.json`, nothing that unpickles code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from prunetune import models
from prunetune.config.schema import Config, ModelConfig
from prunetune.data import Dataset
from prunetune.errors import UserError

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
_FORMAT = 1


class SparseModel(nn.Module):
    """A trained network with its normalization: pixels in, class probabilities out."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        self.input_shape = input_shape

    def forward(self, images: Tensor) -> Tensor:
        """Pixels 0–255 (B, C, H, W), of any number type, to probabilities (B, classes).

        Raises ValueError for images of another shape than the network was trained on.
        """
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"images: shape {tuple(images.shape)}; (N, {', '.join(map(str, self.input_shape))}) is needed"
            )
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        probabilities: Tensor = self.network((images.float() - mean) / std).softmax(1)
        return probabilities


def save_model(folder: Path, config: Config, state: dict[str, Tensor], data: Dataset) -> None:
    """Write a network's parameters and buffers, and what is needed to build and feed it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _replace(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    description = {
        "format": _FORMAT,
        "model": config.tree()["model"],
        "density": config.density,
        "input_shape": list(data.shape),
        "classes": data.classes,
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
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
    channels, height, width = description["input_shape"]
    network = models.build(config, (channels, height, width), description["classes"], seed=0)
    network.load_state_dict(tensors)
    model = SparseModel(
        network,
        torch.tensor(description["mean"]),
        torch.tensor(description["std"]),
        (channels, height, width),
    )
    return model.eval()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
