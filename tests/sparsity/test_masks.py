"""Learnable and fixed masks: which weights, which gradients, and what the model computes with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunetune.sparsity.masks import (
    FixedMask,
    LearnableMask,
    fill_uniform,
    mask_gradients,
    pack,
    prunable,
    regularizer,
    unpack,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Everything(nn.Module):
    """One of each layer that may or may not be pruned, and a weight two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.conv = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1)
        )
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(3, 4)
        self.positions = nn.Parameter(torch.zeros(1, 4))


def test_prunable_weights_are_those_of_linear_conv_and_attention_layers() -> None:
    model = Everything()
    weights = prunable(model)
    assert set(weights) == {
        "linear.weight",
        "conv.0.weight",
        "conv.2.weight",
        "conv.3.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
    }
    parameters = dict(model.named_parameters())
    assert all(weight is parameters[name] for name, weight in weights.items())


def test_a_shared_weight_is_listed_once() -> None:
    model = Everything()
    assert model.tied.weight is prunable(model)["linear.weight"]
    assert "tied.weight" not in prunable(model)


def test_a_bare_layer_has_an_unprefixed_name() -> None:
    assert list(prunable(nn.Linear(2, 3))) == ["weight"]


def test_the_regularizer_by_hand() -> None:
    mask = torch.tensor([0.0, 0.25, 0.5, 1.0])
    # Σ M(1−M) = 0 + 0.1875 + 0.25 + 0 = 0.4375; Σ M = 1.75
    assert regularizer(mask, 2.0, 0.0).item() == 0.875
    assert regularizer(mask, 0.0, 2.0).item() == 3.5
    assert regularizer(mask, 2.0, 2.0).item() == 4.375


def test_mask_gradients_by_hand() -> None:
    theta_grad, mask_grad = mask_gradients(
        grad=torch.tensor([1.0, 2.0, -3.0]),
        theta=torch.tensor([10.0, -1.0, 0.5]),
        drawn=torch.tensor([1.0, 0.0, 1.0]),
        mask=torch.tensor([0.5, 0.0, 1.0]),
        lambda1=4.0,
        lambda2=0.25,
    )
    assert theta_grad.tolist() == [1.0, 0.0, -3.0]
    # g·θ + 4(1 − 2M) + 0.25: 10 + 0 + .25; −2 + 4 + .25; −1.5 − 4 + .25. A weight that was not drawn
    # learns its mask all the same.
    assert mask_grad.tolist() == [10.25, 2.25, -5.25]


class StraightThrough(torch.autograd.Function):
    """B ~ Bernoulli(M) given from outside, ∂B/∂M = 1."""

    @staticmethod
    def forward(ctx: object, mask: Tensor, drawn: Tensor) -> Tensor:
        return drawn.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def test_mask_gradients_are_those_of_autograd_through_the_straight_through_estimator() -> None:
    g = generator()
    theta = torch.randn(20, dtype=torch.float64, generator=g).requires_grad_()
    mask = torch.rand(20, dtype=torch.float64, generator=g).requires_grad_()
    drawn = torch.bernoulli(mask.detach(), generator=g)
    weights = (theta * StraightThrough.apply(mask, drawn)).detach().requires_grad_()

    def loss(w: Tensor) -> Tensor:
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
        return (torch.tanh(x @ w.view(5, 4)) ** 2).sum()

    loss(weights).backward()
    total = loss(theta * StraightThrough.apply(mask, drawn)) + regularizer(mask, 0.3, 0.7)
    expected = torch.autograd.grad(total, (theta, mask))
    assert weights.grad is not None
    found = mask_gradients(weights.grad, theta.detach(), drawn, mask.detach(), 0.3, 0.7)
    torch.testing.assert_close(found, expected)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_step_through_the_model_gives_the_gradients_of_autograd() -> None:
    model = two_layers()
    thetas = [weight.detach().clone() for weight in prunable(model).values()]
    mask = LearnableMask(prunable(model), initial=0.5)
    mask.draw(generator(3))
    drawn = [weight.detach() != 0 for weight in prunable(model).values()]
    assert 0 < sum(int(d.sum()) for d in drawn) < 20
    x, y = torch.randn(8, 3, generator=generator()), torch.randint(0, 2, (8,), generator=generator())
    nn.functional.cross_entropy(model(x), y).backward()
    mask.take_gradients(0.3, 0.7)

    leaves = [theta.clone().requires_grad_() for theta in thetas]
    masks = [torch.full_like(theta, 0.5).requires_grad_() for theta in thetas]
    w1, w2 = (
        theta * StraightThrough.apply(m, d.float()) for theta, m, d in zip(leaves, masks, drawn, strict=True)
    )
    hidden = torch.relu(x @ w1.T + model[0].bias.detach())
    loss = nn.functional.cross_entropy(hidden @ w2.T + model[2].bias.detach(), y)
    loss = loss + sum(regularizer(m, 0.3, 0.7) for m in masks)
    loss.backward()
    for found, expected in ((mask.theta.grad, leaves), (mask.mask.grad, masks)):
        flat = torch.cat([leaf.grad.flatten() for leaf in expected if leaf.grad is not None])
        torch.testing.assert_close(found, flat)


def test_gradients_do_not_add_up_from_step_to_step() -> None:
    model = two_layers()
    mask = LearnableMask(prunable(model), initial=1.0)
    found = []
    for _ in range(2):
        mask.draw(generator())
        model(torch.ones(1, 3)).sum().backward()
        mask.take_gradients(0.0, 0.0)
        assert mask.theta.grad is not None
        found.append(mask.theta.grad.clone())
    assert torch.equal(found[0], found[1])
    assert found[0].any()


def test_the_model_computes_with_drawn_weights_in_training_and_expected_ones_after() -> None:
    model = two_layers()
    theta = torch.cat([weight.detach().flatten() for weight in prunable(model).values()])
    mask = LearnableMask(prunable(model), initial=0.25)
    assert torch.equal(mask.theta.detach(), theta)
    assert mask.mask.tolist() == [0.25] * 20
    mask.draw(generator())
    used = torch.cat([weight.detach().flatten() for weight in prunable(model).values()])
    assert torch.equal(used, theta * (used != 0))
    mask.expect()
    used = torch.cat([weight.detach().flatten() for weight in prunable(model).values()])
    assert torch.equal(used, theta * 0.25)
    assert torch.equal(mask.theta.detach(), theta)


def test_weights_that_are_drawn_have_the_mask_as_mean() -> None:
    layer = nn.Linear(4, 1, bias=False)
    nn.init.ones_(layer.weight)
    mask = LearnableMask(prunable(layer), initial=0.5)
    means = torch.tensor([0.0, 0.2, 0.7, 1.0])
    with torch.no_grad():
        mask.mask.copy_(means)
    g = generator()
    total = torch.zeros(1, 4)
    for _ in range(4000):
        mask.draw(g)
        assert set(layer.weight.unique().tolist()) <= {0.0, 1.0}
        total += layer.weight.detach()
    torch.testing.assert_close(total / 4000, means.view(1, 4), atol=0.03, rtol=0)
    assert total[0, 0] == 0  # M = 0: never
    assert total[0, 3] == 4000  # M = 1: always


@pytest.mark.parametrize("n", [1, 4, 7, 200_001])
def test_uniform_numbers_are_multiples_of_two_to_the_minus_24(n: int) -> None:
    found = fill_uniform(torch.full((n,), math.nan), generator=generator())
    assert torch.equal(found * 2**24, (found * 2**24).round())
    assert float(found.min()) >= 0
    assert float(found.max()) < 1


def test_uniform_numbers_fill_the_interval_evenly_and_without_a_pattern() -> None:
    n = 1 << 18
    g = generator(1)
    found = fill_uniform(torch.empty(n), generator=g)
    for every in (found, found[0::4], found[1::4], found[2::4], found[3::4]):  # a word gives four of them
        counts = torch.histc(every, 64, 0, 1)
        expected = len(every) / 64
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < 120  # 63 degrees of freedom: 2·10⁻⁵
    for distance in (1, 2, 3, 4):
        products = (found[distance:] - 0.5) * (found[:-distance] - 0.5)
        assert abs(float(products.mean())) < 4.5 / 12 / math.sqrt(n)
    # Shared within a call, another at the next one.
    lower = {float((fill_uniform(torch.empty(9), generator=g) * 2**16).frac().unique()) for _ in range(600)}
    assert len(lower) > 200
    assert lower <= {share / 256 for share in range(256)}


def test_the_draw_follows_its_generator() -> None:
    def drawn(seed: int) -> Tensor:
        model = two_layers()
        LearnableMask(prunable(model), initial=0.5).draw(generator(seed))
        return model[0].weight.detach() != 0

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_clip_brings_the_mask_back_into_the_unit_interval() -> None:
    mask = LearnableMask(prunable(nn.Linear(3, 1)), initial=0.5)
    with torch.no_grad():
        mask.mask.copy_(torch.tensor([-0.1, 0.3, 1.2]))
    mask.clip()
    assert mask.mask.tolist() == [0.0, pytest.approx(0.3), 1.0]


def test_a_shared_weight_is_masked_in_both_of_its_places() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    mask = LearnableMask(prunable(model), initial=0.5)
    assert mask.mask.shape == (9,)
    mask.draw(generator())
    assert torch.equal(model[0].weight, model[1].weight)
    assert (model[1].weight == 0).any()


def test_fixed_masks_zero_what_was_pruned_and_nothing_else() -> None:
    model = two_layers()
    before = [weight.detach().clone() for weight in prunable(model).values()]
    masks = {name: torch.rand(w.shape, generator=generator()) < 0.5 for name, w in prunable(model).items()}
    FixedMask(prunable(model), masks).apply()
    for weight, old, mask in zip(prunable(model).values(), before, masks.values(), strict=True):
        assert torch.equal(weight, old * mask)
        assert (weight[~mask] == 0).all()
        assert weight[mask].all()
    assert model[0].bias.detach().all()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=0, max_size=40))
def test_packed_masks_unpack_the_same(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-len(bits) // 8),)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_packed_masks_keep_their_shape() -> None:
    mask = torch.rand(3, 2, 3, 3, generator=generator()) < 0.3
    assert torch.equal(unpack(pack(mask), [3, 2, 3, 3]), mask)
    assert torch.equal(unpack(pack(mask.transpose(0, 1)), (2, 3, 3, 3)), mask.transpose(0, 1))
