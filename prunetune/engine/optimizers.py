"""The optimizers, from torch.optim, with the options that a configuration may set.

Your own optimizer is a function or class of the same form: it takes the parameters first and its options as
keywords, `lr` among them. Each of its parameter groups needs `lr`, which the loop multiplies by the factor of
the learning-rate schedule.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from prunetune.config.schema import OptimizerConfig, ScheduleConfig
from prunetune.sparsity import schedules

Rate = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0)]


def sgd(
    parameters: list[nn.Parameter],
    *,
    lr: Rate,
    momentum: Momentum = 0.9,
    nesterov: bool = True,
    weight_decay: Decay = 0.0,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov momentum by default; `momentum: 0` turns both off."""
    return torch.optim.SGD(
        parameters,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        weight_decay=weight_decay,
        fused=True,
    )


def adam(parameters: list[nn.Parameter], *, lr: Rate, weight_decay: Decay = 0.0) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba, arXiv 1412.6980); weight decay is added to the gradient."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def adamw(parameters: list[nn.Parameter], *, lr: Rate, weight_decay: Decay = 0.0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with weight decay decoupled from the gradient."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def make_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the configured optimizer; all `parameters` have the same options."""
    optimizer: torch.optim.Optimizer = config.component(parameters, **config.options)
    return optimizer


def make_schedule(config: ScheduleConfig) -> schedules.Schedule:
    """Make the schedule of the learning rate's factor, a function of the share of the stage in [0, 1]."""
    return schedules.with_warmup(config.component(**config.options), config.warmup)
