"""Mini-batches cut from tensors that already are on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunetune.data.dataset import Dataset, Split
from prunetune.schema import AugmentationConfig


def batches(
    data: Dataset,
    batch_size: int,
    augmentation: AugmentationConfig | None,
    *,
    order: torch.Generator,
    drawn: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: normalized images (B, C, H, W) and labels (B,), in a random order.

    The last, smaller batch is left out (each epoch a different one, so nothing is never seen), unless
    there is no other. `order` is a CPU generator, `drawn` one on the data's device, for augmentation.
    """
    n = len(data.train)
    permutation = torch.randperm(n, generator=order).to(data.device)
    size = min(batch_size, n)
    for start in range(0, n - size + 1, size):
        chosen = permutation[start : start + size]
        images = data.train.images.index_select(0, chosen)  # copies whole images; indexing goes by pixel
        if augmentation is not None:
            images = augment(images, augmentation, generator=drawn)
        yield data.normalize(images), data.train.labels.index_select(0, chosen)


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """How many batches `batches` yields."""
    return max(1, len(data.train) // batch_size)


def evaluation_batches(data: Dataset, split: Split, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a split in order, normalized, nothing drawn."""
    for start in range(0, len(split), size):
        piece = slice(start, start + size)
        yield data.normalize(split.images[piece]), split.labels[piece]


def augment(images: Tensor, augmentation: AugmentationConfig, *, generator: torch.Generator) -> Tensor:
    """Pad and crop back at a random offset, then mirror with probability ½; each image on its own draw.

    Images (B, C, H, W) of any type, on the generator's device; padding is 0 (black), as torchvision's
    RandomCrop does it before normalization.
    """
    n, _, height, width = images.shape
    device = images.device
    pad = augmentation.crop_padding
    if pad:
        offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=device)
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        rows = offsets[0, :, None] + torch.arange(height, device=device)  # (B, H)
        columns = offsets[1, :, None] + torch.arange(width, device=device)  # (B, W)
        which = torch.arange(n, device=device)[:, None, None]
        # Index (B, H, W) puts the channels last; bring them back.
        images = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if augmentation.flip:
        mirrored = torch.rand(n, generator=generator, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous()
