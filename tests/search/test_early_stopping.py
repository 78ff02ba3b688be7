from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_sweep import epoch, finish, make_sweep

from prunetune.engine.epoch import Epoch
from prunetune.records.trial import TrialRecord
from prunetune.search.early_stopping import EarlyStopping, can_catch_up
from prunetune.search.queue import SweepSearch


def trial(name: str, density: float) -> TrialRecord:
    return TrialRecord(name, density, 0, "", {}, {"post_pruning": {"epochs": 9}})


ASHA = "search.early_stopping={name: asha, grace_epochs: 1, reduction_factor: 2, catch_up: null}"


def make(tmp_path: Path, *overrides: str, past: list | None = None) -> EarlyStopping:
    config, _, _ = make_sweep(tmp_path, ASHA, *overrides)
    return EarlyStopping(config, past or [], 9)


def result(number: int, value: float, *, last: bool = False, **metrics: float) -> Epoch:
    return epoch(number, value, post=number, last=last, metrics=metrics)


def test_the_worse_half_stops_within_a_density(tmp_path: Path) -> None:
    asha = make(tmp_path)
    decisions = []
    for name, value in (("a", 0.9), ("b", 0.5), ("c", 0.95)):
        t = trial(name, 0.1)
        decisions.append(asha.stops(t, result(1, value)))
    assert decisions == [False, True, False]


def test_a_trial_is_not_stopped_after_its_last_epoch(tmp_path: Path) -> None:
    asha = make(tmp_path)
    for name, value in (("a", 0.9), ("b", 0.5)):
        t = trial(name, 0.1)
        assert not asha.stops(t, result(1, value, last=True))


def test_a_sparser_trial_is_not_compared_with_a_denser_one(tmp_path: Path) -> None:
    asha = make(tmp_path)
    for number in range(5):
        dense = trial(f"dense{number}", 0.1)
        asha.stops(dense, result(1, 0.9 + number / 100))
    sparse = trial("sparse", 0.01)
    assert not asha.stops(sparse, result(1, 0.2))


def test_pre_pruning_accuracy_neither_stops_nor_raises_the_bar(tmp_path: Path) -> None:
    asha = make(tmp_path)
    for number in range(5):
        t = trial(f"t{number}", 0.1)
        pre = epoch(1, 0.99 - number / 10)
        assert not asha.stops(t, pre)
    first = trial("first", 0.1)
    assert not asha.stops(first, result(1, 0.3))


def test_the_rungs_of_a_restarted_sweep_hold_what_was_there(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path)
    search = SweepSearch(config, problem, ledger)
    past = [finish(search.next(), 0.9, epochs=9) for _ in range(6)]  # three at each density
    asha = make(tmp_path, past=past)
    t = trial("new", 0.1)
    assert asha.stops(t, result(1, 0.05))  # the past ones had 0.1 after epoch 1


def test_no_early_stopping_lets_everything_run(tmp_path: Path) -> None:
    asha = make(tmp_path, "search.early_stopping=null")
    for value in (0.9, 0.1):
        t = trial(str(value), 0.1)
        assert not asha.stops(t, result(1, value))


# ASHA alone stops the lowest hundredth at a rung.
CATCH_UP = "search.early_stopping={name: asha, grace_epochs: 1, reduction_factor: 1.01, catch_up: 1.0}"


def test_a_trial_is_granted_what_others_gained() -> None:
    complete = [[0.5, 0.7, 0.9], [0.6, 0.7, 0.9], [0.7, 0.8, 0.95], [0.8, 0.85, 0.9]]
    # The gains after epoch 1 are 0.4, 0.3, 0.25 and 0.1, of which the 2/3-quantile is the second largest.
    assert can_catch_up(0.551, 1, complete, 1.0)
    assert not can_catch_up(0.549, 1, complete, 1.0)
    assert can_catch_up(0.651, 1, complete, 2 / 3)
    assert not can_catch_up(0.649, 1, complete, 2 / 3)
    # After epoch 2: 0.2, 0.2, 0.15, 0.05.
    assert can_catch_up(0.751, 2, complete, 1.0)
    assert not can_catch_up(0.749, 2, complete, 1.0)


def test_with_few_that_are_complete_nothing_is_said_against_a_trial() -> None:
    assert can_catch_up(0.0, 1, [[0.5, 0.9]] * 3, 1.0)


def test_an_epoch_without_a_value_says_nothing_of_the_gains() -> None:
    without, gained = [0.1, -math.inf, 0.9], [0.1, 0.2, 0.9]
    assert can_catch_up(0.3, 2, [without] * 3 + [gained] * 3, 0.9)  # three tell too little
    assert can_catch_up(0.3, 2, [without] * 3 + [gained] * 4, 0.9)  # 0.3 + 0.7 ≥ 0.9
    assert not can_catch_up(0.1, 2, [without] * 3 + [gained] * 4, 0.9)  # 0.1 + 0.7 < 0.9
    assert not can_catch_up(0.0, 1, [[0.5, 0.9]] * 4, 1.0)


def test_a_trial_is_not_held_against_shorter_ones(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, CATCH_UP)
    search = SweepSearch(config, problem, ledger)
    past = [finish(search.next(), value) for value in (0.3, 0.3, *[0.9] * 6)]  # of each density four
    stopping = EarlyStopping(config, past, 40)
    longer = TrialRecord("longer", 0.1, 0, "", {}, {"post_pruning": {"epochs": 40}})
    assert not stopping.stops(longer, result(1, 0.2))
    assert stopping.stops(trial("as long", 0.1), result(1, 0.2))  # 0.6 is the most that one gained


def test_a_trial_is_not_held_against_what_collapsed(tmp_path: Path) -> None:
    stopping = make(tmp_path, CATCH_UP, "search.early_stopping.catch_up=0.5")
    for number in range(4):
        stopping.ended(finish(trial(f"complete{number}", 0.1), 0.9))  # gains 0.6 after its first epoch
    for number in range(5):
        stopping.ended(finish(trial(f"collapsed{number}", 0.1), 0.0, "collapsed"))  # gains nothing
    assert not stopping.stops(trial("one", 0.1), result(1, 0.35))
    assert stopping.stops(trial("two", 0.1), result(1, 0.25))


def test_what_gradual_pruning_has_not_pruned_yet_is_not_compared(tmp_path: Path) -> None:
    stopping = make(tmp_path)
    for number in range(5):
        dense = result(1, 0.9 + number / 100, density_now=0.6)
        assert not stopping.stops(trial(f"closing{number}", 0.1), dense)
    assert not stopping.stops(trial("closed", 0.1), result(1, 0.5, density_now=0.1))
    assert stopping.stops(trial("worse", 0.1), result(1, 0.4, density_now=0.099))


def test_the_best_so_far_may_always_go_on() -> None:
    assert can_catch_up(0.9, 1, [[0.9, 0.8]] * 2 + [[0.7, 0.9]] * 2, 1.0)
    assert can_catch_up(0.9, 2, [[0.9, 0.8]] * 2 + [[0.7, 0.9]] * 2, 1.0)


@pytest.mark.parametrize("is_past", [True, False])
def test_only_complete_trials_of_the_density_are_held_against_one(tmp_path: Path, is_past: bool) -> None:
    config, problem, ledger = make_sweep(tmp_path, CATCH_UP)
    search = SweepSearch(config, problem, ledger)
    # At each density four complete ones, which gained at most 0.6 after epoch 1, and one that collapsed.
    records = [finish(search.next(), value) for value in (0.3, 0.3, *[0.9] * 6)]
    records += [finish(search.next(), 0.1, status="collapsed") for _ in range(2)]
    stopping = EarlyStopping(config, records if is_past else [], 9)
    if not is_past:
        for record in records:
            stopping.ended(record)
    low, fair = trial("low", 0.1), trial("fair", 0.1)
    assert not stopping.stops(fair, result(1, 0.31))
    assert stopping.stops(low, result(1, 0.29))
    assert not stopping.stops(trial("last", 0.1), result(1, 0.29, last=True))


def test_grace_is_for_both_rules(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, CATCH_UP.replace("grace_epochs: 1", "grace_epochs: 2"))
    search = SweepSearch(config, problem, ledger)
    past = [finish(search.next(), value) for value in (0.3, 0.3, *[0.9] * 6)]
    stopping = EarlyStopping(config, past, 9)
    t = trial("new", 0.1)
    assert not stopping.stops(t, result(1, 0.25))
    assert stopping.stops(t, result(2, 0.25))  # ASHA alone would not: one had 0.2
