"""Under which keys the store has the results of a configuration's stages: hashes of what determines them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prunetune import models
from prunetune.config.reading import canonical, digest
from prunetune.config.schema import Config
from prunetune.stages import pruning

FORMAT = 5
"""Part of every key: raise it when a stage's computation changes, so that old results are not taken."""


@dataclass(frozen=True)
class StageKeys:
    """The store's keys of a configuration's stages. Each contains the one before."""

    pre_pruning: str
    pruning: str
    post_pruning: str


def stage_keys(config: Config, data_digest: str) -> StageKeys:
    """The keys under which the stages of a configuration are stored; `data_digest` as in `Dataset`."""
    model = canonical(config.model)
    for follows_from_data in ("num_classes", "in_channels"):
        model.pop(follows_from_data, None)
    start = digest(
        FORMAT,
        data_digest,
        config.data.batch_size,
        canonical(config.data.augmentation),
        model,
        models.source_digest(config.model),
        config.seed,
        config.precision,
    )
    mask = config.pre_pruning.mask if config.pre_pruning is not None else None
    aimed = config.density if mask is not None and mask.method == "target" else None
    first = digest("pre_pruning", start, canonical(config.pre_pruning), aimed)
    # Rounds without a pre-pruning stage are trained as the third stage is.
    alone = config.pre_pruning is None and config.pruning.schedule.name == "iterative"
    rounds = canonical(config.post_pruning.optimizer) if alone else None
    second = digest("pruning", first, canonical(config.pruning), config.density, rounds)
    third = digest("post_pruning", second, canonical(config.post_pruning))
    return StageKeys(first, second, third)


def stored_keys(config: Config, data_digest: str) -> dict[str, str]:
    """All that running a configuration may leave in the store: its stages' keys, and those within pruning."""
    keys = stage_keys(config, data_digest)
    inner = pruning.inner_keys(config.pruning, keys.pruning, keys.pre_pruning)
    return {**dataclasses.asdict(keys), **inner}
