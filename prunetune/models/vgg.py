"""VGG-16 for small images: with batch norm, and a single linear layer at the end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from prunetune.models.mlp import he_

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class Vgg(nn.Module):
    """A VGG-16: stages of 3×3 convolutions, each followed by a 2×2 max pool; then the mean over positions.

    For 3×32×32 images and 10 classes it has 14,715,584 prunable weights (Simonyan and Zisserman,
    arXiv 1409.1556, configuration D).
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, width_multiplier: float = 1.0
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 32:
            raise ValueError(f"halves its images five times, so needs 32×32 or more; got {height}×{width}")
        convolutions: list[nn.Module] = []
        for out_channels, count in _STAGES:
            out_channels = max(1, round(out_channels * width_multiplier))
            for index in range(count):
                block = [
                    nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                ]
                if index == count - 1:
                    block.append(nn.MaxPool2d(2))
                convolutions.append(nn.Sequential(*block))
                channels = out_channels
        self.features = nn.ModuleList(convolutions)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                he_(module.weight)
        nn.init.zeros_(self.head.bias)

    def blocks(self) -> list[nn.Module]:
        """The convolutions with their norms, which are the blocks that soft skips bridge."""
        return list(self.features)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes)."""
        for block in self.features:
            x = block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def vgg16(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width_multiplier: Annotated[float, Field(gt=0)] = 1.0,
) -> Vgg:
    """Make a VGG-16 with batch norm for images (C, H, W). Raises ValueError for images below 32×32.

    `width_multiplier` scales the channels of every layer.
    """
    return Vgg(input_shape, num_classes, width_multiplier)


vgg16.is_for_images = True  # type: ignore[attr-defined]
