"""Which pre-pruned network is branched from, and that no stage is computed twice at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from small_sweep import epoch, finish, make_sweep

from prunetune.records.ledger import Ledger
from prunetune.records.trial import TrialRecord
from prunetune.search import branching
from prunetune.search.branching import Pool, determining, upper_bound
from prunetune.search.queue import SweepSearch

PRE = epoch(1, key="pre")
POST = epoch(2, post=1)


def record(key: str, density: float, value: float | None = None, *, aims: bool = False) -> TrialRecord:
    made = TrialRecord(key + str(density), density, 0, "", {}, {})
    made.keys = {"pre_pruning": key, "pruning": key + "p", "post_pruning": key + "pp"}
    made.network, made.network_density = key, density if aims else None
    return made if value is None else finish(made, value)


def pool(*records: TrialRecord) -> Pool:
    made = Pool()
    for each in records:
        made.add(each, {})
        made.started(each)
        made.ended(each)
    return made


def test_upper_bound_by_hand() -> None:
    # One opinion at this density (quantile 1, weight 1), one half a decade away (quantile 0, weight 1/4),
    # and the doubt (½, weight 1/4): (1 + 0.125) / 1.5; bonus ½ √(ln 4 / 2).
    found = upper_bound({0.01: 1.0, 0.01 * 10**0.5: 0.0}, 0.01, branches=1, trials=3)
    assert found == pytest.approx(1.125 / 1.5 + 0.5 * math.sqrt(math.log(4) / 2))


def test_what_another_density_found_decides_where_nothing_was_tried_yet() -> None:
    networks = pool(record("a", 0.1, 0.5), record("b", 0.1, 0.9), record("c", 0.1, 0.7))
    assert [n.key for n in networks.ranked(0.01)] == ["b", "c", "a"]


def test_a_network_is_known_at_every_density_before_any_branch() -> None:
    scores = {"a": (0.9, 0.1), "b": (0.5, 0.3), "c": (0.7, 0.2)}
    networks = Pool([0.1, 0.01])
    for key, (high, low) in scores.items():
        made = finish(record(key, 0.1), 0.5)
        one_shot = {"oneshot_accuracy_density_0.1": high, "oneshot_accuracy_density_0.01": low}
        made.curve.insert(0, epoch(1, metrics=one_shot))
        networks.add(made, {})
    assert [n.key for n in networks.ranked(0.1)] == ["a", "c", "b"]
    assert [n.key for n in networks.ranked(0.01)] == ["b", "c", "a"]


def test_a_density_that_was_added_is_known_from_the_first_branch_that_measures_it() -> None:
    networks, before = Pool([0.1, 0.01]), finish(record("a", 0.1), 0.5)
    before.curve.insert(0, epoch(1, metrics={"oneshot_accuracy_density_0.1": 0.9}))
    networks.add(before, {})
    after = finish(record("a", 0.01), 0.5)
    both = {"oneshot_accuracy_density_0.1": 0.8, "oneshot_accuracy_density_0.01": 0.3}
    after.curve.insert(0, epoch(1, metrics=both))
    networks.add(after, {})
    (network,) = networks.ranked(0.01)
    assert network.one_shot == {0.1: 0.9, 0.01: 0.3}


def test_upper_bound_with_a_one_shot_score_by_hand() -> None:
    # The quantile of the one-shot score has weight 2, the result weight 1, the doubt (½) weight 1/4.
    found = upper_bound({0.01: 1.0}, 0.01, one_shot=0.25, branches=0, trials=0)
    assert found == pytest.approx((2 * 0.25 + 1.0 + 0.125) / 3.25)


def test_the_own_density_outweighs_another() -> None:
    networks = pool(
        record("a", 0.1, 0.5), record("b", 0.1, 0.9), record("a", 0.01, 0.8), record("b", 0.01, 0.2)
    )
    assert next(iter(networks.ranked(0.01))).key == "a"
    assert next(iter(networks.ranked(0.1))).key == "b"


def test_better_networks_are_branched_from_more_often_but_not_alone() -> None:
    values = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    networks = pool(*(record(name, 0.1, value) for name, value in values.items()))
    order = []
    for _ in range(16):
        order.append(networks.ranked(0.1)[0].key)
        networks.started(record(order[-1], 0.1))
    times = [order.count(name) for name in "abcd"]
    assert order[0] == "a"
    assert times == sorted(times, reverse=True)
    assert times[0] > times[1] > 0


def test_a_network_not_tried_at_a_density_comes_before_a_middling_one_that_was() -> None:
    tried = [record(name, 0.1, value) for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7))]
    networks = pool(*tried, record("new", 0.001, 0.5))
    assert [n.key for n in networks.ranked(0.1)].index("new") < 2


def test_a_mask_that_aims_at_a_density_is_of_no_use_to_another() -> None:
    networks = pool(record("a", 0.1, 0.9, aims=True), record("b", 0.1, 0.5))
    assert [n.key for n in networks.ranked(0.01)] == ["b"]
    assert [n.key for n in networks.ranked(0.1)] == ["a", "b"]


def test_a_network_whose_branches_collapsed_is_left_at_that_density_and_below() -> None:
    networks = pool(record("a", 0.1, 0.9), record("b", 0.1, 0.5))
    networks.ended(finish(record("a", 0.03), 0.1, "collapsed"))
    assert "a" in [n.key for n in networks.ranked(0.03)]  # once may be a bad learning rate
    networks.ended(finish(record("a", 0.05), 0.1, "collapsed"))
    assert [n.key for n in networks.ranked(0.1)] == ["a", "b"]
    assert [n.key for n in networks.ranked(0.03)] == ["b"]
    assert [n.key for n in networks.ranked(0.01)] == ["b"]
    networks.ended(finish(record("a", 0.01), 0.6))  # one that was under way did not, after all
    assert "a" in [n.key for n in networks.ranked(0.03)]


def test_where_all_networks_collapse_the_least_bad_is_branched_from_and_no_more_are_trained() -> None:
    networks = pool(record("a", 0.1, 0.9), record("b", 0.1, 0.5))
    for name in "abab":
        networks.ended(finish(record(name, 0.001), 0.1 if name == "a" else 0.12, "collapsed"))
    assert [n.key for n in networks.ranked(0.001)] == ["b", "a"]
    assert [n.key for n in networks.ranked(0.1)] == ["a", "b"]


def test_the_branch_is_what_comes_before_pruning() -> None:
    params = {
        "seed": 1,
        "model.width_multiplier": 2.0,
        "pre_pruning.mask": "{…}",
        "pre_pruning.mask[{…}].lambda2": 0.1,
        "pre_pruning": "null",
        "pruning.criterion": "snip",
        "post_pruning.optimizer.lr": 0.1,
        "post_pruning.soft_skip[on].gamma0": 0.2,
    }
    assert list(determining(params)) == list(params)[:5]


# --- in the queue


def run(search: SweepSearch, trial: TrialRecord, value: float = 0.5) -> None:
    """A trial from its first epoch to its end."""
    finish(trial, value)
    trial.curve.insert(0, PRE)
    search.progressed(trial)
    search.tell(trial)


@pytest.fixture
def from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branch as soon as there is one network."""
    monkeypatch.setattr(branching, "NETWORKS_FIRST", 1)


def make(folder: Path, *overrides: str, stored: bool = True) -> SweepSearch:
    return SweepSearch(*make_sweep(folder, *overrides), lambda key: stored)


def started(search: SweepSearch) -> TrialRecord:
    found = search.next()
    assert found is not None
    return found


@pytest.mark.parametrize(("exploration", "expected"), [(1.0, 24), (0.5, 12), (0.25, 6), (0.01, 4)])
def test_the_share_that_explores_is_as_asked_at_each_density(
    tmp_path: Path, exploration: float, expected: int
) -> None:
    search = make(tmp_path, "search.trials_per_density=24", f"search.exploration={exploration}")
    trials = []
    while (trial := search.next()) is not None:
        run(search, trial, 0.4 + 0.01 * len(trials))
        trials.append(trial)
    assert len(trials) == 48
    for density in (0.1, 0.01):
        keys = [t.network for t in trials if t.density == density and not t.branched]
        assert len(keys) == expected
        assert len(set(keys)) == expected  # each of them a new one
    assert len({t.network for t in trials}) == 2 * expected  # and branches never make one


@pytest.mark.usefixtures("from_the_first")
def test_a_branch_has_the_networks_parameters_and_new_ones_after_it(tmp_path: Path) -> None:
    search = make(tmp_path)
    first, second = started(search), started(search)
    assert not first.branched
    assert not second.branched  # no network is there yet
    run(search, first, 0.9)
    run(search, second, 0.3)
    third = started(search)
    assert third.branched
    assert third.density == 0.1
    # The other density's network: this one's own has been tried here.
    assert determining(third.params) == determining(second.params)
    alpha = "post_pruning.label_smoothing.alpha0"
    assert third.params[alpha] != second.params[alpha]


@pytest.mark.usefixtures("from_the_first")
def test_a_network_of_a_running_trial_can_be_branched_from_once_it_is_pruned(tmp_path: Path) -> None:
    search = make(tmp_path)
    first, second = started(search), started(search)
    first.curve = [PRE]
    search.progressed(first)
    assert not started(search).branched  # it may still be training
    first.curve = [PRE, POST]
    search.progressed(first)
    branch = started(search)
    assert branch.density == second.density
    assert branch.branched
    assert branch.network == first.network


def test_a_network_that_is_not_in_the_store_any_more_is_not_branched_from(tmp_path: Path) -> None:
    search = make(tmp_path, stored=False)
    for _ in range(8):
        trial = started(search)
        assert not trial.branched
        run(search, trial)


def test_a_pre_pruning_stage_that_went_wrong_is_not_branched_from(tmp_path: Path) -> None:
    search = make(tmp_path)
    for _ in range(4):
        trial = started(search)
        assert not trial.branched
        trial.curve, trial.status = [PRE], "diverged"
        search.progressed(trial)
        search.tell(trial)


FIXED = """
name: small
data: {name: digits}
model: {name: mlp, hidden: [8]}
densities: [0.1, 0.01]
pre_pruning: {epochs: 2, optimizer: {name: adam, lr: 1.0e-3}}
post_pruning:
  epochs: 9
  optimizer: {name: adam, lr: {loguniform: [1e-4, 1e-1]}}
search: {trials_per_density: 3}
"""


def test_a_stage_is_never_computed_by_two_trials_at_once(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, text=FIXED)
    stored: set[str] = set()
    search = SweepSearch(config, problem, ledger, stored.__contains__)
    first = started(search)
    assert search.next() is None  # all would compute the same network
    assert search.waiting
    stored.add(first.network)
    first.curve = [PRE, POST]
    search.progressed(first)
    assert [started(search).density, started(search).density] == [0.01, 0.1]
    assert search.next() is None  # the masks of both densities are being computed
    assert search.waiting


def test_a_trial_that_fails_lets_the_waiting_ones_go_on(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, text=FIXED)
    search = SweepSearch(config, problem, ledger, lambda key: False)
    first = started(search)
    assert search.next() is None
    first.error = "lost"
    search.tell(finish(first, None, "failed"))
    assert started(search).uid != first.uid


def test_trials_under_way_when_the_driver_died_do_not_compute_a_stage_twice_either(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path, text=FIXED)
    search = SweepSearch(config, problem, ledger, lambda key: False)
    started(search)
    search.next()  # proposes one that has to wait
    again = SweepSearch(config, problem, Ledger(ledger._store), lambda key: False)
    started(again)
    assert again.next() is None
    assert again.waiting
    assert len(again) == 5


def test_a_restarted_sweep_branches_as_if_it_had_not_ended(tmp_path: Path) -> None:
    many = "search.trials_per_density=12"
    whole, search = [], make(tmp_path / "a", many)
    while (trial := search.next()) is not None:
        run(search, trial, 0.3 + trial.params["pre_pruning.optimizer.lr"])
        whole.append((trial.density, trial.params, trial.branched))
    parts: list[Any] = []
    while True:
        search = make(tmp_path / "b", many)  # a new driver for every trial
        trial = search.next()
        if trial is None:
            break
        run(search, trial, 0.3 + trial.params["pre_pruning.optimizer.lr"])
        parts.append((trial.density, trial.params, trial.branched))
    assert parts == whole
    assert any(branched for _, _, branched in whole)
