"""Mini-batches cut from tensors that already are on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prunetune.config.schema import AugmentationConfig
from prunetune.data.dataset import Dataset, Split

Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stored inputs and targets of a batch, as the network and the loss take them."""


def batches(
    data: Dataset,
    batch_size: int,
    augmentation: AugmentationConfig | None,
    *,
    order: torch.Generator,
    drawn: torch.Generator,
    part: slice | None = None,
    prepare: Prepare | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches in a random order: inputs (B, …) and targets (B, …).

    They are as `prepare` makes them; by default inputs are normalized and targets as they are stored.

    The last, smaller batch is left out (each epoch a different one, so nothing is never seen), unless
    there is no other. `order` is a CPU generator, `drawn` one on the data's device, for augmentation. With
    `part` that slice of each batch, as it is in the whole.
    """
    prepare = prepare or _prepared(data)
    n = len(data.train)
    permutation = torch.randperm(n, generator=order).to(data.device)
    size = batch_length(data, batch_size)
    for start in range(0, n - size + 1, size):
        chosen = permutation[start : start + size]
        if part is not None:
            chosen = chosen[part]
        inputs = data.train.inputs.index_select(0, chosen)  # copies whole images; indexing goes by pixel
        if augmentation is not None:
            inputs = augment(inputs, augmentation, generator=drawn, part=part, of=size)
        yield prepare(inputs, data.train.targets.index_select(0, chosen))


def batch_length(data: Dataset, batch_size: int) -> int:
    """How many examples each batch of `batches` has."""
    return min(batch_size, len(data.train))


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """How many batches `batches` yields."""
    return max(1, len(data.train) // batch_size)


def evaluation_batches(
    data: Dataset,
    split: Split,
    size: int = 1000,
    part: slice | None = None,
    prepare: Prepare | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a split, or a part of it, in order, nothing drawn; `prepare` as for `batches`."""
    prepare = prepare or _prepared(data)
    first, last = (0, len(split)) if part is None else (part.start, part.stop)
    for start in range(first, last, size):
        piece = slice(start, min(start + size, last))
        yield prepare(split.inputs[piece], split.targets[piece])


def _prepared(data: Dataset) -> Prepare:
    return lambda inputs, targets: (data.normalize(inputs), targets)


def augment(
    images: Tensor,
    augmentation: AugmentationConfig,
    *,
    generator: torch.Generator,
    part: slice | None = None,
    of: int | None = None,
) -> Tensor:
    """Pad and crop back at a random offset, then mirror with probability ½; each image on its own draw.

    Images (B, C, H, W) of any type, on the generator's device; padding is 0 (black), as torchvision's
    RandomCrop does it before normalization. Where they are only a `part` of a batch `of` so many, each gets
    what is drawn for it in the whole.
    """
    n, _, height, width = images.shape
    n = n if of is None else of
    part = slice(n) if part is None else part
    device = images.device
    pad = augmentation.crop_padding
    if pad:
        offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=device)[:, part]
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        rows = offsets[0, :, None] + torch.arange(height, device=device)  # (B, H)
        columns = offsets[1, :, None] + torch.arange(width, device=device)  # (B, W)
        which = torch.arange(len(images), device=device)[:, None, None]
        # Index (B, H, W) puts the channels last; bring them back.
        images = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if augmentation.flip:
        mirrored = torch.rand(n, generator=generator, device=device)[part] < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous()
