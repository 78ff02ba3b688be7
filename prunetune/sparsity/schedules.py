"""Schedules, which are functions `time -> value` over a stage; each function here makes one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field

Schedule = Callable[[float], float]


def linear_to_zero(start: float, horizon: float) -> Schedule:
    """Decay linearly: start · (1 − t/T) for t < T, then exactly 0 (paper, label smoothing and soft skips).

    >>> [linear_to_zero(0.5, 2)(t) for t in (0, 1, 2, 3)]
    [0.5, 0.25, 0.0, 0.0]
    """
    return lambda t: start * (1 - t / horizon) if t < horizon else 0.0


def linear_until(start: float, end: float, horizon: float) -> Callable[[float], float | None]:
    """Change linearly, start · (1 − t/T) + end · t/T for t < T, then None: smoothing ends (paper, PSwish).

    >>> [linear_until(1.0, 20.0, 2)(t) for t in (0, 1, 2)]
    [1.0, 10.5, None]
    """
    return lambda t: start * (1 - t / horizon) + end * t / horizon if t < horizon else None


def rise(share: float) -> Schedule:
    """Rise linearly from 0 to 1 over the first `share` of a stage, then stay at 1; time is in [0, 1].

    >>> [rise(0.5)(t) for t in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return lambda t: 1.0 if t >= share else t / share


def constant() -> Schedule:
    """Keep the learning rate constant: the factor is always 1."""
    return lambda t: 1.0


def cosine() -> Schedule:
    """Fall along half a cosine from 1 at time 0 to 0 at time 1 (Loshchilov and Hutter, arXiv 1608.03983).

    >>> [round(cosine()(t), 6) for t in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    return lambda t: 0.5 * (1 + math.cos(math.pi * t))


def _rising(milestones: list[float]) -> list[float]:
    if sorted(set(milestones)) != milestones:
        raise ValueError("must rise")
    return milestones


Milestones = Annotated[list[Annotated[float, Field(gt=0, lt=1)]], AfterValidator(_rising)]


def step(
    *,
    milestones: Milestones = [0.5, 0.75],  # noqa: B006
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1,
) -> Schedule:
    """Multiply the learning rate by `factor` at each of the milestones, which are times in (0, 1).

    >>> [step(milestones=[0.5, 0.75], factor=0.1)(t) for t in (0.0, 0.5)]
    [1.0, 0.1]
    """
    return lambda t: factor ** sum(t >= milestone for milestone in milestones)


def with_warmup(schedule: Schedule, share: float) -> Schedule:
    """Rise linearly over the first `share` of the stage, then follow `schedule`, compressed into the rest.

    >>> [with_warmup(constant(), 0.2)(t) for t in (0.0, 0.1, 0.2, 1.0)]
    [0.0, 0.5, 1.0, 1.0]
    """
    if share == 0:
        return schedule
    return lambda t: t / share if t < share else schedule((t - share) / (1 - share))
