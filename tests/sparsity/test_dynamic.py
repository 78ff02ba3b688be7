from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunetune.sparsity.dynamic import (
    cubic_density,
    drop_fraction,
    move,
    project_to_count,
    rigl_growth,
    set_growth,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_three_rigl_updates_stepped_by_hand() -> None:
    weight = torch.tensor([5.0, -1.0, 0.5, 0.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    # f = 0.34: ⌊0.34·3⌋ = 1. Drop 0.5 (index 2); of the inactive the largest |g| is index 4.
    mask = move(weight, mask, torch.tensor([9.0, 9.0, 0.1, 0.2, 0.7, 0.6]), 0.34, generator=generator())
    assert mask.tolist() == [True, True, False, False, True, False]
    # The new weight is 0, so the smallest: dropped unless its gradient is the largest again, which it is.
    weight = weight * mask
    mask = move(weight, mask, torch.tensor([9.0, 9.0, 0.1, 0.2, 0.7, 0.6]), 0.34, generator=generator())
    assert mask.tolist() == [True, True, False, False, True, False]
    # f = 0.7: two go, index 4 (0) and index 1 (−1); index 5 and index 3 have the largest |g|.
    growth = torch.tensor([9.0, 0.0, 0.1, 0.8, 0.2, 0.9])
    mask = move(weight, mask, growth, 0.7, generator=generator())
    assert mask.tolist() == [True, False, False, True, False, True]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 1000),
    st.sampled_from([rigl_growth, set_growth]),
)
def test_the_count_is_conserved_at_every_update(
    n: int, density: float, fraction: float, seed: int, grow
) -> None:
    g = generator(seed)
    mask = torch.rand(n, generator=g) < density
    weight = torch.randn(n, generator=g).round(decimals=1) * mask  # with ties and zeros
    growth = grow(torch.randn(n, generator=g).round(decimals=1), generator=g)
    new = move(weight, mask, growth, fraction, generator=g)
    assert int(new.sum()) == int(mask.sum())
    changed = int((mask & ~new).sum())
    assert changed <= math.floor(fraction * int(mask.sum()))


def test_rigl_grows_where_set_grows_at_random() -> None:
    gradient = torch.tensor([0.1, -3.0, 2.0])
    assert torch.equal(rigl_growth(gradient, generator=generator()), gradient.abs())
    assert not torch.equal(
        set_growth(gradient, generator=generator(1)), set_growth(gradient, generator=generator(2))
    )


def test_the_drop_fraction_is_a_cosine_from_alpha_to_zero() -> None:
    assert [round(drop_fraction(t, 0.75, 0.3), 6) for t in (0, 0.375, 0.75, 0.9)] == [0.3, 0.15, 0.0, 0.0]


def test_gradual_pruning_is_cubic_between_start_and_end() -> None:
    def at(t: float) -> float:
        return cubic_density(t, 0.25, 0.75, 1.0, 0.2)

    assert (at(0.0), at(0.25), at(0.75), at(1.0)) == (1.0, 1.0, 0.2, 0.2)
    assert at(0.5) == pytest.approx(0.2 + 0.8 * 0.5**3)


def exact_projection(mask: Tensor, count: float) -> Tensor:
    """By bisection in float64."""
    mask = mask.double()
    low, high = mask.min() - 1, mask.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (mask - middle).clamp(0, 1).sum() > count else (low, middle)
    return (mask - (low + high) / 2).clamp(0, 1)


@pytest.mark.parametrize("count", [0.0, 0.5, 2.0, 5.3, 8.0])
def test_the_projection_is_the_nearest_point_with_that_count(count: float) -> None:
    mask = torch.tensor([-0.2, 0.0, 0.1, 0.4, 0.5, 0.9, 1.0, 1.3])
    projected = project_to_count(mask, count, steps=10)
    assert float(projected.sum()) == pytest.approx(count, abs=1e-5)
    torch.testing.assert_close(projected, exact_projection(mask, count).float(), atol=1e-6, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(
        st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30
    ),
    st.floats(0, 1),
)
def test_any_mask_is_projected_with_enough_steps(values: list[float], share: float) -> None:
    mask = torch.tensor(values, dtype=torch.float64)
    projected = project_to_count(mask, share * len(values), steps=40)
    assert float(projected.sum()) == pytest.approx(share * len(values), abs=1e-5)
    torch.testing.assert_close(projected, exact_projection(mask, share * len(values)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5])
def test_a_mask_after_a_step_is_projected_at_once(density: float) -> None:
    # Weights at 0 and at 1 and some between, moved by about the learning rate as Adam does.
    n, g = 100_000, generator()
    mask = exact_projection(torch.randn(n, generator=g) + torch.randn(n, generator=g).sign(), density * n)
    moved = (mask + 0.02 * torch.randn(n, generator=g).clamp(-2, 1)).float()
    projected = project_to_count(moved, 0.999 * density * n)
    assert float(projected.double().sum()) == pytest.approx(0.999 * density * n, abs=1e-6 * n)
    torch.testing.assert_close(
        projected.double(), exact_projection(moved, 0.999 * density * n), atol=1e-5, rtol=0
    )


def test_a_mask_with_the_right_count_stays_as_it_is() -> None:
    mask = torch.rand(1000, generator=generator())
    assert torch.allclose(project_to_count(mask, float(mask.sum())), mask, atol=1e-5)
    extremes = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert torch.equal(project_to_count(extremes, 2.0), extremes)
