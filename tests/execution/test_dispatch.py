"""Trials onto workers, and what workers report, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_sweep import epoch, make_sweep

from prunetune.engine.epoch import Epoch
from prunetune.errors import WorkError
from prunetune.execution.assignment import Assignment
from prunetune.execution.dispatcher import Dispatcher
from prunetune.execution.packing import step_flops, trials_per_worker
from prunetune.execution.referee import Referee
from prunetune.execution.searcher import WorkerSearcher
from prunetune.records.ledger import Ledger
from prunetune.records.trial import TrialRecord
from prunetune.search.early_stopping import EarlyStopping
from prunetune.search.queue import SweepSearch
from prunetune.store import Store


class Board:
    """A roster in this process."""

    def __init__(self) -> None:
        self.written: dict[str, list[Assignment] | None] = {}

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        self.written[worker] = assignments

    def uids(self, worker: str) -> list[str]:
        return [assignment["uid"] for assignment in self.written[worker] or []]


class Listener:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def started(self, record: TrialRecord) -> None:
        self.told.append(("started", record.number))

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        self.told.extend(("epoch", epoch.epoch) for epoch in epochs)

    def ended(self, record: TrialRecord) -> None:
        self.told.append((record.status, record.number))


class Sweep:
    """All that the driver holds, for a sweep of 6 trials at each of two densities."""

    def __init__(self, folder: Path, *overrides: str, per_worker: int = 1, most: int | None = None) -> None:
        self.config, self.problem, self.ledger = make_sweep(folder, *overrides)
        self.board, self.listener = Board(), Listener()
        self.search = SweepSearch(self.config, self.problem, self.ledger)
        self.dispatcher = Dispatcher(self.search, self.board, per_worker=per_worker, most=most)
        self.referee = Referee(
            self.search,
            self.dispatcher,
            EarlyStopping(self.config, [], 9),
            Store(str(folder)).sub("store"),
            [self.listener],
        )

    def start(self, worker: str) -> None:
        self.referee.arrived(worker)

    def report(self, worker: str, *members: Any) -> None:
        self.referee.heard(worker, members)

    def lose(self, worker: str) -> None:
        self.referee.lost(worker, "the worker was lost")

    def statuses(self) -> list[str]:
        return [record.status for record in Ledger(self.ledger.store).records()]


def done(uid: str, value: float = 0.9) -> dict[str, Any]:
    outcome = {"status": "complete", "val_accuracy": value, "test_accuracy": value, "nonzero": 5}
    return {"uid": uid, "epochs": [], **outcome}


@pytest.fixture
def one(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path)
    made.start("w")
    return made


def test_a_worker_is_given_as_many_trials_as_fit(tmp_path: Path) -> None:
    made = Sweep(tmp_path, per_worker=4)
    made.start("a")
    made.start("b")
    assert (len(made.board.uids("a")), len(made.board.uids("b"))) == (4, 4)
    assert len({*made.board.uids("a"), *made.board.uids("b")}) == 8


def test_no_more_trials_than_asked_for_run_at_once(tmp_path: Path) -> None:
    made = Sweep(tmp_path, per_worker=4, most=5)
    made.start("a")
    made.start("b")
    assert (len(made.board.uids("a")), len(made.board.uids("b"))) == (4, 1)


def test_an_ended_trial_makes_room_for_the_next_at_once(one: Sweep) -> None:
    (first,) = one.board.uids("w")
    one.report("w", {"uid": first, "epochs": [epoch(1), epoch(2, post=1)]})
    one.report("w", done(first))
    (second,) = one.board.uids("w")
    assert second != first
    assert one.statuses()[0] == "complete"
    assert one.listener.told == [
        ("started", 0),
        ("epoch", 1),
        ("epoch", 2),
        ("complete", 0),
        ("started", 0),  # of the other density
    ]


def test_workers_end_when_nothing_is_left(one: Sweep) -> None:
    for _ in range(12):
        (uid,) = one.board.uids("w")
        one.report("w", done(uid))
    assert one.board.written["w"] is None
    assert one.statuses() == ["complete"] * 12


def test_early_stopping_ends_one_trial_of_a_worker_and_not_the_others(tmp_path: Path) -> None:
    made = Sweep(tmp_path, "search.early_stopping={grace_epochs: 1, reduction_factor: 2}", per_worker=6)
    made.start("w")
    uids = made.board.uids("w")
    values = {uid: 0.9 - 0.1 * rank for rank, uid in enumerate(uids)}
    made.report("w", *({"uid": uid, "epochs": [epoch(1, values[uid], post=1)]} for uid in uids))
    # Three at each density, told best first: of these the first may go on.
    stopped = [uid for uid in uids if uid not in made.board.uids("w")]
    assert stopped == uids[2:]
    assert len(made.board.uids("w")) == 6  # refilled
    records = {record.uid: record for record in made.ledger.records()}
    assert [records[uid].status for uid in stopped] == ["stopped"] * 4
    assert records[uids[5]].val_accuracy == values[uids[5]]


def test_news_of_a_trial_that_was_stopped_are_ignored(tmp_path: Path) -> None:
    made = Sweep(tmp_path, per_worker=2)
    made.start("w")
    first, second = made.board.uids("w")
    made.report("w", done(first))
    made.report("w", done(first), {"uid": second, "epochs": [epoch(1)]})
    assert made.statuses().count("complete") == 1


def test_a_lost_workers_trial_goes_on_and_its_epochs_count_once(one: Sweep) -> None:
    (uid,) = one.board.uids("w")
    one.report("w", {"uid": uid, "epochs": [epoch(1), epoch(2)]})
    one.lose("w")
    one.start("w")
    assert one.board.uids("w") == [uid]
    one.report("w", {"uid": uid, "epochs": [epoch(1), epoch(2), epoch(3)]})
    assert [told for told in one.listener.told if told[0] == "epoch"] == [
        ("epoch", 1),
        ("epoch", 2),
        ("epoch", 3),
    ]
    assert one.listener.told.count(("started", 0)) == 1


def test_a_trial_that_takes_its_worker_with_it_again_and_again_has_failed(one: Sweep) -> None:
    one.report("w", {"uid": one.board.uids("w")[0], "epochs": [epoch(1)]})
    (uid,) = one.board.uids("w")
    for _ in range(4):
        assert one.board.uids("w") == [uid]
        one.lose("w")
        one.start("w")
    assert one.board.uids("w") != [uid]
    assert next(r for r in one.ledger.records() if r.uid == uid).status == "failed"


def test_nothing_but_failures_end_the_sweep(one: Sweep) -> None:
    for _ in range(3):
        assert not one.referee.is_hopeless
        (uid,) = one.board.uids("w")
        one.report("w", {"uid": uid, "epochs": [], "status": "failed", "error": "ValueError: no"})
    assert one.referee.is_hopeless
    with pytest.raises(WorkError, match=r"first 3 trials failed.*\nValueError: no"):
        one.referee.check()


def test_one_result_and_then_nothing_but_failures_end_the_sweep_later(one: Sweep) -> None:
    one.report("w", done(one.board.uids("w")[0]))
    for _ in range(3):
        (uid,) = one.board.uids("w")
        one.report("w", {"uid": uid, "epochs": [], "status": "failed", "error": "ValueError: no"})
    assert not one.referee.is_hopeless
    one.referee._failures = 20
    with pytest.raises(WorkError, match=r"last 20 trials failed.*\nValueError: no"):
        one.referee.check()
    one.report("w", done(one.board.uids("w")[0]))
    assert not one.referee.is_hopeless


def test_workers_that_never_come_up_end_the_sweep(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    for _ in range(5):
        assert not made.referee.is_hopeless
        made.lose("w")
    assert made.referee.is_hopeless


def test_a_node_that_takes_many_workers_with_it_does_not_end_the_sweep(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    workers = [f"w{number}" for number in range(4)]  # as many as there are first trials
    for _ in range(2):
        for worker in workers:
            made.start(worker)
        for worker in workers:
            made.lose(worker)
    assert not made.referee.is_hopeless


def test_a_worker_lost_again_and_again_does_not_end_what_another_is_at(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    made.start("busy")
    for _ in range(7):  # the fourth loss of a trial counts as its failure
        made.start("w")
        made.lose("w")
    assert not made.referee.is_hopeless
    made.lose("busy")
    assert made.referee.is_hopeless


def test_a_new_epoch_of_any_trial_makes_up_for_workers_that_were_lost(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    for _ in range(2):
        for _ in range(4):
            made.start("w")
            made.lose("w")
        made.start("w")
        made.report("w", {"uid": made.board.uids("w")[0], "epochs": [epoch(1)]})
    made.lose("w")
    assert not made.referee.is_hopeless


def test_a_worker_that_never_comes_up_does_not_end_what_others_do(one: Sweep, caplog: Any) -> None:
    for _ in range(20):
        one.lose("another")  # with no trial on it
    assert not one.referee.is_hopeless
    assert caplog.messages == ["a worker could not start, and is tried again: the worker was lost"]


def test_a_lost_workers_trials_are_the_next_of_the_others(tmp_path: Path) -> None:
    made = Sweep(tmp_path, per_worker=2)
    made.start("a")
    made.start("b")
    lost, (kept, done_next) = made.board.uids("a"), made.board.uids("b")
    made.lose("a")
    assert made.board.written["a"] == []
    made.report("b", done(kept))
    assert made.board.uids("b") == [done_next, lost[0]]
    made.start("a")
    assert made.board.uids("a")[0] == lost[1]
    assert made.listener.told.count(("started", 0)) == 2  # of two densities; none of them twice


def test_losses_count_only_without_a_new_epoch_in_between(one: Sweep) -> None:
    (uid,) = one.board.uids("w")
    for number in range(1, 9):
        one.report("w", {"uid": uid, "epochs": [epoch(number)]})
        one.lose("w")
        one.start("w")
    assert one.board.uids("w") == [uid]


def unfit(made: Sweep, worker: str, *problems: str) -> None:
    made.referee.refused(worker, "10.0.0.9", problems)


def test_a_node_that_cannot_run_trials_is_told_once_and_its_trials_go_to_others(
    one: Sweep, caplog: Any
) -> None:
    (running,) = one.board.uids("w")
    one.start("joined")
    (given,) = one.board.uids("joined")
    useful = one.dispatcher.useful_workers()
    for _ in range(20):
        unfit(one, "joined", "torch is 2.11 there")
    assert caplog.messages == ["10.0.0.9: no trial is run on this node: torch is 2.11 there"]
    assert one.board.written["joined"] == []  # it holds the node, but is not ended
    assert one.dispatcher.useful_workers() == useful + 1  # another place is asked for
    assert not one.referee.is_hopeless
    one.report("w", done(running))
    assert one.board.uids("w") == [given]
    one.report("joined")  # its storage has come back
    assert len(one.board.uids("joined")) == 1


def test_nothing_but_nodes_that_cannot_run_trials_end_the_sweep(tmp_path: Path) -> None:
    made = Sweep(tmp_path)
    made.start("w")
    for _ in range(10):
        unfit(made, "w", "storage = '/here': not shared")
    with pytest.raises(WorkError, match="not shared"):
        made.referee.check()


def test_a_worker_that_was_left_out_ends_with_the_sweep(tmp_path: Path) -> None:
    made = Sweep(tmp_path, "search.trials_per_density=1")
    made.start("w")
    made.start("joined")
    unfit(made, "joined", "no")
    for _ in range(2):
        made.report("w", done(made.board.uids("w")[0]))
    assert made.board.written["w"] is None
    unfit(made, "joined", "no")
    assert made.board.written["joined"] is None


def test_a_worker_waits_where_a_stage_it_needs_is_being_computed(tmp_path: Path) -> None:
    fixed = "pre_pruning={epochs: 2, optimizer: {name: adam, lr: 1.0e-3}}"
    made = Sweep(tmp_path, fixed)
    made.start("a")
    made.start("b")
    assert made.board.uids("b") == []
    assert made.board.written["b"] is not None  # not ended
    (uid,) = made.board.uids("a")
    made.report("a", {"uid": uid, "epochs": [epoch(1), epoch(2), epoch(3, post=1)]})
    made.report("b")
    assert len(made.board.uids("b")) == 1


def test_it_is_over_when_the_last_trial_has_ended(tmp_path: Path) -> None:
    made = Sweep(tmp_path, "densities=[0.5]", per_worker=6)
    assert not made.dispatcher.is_over
    made.start("w")  # all six trials
    for uid in made.board.uids("w"):
        assert not made.dispatcher.is_over
        made.report("w", {"uid": uid, "epochs": [], "status": "failed", "error": "no"})
    made.report("w")
    while uids := made.board.uids("w"):  # once more
        assert not made.dispatcher.is_over
        made.report("w", {"uid": uids[0], "epochs": [], "status": "failed", "error": "no"})
    assert made.dispatcher.is_over


def test_a_cluster_is_asked_for_no_more_workers_than_there_is_work_for(tmp_path: Path) -> None:
    made = Sweep(tmp_path, per_worker=5)
    searcher = WorkerSearcher(made.search, made.dispatcher.useful_workers)
    given = [searcher.suggest(f"w{i}") for i in range(4)]
    assert given == [{"worker": "w0"}, {"worker": "w1"}, {"worker": "w2"}, None]  # 12 trials
    for name in ("w0", "w1", "w2"):
        made.start(name)
    assert searcher.suggest("w4") == "FINISHED"


@pytest.mark.parametrize(
    ("asked", "resources", "expected"),
    [
        ("3", {"cpu": 1.0}, 3),
        ("auto", {"cpu": 1.0}, 1),
        ("auto", {"cpu": 1.0, "gpu": 0.5}, 2),  # a small model; an eighth of 16 trials
    ],
)
def test_trials_per_worker(tmp_path: Path, asked: str, resources: dict[str, float], expected: int) -> None:
    config, problem, _ = make_sweep(
        tmp_path, f"resources.trials_per_worker={asked}", "search.trials_per_density=8"
    )
    assert trials_per_worker(config, problem, resources) == expected


def test_a_steps_operations_are_three_forward_passes(tmp_path: Path) -> None:
    config, problem, _ = make_sweep(tmp_path)
    assert step_flops(problem, config) == 3 * 2 * (64 * 8 + 8 * 10) * 128
