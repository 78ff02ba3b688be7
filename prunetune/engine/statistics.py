"""Batch norm's statistics, computed anew for a network whose weights were changed."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunetune.data import Dataset
from prunetune.engine.loop import task_on
from prunetune.engine.precision import AUTO, Precision
from prunetune.tasks import Task

_EXAMPLES, _BATCH = 1024, 128


@torch.no_grad()
def renew_statistics(
    model: nn.Module, data: Dataset, *, seed: int, precision: Precision = AUTO, task: Task | None = None
) -> None:
    """Compute the running means and variances of all batch norm layers from training examples.

    Those that training has left are for other weights: for weights that were drawn with a mask, or for the
    network before it was pruned. The new ones are the averages over batches of up to 128 of at most 1,024
    training examples, drawn from `seed`, without augmentation. A network without such layers stays as it is.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    prepare = task_on(data, task).batch
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=generator)[:_EXAMPLES].to(data.device)
    was_training, momentum = model.training, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
        norm.train()
    outputs = precision.forward(model, data.device)
    for piece in chosen.tensor_split(math.ceil(len(chosen) / _BATCH)):  # batches of about the same size
        if len(piece) > 1:  # a batch of one has no variance
            inputs, _ = prepare(
                data.train.inputs.index_select(0, piece), data.train.targets.index_select(0, piece)
            )
            outputs(inputs)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    model.train(was_training)
