"""The interface between a sweep and the executor of its trials; Ray Tune is one executor of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prunetune import pipeline
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.records.problem import Problem
from prunetune.search.queue import SweepSearch
from prunetune.trackers.tracker import Listener


@dataclass(frozen=True)
class Trials:
    """The trials that a sweep still has to run, and the listeners to tell of them.

    `config` has absolute paths and says where the store is; `search` proposes one trial after the other;
    `steps` is the pipeline that a trial runs; `source` is the sweep's file, whose lines messages name.
    """

    config: Config
    problem: Problem
    search: SweepSearch
    listeners: Sequence[Listener]
    steps: pipeline.Steps = pipeline.steps
    source: Document = field(default_factory=lambda: Document("the sweep's file", {}))


class Executor(Protocol):
    """Runs trials, and reports their progress to a `Referee`, which records it and decides their outcomes."""

    def run(self, trials: Trials) -> bool:
        """Run all trials; return whether a signal (Ctrl-C) interrupted the sweep before the last one ended.

        Raises WorkError when trials only fail, UserError where this machine or cluster cannot run them.
        """
