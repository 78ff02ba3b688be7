"""A controller of λ2 that keeps the mean of a mask on a given path."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FIRST, LOWEST, HIGHEST = math.log(1e-6), math.log(1e-12), math.log(1.0)
"""The value of log λ2 before the first step, and its bounds."""


def log_path(
    initial: float, start: float, final: float, *, opening: float, end: float, power: float = 1.0
) -> Callable[[float], float]:
    """Return the function from time in [0, 1] to log ρ*, where ρ* is the prescribed mean of a mask.

    log ρ* falls linearly from log `initial` at time 0 to log `start` at time `opening`. From there it falls
    to log `final` at time `end`: the distance to log `final` is the share of time left, to the `power`. With
    power 1 ρ* falls geometrically; with a higher power it falls fast at first and slowly in the end. After
    `end` it is constant. ρ* never rises: a `start` above `initial` counts as `initial`, and a `final` above
    `start` as `start`.

    >>> path = log_path(0.9, 0.1, 0.001, opening=0.1, end=0.9)
    >>> [round(math.exp(path(t)), 4) for t in (0.0, 0.1, 0.5, 0.9, 1.0)]
    [0.9, 0.1, 0.01, 0.001, 0.001]
    >>> path = log_path(0.9, 0.1, 0.001, opening=0.1, end=0.9, power=2.0)
    >>> round(math.exp(path(0.5)), 5)  # half of the time left: a quarter of the distance
    0.00316
    """
    high, middle, low = math.log(initial), math.log(min(start, initial)), math.log(min(final, start, initial))

    def path(time: float) -> float:
        if time < opening:
            return high + (middle - high) * time / opening
        if time < end:
            left: float = ((end - time) / (end - opening)) ** power
            return low + (middle - low) * left
        return low

    return path


def controlled(
    state: Tensor,
    distance: Tensor,
    time: float | Tensor,
    *,
    gain: float | Tensor,
    proportional: float | Tensor,
) -> Tensor:
    """Return the controller's state (…, 3) after a step: (log of the multiplier, time, log λ2).

    `distance` is log ρ − log ρ*, positive if the mask is too open. `time` is the completed share of the
    stage. The log of the multiplier grows by gain · distance · (the time since the last step): it is learnt
    by gradient ascent, as for constraints (arXiv 2505.20628), in the logarithm because λ2 varies over orders
    of magnitude. The gain is per stage, so that it does not depend on the number of steps. λ2 is the
    multiplier · exp(proportional · distance), which damps the oscillation that the multiplier alone has. Both
    stay within [1e-12, 1].
    """
    multiplier, before = state[..., 0], state[..., 1]
    now = torch.zeros_like(before) + time
    moved = (multiplier + gain * distance * (now - before)).clamp(LOWEST, HIGHEST)
    return torch.stack([moved, now, (moved + proportional * distance).clamp(LOWEST, HIGHEST)], -1)


def initial_state() -> Tensor:
    """Return the state before the first step, with λ2 = 1e-6."""
    return torch.tensor([FIRST, 0.0, FIRST])
