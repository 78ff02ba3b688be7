"""Image data sets in parquet files, in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from prunetune.data.dataset import Source
from prunetune.data.sources import images
from prunetune.errors import UserError


def parquet(root: str, *, image_size: images.Size | None = None) -> Source:
    """Load images in Hugging Face's layout: `train*.parquet`, and `test*` or `valid*`, below `data.root`.

    One column holds structs with the encoded `bytes` of an image, another one the integer label. With
    `image_size`, images are resized to a square with sides of this many pixels.
    """
    folder = images.folder(root)
    names = sorted(folder.rglob("*.parquet"))
    train_files = [name for name in names if name.name.startswith("train")]
    test_files = [n for n in names if n.name.startswith("test")] or [
        n for n in names if n.name.startswith("valid")
    ]
    if not train_files or not test_files:
        raise UserError(
            f"data.root = {root!r}: needs train*.parquet and test*.parquet (or valid*.parquet); "
            f"found {[name.name for name in names[:5]] or 'no parquet file'}"
        )
    train_raw, train_labels, declared = _read_parquet(train_files)
    test_raw, test_labels, _ = _read_parquet(test_files)
    channels, size = images.target(train_raw[0], image_size)
    return images.decoded(
        train_raw,
        train_labels,
        test_raw,
        test_labels,
        channels,
        size,
        declared,
        root=root,
        image_size=image_size,
    )


def _read_parquet(files: Sequence[Path]) -> tuple[list[bytes], list[int], int | None]:
    """Return (encoded images, labels, the number of classes if the file's metadata name it)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw: list[bytes] = []
    labels: list[int] = []
    declared: int | None = None
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"data.root: {file} is not a readable parquet file: {error}") from None
        images = next(
            (
                field.name
                for field in table.schema
                if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
            ),
            None,
        )
        label = next((name for name in ("label", "labels", "fine_label") if name in table.column_names), None)
        if images is None or label is None:
            raise UserError(
                f"data.root: {file}: needs a column of structs with 'bytes' and a column 'label'; "
                f"has {table.column_names}"
            )
        for row, item in enumerate(table.column(images).to_pylist()):
            if not item or item.get("bytes") is None:
                raise UserError(f"data.root: {file}: row {row} of column {images!r} has no image bytes")
            raw.append(item["bytes"])
        labels.extend(table.column(label).to_pylist())
        declared = declared or _declared_classes(table.schema.metadata, label)
    if not raw:
        raise UserError(f"data.root: {', '.join(map(str, files))}: no rows")
    wrong = next((row for row, value in enumerate(labels) if not isinstance(value, int) or value < 0), None)
    if wrong is not None:
        raise UserError(
            f"data.root: {files[0].parent}: label {labels[wrong]!r} of row {wrong}: must be 0 or more"
        )
    return raw, labels, declared


def _declared_classes(metadata: dict[bytes, bytes] | None, label: str) -> int | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return len(features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return None
