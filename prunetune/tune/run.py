"""One configuration, an epoch at a time."""

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
    """One configuration under way.

    Between two epochs it is always as far as it comes without training: a stage whose last epoch was
    reported is in the store, and a trial that has no epoch left is known to be at its end.
    """

    def __init__(self, config: Config, stages: TrialStages, device: str, owner: str, *, skip: int) -> None:
        """`skip` of the epochs that are in the store need not be reported again."""
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
        """Whether there is an epoch to be reported, or trained."""
        return bool(self._epochs) or self._work is not None

    def epoch(self) -> dict[str, Any] | None:
        """The next epoch's metrics; None where there is none, or training has diverged in it."""
        if not self._epochs and self._work is not None:
            self._work.run()
            self._advance()
        if not self._epochs:
            return None
        self.last = _shown(self._epochs.popleft())
        return self.last

    def close(self) -> None:
        """Leave it."""
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
    """An epoch as Tune shall see it: where it is stored is the trainable's own business."""
    return {
        name: value for name, value in epoch.report().items() if name not in ("key", "last", "checkpointed")
    }
