from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from small_sweep import TEXT, epoch, finish, make_sweep

from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.search.queue import SweepSearch


def distance(lr: float) -> float:
    return abs(math.log10(lr) + 2)


def run_all(search: SweepSearch, limit: int = 100) -> list[tuple[float, int, dict]]:
    """Run every trial one at a time; the value is a fixed function of the parameters."""
    done = []
    while len(done) < limit and (record := search.next()) is not None:
        lr = record.params["pre_pruning.optimizer.lr"]
        search.tell(finish(record, 0.9 - distance(lr) / 10))
        done.append((record.density, record.number, record.params))
    return done


def test_densities_take_turns_and_each_gets_its_trials(sweep) -> None:
    config, problem, ledger = sweep
    done = run_all(SweepSearch(config, problem, ledger))
    assert [d for d, _, _ in done[:4]] == [0.1, 0.01, 0.1, 0.01]
    assert sorted((d, n) for d, n, _ in done) == sorted((d, n) for d in (0.1, 0.01) for n in range(6))


def test_proposals_are_the_same_from_the_same_seed_and_differ_from_another(tmp_path: Path) -> None:
    first = run_all(SweepSearch(*make_sweep(tmp_path / "a")))
    again = run_all(SweepSearch(*make_sweep(tmp_path / "b")))
    other = run_all(SweepSearch(*make_sweep(tmp_path / "c", "seed=4")))
    assert first == again
    assert first != other


def outline(trial: optuna.trial.FrozenTrial) -> tuple:
    return trial.state, trial.value, trial.params, trial.intermediate_values


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_driver_that_dies_anywhere_goes_on_with_the_same_proposals(tmp_path: Path, cut: int) -> None:
    many = "search.trials_per_density=14"  # beyond TPE's random start-up
    undisturbed = run_all(SweepSearch(*make_sweep(tmp_path / "a", many)))
    config, problem, ledger = make_sweep(tmp_path / "b", many)
    before = run_all(SweepSearch(config, problem, ledger), limit=cut)
    search = SweepSearch(*make_sweep(tmp_path / "b", many))
    killed = search.next()  # proposed, published as running, and the driver dies
    assert killed is not None
    after = run_all(SweepSearch(*make_sweep(tmp_path / "b", many)))
    assert before + after == undisturbed


def test_a_trial_under_way_comes_back_first_with_its_number_and_uid(sweep, tmp_path: Path) -> None:
    config, problem, ledger = sweep
    killed = SweepSearch(config, problem, ledger).next()
    again = SweepSearch(config, problem, Ledger(ledger._store)).next()
    assert killed is not None
    assert again is not None
    assert (again.uid, again.number, again.params) == (killed.uid, killed.number, killed.params)


def test_a_failed_trial_is_tried_again_last_and_a_finished_one_is_not(sweep) -> None:
    config, problem, ledger = sweep
    search = SweepSearch(config, problem, ledger)
    failed, complete = search.next(), search.next()
    assert failed is not None
    assert complete is not None
    failed.error = "CUDA out of memory"
    search.tell(finish(failed, None, "failed"))
    search.tell(finish(complete, 0.5))
    rest = SweepSearch(config, problem, Ledger(ledger._store))
    assert len(rest) == 12 - 1
    issued = []
    while (record := rest.next()) is not None:
        issued.append((record.uid, record.error))
    assert len(issued) == 11
    assert issued[-1] == (failed.uid, None)
    assert complete.uid not in dict(issued)


def test_results_of_other_code_or_data_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    config, problem, ledger = make_sweep(tmp_path)
    run_all(SweepSearch(config, problem, ledger))
    other = Problem.of(problem.template, "another digest")
    search = SweepSearch(config, other, ledger)
    assert (search.past, len(search)) == ([], 12)
    assert other.changes(problem.described) == [
        "(content of the data, and code): was not set, is now another dige"
    ]


@pytest.mark.parametrize(
    ("status", "value", "state", "told"),
    [
        ("complete", 0.7, TrialState.COMPLETE, 0.7),
        ("collapsed", 0.1, TrialState.COMPLETE, 0.1),
        ("stopped", 0.4, TrialState.PRUNED, 0.4),
        ("diverged", None, TrialState.COMPLETE, 0.0),
        ("failed", None, TrialState.FAIL, None),
    ],
)
def test_optuna_is_told_each_outcome_as_what_it_is(sweep, status, value, state, told) -> None:
    config, problem, ledger = sweep
    search = SweepSearch(config, problem, ledger)
    record = search.next()
    assert record is not None
    search.tell(finish(record, value, status))
    live = search._searches[record.density].study.trials
    rebuilt_search = SweepSearch(config, problem, Ledger(ledger._store))
    assert [(t.state, t.value) for t in live] == [(state, told if told is None else pytest.approx(told))]
    if status == "failed":  # it runs again, so it is not in the past
        assert rebuilt_search.past == []
        return
    rebuilt = rebuilt_search._searches[record.density].study.trials
    assert [outline(t) for t in rebuilt] == [outline(t) for t in live]


def test_no_trial_stays_running_in_a_study(sweep) -> None:
    config, problem, ledger = sweep
    search = SweepSearch(config, problem, ledger)
    run_all(search)
    for density in config.densities:
        states = {t.state for t in search._searches[density].study.trials}
        assert TrialState.RUNNING not in states


def test_parameters_of_a_mask_that_is_off_are_not_sampled(sweep) -> None:
    config, problem, ledger = sweep
    search = SweepSearch(config, problem, ledger)
    run_all(search)
    trials = [t for d in config.densities for t in search._searches[d].study.trials]
    assert {t.params["pre_pruning.mask"] for t in trials} == {None, "on"}
    for trial in trials:
        assert ("pre_pruning.mask[on].lambda2" in trial.params) == (trial.params["pre_pruning.mask"] == "on")


def test_a_finished_sweep_is_extended_by_more_trials(tmp_path: Path) -> None:
    run_all(SweepSearch(*make_sweep(tmp_path)))
    config, problem, ledger = make_sweep(tmp_path, "search.trials_per_density=8")
    more = run_all(SweepSearch(config, problem, ledger))
    assert [(d, n) for d, n, _ in more] == [(0.1, 6), (0.01, 6), (0.1, 7), (0.01, 7)]


def test_past_trials_that_fit_a_changed_space_are_known_to_optuna(tmp_path: Path) -> None:
    run_all(SweepSearch(*make_sweep(tmp_path)))
    config, problem, ledger = make_sweep(tmp_path, "pre_pruning.optimizer.lr={loguniform: [1e-3, 1e-1]}")
    fit = [r for r in ledger.records() if r.params["pre_pruning.optimizer.lr"] >= 1e-3]
    assert 0 < len(fit) < 12
    search = SweepSearch(config, problem, ledger)
    assert {r.uid for r in search.past} == {r.uid for r in fit}
    assert len(search) == 12  # a new space gets its own trials
    known = [t for d in config.densities for t in search._searches[d].study.trials]
    assert len(known) == len(fit)


def test_a_finite_space_is_never_tried_twice_and_ends(tmp_path: Path) -> None:
    overrides = [
        "pre_pruning=null",
        "post_pruning.label_smoothing=null",
        "post_pruning.optimizer.lr={choice: [1e-3, 1e-2]}",
        "seed={int: [0, 1]}",
    ]
    config, problem, ledger = make_sweep(tmp_path, *overrides)
    search = SweepSearch(config, problem, ledger)
    points = []
    while (record := search.next()) is not None:
        points.append((record.density, *record.params.values()))
        search.tell(finish(record, 0.5))
    assert len(points) == len(set(points)) == 2 * 4
    assert len(search) == 0


def test_tpe_comes_closer_than_random_does(tmp_path: Path) -> None:
    """A wiring test: results must reach the sampler, at the right sign."""
    best = {}
    for sampler in ("tpe", "random"):
        config, problem, ledger = make_sweep(
            tmp_path / sampler, f"search.sampler={sampler}", "search.trials_per_density=40", "densities=[0.1]"
        )
        rates = [p["pre_pruning.optimizer.lr"] for _, _, p in run_all(SweepSearch(config, problem, ledger))]
        best[sampler] = sum(map(distance, rates[20:])) / 20
    assert best["tpe"] < 0.7 * best["random"]


def test_optuna_is_quiet(sweep) -> None:
    SweepSearch(*sweep)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_a_trial_that_lost_its_worker_is_the_next(sweep) -> None:
    search = SweepSearch(*sweep)
    first, second = search.next(), search.next()
    assert first is not None
    assert second is not None
    left = len(search)
    search.give_back(second)
    assert (len(search), search.waiting) == (left + 1, True)
    assert search.next() is second
    assert len(search) == left


def test_a_space_without_a_word_on_pre_pruning(tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("pre_pruning:")] + TEXT[TEXT.index("post_pruning:") :]
    search = SweepSearch(*make_sweep(tmp_path, text=text))
    record = search.next()
    assert record is not None
    assert search.next() is not None
    record.curve = [epoch(1, post=1)]
    search.progressed(record)
    search.tell(finish(record, 0.5))


INVALID_PAIR = (
    "pruning={criterion: {choice: [magnitude, snip]}, schedule: {choice: [one_shot, {name: gradual}]}}",
    "search.sampler=random",
)


def test_points_that_are_no_configuration_are_left_out_with_one_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = SweepSearch(*make_sweep(tmp_path, *INVALID_PAIR, "search.trials_per_density=12"))
    done = run_all(search)
    assert len(done) == 24
    drawn = {(p["pruning.criterion"], p["pruning.schedule"]) for _, _, p in done}
    assert len(drawn) == 3  # of four
    (message,) = caplog.messages
    assert "pruning.criterion: gradual pruning ranks by magnitude" in message
    states = [t.state for d in (0.1, 0.01) for t in search._searches[d].study.trials]
    assert states.count(TrialState.COMPLETE) == 24
    assert states.count(TrialState.FAIL) == len(states) - 24 > 0  # none that Optuna still waits for


def test_a_finite_space_ends_without_its_invalid_points(tmp_path: Path) -> None:
    fixed = (
        "pre_pruning.optimizer.lr={choice: [1e-3]}",
        "pre_pruning.mask=null",
        "post_pruning.label_smoothing=null",
    )
    search = SweepSearch(*make_sweep(tmp_path, *INVALID_PAIR, *fixed))
    assert len(run_all(search)) == 2 * 3
    assert len(search) == 0
