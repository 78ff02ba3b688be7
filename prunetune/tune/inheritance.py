"""Decides what a trial inherits from its own or another's checkpoint, and the keys of its stages then."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from prunetune.config import space
from prunetune.config.canonical import canonical, determining, digest
from prunetune.config.document import Document
from prunetune.config.reading import validate
from prunetune.config.schema import Config

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class UnderWay:
    """The newest epoch of a running stage: the stage's key, and the checkpoint from which it resumes."""

    key: str
    tensors: Mapping[str, Tensor]
    meta: dict[str, Any]


@final
@dataclass(frozen=True)
class Inheritance:
    """Maps the keys of a configuration's stages to the keys under which a trial stores them.

    A trial that has inherited something which its configuration does not give has a `mark`, the hash of what
    it has inherited; `taken` maps the keys of finished stages that it has inherited to their keys in the
    store.
    """

    mark: str | None = None
    taken: Mapping[str, str] = field(default_factory=dict)

    def stored_as(self, key: str) -> str:
        """Return the key in the store for a stage with this key of the configuration."""
        if key in self.taken:
            return self.taken[key]
        return key if self.mark is None else digest("inherited", self.mark, key)


@final
@dataclass(frozen=True)
class Position:
    """A trial's progress as its checkpoint records it, besides the epoch of the running stage.

    `keys` maps the names of its configuration's stages to their keys; `finished` and `under_way` are such
    names. `reported` counts the epochs that were reported to Tune. `mark` and `taken` are its `Inheritance`.
    """

    config: dict[str, Any]
    keys: dict[str, str]
    finished: list[str]
    under_way: str | None
    reported: int
    mark: str | None
    taken: dict[str, str]


def gone_on_from(
    position: Position, epoch: UnderWay | None, config: Config, keys: Mapping[str, str], source: Document
) -> tuple[Inheritance, UnderWay | None]:
    """Decide how a configuration, with these stage keys, resumes a trial of itself or of another one.

    Returns (its inheritance, the epoch from which the running stage resumes or None). Raises ConfigError,
    with the places of `source`, where the other configuration has another network or other data.
    """
    old = validate(position.config, Document("the checkpoint's configuration", {}))
    _check_same_network(old, config, source)
    before = Inheritance(position.mark, position.taken)
    finished = [name for name in position.finished if _is_of_use(name, position, old, config, keys)]
    name, begun = position.under_way, None
    if name is not None and epoch is not None and _is_of_use(name, position, old, config, keys):
        begun = _fitting(epoch, name, old, config, keys[name])
    kept = [*finished, name] if begun is not None and name is not None else finished
    if not kept:
        if position.reported:
            logger.warning(
                "nothing of the checkpoint can be gone on from; the trial begins at its first epoch"
            )
        return Inheritance(), None
    # An inheritance can be kept only as a whole, because its mark is a hash of all that was inherited, the
    # epoch included.
    is_whole = len(kept) == len(position.finished) + (name is not None)
    if all(keys[name] == position.keys[name] for name in kept) and (is_whole or before.mark is None):
        return before, begun
    stored = {name: before.stored_as(position.keys[name]) for name in kept}
    epochs = len(begun.meta["curve"]) if begun is not None else 0
    mark = digest([(keys[name], stored[name]) for name in kept], epochs)
    return Inheritance(mark, {keys[name]: stored[name] for name in finished}), begun


def _is_of_use(name: str, position: Position, old: Config, config: Config, keys: Mapping[str, str]) -> bool:
    """Whether this configuration can use the other trial's result or epoch of the stage with this name."""
    if keys.get(name) == position.keys[name]:
        return True
    if name not in keys or (old.pre_pruning is None) != (config.pre_pruning is None):
        return False
    asked, before = ((c.density, canonical(c.pruning)) for c in (config, old))
    return _is_pre_pruning(name) or asked == before


def _is_pre_pruning(name: str) -> bool:
    """Whether the name is that of the pre-pruning stage, or of its beginning, used for rewinding."""
    return name.startswith("pre_pruning")


_MOMENTS = "optimizer0."
"""The prefix of the weights' optimizer state in a checkpoint; a mask's own optimizer has a later number."""


def _fitting(epoch: UnderWay, name: str, old: Config, config: Config, key: str) -> UnderWay | None:
    """Turn an epoch of the stage with this name into one of `key`; None if its tensors do not fit."""
    if epoch.key == key:
        return epoch
    (mask, optimizer), (mask_before, optimizer_before) = (_trained_by(name, c) for c in (config, old))
    if mask != mask_before:
        return None
    tensors = epoch.tensors
    if optimizer != optimizer_before:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_MOMENTS)}
    return UnderWay(key, tensors, epoch.meta)


def _trained_by(name: str, config: Config) -> tuple[str | None, str]:
    """Return (mask method, optimizer) of the stage with this name; adamw counts as adam: same moments."""
    pre = config.pre_pruning
    section = config.post_pruning if pre is None or name == "post_pruning" else pre
    mask = pre.mask if pre is not None and _is_pre_pruning(name) else None
    optimizer = section.optimizer.name
    return None if mask is None else mask.name, "adam" if optimizer == "adamw" else optimizer


_FREE = (
    "seed",
    "precision",
    "data.batch_size",
    "data.augmentation",
    "pre_pruning",
    "pruning",
    "post_pruning",
)
"""The keys that say how a network is trained and pruned, which a resumed trial may change. Other keys that
determine results say what the network is, what it learns and on which data: weights from another setting
would not fit, or would have been trained on validation examples."""


def _check_same_network(old: Config, config: Config, source: Document) -> None:
    before, now = (space.flatten(determining(c)) for c in (old, config))
    for key in sorted({*before, *now}):
        is_free = f"{key}.".startswith(tuple(f"{free}." for free in _FREE))
        if before.get(key) != now.get(key) and not is_free:
            rule = f"a trial cannot go on from a checkpoint of one with {before.get(key)!r}"
            raise source.problem(key, rule, now.get(key))
