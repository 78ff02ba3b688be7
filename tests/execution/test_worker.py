"""A worker on its own, without Ray: which trials it runs, and which it refuses to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_sweep import epoch, make_sweep

from prunetune.errors import WorkError
from prunetune.execution import worker as trainable
from prunetune.execution.assignment import Assignment
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch


class Roster:
    """What the one worker is to run."""

    def __init__(self) -> None:
        self.wanted: list[Assignment] | None = []

    def assignments(self, worker: str) -> list[Assignment] | None:
        return self.wanted


class Steps:
    """Pipelines that report post-pruning epochs for ever, and remember which trials were let go."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def __call__(self, config: Any, *, owner: str, **given: Any) -> Any:
        try:
            number = 0
            while True:
                number += 1
                yield epoch(number, config.density, post=number)
        finally:
            self.closed.append(owner)


def assignment(record: TrialRecord, **changes: Any) -> Assignment:
    return {"uid": record.uid, "density": record.density, "number": record.number, **changes}  # type: ignore[typeddict-item]


@pytest.fixture
def records(tmp_path: Path) -> list[TrialRecord]:
    """Two trials of a sweep whose records are in the store, of one density each."""
    search = SweepSearch(*make_sweep(tmp_path))
    return [record for record in (search.next(), search.next()) if record is not None]


@pytest.fixture
def roster() -> Roster:
    return Roster()


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def worker(tmp_path: Path, roster: Roster, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> trainable.Worker:
    monkeypatch.setattr(trainable.ray, "get_gpu_ids", lambda: [])
    worker = trainable.Worker.__new__(trainable.Worker)  # Tune makes its folders in `__init__`
    config = make_sweep(tmp_path)[0]
    worker.setup({"worker": "one"}, sweep=config, threads=1, roster=roster, steps=steps)  # type: ignore[arg-type]
    return worker


def test_trials_come_and_go_as_the_roster_says(
    worker: trainable.Worker, roster: Roster, steps: Steps, records: list[TrialRecord]
) -> None:
    first, second = records
    assert {first.density, second.density} == {0.1, 0.01}
    roster.wanted = [assignment(first)]
    (member,) = worker.step()["members"]
    assert (member["uid"], member["epochs"][0].score) == (first.uid, first.density)
    roster.wanted = [assignment(first), assignment(second)]
    members = {member["uid"]: member["epochs"] for member in worker.step()["members"]}
    assert [members[record.uid][0].epoch for record in records] == [2, 1]
    roster.wanted = [assignment(second)]
    (member,) = worker.step()["members"]
    assert (member["uid"], steps.closed) == (second.uid, [first.uid])
    roster.wanted = None
    assert worker.step() == {"members": [], "done": True}


def test_a_record_that_is_another_trials_is_not_run(
    worker: trainable.Worker, roster: Roster, records: list[TrialRecord]
) -> None:
    """Two processes that run one sweep at once would write each other's records."""
    roster.wanted = [assignment(records[0], uid="another")]
    with pytest.raises(WorkError, match="is another trial's record; does another process run this sweep"):
        worker.step()


def test_a_record_that_is_not_there_is_named(
    worker: trainable.Worker, roster: Roster, records: list[TrialRecord]
) -> None:
    roster.wanted = [assignment(records[0], number=7)]
    with pytest.raises(WorkError, match=r"0\.1.*0*7: the trial's record is not in the store"):
        worker.step()
