"""Early stopping: end trials that do worse than others at their density, or cannot catch up any more.

Each density has its own rule, because scores at density 0.001 and at 0.1 cannot be compared. Only epochs
after pruning count, because scores before pruning say little about scores after it.
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
"""A trial's validation scores, one per post-pruning epoch in order; higher is better."""

_COMPLETE = 4
"""`catch_up` stops no trial before this many comparable trials are complete."""


class StoppingRule(Protocol):
    """A rule that decides which trials at one density end early; `search.early_stopping` names its class.

    One object per density is made, by calling the class with its options and `longest=`, the largest number
    of post-pruning epochs in the space. Scores are validation scores, of which a higher one is better.
    Epochs are post-pruning epochs, counted from 1; `length` is the number of them that the trial is to train.
    """

    def stops(self, trial: str, epoch: int, score: float, length: int) -> bool:
        """Return whether the trial is to end after this epoch. Called once per epoch of a trial, in order."""

    def completed(self, scores: Scores, length: int) -> None:
        """Learn the scores of a trial that has trained all its `length` epochs."""


@final
class EarlyStopping:
    """Applies the stopping rule of each density to the records of its trials."""

    def __init__(self, config: Config, past: list[TrialRecord], longest: int) -> None:
        """`past` are finished trials of earlier runs; `longest` is the space's most post-pruning epochs."""
        settings = config.search.early_stopping
        self._rules: dict[float, StoppingRule] = {}
        if settings is not None:
            self._rules = {density: settings.make(longest=longest) for density in config.densities}
        # What they gained is told last: the rules are not asked about trials that are over, so none need be
        # held against the others.
        for record in past:
            for epoch in record.curve:
                self._tell(record, epoch)
        for record in past:
            self.ended(record)

    def stops(self, record: TrialRecord, epoch: Epoch) -> bool:
        """Return whether a trial is to end after this epoch. To be called once per epoch, in order."""
        # Stopping a trial after its last epoch would save nothing.
        return self._tell(record, epoch) and not epoch.last

    def ended(self, record: TrialRecord) -> None:
        """Tell the density's rule the scores of a trial that is complete."""
        # Leave collapsed trials out: their zero gain would stop slow starters.
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
    """Asynchronous successive halving over post-pruning epochs (arXiv 1810.05934), and a catch-up rule.

    No trial is stopped before `grace_epochs`; at each rung one trial in `reduction_factor` continues. With
    `catch_up`, a trial also ends if it would not reach the density's best score even with the gain that only
    a share 1 − `catch_up` of the complete trials exceeded from the same epoch on; null turns this rule off.
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
        self._complete: dict[int, list[Scores]] = defaultdict(list)  # by `length`

    def stops(self, trial: str, epoch: int, score: float, length: int) -> bool:
        """Return whether the trial is behind at a new rung, or cannot catch up with the best any more."""
        if self._is_idle:
            return False
        # Ask the rungs first, in any case: they must learn the score of every trial that reaches them.
        is_behind = self._rungs.is_behind(trial, epoch, score)
        if is_behind or self._catch_up is None or epoch < self._grace:
            return is_behind
        return not can_catch_up(score, epoch, self._complete[length], self._catch_up)

    def completed(self, scores: Scores, length: int) -> None:
        """Keep the scores of a complete trial, for the catch-up rule."""
        self._complete[length].append(scores)


def can_catch_up(score: float, epoch: int, complete: Sequence[Scores], share: float) -> bool:
    """Whether a trial with this score after this post-pruning epoch may still reach the best final score.

    `complete` holds the scores of complete trials of the same length. The trial is assumed to gain the
    `share`-quantile of their gains from this epoch to the end. With fewer than four finite gains the answer
    is always True.

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
    """The number of post-pruning epochs that a trial is to train; only equal lengths are compared."""
    return int(record.tree["post_pruning"]["epochs"])
