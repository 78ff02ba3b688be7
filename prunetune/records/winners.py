"""The only definition of the best trial at a density, used for records and for the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Outcome(NamedTuple):
    """The values by which trials are ranked; `score` is the validation score (higher is better) or None."""

    density: float
    number: int
    status: str
    score: float | None
    nonzero: int | None


def winners(trials: Iterable[T], outcome_of: Callable[[T], Outcome]) -> dict[float, T]:
    """The best trial at each density by its validation score; of equal ones, the earlier.

    A collapsed trial wins only where no trial is complete. A trial without a score, or without any weight
    left, never wins: it is a result, but it gives no network to train.

    >>> trials = [Outcome(0.1, 0, "complete", 0.7, 9), Outcome(0.1, 1, "complete", 0.8, 9)]
    >>> winners(trials, lambda outcome: outcome)[0.1].number
    1
    """
    found: dict[float, tuple[tuple[bool, float, int], T]] = {}
    for trial in trials:
        density, number, status, score, nonzero = outcome_of(trial)
        if status not in ("complete", "collapsed") or score is None or not nonzero:
            continue
        rank = status == "complete", score, -number
        if density not in found or rank > found[density][0]:
            found[density] = rank, trial
    return {density: trial for density, (_, trial) in found.items()}
