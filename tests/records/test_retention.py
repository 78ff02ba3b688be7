"""What a sweep keeps: the decision on hand-made records, and the store after trials have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_sweep import finish, make_sweep

from prunetune.config.schema import KeepConfig
from prunetune.records.ledger import Ledger
from prunetune.records.retention import References, Retention, all_keys, kept_keys
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.store import Store


def record(
    number: int, value: float | None, status: Any = "complete", *, pre: str = "", density: float = 0.1
) -> TrialRecord:
    """A trial whose keys are `pre` (its own where that is not given), `m<number>` and `p<number>`."""
    keys = {"pre_pruning": pre or f"d{number}", "pruning": f"m{number}", "post_pruning": f"p{number}"}
    shared = [keys["pre_pruning"]]
    made = TrialRecord(f"uid{number}", density, number, "space", {}, {}, keys=keys, shared=shared)
    return finish(made, value, status)


def kept(*records: TrialRecord, going_on: bool, **policy: Any) -> str:
    return " ".join(sorted(kept_keys(records, KeepConfig(**policy), going_on=going_on)))


@pytest.mark.parametrize(
    ("going_on", "policy", "expected"),
    [
        (True, {}, "d0 d1 d2 d3 m1 p1"),
        (False, {}, "d1 m1 p1"),
        (False, {"pre_pruning": "always"}, "d0 d1 d2 d3 m1 p1"),
        (True, {"post_pruning": "all"}, "d0 d1 d2 d3 m0 m1 m3 p0 p1 p3"),
        (False, {"post_pruning": "all"}, "d0 d1 d3 m0 m1 m3 p0 p1 p3"),
    ],
)
def test_the_best_keeps_all_and_the_others_what_trials_may_start_from(going_on, policy, expected) -> None:
    records = [record(0, 0.5), record(1, 0.9), record(2, 0.4, "stopped"), record(3, None, "diverged")]
    assert kept(*records, going_on=going_on, **policy) == expected


def test_each_density_keeps_its_best() -> None:
    records = [record(0, 0.9), record(1, 0.8), record(2, 0.1, density=0.01), record(3, 0.2, density=0.01)]
    assert kept(*records, going_on=False) == "d0 d3 m0 m3 p0 p3"


def test_of_equals_the_earlier_one_is_the_best() -> None:
    assert kept(record(1, 0.5), record(0, 0.5), going_on=False) == "d0 m0 p0"


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_unfinished_trial_keeps_all_it_has(status: Any) -> None:
    assert kept(record(0, 0.9), record(1, None, status), going_on=False) == "d0 d1 m0 m1 p0 p1"


def test_what_is_shared_with_the_best_or_an_unfinished_trial_stays() -> None:
    one, best, running = record(0, 0.1), record(1, 0.9), record(2, None, "running")
    one.keys["pruning"] = best.keys["pruning"]
    two = record(3, 0.2)
    two.keys["pruning"] = running.keys["pruning"]
    assert kept(one, best, running, two, going_on=True) == "d0 d1 d2 d3 m1 m2 p1 p2"


def test_branch_points_at_other_densities_stay_while_there_are_trials_to_run() -> None:
    best, other, running = record(0, 0.9), record(1, 0.1), record(2, None, "running")
    for each, watched in ((best, ["w0", "d0"]), (other, ["w1"]), (running, ["w2"])):
        each.watched = watched
    assert kept(best, other, going_on=True) == "d0 d1 m0 p0 w0 w1"
    assert kept(best, other, going_on=False) == "d0 m0 p0"
    assert kept(other, running, going_on=False) == "d1 d2 m1 m2 p1 p2 w2"
    assert all_keys([best, other]) == {"d0", "m0", "p0", "w0", "d1", "m1", "p1", "w1"}


def test_records_of_earlier_versions_name_no_keys() -> None:
    old = record(0, 0.9)
    old.keys, old.shared = {}, []
    assert kept(old, going_on=True) == ""


def test_networks_that_pruning_trains_on_its_way_are_shared(tmp_path: Path) -> None:
    schedule = "{name: iterative, rounds: 3, epochs: 1}"
    sweep = Sweep(tmp_path, f"pruning={{rewind: 1, schedule: {schedule}}}")
    record = sweep.start()
    keys = record.keys
    assert sorted(name for name, key in keys.items() if key in record.shared) == [
        "pre_pruning",
        "pre_pruning to epoch 1",
        "pruning round 1",
        "pruning round 2",
    ]
    assert len(set(keys.values())) == len(keys) == 8


class Sweep:
    """A sweep whose trials leave a small artefact under each of their keys, without being run."""

    def __init__(self, folder: Path, *overrides: str, storage: Store | None = None) -> None:
        self.config, self.problem, _ = make_sweep(folder, *overrides)
        storage = storage or Store(str(folder))
        self.ledger = Ledger(storage.sub(self.config.name))
        self.store = storage.sub("store")
        self.header: dict[str, Any] = {"space": self.problem.hash, "described": self.problem.described}
        self.ledger.store.write_record("sweep", {**self.header, "kept": None})
        self.search = SweepSearch(self.config, self.problem, self.ledger)
        self.keeper = Retention(
            self.config.keep,
            self.ledger,
            self.ledger.fitting(self.problem),
            self.store,
            References(storage, self.config.name),
        )

    def start(self) -> TrialRecord:
        record = self.search.next()
        assert record is not None
        self.keeper.started(record)
        for name, key in record.keys.items():
            self.store.save("stages", key, {"x": torch.ones(3)}, {"name": name})
        return record

    def end(self, record: TrialRecord, value: float | None, status: Any = "complete") -> TrialRecord:
        self.search.tell(finish(record, value, status))
        self.keeper.ended(record)
        return record

    def has(self, record: TrialRecord) -> str:
        """The first letters of its stages that are there: d(ense), m(ask), p(ost)."""
        names = {"pre_pruning": "d", "pruning": "m", "post_pruning": "p"}
        return "".join(names[name] for name, key in record.keys.items() if self.store.load("stages", key))

    def close(self) -> None:
        keys = self.keeper.apply(going_on=False)
        assert keys is not None
        self.ledger.store.write_record("sweep", {**self.header, "kept": sorted(keys)})


def test_a_beaten_best_goes_when_it_is_beaten_and_its_dense_network_with_the_sweep(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]")
    first = sweep.end(sweep.start(), 0.5)
    assert sweep.has(first) == "dmp"
    running, second = sweep.start(), sweep.end(sweep.start(), 0.7)
    assert (sweep.has(first), sweep.has(second), sweep.has(running)) == ("d", "dmp", "dmp")
    third = sweep.end(sweep.start(), 0.6)
    assert (sweep.has(third), sweep.has(running)) == ("d", "dmp")
    sweep.end(running, None, "failed")
    sweep.close()
    assert [sweep.has(r) for r in (first, second, third)] == ["", "dmp", ""]
    assert sweep.has(running) == "dmp"  # will be tried again


def test_what_a_killed_driver_left_goes_with_the_next_trial_that_ends(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]")
    trials = [sweep.start() for _ in range(4)]
    for value, trial in enumerate(trials[:3]):
        sweep.search.tell(finish(trial, value / 10))  # killed before retention heard of it
    assert [sweep.has(trial) for trial in trials] == ["dmp"] * 4
    again = Sweep(tmp_path, "densities=[0.1]")
    again.end(again.start(), 0.9)
    assert [again.has(trial) for trial in trials] == ["d", "d", "d", "dmp"]


def test_a_mask_that_comes_back_goes_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]")
    sweep.end(sweep.start(), 0.9)
    one, two = sweep.start(), sweep.start()
    two.keys["pruning"] = one.keys["pruning"]
    sweep.end(one, 0.1)
    assert sweep.has(one) == "dm"  # of one that runs
    sweep.end(two, 0.2)
    assert sweep.has(one) == "d"
    three = sweep.search.next()
    assert three is not None
    three.keys["pruning"] = one.keys["pruning"]
    sweep.keeper.started(three)
    sweep.store.save("stages", one.keys["pruning"], {}, {})
    sweep.end(three, 0.2)
    assert sweep.has(one) == "d"


def test_an_extension_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]", "search.trials_per_density=2")
    best, other = sweep.end(sweep.start(), 0.9), sweep.end(sweep.start(), 0.1)
    sweep.close()
    more = Sweep(tmp_path, "densities=[0.1]", "search.trials_per_density=3")
    new = more.end(more.start(), 0.95)
    assert [more.has(r) for r in (best, other, new)] == ["d", "", "dmp"]


def test_the_policy_may_change_between_runs(tmp_path: Path) -> None:
    options = ["densities=[0.1]", "search.trials_per_density=2"]
    sweep = Sweep(tmp_path, *options, "keep={post_pruning: all, pre_pruning: always}")
    best, other = sweep.end(sweep.start(), 0.9), sweep.end(sweep.start(), 0.1)
    sweep.close()
    assert [sweep.has(r) for r in (best, other)] == ["dmp", "dmp"]
    less = Sweep(tmp_path, *options)
    assert (len(less.search), less.problem.hash) == (0, sweep.problem.hash)
    less.close()
    assert [less.has(r) for r in (best, other)] == ["dmp", ""]


def test_an_earlier_spaces_networks_are_left_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]")
    old = sweep.end(sweep.start(), 0.5)
    changed = Sweep(tmp_path, "densities=[0.1]", "post_pruning.epochs=5")
    assert changed.ledger.fitting(changed.problem) == []
    changed.end(changed.start(), 0.9)
    changed.close()
    assert sweep.has(old) == "dmp"


@pytest.mark.parametrize("state", ["running", "finished", "no header"])
def test_what_another_sweep_needs_stays(tmp_path: Path, state: str) -> None:
    options = ["densities=[0.1]", "search.trials_per_density=2"]
    other = Sweep(tmp_path, *options, "name=other")
    theirs = [other.end(other.start(), 0.9), other.end(other.start(), 0.1)]
    if state == "finished":
        other.close()
    elif state == "no header":
        other.ledger.store.delete_file("sweep.json")
    mine = Sweep(tmp_path, *options)
    for record, value in zip([mine.start(), mine.start()], (0.1, 0.2), strict=True):
        mine.end(record, value)
    records = mine.ledger.records()
    # The same seed proposes the same trials first; what differs is which one was best.
    assert [r.keys for r in records] == [r.keys for r in theirs]
    mine.close()
    assert mine.has(records[0]) == "dmp"  # the other's best
    assert mine.has(records[1]) == "dmp"


def test_a_trial_that_another_sweep_has_proposed_meanwhile_is_spared(tmp_path: Path) -> None:
    mine = Sweep(tmp_path, "densities=[0.1]")
    mine.end(mine.start(), 0.9)
    second = mine.start()
    other = Sweep(tmp_path, "densities=[0.1]", "name=other")
    assert [other.start().keys for _ in range(2)][1] == second.keys
    mine.end(second, 0.1)
    assert mine.has(second) == "dmp"


def test_what_a_training_left_stays_until_its_record_is_deleted(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]")
    sweep.end(sweep.start(), 0.9)
    trained = sweep.start()
    folder = Store(str(tmp_path)).sub("elsewhere")
    folder.write_record("trained/key", {"keys": trained.keys})
    sweep.end(trained, 0.1)
    assert sweep.has(trained) == "dmp"
    folder.delete_file("trained/key.json")
    sweep.end(sweep.start(), 0.2)
    assert sweep.has(trained) == "d"


def test_a_store_that_cannot_delete_does_not_end_the_sweep(tmp_path: Path, monkeypatch, caplog) -> None:
    sweep = Sweep(tmp_path, "densities=[0.1]")

    def refuse(*args: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Store, "delete", refuse)
    for value in (0.5, 0.6, 0.7):
        sweep.end(sweep.start(), value)
    assert caplog.text.count("cannot be removed: read-only") == 1
    assert sweep.keeper.apply(going_on=False) is None


def test_it_is_the_same_on_a_remote_filesystem(tmp_path: Path, remote: Store) -> None:
    other = Sweep(tmp_path, "densities=[0.1]", "name=other", storage=remote)
    theirs = other.start()
    sweep = Sweep(tmp_path, "densities=[0.1]", storage=remote)
    trials = [sweep.start() for _ in range(4)]
    for value, trial in enumerate(trials):
        sweep.end(trial, value / 10)
    assert theirs.keys == trials[0].keys
    assert [sweep.has(trial) for trial in trials] == ["dmp", "d", "d", "dmp"]
    sweep.close()
    assert [sweep.has(trial) for trial in trials] == ["dmp", "", "", "dmp"]


def test_references_read_each_record_once(tmp_path: Path, monkeypatch) -> None:
    other = Sweep(tmp_path, "name=other")
    one = other.start()
    references = References(Store(str(tmp_path)), "mine")
    assert references.keys() == set(one.keys.values())
    read: list[str] = []
    read_record = Store.read_record

    def spying(self: Store, name: str) -> Any:
        read.append(name)
        return read_record(self, name)

    monkeypatch.setattr(Store, "read_record", spying)
    two = other.start()
    read.clear()
    assert references.keys() == {*one.keys.values(), *two.keys.values()}
    assert [name for name in read if name != "sweep"] == ["trials/density-0.01/00000"]
    assert Ledger(other.ledger.store).records() == [one, two]
