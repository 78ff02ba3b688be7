"""What a sweep asks of whatever runs its trials: the one place where Ray could be something else."""

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
    """The trials of a sweep that are missing, and who is to be told of them.

    `config` has absolute paths and says where the store is, `search` gives one trial after the other, `steps`
    is what a trial runs, `source` the sweep's file, for the places of keys in messages.
    """

    config: Config
    problem: Problem
    search: SweepSearch
    listeners: Sequence[Listener]
    steps: pipeline.Steps = pipeline.steps
    source: Document = field(default_factory=lambda: Document("the sweep's file", {}))


class Executor(Protocol):
    """Runs trials. It reports what they do to a `Referee`, which records it and decides what they came to."""

    def run(self, trials: Trials) -> bool:
        """Run all of them; whether it was interrupted (Ctrl-C) before the last one ended.

        Raises WorkError when nothing works, UserError where this machine or cluster cannot run them.
        """
