"""A clock around what a sweep's trials run, in whatever process runs them."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunetune.config.schema import Config
from prunetune.engine.loop import EpochWork
from prunetune.pipeline import PipelineResult, Steps
from prunetune.stages.stage import Step


@dataclass(frozen=True)
class Times:
    """When a trial ran, in which process; seconds of a clock that all processes of a machine share.

    `inside` is the time spent in the trial's own work; the rest of `ended - begun` it waited to go on.
    """

    process: int
    begun: float
    ended: float
    inside: float


@dataclass(frozen=True)
class Clocked:
    """Runs trials, and leaves each one's `Times` in a folder."""

    steps: Steps
    folder: str

    def __call__(self, config: Config, **arguments: Any) -> Generator[Step, None, PipelineResult]:
        """As `steps`."""
        begun = since = time.monotonic()
        inside = 0.0
        trial = self.steps(config, **arguments)
        try:
            while True:
                try:
                    step = next(trial)
                except StopIteration as end:
                    result: PipelineResult = end.value
                    inside += time.monotonic() - since
                    return result
                if isinstance(step, EpochWork):  # which the worker may run: the trial's own work
                    yield step
                    continue
                inside += time.monotonic() - since
                yield step
                since = time.monotonic()
        finally:
            trial.close()
            times = Times(os.getpid(), begun, time.monotonic(), inside)
            Path(self.folder, f"{arguments['owner']}.json").write_text(json.dumps(asdict(times)))


def read(folder: Path) -> list[Times]:
    """What was left, in the order in which the trials ended."""
    found = [Times(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return sorted(found, key=lambda times: times.ended)


@dataclass(frozen=True)
class Beyond:
    """Seconds of a trial's slot beyond its work: `between` it and the one before, `within` it."""

    between: float
    within: float
    inside: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.between + self.within


def beyond(trials: list[Times]) -> list[Beyond]:
    """For every trial but the first of each process, what came with it since the one before it ended."""
    by_process: dict[int, list[Times]] = defaultdict(list)
    for times in trials:
        by_process[times.process].append(times)
    found = []
    for here in by_process.values():
        for before, times in pairwise(here):
            waited = times.ended - times.begun - times.inside
            found.append(Beyond(times.begun - before.ended, waited, times.inside))
    return found
