"""A small vision transformer, whose attention projections are plain Linear layers and so can be pruned."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key, value and output projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        q, k, v = (
            projection(z).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, D/heads)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm transformer block with a ReLU perceptron of four times the width.

    It has ReLU instead of GELU, so that the soft activation can replace it and ends at the original network.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        z = z + self.attention(self.norm1(z))
        out: Tensor = z + self.mlp(self.norm2(z))
        return out


class VitTiny(nn.Module):
    """A vision transformer: patches by a strided convolution, learnt positions, blocks, the mean over tokens.

    With the default options it has 3,992,448 prunable weights on 3×32×32 images. It follows ViT-Ti
    (Touvron et al., arXiv 2012.12877), with 9 blocks instead of 12.
    """

    is_for_images = True

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch: Annotated[int, Field(ge=1)] = 4,
        dim: Annotated[int, Field(ge=1)] = 192,
        depth: Annotated[int, Field(ge=1)] = 9,
        heads: Annotated[int, Field(ge=1)] = 3,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if height % patch or width % patch:
            raise ValueError(f"patch = {patch}: must divide the images' height and width, {height}×{width}")
        if dim % heads:
            raise ValueError(f"heads = {heads}: must divide dim = {dim}")
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (height // patch) * (width // patch), dim) * 0.02)
        self.body = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, which are the blocks that soft skips bridge."""
        return list(self.body)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes)."""
        z = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.body:
            z = block(z)
        out: Tensor = self.head(self.norm(z).mean(1))
        return out
