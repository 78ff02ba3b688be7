"""Stage 3: train the weights that pruning has kept (paper, section 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from prunetune.config.schema import PostPruningConfig
from prunetune.data import batches
from prunetune.engine.constraint import Constraint
from prunetune.engine.loop import Learner, Smoothing, evaluate
from prunetune.engine.optimizers import make_optimizer, make_schedule
from prunetune.engine.seeds import seed_of, seeded
from prunetune.methods.fixed import Pruned
from prunetune.methods.gradual import Gradual
from prunetune.sparsity import schedules
from prunetune.sparsity.effective import effective_weights
from prunetune.sparsity.masks import FixedMask, pack, prunable, unpack
from prunetune.sparsity.rescaling import rescale
from prunetune.stages.pruning import Masks, masks_of
from prunetune.stages.stage import Origin, Place, Stage, Step, train
from prunetune.stages.state import load_state, state_of
from prunetune.store import Artefact

logger = logging.getLogger(__name__)

_MASK = "prunetune:mask:"  # no parameter has such a name


@dataclass(frozen=True)
class Closing:
    """The settings with which gradual pruning closes the mask during the stage, down to `density`."""

    density: float
    start: float
    end: float
    every: int
    allocation: str
    dense_layers: str


@final
@dataclass(frozen=True)
class PostPruning(Stage):
    """Trains the final network under masks, starting with the weights of the stage `start`.

    The masks stay fixed, unless dynamic sparse training moves them or gradual pruning (`closing`) closes
    them. The artefact holds the parameters and buffers and, as bits, the final masks (`final_state`,
    `final_masks`). Its meta has the task's metric on the validation and test splits, such as `val_accuracy`
    and `test_accuracy` (measured once, in the precision of training), `nonzero`, `effective_density`, and
    `cut_layers`, the layers with no weight on any path from input to output. The status is `collapsed` if the
    network is no better on the validation split than a constant answer.
    """

    origin: Origin
    masks: Masks
    start: Stage
    config: PostPruningConfig
    closing: Closing | None = None

    @property
    def name(self) -> str:
        """The stage's name, `post_pruning`."""
        return "post_pruning"

    @property
    def epochs(self) -> int:
        """The number of epochs, as configured."""
        return self.config.epochs

    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Train and evaluate the final network; the stored tensors are its state and its masks."""
        return (
            yield from train(
                self,
                place,
                report_as="post_pruning",
                origin=self.origin,
                seed_name="post_pruning",
                total=self.config.epochs,
                make_learner=partial(self._learner, place),
                finish=partial(_finish, place),
            )
        )

    def _learner(self, place: Place) -> Learner:
        config, seed = self.config, self.origin.seed
        model = self.origin.build(place)
        load_state(model, place.result(self.start).tensors)
        fixed = FixedMask(prunable(model), masks_of(place.result(self.masks)))
        fixed.apply()
        if config.rescaled_init is not None:
            with seeded(seed_of(seed, "rescaling"), place.data.device):
                rescale(
                    model,
                    _endless(self.origin, place),
                    loss=self.origin.learns(place).loss,
                    **config.rescaled_init.model_dump(),
                )
        optimizer = make_optimizer(config.optimizer, list(model.parameters()))
        return Learner(
            model,
            [optimizer],
            {**state_of(model), **{_MASK + name: mask for name, mask in fixed.masks.items()}},
            make_schedule(config.optimizer.schedule),
            self._constraint(fixed, optimizer, seed_of(seed, "post_pruning")),
            partial(smoothing_at, config),
        )

    def _constraint(self, fixed: FixedMask, optimizer: torch.optim.Optimizer, seed: int) -> Constraint:
        dynamic, closing = self.config.dynamic, self.closing
        if dynamic is not None:
            moving: Constraint = dynamic.component(fixed, optimizer, seed=seed, **dynamic.options)
            return moving
        if closing is not None:
            return Gradual(
                fixed,
                density=closing.density,
                start=closing.start,
                end=closing.end,
                every=closing.every,
                allocate=closing.allocation,
                dense_layers=closing.dense_layers,
                seed=seed,
            )
        return Pruned(fixed)


def _finish(place: Place, learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = place.data
    task = learner.learns(data)
    metric, how = task.metric, (learner.precision, learner.replicas, task)
    with learner.compacted():
        value, _ = evaluate(learner.model, data, data.validation, *how)
        test_value, _ = evaluate(learner.model, data, data.test, *how)
    final = {
        name.removeprefix(_MASK): mask.bool()
        for name, mask in learner.tensors.items()
        if name.startswith(_MASK)
    }
    probe = task.probe(2)
    indices = None if probe.is_floating_point() else probe
    effective = effective_weights(learner.model, final, data.shape, inputs=indices)
    cut = [name for name, mask in effective.items() if not mask.any()]
    if cut:
        logger.warning("layer collapse: no weight of %s is on a path from input to output", ", ".join(cut))
    chance = task.chance(data.validation.targets)
    tensors = state_of(learner.model) | {_MASK + name: pack(mask) for name, mask in final.items()}
    return tensors, {
        "status": "complete" if metric.score(value) > metric.score(chance) else "collapsed",
        metric.val: value,
        metric.test: test_value,
        "nonzero": sum(int(weight.count_nonzero()) for weight in prunable(learner.model).values()),
        "effective_density": sum(int(m.sum()) for m in effective.values())
        / sum(m.numel() for m in effective.values()),
        "cut_layers": cut,
    }


def final_state(artefact: Artefact) -> dict[str, Tensor]:
    """The parameters and buffers of the final network by name, from what `PostPruning` has stored."""
    return {name: tensor for name, tensor in artefact.tensors.items() if not name.startswith(_MASK)}


def final_masks(artefact: Artefact) -> dict[str, Tensor]:
    """The boolean masks of the final network by weight name; {} if training diverged."""
    return {
        name.removeprefix(_MASK): unpack(bits, artefact.tensors[name.removeprefix(_MASK)].shape)
        for name, bits in artefact.tensors.items()
        if name.startswith(_MASK)
    }


def smoothing_at(config: PostPruningConfig, epoch: int) -> Smoothing:
    """The smoothing at the start of an epoch (from 0); each piece ends at its own horizon."""
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


def _endless(origin: Origin, place: Place) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches without end, drawn from a seed of their own."""
    data, task, epoch = place.data, origin.learns(place), 0
    while True:
        seed = seed_of(origin.seed, "rescaling", epoch)
        yield from batches(
            data,
            origin.batch_size,
            origin.augmentation,
            order=torch.Generator().manual_seed(seed),
            drawn=torch.Generator(data.device).manual_seed(seed),
            prepare=task.batch,
        )
        epoch += 1
