"""Several trackers as one, and one of a user's own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from small_sweep import make_sweep

from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.errors import ConfigError, UserError
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.trackers.group import Closed, Trackers
from prunetune.trackers.tracker import Sweep

LINES = '''
"""A tracker that writes what happens as lines of JSON."""

import json
from pathlib import Path


class Lines:
    title = "my lines"

    def __init__(self, sweep, *, path: str, only_ends: bool = False) -> None:
        self.file = Path(path).open("a")
        self.only_ends = only_ends
        self.sweep = sweep
        self.look = f"less {path}"

    def begin(self, file, records) -> None:
        self.write("begin", name=self.sweep.name, densities=file["densities"], before=len(records))

    def started(self, record) -> None:
        self.write("started", density=record.density, trial=record.number)

    def epochs(self, record, epochs) -> None:
        if not self.only_ends:
            self.write("epochs", trial=record.number, scores=[epoch.score for epoch in epochs])

    def ended(self, record) -> None:
        self.write("ended", density=record.density, trial=record.number, status=record.status)

    def finish(self, status, summary, files) -> None:
        self.write("finish", status=status, best=sorted(files))

    def close(self) -> int:
        self.file.close()
        return 0

    def write(self, event: str, **values) -> None:
        self.file.write(json.dumps({"event": event, **values}) + "\\n")


class Fails(Lines):
    def epochs(self, record, epochs) -> None:
        raise OSError("the disk is full")

    def finish(self, status, summary, files) -> None:
        raise RuntimeError("and now this")


class SaysClosed(Lines):
    def close(self) -> int:
        self.write("closed")
        return super().close()


class Opaque(Lines):
    @property
    def look(self):
        raise OSError("the server is gone")

    @look.setter
    def look(self, value) -> None:
        pass

    @property
    def run_ids(self):
        raise OSError("the server is gone")

    def close(self):
        return "nothing to tell"


def cannot_be_made(sweep):
    raise ConnectionError("log in first")
'''


@pytest.fixture(autouse=True)
def my_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_trackers.py").write_text(LINES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_trackers", raising=False)


def config_with(folder: Path, trackers: str) -> Config:
    return make_sweep(folder, f"tracking.trackers={trackers}")[0]


def group(folder: Path, trackers: str) -> Trackers:
    return Trackers.of(Sweep("an id", config_with(folder, trackers), str(folder)))


def record(folder: Path) -> TrialRecord:
    found = SweepSearch(*make_sweep(folder)).next()
    assert found is not None
    return found


def play(trackers: Trackers, trial: TrialRecord) -> list[Closed]:
    trackers.begin({"densities": [0.1]}, [])
    trackers.started(trial)
    trackers.epochs(trial, [Epoch("pre_pruning", 1, 0.5, {}, epoch=1)])
    trackers.epochs(trial, [Epoch("pre_pruning", 2, 0.6, {}, epoch=2)])
    trial.status = "complete"
    trackers.ended(trial)
    trackers.finish("finished", {"best": 0.6}, {"best/x.yaml": ""})
    return trackers.close()


def test_a_tracker_of_ones_own_is_told_everything(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    trackers = group(tmp_path, f"[{{name: 'my_trackers:Lines', path: {path}}}]")
    assert play(trackers, record(tmp_path)) == [Closed("my lines", f"less {path}", 0)]
    assert path.read_text().splitlines() == [
        '{"event": "begin", "name": "small", "densities": [0.1], "before": 0}',
        '{"event": "started", "density": 0.1, "trial": 0}',
        '{"event": "epochs", "trial": 0, "scores": [0.5]}',
        '{"event": "epochs", "trial": 0, "scores": [0.6]}',
        '{"event": "ended", "density": 0.1, "trial": 0, "status": "complete"}',
        '{"event": "finish", "status": "finished", "best": ["best/x.yaml"]}',
    ]


def test_one_that_fails_is_named_once_and_the_others_hear_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    trackers = group(
        tmp_path,
        f"[{{name: 'my_trackers:Fails', path: {bad}}}, "
        f"{{name: 'my_trackers:Lines', path: {good}, only_ends: true}}]",
    )
    with caplog.at_level(logging.WARNING):
        closed = play(trackers, record(tmp_path))
    assert [(entry.look, entry.unwritten) for entry in closed] == [(f"less {bad}", 3), (f"less {good}", 0)]
    (message,) = caplog.messages
    assert message == (
        "tracking.trackers: my lines: epochs: OSError: the disk is full (said once; the sweep goes on)"
    )
    assert len(bad.read_text().splitlines()) == 3  # it goes on being told
    assert len(good.read_text().splitlines()) == 4


def test_what_one_says_of_itself_stops_nothing_either(tmp_path: Path) -> None:
    trackers = group(tmp_path, f"[{{name: 'my_trackers:Opaque', path: {tmp_path / 'a'}}}]")
    assert trackers.run_ids == {}
    # Its ids, how to look at it, and what it left, cannot be told.
    assert play(trackers, record(tmp_path)) == [Closed("my lines", "", 3)]


def test_those_before_one_that_cannot_be_made_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "closed.jsonl"
    with pytest.raises(UserError, match="cannot be made"):
        group(tmp_path, f"[{{name: 'my_trackers:SaysClosed', path: {path}}}, 'my_trackers:cannot_be_made']")
    assert path.read_text() == '{"event": "closed"}\n'


def test_one_that_cannot_be_made_is_a_message_before_the_first_trial(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^tracking.trackers.1 = 'my_trackers:cannot_be_made': cannot be made: ConnectionError: log in",
    ):
        group(
            tmp_path, f"[{{name: 'my_trackers:Lines', path: {tmp_path / 'a'}}}, 'my_trackers:cannot_be_made']"
        )


@pytest.mark.parametrize(
    ("trackers", "rule"),
    [
        ("[mlfow]", "did you mean 'mlflow'?"),
        ("[{name: 'my_trackers:Lines', pth: x}]", "did you mean 'path'?"),
        ("[{name: 'my_trackers:Lines', path: 3}]", "must be a valid string"),
        ("['no_such_module:Lines']", "cannot be imported: ModuleNotFoundError"),
        ("mlflow", "must be a valid list"),
    ],
)
def test_what_a_file_says_of_trackers_is_checked(tmp_path: Path, trackers: str, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_with(tmp_path, trackers)
    assert "tracking.trackers" in str(error.value)
    assert rule in str(error.value)


def test_mlflow_is_the_tracker_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    assert make_sweep(tmp_path)[0].tracking.uses_mlflow
    none = config_with(tmp_path, "[]")
    assert not none.tracking.uses_mlflow
    trackers = Trackers.of(Sweep("an id", none, str(tmp_path)))
    assert (trackers.run_ids, trackers.close()) == ({}, [])


def test_the_trackers_are_no_part_of_what_determines_a_result(tmp_path: Path) -> None:
    problems: list[Any] = [make_sweep(tmp_path, *more)[1].hash for more in ((), ("tracking.trackers=[]",))]
    assert problems[0] == problems[1]
