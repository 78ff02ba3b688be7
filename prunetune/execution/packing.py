"""How many trials a worker runs side by side."""

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
"""Operations per step that fill a GPU: trials are batched up to that. An estimate, not measured yet."""
_MOST = 64


def trials_per_worker(config: Config, problem: Problem, resources: dict[str, float]) -> int:
    """`resources.trials_per_worker`, or for `auto` what fits the model and leaves the search its feedback."""
    asked = config.resources.trials_per_worker
    if asked != "auto":
        return asked
    if not resources.get("gpu"):
        # In a program of 8 a step of the digits' perceptron (27 thousand weights, batch 32) costs half, one
        # of MNIST's (119 thousand, 128) as much as alone; and the search loses 7 trials' feedback.
        return 1
    trials = config.search.trials_per_density * len(config.densities)
    return automatic(step_flops(problem, config), trials)


def automatic(flops: float, trials: int) -> int:
    """Trials side by side on a GPU, for steps of so many operations, in a sweep of so many trials.

    At most an eighth of the trials: proposals made at once know nothing of each other's results.

    >>> automatic(9e7, 1000), automatic(2e10, 1000), automatic(3e11, 1000), automatic(9e7, 160)
    (64, 5, 1, 20)
    """
    return max(1, min(int(_ROOM_FLOPS / flops), _MOST, trials // 8))


def step_flops(problem: Problem, config: Config) -> float:
    """Operations of a training step, forward and backward, of the first model and batch size of the space."""
    tree: dict[str, Any] = space.at(problem.template, {}, is_active)
    first = validate({**tree, "densities": config.densities}, Document("sweep", {}))
    task = tasks.make(first.task, datasets.form_of(first.data))
    model = tasks.network(first.model, task, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(task.probe(1))
    forward: int = counter.get_total_flops()
    return 3.0 * forward * first.data.batch_size
