"""Stage 1: train a network that can be pruned well (paper, section 3.1)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

from torch import Tensor, nn

from prunetune import models
from prunetune.config.schema import PrePruningConfig
from prunetune.data.batches import steps_per_epoch
from prunetune.engine.checkpoint import Curve
from prunetune.engine.constraint import Unconstrained
from prunetune.engine.loop import Learner
from prunetune.engine.optimizers import make_optimizer, make_schedule
from prunetune.engine.seeds import seed_of
from prunetune.sparsity.masks import prunable
from prunetune.stages.stage import Origin, Place, Stage, Step, Watcher, train
from prunetune.stages.state import state_of
from prunetune.store import Artefact
from prunetune.tasks import ACCURACY, Metric


@final
@dataclass(frozen=True)
class PrePruning(Stage):
    """Trains the pre-pruned network; at the end of the stage θ ← θ⊙M if it has a mask M.

    `density` is given only for a mask that aims at one. `until` makes it the network after this many epochs
    of the stage, for rewinding.

    The status is `collapsed` if no prunable weight is left, or if training ended early (`is_hopeless`). With
    a Bernoulli mask the metrics include `mask_density` (the mean of M, the expected density) and `mask_open`
    (the share of M > ½; best near the density that is asked for).
    """

    origin: Origin
    config: PrePruningConfig
    density: float | None = None
    until: int | None = None

    is_shared: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The stage's name: `pre_pruning`, or `pre_pruning to epoch N` with `until`."""
        return "pre_pruning" if self.until is None else f"pre_pruning to epoch {self.until}"

    @property
    def epochs(self) -> int:
        """The number of epochs: those configured, or `until`."""
        return self.config.epochs if self.until is None else self.until

    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Train the network; the stored tensors are its parameters and buffers."""
        config = self.config
        ended_early = False

        def give_up(curve: Curve) -> bool:
            nonlocal ended_early
            ended_early = self.is_hopeless(place, curve)
            return ended_early

        def finish(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
            learner.constraint.before_evaluation()  # θ ← θ⊙M
            alive = any(bool(weight.any()) for weight in prunable(learner.model).values())
            status = "complete" if alive and not ended_early else "collapsed"
            return state_of(learner.model), {"status": status}

        return (
            yield from train(
                self,
                place,
                report_as="pre_pruning",
                origin=self.origin,
                seed_name="pre_pruning",
                total=config.epochs,
                make_learner=partial(self.learner, place),
                finish=finish,
                stop=self.until,
                is_hopeless=give_up,
                make_watchers=partial(self._watchers, place),
            )
        )

    def learner(self, place: Place) -> Learner:
        """The network before its first epoch, with its optimizers and its mask."""
        model, config = self.origin.build(place), self.config
        models.initialize(model, config.initializer, seed=seed_of(self.origin.seed, "initializer"))
        steps = steps_per_epoch(place.data, self.origin.batch_size) * config.epochs
        return make_learner(config, model, self.density, steps=steps)

    def is_hopeless(self, place: Place, curve: Curve) -> bool:
        """Whether training is to end after an epoch with this curve (`is_hopeless`)."""
        task = self.origin.learns(place)
        return is_hopeless(curve, self.config, task.chance(place.data.validation.targets), task.metric)

    def _watchers(self, place: Place) -> list[Watcher]:
        mine = [watched for watched in place.watched if watched.network.key == self.key]
        return [watched.watcher(place) for watched in mine]


def make_learner(
    config: PrePruningConfig, model: nn.Module, density: float | None = None, *, steps: int | None = None
) -> Learner:
    """Combine a model with its optimizers and its mask.

    `density` is for a mask that aims at one. `steps`, the number of steps of the stage, is for a mask that
    takes it; a stage without epochs counts as one of a single step.
    """
    factor = make_schedule(config.optimizer.schedule)
    if config.mask is None:
        optimizer = make_optimizer(config.optimizer, list(model.parameters()))
        return Learner(model, [optimizer], state_of(model), factor, Unconstrained())
    weights = prunable(model)
    component = config.mask.component
    provided: dict[str, float] = {} if density is None else {"density": density}
    if steps is not None and "steps" in inspect.signature(component).parameters:
        provided["steps"] = max(1, steps)
    method = component(weights, **provided, **config.mask.options)
    masked = {id(weight) for weight in weights.values()}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in masked]
    return Learner(
        model,
        [make_optimizer(config.optimizer, [*method.parameters, *dense]), *method.optimizers],
        {**state_of(model), **method.tensors},
        factor,
        method,
    )


def is_hopeless(curve: Curve, config: PrePruningConfig, chance: float, metric: Metric = ACCURACY) -> bool:
    """Whether a stage with this curve has collapsed, so that further training would be wasted.

    It has if the mask is all zero (no gradient opens it again), or if the metric was no better than chance in
    the last epochs, as many as the share `chance_patience` of the stage's epochs, at least 3.
    """
    if not curve:
        return False
    if curve[-1].get("mask_density") == 0:
        return True
    if config.chance_patience is None:
        return False
    patience = max(3, math.ceil(config.chance_patience * config.epochs))
    recent = curve[-patience:]
    return len(recent) == patience and all(
        metric.score(entry[metric.val]) <= metric.score(chance) for entry in recent
    )
