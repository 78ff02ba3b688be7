"""Decides how many trials a worker runs side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from prunetune import data as datasets
from prunetune import tasks
from prunetune.config import space
from prunetune.config.canonical import is_active
from prunetune.config.document import Document
from prunetune.config.reading import validate
from prunetune.config.schema import Config
from prunetune.records.problem import Problem

_ROOM_FLOPS = 1e11
"""Operations per training step that keep a GPU busy: trials share it up to that. An estimate."""
_MOST = 64
"""The most trials that a worker runs side by side."""


def trials_per_worker(config: Config, problem: Problem, resources: dict[str, float]) -> int:
    """Return `resources.trials_per_worker`; `auto` means 1 on a CPU, `automatic` on a GPU."""
    asked = config.resources.trials_per_worker
    if asked != "auto":
        return asked
    if not resources.get("gpu"):
        # On a CPU, with 8 trials in one batched program, a step per trial costs half of a step alone for the
        # digits' perceptron (27 thousand weights, batch size 32), and as much as alone for MNIST's (119
        # thousand, 128). In return the search would propose 8 trials at once, without each other's results.
        return 1
    trials = config.search.trials_per_density * len(config.densities)
    return automatic(step_flops(problem, config), trials)


def automatic(flops: float, trials: int) -> int:
    """How many trials share a GPU, for training steps of `flops` operations in a sweep of `trials` trials.

    At most an eighth of all trials run at once, because trials proposed together cannot use each other's
    results.

    >>> automatic(9e7, 1000), automatic(2e10, 1000), automatic(3e11, 1000), automatic(9e7, 160)
    (64, 5, 1, 20)
    """
    return max(1, min(int(_ROOM_FLOPS / flops), _MOST, trials // 8))


def step_flops(problem: Problem, config: Config) -> float:
    """Operations of one training step (forward and backward) for the space's first model and batch size."""
    tree: dict[str, Any] = space.at(problem.template, {}, is_active)
    first = validate({**tree, "densities": config.densities}, Document("sweep", {}))
    task = tasks.make(first.task, datasets.form_of(first.data))
    model = tasks.network(first.model, task, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(task.probe(1))
    forward: int = counter.get_total_flops()
    return 3.0 * forward * first.data.batch_size
