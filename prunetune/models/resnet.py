"""ResNets for small images: with a 3×3 stem and without max pooling (He et al., arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from prunetune.models.mlp import he_


class BasicBlock(nn.Module):
    """A residual block: two 3×3 convolutions and a shortcut around them.

    Where shapes differ, the shortcut is a strided 1×1 convolution (`project`), or the subsampled input
    padded with zero channels (option A of the ResNet authors, without weights).
    """

    def __init__(self, n_in: int, n_out: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.relu2 = nn.ReLU()
        self.stride, self.extra = stride, n_out - n_in
        self.project = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            if project and (stride != 1 or n_in != n_out)
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n_in, H, W) to (B, n_out, H/stride, W/stride)."""
        z = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        if self.project is not None:
            shortcut = self.project(x)
        else:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        out: Tensor = self.relu2(z + shortcut)
        return out


class ResNet(nn.Module):
    """A ResNet: a stem, stages of basic blocks, the mean over positions, and a linear layer."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        widths: Sequence[int],
        depth: int,
        *,
        project: bool,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        body: list[nn.Module] = []
        n_in = widths[0]
        for stage, n_out in enumerate(widths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                body.append(BasicBlock(n_in, n_out, stride, project=project))
                n_in = n_out
        self.body = nn.ModuleList(body)
        self.head = nn.Linear(n_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                he_(module.weight)
        nn.init.zeros_(self.head.bias)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, which are the blocks that soft skips bridge."""
        return list(self.body)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes)."""
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def resnet20(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width_multiplier: Annotated[float, Field(gt=0)] = 1.0,
) -> ResNet:
    """Make a ResNet-20: three stages of three blocks, 16-32-64 channels, shortcuts without weights.

    `width_multiplier` scales the channels of every layer (He et al., arXiv 1512.03385, section 4.2).
    """
    widths = [max(1, round(w * width_multiplier)) for w in (16, 32, 64)]
    return ResNet(input_shape, num_classes, widths, 3, project=False)


def resnet18(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width_multiplier: Annotated[float, Field(gt=0)] = 1.0,
) -> ResNet:
    """Make a ResNet-18 with a 3×3 stem: four stages of two blocks, 64-128-256-512 channels.

    `width_multiplier` scales the channels of every layer.
    """
    widths = [max(1, round(w * width_multiplier)) for w in (64, 128, 256, 512)]
    return ResNet(input_shape, num_classes, widths, 2, project=True)


resnet20.is_for_images = True  # type: ignore[attr-defined]
resnet18.is_for_images = True  # type: ignore[attr-defined]
