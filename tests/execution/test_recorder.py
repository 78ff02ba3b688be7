"""Ray Tune's events, passed on to a referee."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunetune.execution.recorder import Recorder


class Referee:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.told.append((name, *given, *named.values()))


@pytest.fixture
def referee() -> Referee:
    return Referee()


def worker(error_file: Path | None = None) -> Any:
    return SimpleNamespace(trial_id="w", error_file=None if error_file is None else str(error_file))


def test_what_tune_says_of_a_worker_comes_to_the_referee(referee: Referee) -> None:
    recorder = Recorder(referee)  # type: ignore[arg-type]
    recorder.on_trial_start(0, [], worker())
    recorder.on_trial_result(0, [], worker(), {"members": ["news"]})
    recorder.on_trial_result(0, [], worker(), {"members": [], "done": True})
    recorder.on_trial_result(0, [], worker(), {"members": [], "unfit": ["no"], "node": "10.0.0.9"})
    recorder.on_trial_recover(0, [], worker())
    assert referee.told == [
        ("arrived", "w"),
        ("heard", "w", ["news"], False),
        ("heard", "w", [], True),
        ("refused", "w", "10.0.0.9", ["no"]),
        ("lost", "w", "the worker was lost"),
    ]


def test_of_a_workers_error_file_the_newest_entry_counts(referee: Referee, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(
        "Failure # 1 (occurred at x)\nfirst\n\nFailure # 2 (at y)\nsecond\nline\n"
    )
    Recorder(referee).on_trial_error(0, [], worker(tmp_path / "error.txt"))  # type: ignore[arg-type]
    assert referee.told == [("given_up", "w", "second\nline")]
