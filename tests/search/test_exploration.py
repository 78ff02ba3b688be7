"""Which network is pre-trained next, given what others gave."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from search.test_branching import PRE, started
from small_sweep import TEXT, finish, make_sweep

from prunetune.config import space
from prunetune.records.trial import TrialRecord
from prunetune.search import branching, exploration
from prunetune.search.branching import determining
from prunetune.search.exploration import Experience, coordinates
from prunetune.search.queue import SweepSearch

LR = "pre_pruning.optimizer.lr"
LATER = "post_pruning.optimizer.lr"
SPACE: dict[str, space.Distribution] = {LR: space.LogUniform(1e-5, 1e-1), LATER: space.Uniform(0.0, 1.0)}
DENSITIES = [0.1, 0.01, 0.001]
GRID = [{LR: 10 ** (-5 + i / 10)} for i in range(41)]


def experience(*results: tuple[float, float, float], shuffled: bool = False) -> Experience:
    """From (density, log10 of the rate, accuracy)."""
    made = Experience(SPACE, DENSITIES)
    records = []
    for number, (density, rate, value) in enumerate(results):
        record = TrialRecord(str(number), density, number, "", {LR: 10**rate, LATER: 0.5}, {})
        records.append(finish(record, value))
    if shuffled:
        random.Random(0).shuffle(records)
    for record in records:
        made.ended(record, record.params)
    return made


def rates(best: float) -> list[float]:
    return [best + offset for offset in (-1.5, -1.0, -0.6, -0.3, 0.2, 0.5, 0.8, 1.4)]


def peaked(density: float, best: float, scale: float = 1.0) -> list[tuple[float, float, float]]:
    """Results over rates, best at one of them; the worst ones are at chance."""
    return [(density, rate, max(0.1, 0.9 - scale * abs(rate - best) ** 2)) for rate in rates(best)]


def chosen(made: Experience, density: float) -> float:
    index = made.most_promising(GRID, density)
    assert index is not None
    return math.log10(GRID[index][LR])


def test_coordinates_by_hand() -> None:
    assert coordinates(space.Uniform(2.0, 4.0), 2.5) == [0.25]
    assert coordinates(space.LogUniform(1e-4, 1e-2), 1e-3) == pytest.approx([0.5])
    assert coordinates(space.Int(1, 5), 2) == [0.25]
    assert coordinates(space.Int(3, 3), 3) == [0.5]
    both = space.Choice(("a", "b"), ("a", "b"))
    assert [coordinates(both, v) for v in ("a", "b", None)] == [[0.0], [1.0], [0.0]]


def test_scores_are_those_of_a_normal_sample_within_a_density() -> None:
    made = experience((0.1, -2, 0.3), (0.1, -3, 0.9), (0.01, -2, 0.2))
    scores = exploration._scores(list(made._results.values()))
    # Quantiles ¼ and ¾ of two, ½ of one.
    assert scores == pytest.approx([-0.6745, 0.6745, 0.0], abs=1e-4)


def test_it_looks_where_the_results_are_best() -> None:
    assert chosen(experience(*peaked(0.1, -2.5)), 0.1) == pytest.approx(-2.5, abs=0.5)
    assert chosen(experience(*peaked(0.1, -4.0)), 0.1) == pytest.approx(-4.0, abs=0.5)


def test_what_a_density_needs_follows_from_its_neighbours() -> None:
    neighbours = experience(*peaked(0.1, -2.0), *peaked(0.001, -3.0))
    assert chosen(neighbours, 0.01) == pytest.approx(-2.5, abs=0.4)


def test_the_own_density_outweighs_the_others() -> None:
    made = experience(*peaked(0.1, -4.0), *peaked(0.01, -2.0))
    assert chosen(made, 0.01) == pytest.approx(-2.0, abs=0.5)


def test_only_the_order_of_accuracies_counts_not_their_scale() -> None:
    one = peaked(0.1, -2.5) + peaked(0.01, -3.0)
    other = [(d, rate, 0.5 * value**3) for d, rate, value in one]
    assert chosen(experience(*one), 0.1) == chosen(experience(*other), 0.1)


def test_the_order_in_which_results_come_does_not_matter() -> None:
    results = peaked(0.1, -2.5) + peaked(0.01, -3.0)
    assert chosen(experience(*results), 0.01) == chosen(experience(*results, shuffled=True), 0.01)


def test_a_diverged_trial_is_the_worst_of_its_density() -> None:
    made = experience(*peaked(0.1, -2.5))
    record = TrialRecord("diverged", 0.1, 99, "", {LR: 1e-1, LATER: 0.5}, {})
    made.ended(finish(record, None, "diverged"), record.params)
    scores = exploration._scores(list(made._results.values()))
    assert scores.argmin() == len(scores) - 1


def test_only_the_newest_results_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration, "_MOST", 8)
    made = experience(*peaked(0.1, -4.0), *peaked(0.1, -2.0))
    assert chosen(made, 0.1) == chosen(experience(*peaked(0.1, -2.0)), 0.1)
    # By their numbers, not by when they came.
    shuffled = experience(*peaked(0.1, -4.0), *peaked(0.1, -2.0), shuffled=True)
    assert chosen(shuffled, 0.1) == chosen(made, 0.1)


def test_what_is_to_be_improved_on_is_the_best_of_the_own_density(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat:
        """Expects 0 ± 1 everywhere."""

        def predict(self, points: Any, return_std: bool) -> tuple[list[float], list[float]]:
            return [0.0] * len(points), [1.0] * len(points)

    ahead: list[float] = []
    monkeypatch.setattr(exploration, "_process", lambda points, scores: Flat())
    monkeypatch.setattr(exploration, "expected_improvement", lambda a, s: ahead.append(a) or 0.0)
    made = experience(*peaked(0.1, -2.5), (0.01, -2.0, 0.3))
    for density in (0.1, 0.01):
        made.most_promising(GRID[:1], density)
    assert ahead == pytest.approx([-1.5341, 0.0], abs=1e-4)  # quantiles 15/16 of eight, ½ of one


def test_nothing_is_said_of_too_little() -> None:
    results = peaked(0.1, -2.0)
    assert experience(*results[:4]).most_promising(GRID, 0.1) is None
    assert experience(*results).most_promising([], 0.1) is None
    later = Experience({LATER: SPACE[LATER]}, DENSITIES)  # all networks are the same
    for number in range(8):
        record = TrialRecord(str(number), 0.1, number, "", {LATER: 0.5}, {})
        later.ended(finish(record, 0.5), record.params)
    assert later.most_promising([{}], 0.1) is None


def test_a_sweep_of_one_density() -> None:
    made = Experience(SPACE, [0.1])
    for number, (_, rate, value) in enumerate(peaked(0.1, -2.5)):
        record = TrialRecord(str(number), 0.1, number, "", {LR: 10**rate, LATER: 0.5}, {})
        made.ended(finish(record, value), record.params)
    assert chosen(made, 0.1) == pytest.approx(-2.5, abs=0.5)


def test_while_one_good_place_is_being_tried_the_other_is_next() -> None:
    places = (-4.0, -2.0)
    tried = [(0.1, best + offset, 0.9 - abs(offset)) for best in places for offset in (-0.4, -0.2, 0.2, 0.4)]
    made = experience((0.1, -5.0, 0.1), (0.1, -3.0, 0.1), (0.1, -1.0, 0.1), *tried)
    first = chosen(made, 0.1)
    running = TrialRecord("running", 0.1, 20, "", {LR: 10**first, LATER: 0.5}, {})
    made.begun(running)
    assert made.running == [{LR: 10**first}]
    second = chosen(made, 0.1)
    assert {min(places, key=lambda place: abs(place - rate)) for rate in (first, second)} == set(places)
    # What fails says nothing, and may be tried again.
    made.ended(finish(running, None, "failed"), running.params)
    assert made.running == []
    assert chosen(made, 0.1) == first


def test_a_running_branch_is_of_no_account() -> None:
    made = experience(*peaked(0.1, -2.5))
    before = chosen(made, 0.1)
    record = TrialRecord("branch", 0.1, 50, "", {LR: 10**before, LATER: 0.5}, {}, branched=True)
    made.begun(record)
    assert made.running == []
    assert chosen(made, 0.1) == before


# --- in the queue


def run_all(search: SweepSearch) -> list[TrialRecord]:
    """Every trial, one at a time: what a network gives falls off around a rate, which the density shifts."""
    trials = []
    while (trial := search.next()) is not None:
        best = -2.0 + 0.5 * math.log10(trial.density / 0.1)
        value = 0.9 - 0.2 * abs(math.log10(trial.params[LR]) - best)
        finish(trial, max(value, 0.1))
        trial.curve.insert(0, PRE)
        search.progressed(trial)
        search.tell(trial)
        trials.append(trial)
    return trials


def make(folder: Path, *overrides: str, text: str = TEXT) -> SweepSearch:
    return SweepSearch(*make_sweep(folder, *overrides, text=text), lambda key: True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What was found most promising, each time that was asked."""
    answers: list[int | None] = []
    ask = Experience.most_promising

    def spying(self: Experience, networks: Any, density: float) -> int | None:
        answers.append(ask(self, networks, density))
        return answers[-1]

    monkeypatch.setattr(Experience, "most_promising", spying)
    return answers


def test_new_networks_are_chosen_once_there_are_some_to_learn_from(
    tmp_path: Path, asked: list[int | None]
) -> None:
    search = make(tmp_path, "search.trials_per_density=20", "search.exploration=0.5")
    explored = [trial for trial in run_all(search) if not trial.branched]
    assert len(asked) == len(explored) - branching.NETWORKS_FIRST
    assert None not in asked
    drawn = search._searches[explored[-1].density].draw(explored[-1].number, exploration.DRAWN)
    assert asked[-1] is not None
    chosen = determining(drawn[asked[-1]])
    assert determining(explored[-1].params) == chosen


@pytest.mark.parametrize(
    "changed",
    [["search.sampler=random", "search.exploration=0.5"], ["search.exploration=1.0"], ["pre_pruning=null"]],
)
def test_where_nothing_is_shared_proposals_are_the_studies_own(
    changed: list[str], tmp_path: Path, asked: list[int | None]
) -> None:
    search = make(tmp_path, "search.trials_per_density=12", *changed)
    while (trial := search.next()) is not None:
        finish(trial, 0.5)
        if trial.tree["pre_pruning"] is not None:
            trial.curve.insert(0, PRE)
        search.progressed(trial)
        search.tell(trial)
    assert asked == []


def with_rates(rates: str) -> str:
    """A space whose networks differ by these learning rates alone."""
    mask = "{choice: [null, {lambda1: 0.0, lambda2: {loguniform: [1e-5, 1e-2]}}]}"
    return TEXT.replace("{loguniform: [1e-4, 1e-1]}", f"{{choice: [{rates}]}}").replace(mask, "null")


def test_a_network_that_is_there_is_not_taken_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branching, "NETWORKS_FIRST", 2)
    search = make(
        tmp_path,
        "search.trials_per_density=8",
        "search.exploration=0.25",
        text=with_rates("0.1, 0.01, 0.001"),
    )
    explored = [trial.params[LR] for trial in run_all(search) if not trial.branched]
    assert sorted(explored[:3]) == [0.001, 0.01, 0.1]


def test_what_is_asked_about_is_neither_trained_nor_being_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branching, "NETWORKS_FIRST", 1)
    search = make(tmp_path, "search.exploration=0.9", text=with_rates("0.1, 0.01, 0.001, 0.0001"))
    trained, running = started(search), started(search)
    finish(trained, 0.5).curve.insert(0, PRE)
    search.progressed(trained)
    search.tell(trained)
    assert search._experience.running == [determining(running.params)]
    seen: list[Any] = []
    monkeypatch.setattr(Experience, "most_promising", lambda self, networks, density: seen.extend(networks))
    search._network(0.1, 5, 0)
    taken = {trained.params[LR], running.params[LR]}
    assert {network[LR] for network in seen} == {0.1, 0.01, 0.001, 0.0001} - taken


def test_a_restarted_sweep_explores_as_if_it_had_not_ended(tmp_path: Path) -> None:
    overrides = ["search.trials_per_density=14", "search.exploration=0.5"]
    undisturbed = run_all(make(tmp_path / "a", *overrides))
    first = make(tmp_path / "b", *overrides)
    for _ in range(20):
        trial = started(first)
        best = -2.0 + 0.5 * math.log10(trial.density / 0.1)
        finish(trial, max(0.9 - 0.2 * abs(math.log10(trial.params[LR]) - best), 0.1))
        trial.curve.insert(0, PRE)
        first.progressed(trial)
        first.tell(trial)
    rest = run_all(make(tmp_path / "b", *overrides))
    assert [t.params for t in rest] == [t.params for t in undisturbed[20:]]


def test_it_finds_better_networks_than_the_studies_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best(folder: Path) -> float:
        found = 0.0
        for seed in range(4):
            settings = [f"seed={seed}", "search.trials_per_density=20", "search.exploration=0.4"]
            search = make(folder / str(seed), *settings)
            trials = run_all(search)
            found += sum(max(t.val_accuracy or 0 for t in trials if t.density == d) for d in (0.1, 0.01))
        return found

    guided = best(tmp_path / "guided")
    monkeypatch.setattr(SweepSearch, "_network", lambda self, density, number, attempt: None)
    assert guided > best(tmp_path / "alone")
