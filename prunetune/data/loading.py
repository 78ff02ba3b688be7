"""Loads the data set that the section `data` names, once per process and device."""

from __future__ import annotations

from pathlib import Path

import torch

from prunetune.config.schema import DataConfig
from prunetune.data.dataset import Dataset, Form, Source, Split, split_off_validation
from prunetune.errors import UserError


def load(config: DataConfig, device: str = "cpu") -> Dataset:
    """Load the data set on a device. All trials of a process share it, so it must not be changed.

    Raises UserError where files are missing, unreadable, or not in the expected format.
    """
    key = (_key(config), device)
    found = _loaded.get(key)
    if found is None:
        found = _load(config) if device == "cpu" else load(config, "cpu").to(torch.device(device))
    _remember(key, found)
    return found


def provide(config: DataConfig, data: Dataset) -> None:
    """Make `load` return `data` (on the CPU) for this configuration, without reading files."""
    _remember((_key(config), "cpu"), data)


def forget() -> None:
    """Let `load` read files anew, and lose what was provided."""
    _loaded.clear()


_loaded: dict[tuple[DataConfig, str], Dataset] = {}
"""The data sets used last, the latest at the end."""
_MOST_LOADED = 2


def _key(config: DataConfig) -> DataConfig:
    # Batch size and augmentation do not change the data, so trials that differ in them share the tensors.
    root = str(Path(config.root).expanduser().absolute())
    return config.model_copy(update={"batch_size": 1, "augmentation": None, "root": root})


def _remember(key: tuple[DataConfig, str], data: Dataset) -> None:
    _loaded.pop(key, None)
    while len(_loaded) >= _MOST_LOADED:
        del _loaded[next(iter(_loaded))]
    _loaded[key] = data


def _load(config: DataConfig) -> Dataset:
    source: object = config.make(config.root)
    if not isinstance(source, Source):
        given = type(source).__name__
        raise UserError(f"data.name = {config.name!r}: must return a prunetune.data.Source, not a {given}")
    training, test = source.train, source.test
    if config.augmentation is not None and training.inputs.dim() != 4:
        raise UserError(
            "data.augmentation: is for images (channels, height, width); "
            f"the inputs of {config.name} have shape {tuple(training.inputs.shape[1:])}"
        )
    for part, split in (("training", training), ("test", test)):
        if len(split) < 2:
            raise UserError(
                f"data.root = {config.root!r}: has {len(split)} {part} examples; at least 2 are needed"
            )
    if config.limit is not None:
        training, test = _first(training, config.limit), _first(test, config.limit)
    return split_off_validation(
        training, test, source.classes, fraction=config.validation_fraction, seed=config.split_seed
    )


def form_of(config: DataConfig) -> Form:
    """Return the data's form; a built-in source of known form is not loaded, and has no statistics then."""
    known: tuple[tuple[int, ...], int | None] | None = getattr(config.component, "known", None)
    return load(config).form if known is None else Form.unseen(*known)


def _first(split: Split, count: int) -> Split:
    """Take a fixed random choice of `count` examples, because files may be sorted by class."""
    if count >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.take(order[:count])
