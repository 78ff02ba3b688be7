"""A tracker that writes down when each complete trial ended, and with which result."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from prunetune.engine.epoch import Epoch
from prunetune.records.trial import TrialRecord
from prunetune.trackers.tracker import Sweep


def write(path: str, density: float, val: float | None, test: float | None) -> None:
    """Append a line with the time, the density and the accuracies of a trial that has just ended."""
    line = {"time": time.time(), "density": density, "val": val or 0.0, "test": test or 0.0}
    with Path(path).open("a", encoding="utf-8") as file:  # one write of a short line: processes may share it
        file.write(json.dumps(line) + "\n")


def read(path: Path, begun: float) -> list[dict[str, float]]:
    """Read the lines in order of time, with `seconds` since `begun` instead of the time."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [{"seconds": line.pop("time") - begun, **line} for line in lines]
    return sorted(found, key=lambda line: line["seconds"])


@final
class Events:
    """Writes the lines of a sweep's complete trials to a file."""

    def __init__(self, sweep: Sweep, *, path: str) -> None:
        self._path = path

    def begin(self, file: dict[str, Any], records: Sequence[TrialRecord]) -> None:
        """Do nothing: only trials of this run are written."""

    def started(self, record: TrialRecord) -> None:
        """Do nothing."""

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Do nothing."""

    def ended(self, record: TrialRecord) -> None:
        """Write a complete trial."""
        if record.status == "complete":
            write(self._path, record.density, record.val, record.test)

    def finish(self, status: str, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """Do nothing."""

    def close(self) -> int:
        """Return 0: every line is written at once."""
        return 0
