"""Invariant 1: exactly k are kept, ties included; no kept score lies below a dropped one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunetune.config.canonical import kept
from prunetune.registry import CRITERIA
from prunetune.sparsity.allocation import (
    LAYER_COUNTS,
    apportion,
    channels,
    dense_layer_names,
    erk_counts,
    n_of_m,
    shuffled_within_layers,
    top_k,
    uniform_counts,
    unstructured,
)
from prunetune.sparsity.criteria import Scene
from prunetune.sparsity.masks import FixedMask, prunable


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


VGG = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (256, 128, 3, 3), (256, 256, 3, 3)]
VGG += [(256, 256, 3, 3), (512, 256, 3, 3), *[(512, 512, 3, 3)] * 5, (10, 512)]


@pytest.mark.parametrize("density", [0.1, 0.032, 0.01, 0.0032, 0.001])
@pytest.mark.parametrize("counts", [erk_counts, uniform_counts])
def test_layer_counts_are_exact_for_vgg16_at_every_density_of_the_paper(counts, density: float) -> None:
    shapes = {f"layer{i}": torch.Size(shape) for i, shape in enumerate(VGG)}
    total = kept(density, 14_715_584)
    found = counts(shapes, total)
    assert sum(found.values()) == total
    assert all(0 <= count <= shapes[name].numel() for name, count in found.items())


def test_uniform_has_one_density_and_erk_favours_small_layers() -> None:
    shapes = {"small": torch.Size((10, 10)), "large": torch.Size((100, 100))}
    assert uniform_counts(shapes, 1010) == {"small": 10, "large": 1000}
    # Σ/Π: 20/100 = 0.2 and 200/10000 = 0.02: 20 and 200 weights at scale 1, so 10 and 100 at scale ½.
    assert erk_counts(shapes, 110) == {"small": 10, "large": 100}


def test_erk_makes_layers_dense_that_would_exceed_it() -> None:
    shapes = {"tiny": torch.Size((2, 2)), "large": torch.Size((100, 100))}
    assert erk_counts(shapes, 5004) == {"tiny": 4, "large": 5000}


def test_apportion_gives_the_largest_remainders_and_respects_caps() -> None:
    assert apportion([0.4, 0.4, 0.2], [1, 1, 1], 1) == [1, 0, 0]
    assert apportion([5.0, 1.0], [2, 9], 6) == [2, 4]
    with pytest.raises(ValueError, match="must be at most the sum of the caps, 3"):
        apportion([5.0], [3], 5)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    density=st.floats(0.001, 1),
    allocation=st.sampled_from(sorted(LAYER_COUNTS)),
    criterion=st.sampled_from(CRITERIA.names),
    dense=st.sampled_from(["none", "first", "last", "both"]),
    seed=st.integers(0, 10_000),
)
def test_every_allocation_of_every_criterion_is_exact(
    shapes, density, allocation, criterion, dense, seed
) -> None:
    """Exact count, what was pruned stays pruned, no NaN, over two rounds."""
    g = torch.Generator().manual_seed(seed)
    widths = [shapes[0][1], *(out for out, _ in shapes)]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    net = nn.Sequential(nn.Flatten(), *(m for layer in layers for m in (layer, nn.ReLU())))
    weights = prunable(net)
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(torch.randn(weight.shape, generator=g).round(decimals=1))
    x = torch.randn(6, 1, 1, widths[0], generator=g)
    labels = torch.randint(0, widths[-1], (6,), generator=g)
    total = sum(weight.numel() for weight in weights.values())
    whole = dense_layer_names(list(weights), dense)
    least = sum(weights[name].numel() for name in whole)
    masks = None
    for share in (0.5, 1.0):
        count = max(least, kept(density, total), int(total * density**share))
        scores = CRITERIA.find(criterion)(Scene(net, x, labels, g))
        assert not any(torch.isnan(score).any() for score in scores.values())
        new = unstructured(scores, count, allocation=allocation, dense=whole, alive=masks, generator=g)
        assert sum(int(mask.sum()) for mask in new.values()) == count
        assert all(bool(new[name].all()) for name in whole)
        if masks is not None:
            assert not any(bool((new[name] & ~masks[name]).any()) for name in new)
        masks = new
        FixedMask(weights, masks).apply()
        assert all(not weights[name][~mask].any() for name, mask in masks.items())


def test_dense_layers_that_hold_too_much_are_an_error() -> None:
    scores = {"a": torch.ones(4, 4), "b": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="k = 3: must be at least the 16 weights of the dense layers"):
        unstructured(scores, 3, dense={"a"}, generator=generator())


def test_channels_go_and_stay_as_a_whole() -> None:
    scores = {
        "conv": torch.tensor([1.0, 5.0, 3.0]).view(3, 1, 1, 1).expand(3, 2, 1, 1),
        "head": torch.zeros(2, 3),
    }
    masks = channels(scores, 6 + 4, generator=generator())
    assert masks["conv"].flatten(1).tolist() == [[False, False], [True, True], [True, True]]
    assert masks["head"].all()
    fewer = channels(scores, 6 + 3, generator=generator())  # the second channel does not fit
    assert fewer["conv"].flatten(1).any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="at least the 6 weights of the last layer"):
        channels(scores, 5, generator=generator())


@pytest.mark.parametrize("shape", [(5, 8), (3, 8, 3, 3), (4, 6), (4, 3, 3, 3)])
def test_two_of_four_along_the_input_dimension(shape: tuple[int, ...]) -> None:
    scores = {"w": torch.rand(shape, generator=generator()).round(decimals=1)}
    mask = n_of_m(scores, 2, 4, generator=generator())["w"]
    assert mask.shape == shape
    groups = mask.movedim(1, -1).reshape(-1, shape[1])
    ranked = scores["w"].movedim(1, -1).reshape(-1, shape[1])
    for start in range(0, shape[1], 4):
        group, values = groups[:, start : start + 4], ranked[:, start : start + 4]
        assert (group.sum(1) == 2 * group.shape[1] // 4).all()
        for row, value in zip(group, values, strict=True):
            if row.any() and not row.all():
                assert value[row].min() >= value[~row].max()


def test_a_shuffle_changes_the_mask_and_keeps_each_layers_count() -> None:
    masks = {name: torch.rand(20, 30, generator=generator(i)) < 0.2 for i, name in enumerate("ab")}
    shuffled = shuffled_within_layers(masks, generator=generator())
    for name, mask in masks.items():
        assert int(shuffled[name].sum()) == int(mask.sum())
        assert not torch.equal(shuffled[name], mask)
