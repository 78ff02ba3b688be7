"""Stage 3: train the weights that stayed (paper, section 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunetune.config.schema import PostPruningConfig, PruningConfig
from prunetune.data import batches
from prunetune.engine.loop import (
    Constraint,
    Learner,
    Smoothing,
    chance_accuracy,
    evaluate,
    make_optimizer,
    make_schedule,
    seed_of,
    seeded,
)
from prunetune.methods.pruned import Dynamic, Gradual, Pruned
from prunetune.sparsity import schedules
from prunetune.sparsity.effective import effective_weights
from prunetune.sparsity.masks import FixedMask, pack, prunable, unpack
from prunetune.sparsity.rescaling import rescale
from prunetune.stages.stage import Context, Step, load_state, state_of, train_stage
from prunetune.store import Artefact

logger = logging.getLogger(__name__)

_MASK = "prunetune:mask:"  # no parameter has such a name


def run(
    config: PostPruningConfig,
    key: str,
    context: Context,
    start: dict[str, Tensor] | None,
    masks: dict[str, Tensor],
    pruning: PruningConfig = PruningConfig(),
    density: float = 1.0,
) -> Generator[Step, None, Artefact]:
    """Train under masks; yields a report per epoch, returns the final network as stored under `key`.

    The masks rest, unless `dynamic` moves them or gradual pruning (of `pruning`, to `density`) closes
    them. The artefact holds the state and, as bits, the final masks (`final_masks`); its meta has
    `val_accuracy`, `test_accuracy` (measured here, once, in the precision of training), `nonzero`,
    `effective_density` and `cut_layers`, the layers with no weight on any path from input to output.
    Status `collapsed`: no better on the validation split than always naming its most frequent class.
    """

    def make_learner() -> Learner:
        model = context.build(None)
        if start is not None:
            load_state(model, start)
        fixed = FixedMask(prunable(model), masks)
        fixed.apply()
        if config.rescaled_init is not None:
            with seeded(seed_of(context.seed, "rescaling"), context.data.device):
                rescale(model, _endless(context), **config.rescaled_init.model_dump())
        optimizer = make_optimizer(config.optimizer, list(model.parameters()))
        seed = seed_of(context.seed, "post_pruning")
        constraint: Constraint = Pruned(fixed)
        if config.dynamic is not None:
            constraint = Dynamic(fixed, config.dynamic, optimizer, seed)
        elif pruning.schedule.name == "gradual":
            constraint = Gradual(fixed, pruning, density, seed)
        return Learner(
            model,
            [optimizer],
            {**state_of(model), **{_MASK + name: mask for name, mask in fixed.masks.items()}},
            make_schedule(config.optimizer.schedule),
            constraint,
            partial(smoothing_at, config),
        )

    def finish(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        data = context.data
        how = learner.precision, learner.replicas
        with learner.compacted():
            accuracy, _ = evaluate(learner.model, data, data.validation, *how)
            test_accuracy, _ = evaluate(learner.model, data, data.test, *how)
        final = {name: learner.tensors[_MASK + name].bool() for name in masks}
        effective = effective_weights(learner.model, final, data.shape)
        cut = [name for name, mask in effective.items() if not mask.any()]
        if cut:
            logger.warning(
                "layer collapse: no weight of %s is on a path from input to output", ", ".join(cut)
            )
        tensors = state_of(learner.model) | {_MASK + name: pack(mask) for name, mask in final.items()}
        return tensors, {
            "status": "complete" if accuracy > chance_accuracy(data) else "collapsed",
            "val_accuracy": accuracy,
            "test_accuracy": test_accuracy,
            "nonzero": sum(int(weight.count_nonzero()) for weight in prunable(learner.model).values()),
            "effective_density": sum(int(m.sum()) for m in effective.values())
            / sum(m.numel() for m in effective.values()),
            "cut_layers": cut,
        }

    return (yield from train_stage("post_pruning", key, config.epochs, context, make_learner, finish))


def final_state(artefact: Artefact) -> dict[str, Tensor]:
    """Parameters and buffers of the final network."""
    return {name: tensor for name, tensor in artefact.tensors.items() if not name.startswith(_MASK)}


def final_masks(artefact: Artefact) -> dict[str, Tensor]:
    """Boolean masks of the final network by weight name; none of one that diverged."""
    return {
        name.removeprefix(_MASK): unpack(bits, artefact.tensors[name.removeprefix(_MASK)].shape)
        for name, bits in artefact.tensors.items()
        if name.startswith(_MASK)
    }


def smoothing_at(config: PostPruningConfig, epoch: int) -> Smoothing:
    """The smoothing at the start of an epoch (from 0): nothing at and after each piece's own horizon."""
    alpha, beta, gamma = 0.0, None, 0.0
    if config.label_smoothing is not None:
        horizon = config.label_smoothing.horizon * config.epochs
        alpha = schedules.linear_to_zero(config.label_smoothing.alpha0, horizon)(epoch)
    if config.soft_activation is not None:
        soft = config.soft_activation
        beta = schedules.linear_until(soft.beta0, soft.beta_max, soft.horizon * config.epochs)(epoch)
    if config.soft_skip is not None:
        horizon = config.soft_skip.horizon * config.epochs
        gamma = schedules.linear_to_zero(config.soft_skip.gamma0, horizon)(epoch)
    return Smoothing(alpha, beta, gamma)


def _endless(context: Context) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end, from a seed of their own."""
    data, epoch = context.data, 0
    while True:
        seed = seed_of(context.seed, "rescaling", epoch)
        yield from batches(
            data,
            context.batch_size,
            context.augmentation,
            order=torch.Generator().manual_seed(seed),
            drawn=torch.Generator(data.device).manual_seed(seed),
        )
        epoch += 1
