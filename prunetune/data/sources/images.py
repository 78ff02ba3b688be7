"""Decodes image files into one tensor, for the data sources that read images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from prunetune.data.dataset import Source, Split
from prunetune.errors import UserError

Size = Annotated[int, Field(ge=1)]
"""The height and width, in pixels, to which images are resized."""


def folder(root: str) -> Path:
    """Return `data.root` as a path. Raises UserError where there is no such folder."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"data.root = {root!r}: no such folder (looked for {path.absolute()})")
    return path


def target(first: Any, image_size: int | None) -> tuple[int, tuple[int, int]]:
    """Return (channels, (height, width)) for all images: those of the first one, or `image_size`."""
    image = _open(first)
    channels = 1 if image.mode in ("1", "L", "I", "F", "I;16") else 3
    return channels, (image_size, image_size) if image_size else (image.height, image.width)


def _open(source: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # as decoders raise
        name = "an image's bytes" if isinstance(source, bytes) else source
        raise UserError(f"data.root: {name} cannot be decoded: {error}") from None
    return image


def decoded(
    train_raw: Sequence[Any],
    train_labels: Sequence[int],
    test_raw: Sequence[Any],
    test_labels: Sequence[int],
    channels: int,
    size: tuple[int, int],
    declared: int | None,
    *,
    root: str,
    image_size: int | None,
) -> Source:
    """Decode both splits; `declared` is the number of classes if the files' metadata name it."""
    classes = max(declared or 0, max(train_labels) + 1, max(test_labels) + 1)
    if declared and classes > declared:
        raise UserError(
            f"data.root = {root!r}: has label {classes - 1}, but its metadata names {declared} classes"
        )
    return Source(
        Split(_decode(train_raw, channels, size, root, image_size), torch.tensor(train_labels)),
        Split(_decode(test_raw, channels, size, root, image_size), torch.tensor(test_labels)),
        classes,
    )


def _decode(
    sources: Sequence[Any], channels: int, size: tuple[int, int], root: str, image_size: int | None
) -> torch.Tensor:
    """Decode images to (N, C, H, W) uint8. Raises UserError if sizes differ and `image_size` is None."""
    from PIL import Image

    height, width = size
    out = torch.empty((len(sources), channels, height, width), dtype=torch.uint8)
    for index, source in enumerate(sources):
        image = _open(source).convert("L" if channels == 1 else "RGB")
        if (image.height, image.width) != size:
            if image_size is None:
                name = f"image {index}" if isinstance(source, bytes) else source
                raise UserError(
                    f"data.root = {root!r}: {name} is {image.height}×{image.width}, the first one "
                    f"{height}×{width}; give data.image_size to resize them all"
                )
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image))
        out[index] = pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)
    return out
