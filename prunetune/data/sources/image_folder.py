"""Image data sets with a folder of images for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.data.dataset import Source
from prunetune.data.sources import images
from prunetune.errors import UserError

_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def image_folder(root: str, *, image_size: images.Size | None = None) -> Source:
    """Load images from `root/train/<class>/…` and `root/test/<class>/…` (or `val`, `valid`).

    With `image_size`, images are resized to a square with sides of this many pixels.
    """
    top = images.folder(root)
    train_root = top / "train"
    test_root = next((top / name for name in ("test", "val", "valid") if (top / name).is_dir()), None)
    if not train_root.is_dir() or test_root is None:
        raise UserError(
            f"data.root = {root!r}: needs the folders train/<class>/ and test/<class>/ (or val/); "
            f"found {sorted(p.name for p in top.iterdir())[:5]}"
        )
    classes = sorted(p.name for p in train_root.iterdir() if p.is_dir())
    if len(classes) < 2:
        raise UserError(f"data.root = {root!r}: {train_root} has {len(classes)} class folders; 2 are needed")
    extra = sorted({p.name for p in test_root.iterdir() if p.is_dir()} - set(classes))
    if extra:
        raise UserError(f"data.root = {root!r}: class {extra[0]!r} is in {test_root} but not in {train_root}")

    def files(folder: Path) -> tuple[list[Any], list[int]]:
        found = [
            (path, index)
            for index, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in _IMAGE_ENDINGS
        ]
        if not found:
            raise UserError(f"data.root = {root!r}: no images below {folder}")
        return [path for path, _ in found], [index for _, index in found]

    train_files, train_labels = files(train_root)
    test_files, test_labels = files(test_root)
    channels, size = images.target(train_files[0], image_size)
    return images.decoded(
        train_files,
        train_labels,
        test_files,
        test_labels,
        channels,
        size,
        len(classes),
        root=root,
        image_size=image_size,
    )
