"""The rungs of asynchronous successive halving (Li et al., arXiv 1810.05934), without a scheduler."""

from __future__ import annotations

import math

import numpy as np


class Rungs:
    """The scores of trials at each rung; a trial continues if it is among the best at its rung.

    Rung k is at `grace` · `factor`^k epochs, up to `longest`. A trial is judged once per rung, at the highest
    rung that it has reached, against the trials that reached the rung before it: it is behind if its score
    (higher is better) is below their (1 − 1/`factor`)-quantile. Ray Tune's `ASHAScheduler` with one bracket
    does the same.

    >>> rungs = Rungs(grace=1, longest=9, factor=2)
    >>> [rungs.is_behind(name, 1, score) for name, score in (("a", 0.9), ("b", 0.5), ("c", 0.95))]
    [False, True, False]
    """

    def __init__(self, *, grace: int, longest: int, factor: float) -> None:
        count = int(math.log(longest / grace) / math.log(factor) + 1)
        self._share = 1 - 1 / factor
        self._rungs: list[tuple[float, dict[str, float]]] = [
            (grace * factor**k, {}) for k in reversed(range(count))
        ]

    def is_behind(self, trial: str, epoch: int, score: float) -> bool:
        """Note the score if this epoch (from 1) reaches a new rung; return whether the trial is behind."""
        reached = next((scores for place, scores in self._rungs if epoch >= place), None)
        if reached is None or trial in reached:
            return False
        before = list(reached.values())
        reached[trial] = score
        return bool(before) and bool(score < np.nanquantile(before, self._share))
