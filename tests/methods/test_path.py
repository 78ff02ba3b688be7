"""The mask under control: by hand, and that it follows its path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prunetune import pipeline, testing
from prunetune.config.document import Document
from prunetune.config.reading import from_document
from prunetune.methods.path import Path
from prunetune.sparsity.control import HIGHEST, LOWEST, controlled, initial_state, log_path
from prunetune.store import Store


def test_a_step_of_the_controller_by_hand() -> None:
    before = torch.tensor([-5.0, 0.1, -7.0])
    after = controlled(before, torch.tensor(0.5), 0.2, gain=10.0, proportional=2.0)
    multiplier = -5 + 10 * 0.5 * (0.2 - 0.1)
    torch.testing.assert_close(after, torch.tensor([multiplier, 0.2, multiplier + 2 * 0.5]))


def test_rows_are_controlled_each_for_itself() -> None:
    state = torch.tensor([[-5.0, 0.1, -5.0], [-3.0, 0.4, -3.0]])
    both = controlled(
        state,
        torch.tensor([0.5, 0.1]),
        torch.tensor([0.2, 0.5]),
        gain=torch.tensor([10.0, 20.0]),
        proportional=torch.tensor([2.0, 0.0]),
    )
    for row, distance, time, gain, proportional in ((0, 0.5, 0.2, 10.0, 2.0), (1, 0.1, 0.5, 20.0, 0.0)):
        alone = controlled(state[row], torch.tensor(distance), time, gain=gain, proportional=proportional)
        torch.testing.assert_close(both[row], alone)


@pytest.mark.parametrize(("distance", "bound"), [(1e3, HIGHEST), (-1e3, LOWEST)])
def test_lambda2_stays_within_its_bounds(distance: float, bound: float) -> None:
    after = controlled(initial_state(), torch.tensor(distance), 0.5, gain=10.0, proportional=1.0)
    assert float(after[0]) == pytest.approx(bound)
    assert float(after[2]) == pytest.approx(bound)


def test_the_path_is_straight_in_the_logarithm_and_rests_at_its_end() -> None:
    path = log_path(0.5, 0.1, 0.001, opening=0.2, end=0.8)
    assert path(0.0) == pytest.approx(math.log(0.5))
    assert path(0.1) == pytest.approx((math.log(0.5) + math.log(0.1)) / 2)
    assert path(0.5) == pytest.approx(math.log(0.01))
    assert path(0.8) == path(0.9) == path(1.0) == pytest.approx(math.log(0.001))


def test_with_a_power_the_path_slows_down() -> None:
    path = log_path(0.5, 0.1, 0.001, opening=0.2, end=0.8, power=3.0)
    assert path(0.2) == pytest.approx(math.log(0.1))
    assert path(0.5) == pytest.approx(math.log(0.001) + math.log(100) / 8)  # half of the time is left
    assert path(0.8) == path(1.0) == pytest.approx(math.log(0.001))


def test_a_path_that_would_rise_does_not() -> None:
    path = log_path(0.05, 0.1, 0.2, opening=0.2, end=0.8)
    assert {round(path(t / 10), 9) for t in range(11)} == {round(math.log(0.05), 9)}


def tree(**mask: Any) -> dict[str, Any]:
    return {
        "name": "path",
        "seed": 0,
        "data": {"name": "digits", "batch_size": 32, "validation_fraction": 0.2},
        "model": {"name": "mlp", "hidden": [32, 32]},
        "densities": [0.03],
        "pre_pruning": {
            "epochs": 20,
            "optimizer": {"name": "adam", "lr": 3e-3},
            "initializer": "kaiming",
            "mask": {"method": "path", "start": 0.3, **mask},
        },
        "post_pruning": {"epochs": 1, "optimizer": {"name": "adam", "lr": 3e-3}},
    }


def test_the_mask_follows_its_path(tmp_path: Any) -> None:
    """λ2 rises over decades until it holds; then ρ stays within a factor of 1.6, and a tenth at the end."""
    config = from_document(Document("path", tree(lowest=0.02, opening=0.2, end=0.8, travel=20)))
    epochs = [e for e in pipeline.run(config, store=Store(str(tmp_path))) if e.stage == "pre_pruning"]
    goal = log_path(0.9, 0.3, 0.9 * 0.02, opening=0.2, end=0.8, power=2.0)
    shares = [e.metrics["mask_density"] / math.exp(goal(number / 20)) for number, e in enumerate(epochs, 1)]
    assert all(1 / 1.6 < share < 1.6 for share in shares[7:]), shares
    assert shares[-1] == pytest.approx(1, abs=0.1)
    rates = [epoch.metrics["lambda2"] for epoch in epochs]
    assert rates[9] > 10 * rates[0]


def test_without_a_lowest_density_it_is_the_files() -> None:
    given = from_document(Document("path", tree()))
    assert given.pre_pruning is not None
    assert given.pre_pruning.mask is not None
    assert given.pre_pruning.mask.options["lowest"] == 0.03


def test_its_name_alone_is_enough() -> None:
    pre = {**tree()["pre_pruning"], "mask": "path"}
    given = from_document(Document("path", {**tree(), "pre_pruning": pre}))
    assert given.pre_pruning is not None
    assert given.pre_pruning.mask is not None
    assert given.pre_pruning.mask.options["lowest"] == 0.03


def test_it_holds_to_the_contract_of_masks() -> None:
    testing.check_mask("path", lowest=0.1, start=0.5)


@pytest.mark.parametrize(("steps", "expected"), [(1000, 0.012), (24, 0.05)])
def test_the_step_size_is_for_the_whole_stage_and_never_so_large_that_the_mask_closes_at_once(
    steps: int, expected: float
) -> None:
    weights = {"weight": torch.nn.Parameter(torch.ones(4))}
    made = Path(weights, steps=steps, lowest=0.1, travel=12.0)
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)
