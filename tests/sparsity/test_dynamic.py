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


def brute_force(mask: Tensor, count: float) -> Tensor:
    """τ on a fine grid."""
    grid = torch.linspace(float(mask.min()) - 1, float(mask.max()), 200_001, dtype=torch.float64)
    totals = (mask.double()[:, None] - grid).clamp(0, 1).sum(0)
    return (mask.double() - grid[(totals - count).abs().argmin()]).clamp(0, 1).float()


@pytest.mark.parametrize("count", [0.0, 0.5, 2.0, 5.3, 8.0])
def test_the_projection_is_the_nearest_point_with_that_count(count: float) -> None:
    mask = torch.tensor([-0.2, 0.0, 0.1, 0.4, 0.5, 0.9, 1.0, 1.3])
    projected = project_to_count(mask, count)
    assert float(projected.sum()) == pytest.approx(count, abs=1e-4)
    assert float(projected.min()) >= 0
    assert float(projected.max()) <= 1
    assert torch.allclose(projected, brute_force(mask, count), atol=1e-3)


def test_a_mask_with_the_right_count_stays_as_it_is() -> None:
    mask = torch.rand(1000, generator=generator())
    assert torch.allclose(project_to_count(mask, float(mask.sum())), mask, atol=1e-5)
