"""Which trials end early: what compares badly or cannot catch up, within a density, after pruning.

One rule for all densities would rank a trial at density 0.001 against one at 0.1, and a pre-pruning accuracy
against one after pruning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Protocol, final

import numpy as np
from pydantic import Field

from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.records.trial import TrialRecord, is_at_density
from prunetune.search.asha import Rungs

Scores = Sequence[float]
"""By post-pruning epoch, from 1; higher is better."""

_COMPLETE = 4
"""So many trials must be complete before others are held against what they gained."""


class StoppingRule(Protocol):
    """What decides at one density which trials end; `search.early_stopping` names its class.

    The class is called with `longest=`, the most post-pruning epochs of the space, and its options. Scores
    are validation scores of which the higher is the better, epochs are post-pruning epochs from 1. `length`
    is for how many of them the trial is to train.
    """

    def stops(self, trial: str, epoch: int, score: float, length: int) -> bool:
        """Whether a trial is to end after this epoch; each is told once, in order."""

    def completed(self, scores: Scores, length: int) -> None:
        """A trial has come to its end, with these scores."""


@final
class EarlyStopping:
    """A stopping rule for each density."""

    def __init__(self, config: Config, past: list[TrialRecord], longest: int) -> None:
        """`past` are trials that ended before; `longest` is the most post-pruning epochs."""
        settings = config.search.early_stopping
        self._rules: dict[float, StoppingRule] = {}
        if settings is not None:
            self._rules = {
                density: settings.component(longest=longest, **settings.options)
                for density in config.densities
            }
        # What they gained is told last: the rules are not asked about trials that are over, so none need be
        # held against the others.
        for record in past:
            for epoch in record.curve:
                self._tell(record, epoch)
        for record in past:
            self.ended(record)

    def stops(self, record: TrialRecord, epoch: Epoch) -> bool:
        """Whether a trial is to end after this epoch of it. Each epoch may be told once, in their order."""
        # After the very last epoch there is nothing left to save.
        return self._tell(record, epoch) and not epoch.last

    def ended(self, record: TrialRecord) -> None:
        """A trial has a result."""
        # One that collapsed gained nothing: by its like, slow starters would have no hope.
        if record.density in self._rules and record.status == "complete":
            scores = [epoch.score for epoch in record.curve if epoch.post_epoch is not None]
            self._rules[record.density].completed(scores, _length(record))

    def _tell(self, record: TrialRecord, epoch: Epoch) -> bool:
        rule = self._rules.get(record.density)
        if rule is None or epoch.post_epoch is None or not is_at_density(epoch, record.density):
            return False
        return rule.stops(record.uid, epoch.post_epoch, epoch.score, _length(record))


@final
class Asha:
    """Asynchronous successive halving over post-pruning epochs (arXiv 1810.05934); and what is too late.

    No trial is stopped before `grace_epochs`; one in `reduction_factor` goes on at each rung. With `catch_up`
    a trial also ends when it would not come to the density's best even with a gain that only 1 − `catch_up`
    of the complete trials had from the same epoch on; null: all may go on.
    """

    def __init__(
        self,
        longest: int,
        *,
        grace_epochs: Annotated[int, Field(ge=1)] = 2,
        reduction_factor: Annotated[float, Field(gt=1)] = 3.0,
        catch_up: Annotated[float, Field(gt=0, le=1)] | None = 0.9,
    ) -> None:
        self._is_idle = longest <= grace_epochs
        self._grace, self._catch_up = grace_epochs, catch_up
        self._rungs = Rungs(grace=grace_epochs, longest=max(longest, grace_epochs), factor=reduction_factor)
        self._complete: dict[int, list[Scores]] = defaultdict(list)  # by the epochs asked for

    def stops(self, trial: str, epoch: int, score: float, length: int) -> bool:
        """As `StoppingRule` says."""
        if self._is_idle:
            return False
        # Both are asked: the rungs want every trial that came to them.
        is_behind = self._rungs.is_behind(trial, epoch, score)
        if is_behind or self._catch_up is None or epoch < self._grace:
            return is_behind
        return not can_catch_up(score, epoch, self._complete[length], self._catch_up)

    def completed(self, scores: Scores, length: int) -> None:
        """As `StoppingRule` says."""
        self._complete[length].append(scores)


def can_catch_up(score: float, epoch: int, complete: Sequence[Scores], share: float) -> bool:
    """Whether a trial with this score after this post-pruning epoch may still come to the best one.

    It is granted what the `share`-quantile of the complete trials, which are as long as it, gained from that
    epoch to their end. With less than four gains that are finite nothing is said against it.

    >>> complete = [[0.5, 0.9], [0.6, 0.9], [0.7, 0.95], [0.8, 0.9]]    # gains 0.4, 0.3, 0.25, 0.1
    >>> can_catch_up(0.56, 1, complete, 1.0), can_catch_up(0.54, 1, complete, 1.0)
    (True, False)
    """
    if not complete:
        return True
    # An epoch without a value has the worst score, which may be infinite: it tells no gain.
    ends = np.array([(curve[epoch - 1], curve[-1]) for curve in complete])
    ends = ends[np.isfinite(ends).all(1)]
    gains = ends[:, 1] - ends[:, 0]
    if len(gains) < _COMPLETE:
        return True
    best = max(curve[-1] for curve in complete)
    return bool(score + np.quantile(gains, share) >= best)


def _length(record: TrialRecord) -> int:
    """For how many post-pruning epochs a trial is to train: only such are held against each other."""
    return int(record.tree["post_pruning"]["epochs"])
