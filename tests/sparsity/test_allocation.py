"""Invariant 1: exactly k are kept, ties included; no kept score lies below a dropped one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.sparsity.allocation import top_k, unstructured


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_highest_scores_are_kept() -> None:
    mask = top_k(torch.tensor([0.1, 0.9, 0.5, 0.3]), 2, generator=generator())
    assert mask.tolist() == [False, True, True, False]


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_exactly_k_are_kept_and_none_of_them_lies_below_a_dropped_one(data: st.DataObject) -> None:
    levels = st.sampled_from([0.0, 0.0, 1e-30, 0.5, 0.5, 1.0, 2.0])  # ties are the normal case
    values = data.draw(st.lists(levels, min_size=1, max_size=60))
    k = data.draw(st.integers(0, len(values)))
    seed = data.draw(st.integers(0, 5))
    scores = torch.tensor(values)
    mask = top_k(scores, k, generator=generator(seed))
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == k
    if 0 < k < len(values):
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("k", [0, 1, 37, 99, 100])
def test_exactly_k_of_all_equal_scores_are_kept(k: int) -> None:
    assert int(top_k(torch.zeros(100), k, generator=generator()).sum()) == k


def test_ties_are_drawn_not_taken_by_index() -> None:
    scores = torch.zeros(1000)
    mask = top_k(scores, 100, generator=generator())
    assert 25 <= int(mask[:500].sum()) <= 75  # 50 expected, deviation 4.7
    assert not torch.equal(mask, top_k(scores, 100, generator=generator(1)))
    assert torch.equal(mask, top_k(scores, 100, generator=generator()))


def test_every_tied_score_has_the_same_chance() -> None:
    g = generator()
    counts = torch.zeros(10)
    for _ in range(2000):
        counts += top_k(torch.tensor([1.0] + [0.0] * 9), 4, generator=g)
    assert counts[0] == 2000
    torch.testing.assert_close(counts[1:] / 2000, torch.full((9,), 1 / 3), atol=0.05, rtol=0)


@pytest.mark.parametrize("k", [-1, 4])
def test_an_impossible_count_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}: must be between 0 and the number of scores, 3"):
        top_k(torch.zeros(3), k, generator=generator())


def test_a_score_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="scores: must not be NaN"):
        top_k(torch.tensor([1.0, float("nan")]), 1, generator=generator())


def test_no_scores_and_infinite_scores() -> None:
    assert top_k(torch.zeros(0), 0, generator=generator()).shape == (0,)
    mask = top_k(torch.tensor([1.0, float("inf"), 2.0]), 1, generator=generator())
    assert mask.tolist() == [False, True, False]


def test_layers_are_ranked_together_and_keep_their_shapes() -> None:
    scores = {"a": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "b": torch.tensor([0.5, 0.05, 0.6])}
    masks = unstructured(scores, 3, generator=generator())
    assert masks["a"].tolist() == [[False, False], [False, True]]
    assert masks["b"].tolist() == [True, False, True]


def test_ties_are_spread_over_all_layers() -> None:
    scores = {f"layer{i}": torch.zeros(20, 50) for i in range(5)}
    masks = unstructured(scores, 500, generator=generator())
    counts = [int(mask.sum()) for mask in masks.values()]
    assert sum(counts) == 500
    assert min(counts) > 60  # 100 expected, deviation 8.5
