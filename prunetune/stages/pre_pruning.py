"""Stage 1: train a network that is good to prune (paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from prunetune import models
from prunetune.config.reading import digest
from prunetune.config.schema import MaskConfig, PrePruningConfig
from prunetune.engine.checkpoint import Curve
from prunetune.engine.loop import (
    Learner,
    Metrics,
    Unconstrained,
    chance_accuracy,
    make_optimizer,
    make_schedule,
    seed_of,
)
from prunetune.sparsity import schedules
from prunetune.sparsity.dynamic import cubic_density
from prunetune.sparsity.masks import LearnableMask, prunable
from prunetune.stages.stage import Context, Step, state_of, train_stage
from prunetune.store import Artefact


def run(
    config: PrePruningConfig, key: str, context: Context, *, density: float, stop: int | None = None
) -> Generator[Step, None, Artefact]:
    """Train; yields a report per epoch, returns the network (with θ ← θ⊙M) as stored under `key`.

    With `stop` the network after that many epochs, under a key of its own. `density` matters to a mask with
    a target only.

    Status `collapsed`: no prunable weight is left, or training ended early (`is_hopeless`). Metrics with a
    mask: `mask_density` (mean M, the expected density) and `mask_open` (share of M > ½; best near the
    density that is asked for).
    """

    chance = chance_accuracy(context.data)
    ended_early = False

    def give_up(curve: Curve) -> bool:
        nonlocal ended_early
        ended_early = is_hopeless(curve, config, chance)
        return ended_early

    def make_learner() -> Learner:
        model = context.build(None)
        models.initialize(model, config.initializer, seed=seed_of(context.seed, "initializer"))
        return _learner(config, model, density)

    def finish(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        learner.constraint.before_evaluation()  # θ ← θ⊙M
        alive = any(bool(weight.any()) for weight in prunable(learner.model).values())
        return state_of(learner.model), {"status": "complete" if alive and not ended_early else "collapsed"}

    if stop is not None:
        key = stopped_key(key, stop)
    return (
        yield from train_stage(
            "pre_pruning", key, config.epochs, context, make_learner, finish, stop, give_up
        )
    )


def is_hopeless(curve: Curve, config: PrePruningConfig, chance: float) -> bool:
    """Whether a stage with this curve has collapsed: what comes after it would be a waste.

    The mask is all zero (then no gradient opens it again), or accuracy was not above chance over the last
    `chance_patience` of the stage's epochs, 3 at least.
    """
    if not curve:
        return False
    if curve[-1].get("mask_density") == 0:
        return True
    if config.chance_patience is None:
        return False
    patience = max(3, math.ceil(config.chance_patience * config.epochs))
    recent = curve[-patience:]
    return len(recent) == patience and all(entry["val_accuracy"] <= chance for entry in recent)


def stopped_key(key: str, stop: int) -> str:
    """The key of the network after so many epochs of the stage with this key."""
    return digest(key, "stop", stop)


def _learner(config: PrePruningConfig, model: nn.Module, density: float = 1.0) -> Learner:
    factor = make_schedule(config.optimizer.schedule)
    if config.mask is None:
        optimizer = make_optimizer(config.optimizer, list(model.parameters()))
        return Learner(model, [optimizer], state_of(model), factor, Unconstrained())
    weights = prunable(model)
    mask = LearnableMask(weights, initial=config.mask.initial)
    masked = {id(weight) for weight in weights.values()}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in masked]
    return Learner(
        model,
        [
            make_optimizer(config.optimizer, [mask.theta, *dense]),
            # Adam whatever the weights use: M's gradient g⊙θ spans orders of magnitude between layers.
            torch.optim.Adam([mask.mask], lr=config.mask.lr, fused=True),
        ],
        {**state_of(model), "prunetune:theta": mask.theta.detach(), "prunetune:mask": mask.mask.detach()},
        factor,
        MaskLearning(mask, config.mask, density),
    )


@final
class MaskLearning:
    """Each step computes with θ⊙B, B ~ Bernoulli(M); the regularizer enters M's gradient.

    With a target, Σ M is projected on its schedule after each step: cubic, from the initial value to the
    density.
    """

    def __init__(self, mask: LearnableMask, config: MaskConfig, density: float) -> None:
        self.mask = mask
        self.lambda1 = config.lambda1
        self._lambda2 = config.lambda2 if config.method == "penalty" else 0.0
        self._warmup = schedules.rise(config.lambda2_warmup)
        self.target = (
            partial(cubic_density, start=0.0, end=config.target_warmup, initial=config.initial, final=density)
            if config.method == "target"
            else None
        )
        self._time = 0.0

    def lambda2(self, time: float) -> float:
        """λ2 at a share of the stage."""
        return self._lambda2 * self._warmup(time)

    def before_forward(self, generator: torch.Generator) -> None:
        """A fresh B."""
        self.mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Gradients of θ and M."""
        self.mask.take_gradients(self.lambda1, self.lambda2(time))
        self._time = time
        return True

    def after_step(self) -> None:
        """M back into [0, 1], at the target count where there is one."""
        if self.target is None:
            self.mask.clip()
        else:
            self.mask.project(self.target(self._time))

    def before_evaluation(self) -> None:
        """θ⊙M."""
        self.mask.expect()

    def measure(self) -> Metrics:
        """How sparse the mask is."""
        mask = self.mask.mask.detach()
        return {"mask_density": float(mask.mean()), "mask_open": float((mask > 0.5).float().mean())}
