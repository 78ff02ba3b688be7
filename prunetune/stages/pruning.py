"""Stage 2: choose the weights that stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunetune.config import PruningConfig, kept
from prunetune.sparsity.allocation import ALLOCATIONS
from prunetune.sparsity.criteria import CRITERIA
from prunetune.sparsity.masks import pack, prunable, unpack
from prunetune.stages.stage import Context, load_state
from prunetune.training import seed_of


def run(
    config: PruningConfig, density: float, key: str, context: Context, trained: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Boolean masks by weight name that keep exactly floor(d·n) of all prunable weights.

    `trained` is the state of the network to prune; None is the network at its initialization.
    """
    saved = context.store.load("stages", key)
    if saved is not None:
        return {name: unpack(bits, saved.meta["shapes"][name]) for name, bits in saved.tensors.items()}
    model = context.build()
    if trained is not None:
        load_state(model, trained)
    masks = prune(model, config, density, seed=seed_of(context.seed, "pruning"))
    context.store.save(
        "stages",
        key,
        {name: pack(mask) for name, mask in masks.items()},
        {"shapes": {name: list(mask.shape) for name, mask in masks.items()}},
    )
    return masks


def prune(model: nn.Module, config: PruningConfig, density: float, *, seed: int) -> dict[str, Tensor]:
    """Masks for a network at a density; scores and allocation as configured, ties drawn from `seed`."""
    weights = prunable(model)
    count = kept(density, sum(weight.numel() for weight in weights.values()))
    scores = CRITERIA[config.criterion](weights)
    masks = ALLOCATIONS[config.allocation](scores, count, generator=torch.Generator().manual_seed(seed))
    return {name: mask.cpu() for name, mask in masks.items()}
