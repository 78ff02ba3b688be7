"""Trains the epochs of several trials as one batched program, so that small models fill a GPU.

Weights, masks, optimizer states and hyperparameters of K trials of one model are stacked along a leading
dimension; `torch.func.vmap` turns the model's forward pass into batched matrix products over them. Each trial
computes what it computes alone, within float tolerance: with the same batches, the same random numbers and
the same schedules. Trials whose epochs have the same seed and number see the same batches and random numbers,
so these are made once.

A trial can be batched if its constraint has a batched form (the class has a function `batched`: dense
networks, learnable masks and fixed masks have) and its optimizer has one. Other trials, models with dropout,
and models with operations that have no batching rule run alone.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from prunetune.engine.batched_optimizers import is_batchable
from prunetune.engine.loop import EpochWork
from prunetune.vectorized.program import Program

logger = logging.getLogger(__name__)

_told: set[str] = set()  # classes of models for which the warning that they run alone was given


def run_together(works: Sequence[EpochWork]) -> None:
    """Train those epochs together that can form a batched program.

    An epoch that fits no other is not trained here: its stage trains it alone when it is resumed.
    """
    groups: dict[Hashable, list[EpochWork]] = {}
    for work in works:
        key = signature(work)
        if key is not None:
            groups.setdefault(key, []).append(work)
    for group in groups.values():
        _run(group)


def signature(work: EpochWork) -> Hashable | None:
    """Return a value that is equal for works that can run as one program; None if the work must run alone."""
    learner = work.learner
    constraint = learner.constraint
    if not hasattr(type(constraint), "batched") or not is_batchable(learner.optimizers[0]):
        return None
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in learner.model.modules()):
        return None
    return (
        id(work.data),
        work.batch_size,
        repr(work.augmentation),
        learner.architecture,
        repr(learner.model),
        tuple((name, tensor.shape) for name, tensor in learner.model.state_dict().items()),
        type(constraint),
        learner.precision,
        learner.graphs,
        type(learner.optimizers[0]),
        bool(learner.optimizers[0].param_groups[0].get("nesterov")),
    )


def _run(group: list[EpochWork]) -> None:
    """Train a group as one batched program, in halves if memory is short; not at all if that cannot work."""
    if len(group) < 2:
        return
    try:
        metrics = Program(group).run()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        _run(group[: len(group) // 2])
        _run(group[len(group) // 2 :])
    except RuntimeError as error:  # an operation without a batching rule, or that draws random numbers
        kind = type(group[0].learner.model).__name__
        if kind not in _told:
            _told.add(kind)
            logger.warning("trials of %s cannot be batched and run one by one: %s", kind, error)
    else:
        for work, found in zip(group, metrics, strict=True):
            work.metrics = found
