"""Read and write the parameters and buffers of a network by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """Return the model's parameters and buffers by name; they share memory with the model."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def load_state(model: nn.Module, tensors: State) -> None:
    """Copy stored parameters and buffers into a model, in place."""
    with torch.no_grad():
        for name, tensor in state_of(model).items():
            tensor.copy_(tensors[name])
