"""What a trial takes over from a checkpoint, its own or another trial's, and the keys that this gives it."""

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
    """The newest epoch of a stage under way: its key, and what the pipeline wants to find of it to go on."""

    key: str
    tensors: Mapping[str, Tensor]
    meta: dict[str, Any]


@final
@dataclass(frozen=True)
class Inheritance:
    """Under which keys the stages of a trial are stored, given the keys of its configuration.

    A trial that took over what its configuration does not give has a `mark`, the hash of what it took over;
    `taken` says where the stages are that others finished for it.
    """

    mark: str | None = None
    taken: Mapping[str, str] = field(default_factory=dict)

    def stored_as(self, key: str) -> str:
        """The store's key of the stage whose configuration has this one."""
        if key in self.taken:
            return self.taken[key]
        return key if self.mark is None else digest("inherited", self.mark, key)


@final
@dataclass(frozen=True)
class Position:
    """Where a trial is, as its checkpoint says it, beside the epoch of the stage under way.

    `keys` are those of its configuration's stages, by name; `finished` and `under_way` are such names.
    `reported` counts the epochs that Tune was told of. `mark` and `taken` are its `Inheritance`.
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
    """How a configuration, with these stage keys, goes on from where a trial of it or of another was.

    Gives its inheritance, and the epoch that the stage under way begins with. Raises ConfigError, with the
    places of `source`, where the other's network cannot be this configuration's.
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
    # An inheritance stays as it is only whole: its mark stands for all that was taken over, the epoch too.
    is_whole = len(kept) == len(position.finished) + (name is not None)
    if all(keys[name] == position.keys[name] for name in kept) and (is_whole or before.mark is None):
        return before, begun
    stored = {name: before.stored_as(position.keys[name]) for name in kept}
    epochs = len(begun.meta["curve"]) if begun is not None else 0
    mark = digest([(keys[name], stored[name]) for name in kept], epochs)
    return Inheritance(mark, {keys[name]: stored[name] for name in finished}), begun


def _is_of_use(name: str, position: Position, old: Config, config: Config, keys: Mapping[str, str]) -> bool:
    """Whether what the other has of the stage with this name can stand for this configuration's."""
    if keys.get(name) == position.keys[name]:
        return True
    if name not in keys or (old.pre_pruning is None) != (config.pre_pruning is None):
        return False
    asked, before = ((c.density, canonical(c.pruning)) for c in (config, old))
    return _is_pre_pruning(name) or asked == before


def _is_pre_pruning(name: str) -> bool:
    """The whole stage, or its beginning, to rewind to."""
    return name.startswith("pre_pruning")


_MOMENTS = "optimizer0."
"""What a checkpoint has of the weights' optimizer; a mask's own come after it."""


def _fitting(epoch: UnderWay, name: str, old: Config, config: Config, key: str) -> UnderWay | None:
    """An epoch of the stage with this name as one of `key`; None where its tensors do not fit there."""
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
    """The mask method and the optimizer of the stage with this name; adamw's moments are adam's."""
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
"""How a network is trained and pruned. All else that determines a result says what the network is, what it
learns, and on which data: other weights would not fit, or would have seen what validates."""


def _check_same_network(old: Config, config: Config, source: Document) -> None:
    before, now = (space.flatten(determining(c)) for c in (old, config))
    for key in sorted({*before, *now}):
        is_free = f"{key}.".startswith(tuple(f"{free}." for free in _FREE))
        if before.get(key) != now.get(key) and not is_free:
            rule = f"a trial cannot go on from a checkpoint of one with {before.get(key)!r}"
            raise source.problem(key, rule, now.get(key))
