"""Stage 1: train a network that is good to prune (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from prunetune import models
from prunetune.config import digest
from prunetune.schema import MaskConfig, PrePruningConfig
from prunetune.sparsity import schedules
from prunetune.sparsity.dynamic import cubic_density
from prunetune.sparsity.masks import LearnableMask, prunable
from prunetune.stages.stage import Context, Step, state_of, train_stage
from prunetune.store import Artefact
from prunetune.training import Learner, Metrics, Unconstrained, make_optimizer, make_schedule, seed_of


def run(
    config: PrePruningConfig, key: str, context: Context, *, density: float, stop: int | None = None
) -> Generator[Step, None, Artefact]:
    """Train; yields a report per epoch, returns the network (with θ ← θ⊙M) as stored under `key`.

    With `stop` the network after that many epochs, under a key of its own. `density` matters to a mask with
    a target only.

    Status `collapsed`: no prunable weight is left. Metrics with a mask: `mask_density` (mean M, the
    expected density) and `mask_open` (share of M > ½; best near the density that is asked for).
    """

    def make_learner() -> Learner:
        model = context.build(None)
        models.initialize(model, config.initializer, seed=seed_of(context.seed, "initializer"))
        return _learner(config, model, density)

    def finish(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        learner.constraint.before_evaluation()  # θ ← θ⊙M
        alive = any(bool(weight.any()) for weight in prunable(learner.model).values())
        return state_of(learner.model), {"status": "complete" if alive else "collapsed"}

    if stop is not None:
        key = digest(key, "stop", stop)
    return (yield from train_stage("pre_pruning", key, config.epochs, context, make_learner, finish, stop))


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
        self._mask = mask
        self._lambda1 = config.lambda1
        self._lambda2 = config.lambda2 if config.method == "penalty" else 0.0
        self._warmup = schedules.rise(config.lambda2_warmup)
        self._target = (
            partial(cubic_density, start=0.0, end=config.target_warmup, initial=config.initial, final=density)
            if config.method == "target"
            else None
        )
        self._time = 0.0

    def before_forward(self, generator: torch.Generator) -> None:
        """A fresh B."""
        self._mask.draw(generator)

    def before_step(self, time: float, step: int) -> bool:
        """Gradients of θ and M."""
        self._mask.take_gradients(self._lambda1, self._lambda2 * self._warmup(time))
        self._time = time
        return True

    def after_step(self) -> None:
        """M back into [0, 1], at the target count where there is one."""
        if self._target is None:
            self._mask.clip()
        else:
            self._mask.project(self._target(self._time))

    def before_evaluation(self) -> None:
        """θ⊙M."""
        self._mask.expect()

    def measure(self) -> Metrics:
        """How sparse the mask is."""
        mask = self._mask.mask.detach()
        return {"mask_density": float(mask.mean()), "mask_open": float((mask > 0.5).float().mean())}
