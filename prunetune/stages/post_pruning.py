"""Stage 3: train the weights that stayed (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from prunetune.config import PostPruningConfig
from prunetune.sparsity import schedules
from prunetune.sparsity.effective import effective_density
from prunetune.sparsity.masks import FixedMask, prunable
from prunetune.sparsity.smoothing import softened
from prunetune.stages.stage import Context, Report, load_state, state_of, train_stage
from prunetune.store import Artefact
from prunetune.training import Learner, Metrics, Smoothing, evaluate, make_optimizer, make_schedule


def run(
    config: PostPruningConfig,
    key: str,
    context: Context,
    trained: dict[str, Tensor] | None,
    masks: dict[str, Tensor],
) -> Generator[Report, None, Artefact]:
    """Train under fixed masks; yields a report per epoch, returns the final network as stored under `key`.

    The meta has `val_accuracy`, `test_accuracy` (measured here, once), `nonzero` and `effective_density`.
    Status `collapsed`: no better on the validation split than always naming its most frequent class.
    """

    def make_learner() -> Learner:
        model = context.build()
        if trained is not None:
            load_state(model, trained)
        pruned = Pruned(FixedMask(prunable(model), masks))
        pruned.after_step()
        return Learner(
            model,
            [make_optimizer(config.optimizer, list(model.parameters()))],
            state_of(model),
            make_schedule(config.optimizer.schedule),
            pruned,
            partial(smoothing_at, config, model),
        )

    def finish(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        data = context.data
        accuracy, _ = evaluate(learner.model, data, data.validation)
        test_accuracy, _ = evaluate(learner.model, data, data.test)
        chance = float(data.validation.labels.bincount().max()) / len(data.validation)
        return state_of(learner.model), {
            "status": "complete" if accuracy > chance else "collapsed",
            "val_accuracy": accuracy,
            "test_accuracy": test_accuracy,
            "nonzero": sum(int(weight.count_nonzero()) for weight in prunable(learner.model).values()),
            "effective_density": effective_density(learner.model, masks, data.shape),
        }

    return (yield from train_stage("post_pruning", key, config.epochs, context, make_learner, finish))


def smoothing_at(config: PostPruningConfig, model: nn.Module, epoch: int) -> Smoothing:
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
    return Smoothing(alpha, partial(softened, model, beta=beta, gamma=gamma))


@final
class Pruned:
    """Pruned weights are exactly zero after every step."""

    def __init__(self, mask: FixedMask) -> None:
        self._mask = mask

    def before_forward(self, generator: torch.Generator) -> None:
        """Nothing."""

    def before_step(self, time: float) -> None:
        """Nothing."""

    def after_step(self) -> None:
        """Zero what was pruned."""
        self._mask.apply()

    def before_evaluation(self) -> None:
        """Nothing: the weights are as they are used."""

    def measure(self) -> Metrics:
        """Nothing."""
        return {}
