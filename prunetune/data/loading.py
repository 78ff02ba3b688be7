"""Reading and decoding each source named in `data.name`, once per process and device."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunetune.config.schema import DataConfig
from prunetune.data.dataset import Dataset, Split, split_off_validation
from prunetune.errors import UserError

_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def load(config: DataConfig, device: str = "cpu") -> Dataset:
    """The data set on a device; the trials of a process share it, so treat it as read-only.

    Raises UserError where files are missing, unreadable, or not what the format says.
    """
    key = (_key(config), device)
    found = _loaded.get(key)
    if found is None:
        found = _load(config) if device == "cpu" else load(config, "cpu").to(torch.device(device))
    _remember(key, found)
    return found


def provide(config: DataConfig, data: Dataset) -> None:
    """Let `load` give `data` (on the CPU) for this configuration, as if it had read the files."""
    _remember((_key(config), "cpu"), data)


_loaded: dict[tuple[DataConfig, str], Dataset] = {}
"""The last ones used, the latest at the end."""
_MOST_LOADED = 2


def _key(config: DataConfig) -> DataConfig:
    # How batches are cut does not matter here, so that trials which differ in it share the tensors.
    root = str(Path(config.root).expanduser().absolute())
    return config.model_copy(update={"batch_size": 1, "augmentation": None, "root": root})


def _remember(key: tuple[DataConfig, str], data: Dataset) -> None:
    _loaded.pop(key, None)
    while len(_loaded) >= _MOST_LOADED:
        del _loaded[next(iter(_loaded))]
    _loaded[key] = data


def _load(config: DataConfig) -> Dataset:
    training, test, classes = DATASETS[config.name](config)
    for part, split in (("training", training), ("test", test)):
        if len(split) < 2:
            raise UserError(
                f"data.root = {config.root!r}: has {len(split)} {part} images; at least 2 are needed"
            )
    if config.limit is not None:
        training, test = _first(training, config.limit), _first(test, config.limit)
    return split_off_validation(
        training, test, classes, fraction=config.validation_fraction, seed=config.split_seed
    )


def shape_of(config: DataConfig) -> tuple[tuple[int, int, int], int]:
    """((C, H, W), classes) without loading, where the name alone says it; else from the loaded data."""
    known = {
        "digits": ((1, 8, 8), 10),
        "mnist": ((1, 28, 28), 10),
        "fashion_mnist": ((1, 28, 28), 10),
        "cifar10": ((3, 32, 32), 10),
        "cifar100": ((3, 32, 32), 100),
    }
    if config.name in known:
        return known[config.name]
    data = load(config)
    return data.shape, data.classes


def _digits(config: DataConfig) -> tuple[Split, Split, int]:
    """scikit-learn's 1,797 handwritten digits, 8×8; a fixed random fifth of them is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    whole = Split(images, labels)
    return whole.take(order[360:]), whole.take(order[:360]), 10


def _torchvision(config: DataConfig) -> tuple[Split, Split, int]:
    """MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 through torchvision, downloaded where missing."""
    from torchvision import datasets

    constructors = {
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }
    constructor = constructors[config.name]
    splits = []
    for train in (True, False):
        try:
            source = constructor(config.root, train=train, download=False)
        except RuntimeError:
            try:
                source = constructor(config.root, train=train, download=True)
            except Exception as error:
                raise UserError(
                    f"data.root = {config.root!r}: {config.name} is not there, and downloading it failed "
                    f"({type(error).__name__}: {error}); put torchvision's files there, or give the folder "
                    "that has them as data.root"
                ) from None
        except Exception as error:
            raise UserError(
                f"data.root = {config.root!r}: the files of {config.name} cannot be read: {error}"
            ) from None
        images = torch.as_tensor(np.asarray(source.data))
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        splits.append(Split(images.contiguous(), torch.as_tensor(source.targets).long()))
    return splits[0], splits[1], 100 if config.name == "cifar100" else 10


def _parquet(config: DataConfig) -> tuple[Split, Split, int]:
    """Hugging Face's image layout: `train*.parquet`, and `test*` or `valid*`, below `data.root`.

    One column holds structs with the encoded `bytes` of an image, one the integer label.
    """
    root = _folder(config)
    names = sorted(root.rglob("*.parquet"))
    train_files = [name for name in names if name.name.startswith("train")]
    test_files = [n for n in names if n.name.startswith("test")] or [
        n for n in names if n.name.startswith("valid")
    ]
    if not train_files or not test_files:
        raise UserError(
            f"data.root = {config.root!r}: needs train*.parquet and test*.parquet (or valid*.parquet); "
            f"found {[name.name for name in names[:5]] or 'no parquet file'}"
        )
    train_raw, train_labels, declared = _read_parquet(train_files)
    test_raw, test_labels, _ = _read_parquet(test_files)
    channels, size = _target(train_raw[0], config)
    return _splits(train_raw, train_labels, test_raw, test_labels, channels, size, config, declared)


def _image_folder(config: DataConfig) -> tuple[Split, Split, int]:
    """`root/train/<class>/…` and `root/test/<class>/…` (or `val`, `valid`): a folder of images per class."""
    root = _folder(config)
    train_root = root / "train"
    test_root = next((root / name for name in ("test", "val", "valid") if (root / name).is_dir()), None)
    if not train_root.is_dir() or test_root is None:
        raise UserError(
            f"data.root = {config.root!r}: needs the folders train/<class>/ and test/<class>/ (or val/); "
            f"found {sorted(p.name for p in root.iterdir())[:5]}"
        )
    classes = sorted(p.name for p in train_root.iterdir() if p.is_dir())
    if len(classes) < 2:
        raise UserError(
            f"data.root = {config.root!r}: {train_root} has {len(classes)} class folders; 2 are needed"
        )
    extra = sorted({p.name for p in test_root.iterdir() if p.is_dir()} - set(classes))
    if extra:
        raise UserError(
            f"data.root = {config.root!r}: class {extra[0]!r} is in {test_root} but not in {train_root}"
        )

    def files(folder: Path) -> tuple[list[Any], list[int]]:
        found = [
            (path, index)
            for index, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in _IMAGE_ENDINGS
        ]
        if not found:
            raise UserError(f"data.root = {config.root!r}: no images below {folder}")
        return [path for path, _ in found], [index for _, index in found]

    train_files, train_labels = files(train_root)
    test_files, test_labels = files(test_root)
    channels, size = _target(train_files[0], config)
    return _splits(train_files, train_labels, test_files, test_labels, channels, size, config, len(classes))


Loader = Callable[[DataConfig], tuple[Split, Split, int]]

DATASETS: dict[str, Loader] = {
    "digits": _digits,
    "mnist": _torchvision,
    "fashion_mnist": _torchvision,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "parquet": _parquet,
    "image_folder": _image_folder,
}
"""Loaders by `data.name`: a configuration to (training, test, number of classes)."""


def _folder(config: DataConfig) -> Path:
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root = {config.root!r}: no such folder (looked for {root.absolute()})")
    return root


def _first(split: Split, count: int) -> Split:
    """A fixed random choice of `count` examples: the first ones of a file may be sorted by class."""
    if count >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.take(order[:count])


def _read_parquet(files: Sequence[Path]) -> tuple[list[bytes], list[int], int | None]:
    """Encoded images, labels, and the number of classes where the file's metadata declares it."""
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


def _target(first: Any, config: DataConfig) -> tuple[int, tuple[int, int]]:
    """Channels and (height, width) that all images are brought to: the first one's, unless configured."""
    image = _open(first)
    channels = 1 if image.mode in ("1", "L", "I", "F", "I;16") else 3
    side = config.image_size
    return channels, (side, side) if side else (image.height, image.width)


def _open(source: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # as its decoders raise
        name = "an image's bytes" if isinstance(source, bytes) else source
        raise UserError(f"data.root: {name} cannot be decoded: {error}") from None
    return image


def _splits(
    train_raw: Sequence[Any],
    train_labels: Sequence[int],
    test_raw: Sequence[Any],
    test_labels: Sequence[int],
    channels: int,
    size: tuple[int, int],
    config: DataConfig,
    declared: int | None,
) -> tuple[Split, Split, int]:
    classes = max(declared or 0, max(train_labels) + 1, max(test_labels) + 1)
    if declared and classes > declared:
        raise UserError(
            f"data.root = {config.root!r}: has label {classes - 1}, but its metadata names {declared} classes"
        )
    return (
        Split(_decode(train_raw, channels, size, config), torch.tensor(train_labels)),
        Split(_decode(test_raw, channels, size, config), torch.tensor(test_labels)),
        classes,
    )


def _decode(sources: Sequence[Any], channels: int, size: tuple[int, int], config: DataConfig) -> torch.Tensor:
    """All images as one tensor (N, C, H, W) uint8. Raises UserError for sizes that differ and may not."""
    from PIL import Image

    height, width = size
    out = torch.empty((len(sources), channels, height, width), dtype=torch.uint8)
    for index, source in enumerate(sources):
        image = _open(source).convert("L" if channels == 1 else "RGB")
        if (image.height, image.width) != size:
            if config.image_size is None:
                name = f"image {index}" if isinstance(source, bytes) else source
                raise UserError(
                    f"data.root = {config.root!r}: {name} is {image.height}×{image.width}, the first one "
                    f"{height}×{width}; give data.image_size to resize them all"
                )
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image))
        out[index] = pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)
    return out
