"""Runs one configuration, one epoch at a time."""

from __future__ import annotations

from collections import deque
from typing import Any, final

from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork
from prunetune.pipeline import Outcome, PipelineResult
from prunetune.tune.stages import TrialStages


@final
class Run:
    """Runs the pipeline of one configuration, one epoch at a time.

    Between two epochs it always advances as far as it can without training. So a stage whose last epoch was
    reported is already in the store, and `end` is set as soon as no epoch is left.
    """

    def __init__(self, config: Config, stages: TrialStages, device: str, owner: str, *, skip: int) -> None:
        """`skip` is the number of epochs in the store that need not be reported again."""
        self.stages = stages
        self.end: PipelineResult | None = None
        self.last: dict[str, Any] = {}
        # At an interval of zero every epoch is offered to `stages`.
        self._pipeline = pipeline.steps(
            config, store=stages, device=device, owner=owner, checkpoint_interval=0.0
        )
        self._outcome = Outcome(self._pipeline)
        self._steps = iter(self._outcome)
        self._epochs: deque[Epoch] = deque()
        self._work: EpochWork | None = None
        self._advance()
        for _ in range(min(skip, len(self._epochs))):
            self.epoch()

    @property
    def has_more(self) -> bool:
        """Whether an epoch is left to report or to train."""
        return bool(self._epochs) or self._work is not None

    def epoch(self) -> dict[str, Any] | None:
        """Return the next epoch's metrics, trained if necessary; None if there is none, or if it diverged."""
        if not self._epochs and self._work is not None:
            self._work.run()
            self._advance()
        if not self._epochs:
            return None
        self.last = _shown(self._epochs.popleft())
        return self.last

    def close(self) -> None:
        """Abandon the pipeline; finished stages stay in the store."""
        self._pipeline.close()

    def _advance(self) -> None:
        self._work = None
        for step in self._steps:
            if isinstance(step, EpochWork):
                self._work = step
                return
            self._epochs.append(step)
        self.end = self._outcome.value


def _shown(epoch: Epoch) -> dict[str, Any]:
    """Return an epoch's values for Tune, without those that say how it is stored."""
    return {
        name: value for name, value in epoch.report().items() if name not in ("key", "last", "checkpointed")
    }
