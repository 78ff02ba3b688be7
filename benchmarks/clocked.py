"""Measures the times of a sweep's trials, in the processes that run them."""

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
    """When a trial ran and in which process, in seconds of a clock that all processes of a machine share.

    `inside` is the time of the trial's own work; for the rest of `ended - begun` it waited to be resumed.
    """

    process: int
    begun: float
    ended: float
    inside: float


@dataclass(frozen=True)
class Clocked:
    """Wraps the pipeline of trials, and writes the `Times` of each trial into a folder."""

    steps: Steps
    folder: str

    def __call__(self, config: Config, **arguments: Any) -> Generator[Step, None, PipelineResult]:
        """Yield what the wrapped pipeline yields, and write the trial's times when it ends."""
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
                if isinstance(step, EpochWork):  # the worker may run it, which is the trial's own work
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
    """Read the times of all trials, in the order in which the trials ended."""
    found = [Times(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return sorted(found, key=lambda times: times.ended)


@dataclass(frozen=True)
class Beyond:
    """The overhead of a trial in seconds: `between` the previous trial and it, and `within` it.

    `inside` is the time of the trial's own work.
    """

    between: float
    within: float
    inside: float

    @property
    def total(self) -> float:
        """The sum of `between` and `within`."""
        return self.between + self.within


def beyond(trials: list[Times]) -> list[Beyond]:
    """Return the overhead of every trial but the first of each process, since the previous trial ended."""
    by_process: dict[int, list[Times]] = defaultdict(list)
    for times in trials:
        by_process[times.process].append(times)
    found = []
    for here in by_process.values():
        for before, times in pairwise(here):
            waited = times.ended - times.begun - times.inside
            found.append(Beyond(times.begun - before.ended, waited, times.inside))
    return found
