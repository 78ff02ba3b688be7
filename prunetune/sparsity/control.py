"""A controller of λ2 that keeps the mean of a mask on a given path."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOWEST, HIGHEST = math.log(1e-6), math.log(0.05)
"""The bounds of log λ2."""


def log_path(
    initial: float, start: float, final: float, *, opening: float, end: float
) -> Callable[[float], float]:
    """Return the function from time in [0, 1] to log ρ*, where ρ* is the prescribed mean of a mask.

    log ρ* is linear between the points (0, initial), (opening, start) and (end, final), and constant after
    `end`. A linear log ρ* means that ρ* falls geometrically. ρ* never rises: a `start` above `initial`
    counts as `initial`, and a `final` above `start` as `start`.

    >>> path = log_path(0.9, 0.1, 0.001, opening=0.1, end=0.9)
    >>> [round(math.exp(path(t)), 4) for t in (0.0, 0.1, 0.5, 0.9, 1.0)]
    [0.9, 0.1, 0.01, 0.001, 0.001]
    """
    high, middle, low = math.log(initial), math.log(min(start, initial)), math.log(min(final, start, initial))

    def path(time: float) -> float:
        if time < opening:
            return high + (middle - high) * time / opening
        if time < end:
            return middle + (low - middle) * (time - opening) / (end - opening)
        return low

    return path


def controlled(state: Tensor, distance: Tensor, time: float | Tensor, *, gain: float | Tensor) -> Tensor:
    """Return the state (log λ2, time of the last step) (…, 2) after a step of the controller.

    `distance` is log ρ − log ρ*, positive if the mask is too open. `time` is the completed share of the
    stage. log λ2 grows by gain · distance · (the time since the last step). It is a multiplier learnt by
    gradient ascent, as for constraints (arXiv 2505.20628). The logarithm is used because λ2 varies over
    orders of magnitude. The gain is per stage, so that it does not depend on the number of steps. λ2 stays
    within [1e-6, 0.05].
    """
    log_lambda, before = state.unbind(-1)
    moved = log_lambda + gain * distance * (time - before)
    now = torch.zeros_like(before) + time
    return torch.stack([moved.clamp(LOWEST, HIGHEST), now], -1)


def initial_state() -> Tensor:
    """Return the state before the first step, with the lowest λ2."""
    return torch.tensor([LOWEST, 0.0])
