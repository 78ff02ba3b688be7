"""Several trials' epochs as one batched program, so that small models fill a GPU.

Weights, masks, optimizer states and hyperparameters of K trials of one model are stacked along a leading
dimension; `torch.func.vmap` turns the model's forward pass into batched matrix products over them. What a
trial computes is what it computes alone, within float tolerance: the same batches, the same draws, the
same schedules. Trials whose epochs have the same seed and number see the same batches and the same uniform
draws, so these are made once.

Batched is what has a batched form: the constraint (dense, with a learnable mask, under fixed masks: those
whose
class has a function `batched`) and the optimizer. All else, models with dropout, and operations without a
batching rule run alone.
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

_told: set[str] = set()  # kinds of models of which it was said that they run alone


def run_together(works: Sequence[EpochWork]) -> None:
    """Run the epochs that fit together as batched programs.

    Works that fit with no other are left as they are: they run alone when their stage goes on.
    """
    groups: dict[Hashable, list[EpochWork]] = {}
    for work in works:
        key = signature(work)
        if key is not None:
            groups.setdefault(key, []).append(work)
    for group in groups.values():
        _run(group)


def signature(work: EpochWork) -> Hashable | None:
    """What works must have in common to run as one program; None for a work that must run alone."""
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
    """One batched program; two of half the size where memory is too small; none where there is no way."""
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
