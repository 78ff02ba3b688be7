"""The interface of trackers, and how to write your own.

A *tracker* shows or records a sweep somewhere; MLflow is built in. Your own tracker is a class, or a function
that returns an object, which `tracking.trackers` names by its import path, together with its options:

    tracking: {trackers: [mlflow, {name: 'my_package.my_module:Lines', path: trials.jsonl}]}

    class Lines:
        def __init__(self, sweep: Sweep, *, path: str) -> None: ...
        def begin(self, file, records): ...
        ...

The class is called with the `Sweep` and the options, as keywords. `Tracker` describes the methods that are
then called, and when. All calls come from one thread of the process that runs the sweep, and the sweep waits
for them: a tracker should do slow work in a thread of its own. An exception that a tracker raises is logged
once, and does not stop the sweep (`group.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.records.trial import TrialRecord


class Listener(Protocol):
    """An object that is told what the trials of a sweep do: a tracker, the live view, or retention."""

    def started(self, record: TrialRecord) -> None:
        """Called when a trial starts, for the first time or again; the record has its configuration."""

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Called when a trial has new epochs: each epoch once, in order, including reused ones."""

    def ended(self, record: TrialRecord) -> None:
        """Called when a trial has ended; `record.status` says how, and the record has the results."""


class Tracker(Listener, Protocol):
    """A listener that is also told of the beginning and the end of each run of a sweep.

    It may have three further attributes, all optional: `title` is its name in messages; `look` is a line,
    printed at the end, that says how to view what was written; `run_ids` maps each trial's `uid` to the id
    under which it was written, for the column `mlflow_run_id` of the results.
    """

    def begin(self, file: dict[str, Any], records: Sequence[TrialRecord]) -> None:
        """Called when the sweep is run, for the first time or again.

        `file` is the configuration tree as given, with distributions. `records` are the trials of earlier
        runs, finished or not; the tracker was told of them then, unless it has been added since.
        """

    def finish(self, status: str, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """Called when this run of the sweep ends; `status` is "finished", "interrupted" or "failed".

        `summary` has the best validation score at each density. `files` has the best configurations as YAML
        text, by their paths in the sweep's folder.
        """

    def close(self) -> int:
        """Write all pending entries, within seconds; return how many could not be written."""


@dataclass(frozen=True)
class Sweep:
    """The sweep for which a tracker is made.

    `id` is the same each time the sweep is run; `folder` is the sweep's folder, a path or a URI.
    """

    id: str
    config: Config
    folder: str

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.config.name
