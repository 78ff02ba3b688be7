"""Who is told how a sweep goes, and how to write one's own.

A *tracker* shows or records a sweep somewhere: MLflow is built in. Another one is a class, or a function that
makes an object, which `tracking.trackers` names by its import path, with options of its own:

    tracking: {trackers: [mlflow, {name: 'my_package.my_module:Lines', path: trials.jsonl}]}

    class Lines:
        def __init__(self, sweep: Sweep, *, path: str) -> None: ...
        def begin(self, file, records): ...
        ...

It is made with the `Sweep` and its options, which are its further parameters. `Tracker` says what it is
told, and when. All of it happens in the process that was started, in one thread, while the sweep waits: what
takes long belongs into a thread of the tracker's own. What a tracker raises is logged, once, and stops
nothing (`group.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.records.trial import TrialRecord


class Listener(Protocol):
    """Somebody who wants to know what trials do: a tracker, the live view, retention."""

    def started(self, record: TrialRecord) -> None:
        """A trial is running, for the first time or again; the record says what is tried."""

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """It has finished these epochs: each is told once, in order, also where it came from the store."""

    def ended(self, record: TrialRecord) -> None:
        """It has ended; `record.status` says how, and the record has its results."""


class Tracker(Listener, Protocol):
    """A listener that also sees the beginning and the end of each run of a sweep.

    It may have further attributes, each of which may be missing: `title`, its name in messages; `look`, how a
    person comes to what was written, as a line for the end; `run_ids`, by a trial's `uid` the id of what was
    written of it, for the column `mlflow_run_id` of the results.
    """

    def begin(self, file: dict[str, Any], records: Sequence[TrialRecord]) -> None:
        """The sweep is run, perhaps again. `file` is its tree as given, with distributions.

        `records` are the trials of earlier runs, finished or not: told then, unless the tracker is new.
        """

    def finish(self, status: str, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """This run has ended: `status` is finished, interrupted or failed.

        `summary` has the best validation score of each density, `files` the best configurations as YAML, by
        their path in the sweep's folder.
        """

    def close(self) -> int:
        """Write what is still to be written, within seconds; how many entries could not be."""


@dataclass(frozen=True)
class Sweep:
    """What a tracker is made for: `id` is the same whenever the sweep is run, `folder` a path or URI."""

    id: str
    config: Config
    folder: str

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.config.name
