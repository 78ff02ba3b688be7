"""Mini-batches of tensors that are already on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prunetune.config.schema import AugmentationConfig
from prunetune.data.dataset import Dataset, Split

Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function that turns a batch's stored inputs and targets into those that network and loss take."""


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
    """Yield one epoch of training batches in a random order: inputs (B, …) and targets (B, …).

    `prepare` is applied to each; by default inputs are normalized and targets are as stored.

    The last, smaller batch is left out, unless it is the only one; it has other examples in each epoch, so
    every example is seen. `order` is a CPU generator; `drawn` is a generator on the data's device, for
    augmentation. With `part`, only that slice of each batch is yielded, as it is in the whole batch.
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
    """The number of examples in each batch of `batches`."""
    return min(batch_size, len(data.train))


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """The number of batches that `batches` yields."""
    return max(1, len(data.train) // batch_size)


def evaluation_batches(
    data: Dataset,
    split: Split,
    size: int = 1000,
    part: slice | None = None,
    prepare: Prepare | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a split, or of a part of it, in order and without augmentation.

    `prepare` is as for `batches`.
    """
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
    """Pad each image and crop it back at a random offset, then mirror it with probability ½.

    `images` (B, C, H, W) may have any type and are on the generator's device. The padding is 0 (black), as in
    torchvision's RandomCrop before normalization. If they are only a `part` of a batch `of` that many images,
    each image gets the random numbers that it would get in the whole batch.
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
