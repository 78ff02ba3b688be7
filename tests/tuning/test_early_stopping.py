from __future__ import annotations

from pathlib import Path
from typing import Any

from tuning.conftest import finish, make_sweep

from prunetune.tuning.early_stopping import PerDensityAsha
from prunetune.tuning.ledger import TrialRecord
from prunetune.tuning.search import SweepSearch


def trial(name: str, density: float) -> TrialRecord:
    return TrialRecord(name, density, 0, "", {}, {})


def make(tmp_path: Path, *overrides: str, past: list | None = None) -> PerDensityAsha:
    config, _, _ = make_sweep(
        tmp_path, "search.early_stopping={name: asha, grace_epochs: 1, reduction_factor: 2}", *overrides
    )
    return PerDensityAsha(config, past or [], 9)


def result(epoch: int, value: float) -> dict[str, Any]:
    return {"post_epoch": epoch, "val_accuracy": value, "stage": "post_pruning"}


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
        assert not asha.stops(t, result(1, value) | {"last": True})


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
        pre = {"stage": "pre_pruning", "val_accuracy": 0.99 - number / 10, "epoch": 1}
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
