"""How many trials a worker runs side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from prunetune import data as datasets
from prunetune import models, space
from prunetune.config import is_active, validate
from prunetune.document import Document
from prunetune.schema import Config
from prunetune.tuning.ledger import Problem

_ROOM_FLOPS = {"cpu": 5e7, "cuda": 1e11}
"""Operations per step up to which trials are batched: below, a step's cost is its calls, not its sums.

On two x86 cores a perceptron of 27 thousand weights at batch size 32 (5e6 per step) ran 8 trials at twice the
rate of one by one, and one of 119 thousand at 128 (9e7) gained nothing. The GPU's is not measured yet.
"""
_MOST = {"cpu": 8, "cuda": 64}


def trials_per_worker(config: Config, problem: Problem, resources: dict[str, float]) -> int:
    """`resources.trials_per_worker`, or for `auto` what fits the model and leaves the search its feedback."""
    asked = config.resources.trials_per_worker
    if asked != "auto":
        return asked
    device = "cuda" if resources.get("gpu") else "cpu"
    trials = config.search.trials_per_density * len(config.densities)
    return automatic(step_flops(problem, config), device, trials)


def automatic(flops: float, device: str, trials: int) -> int:
    """Trials side by side, for steps of so many operations, in a sweep of so many trials.

    At most an eighth of the trials: proposals made at once know nothing of each other's results.

    >>> automatic(5e6, "cpu", 72), automatic(9e7, "cpu", 72), automatic(5e6, "cpu", 16)
    (8, 1, 2)
    """
    fits = int(_ROOM_FLOPS[device] / flops)
    return max(1, min(fits, _MOST[device], trials // 8))


def step_flops(problem: Problem, config: Config) -> float:
    """Operations of a training step, forward and backward, of the first model and batch size of the space."""
    tree: dict[str, Any] = space.at(problem.template, {}, is_active)
    first = validate({**tree, "densities": config.densities}, Document("sweep", {}))
    shape, classes = datasets.shape_of(first.data)
    model = models.build(first.model, shape, classes, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    forward: int = counter.get_total_flops()
    return 3.0 * forward * first.data.batch_size
