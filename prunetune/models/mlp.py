"""The multi-layer perceptron; the paper's has the widths 784-100-100-100-100-100-10."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from prunetune.sparsity.initializers import kaiming


def he_(weight: Tensor) -> None:
    """Draw a weight by He's normal initialization, in place, seeded by the global generator."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
    with torch.no_grad():
        weight.copy_(kaiming(weight.shape, generator=generator))


class Mlp(nn.Module):
    """A perceptron: Linear and ReLU per hidden layer, then a Linear layer; inputs are flattened."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [100] * 5,
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU()) for n_in, n_out in pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                he_(module.weight)
                nn.init.zeros_(module.bias)

    def blocks(self) -> list[nn.Module]:
        """The hidden layers, which are the blocks that soft skips bridge."""
        return list(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, …), such as images or columns of a table, to outputs (B, classes)."""
        z = x.flatten(1)
        for layer in self.hidden:
            z = layer(z)
        out: Tensor = self.head(z)
        return out
