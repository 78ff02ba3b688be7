"""Scores against hand-computed ones on a two-layer network, and what the literature states of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune import models
from prunetune.config.schema import ModelConfig
from prunetune.registry import CRITERIA
from prunetune.sparsity import criteria
from prunetune.sparsity.allocation import unstructured
from prunetune.sparsity.criteria import Scene, scoring_rounds
from prunetune.sparsity.masks import FixedMask, prunable


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_layers() -> nn.Sequential:
    """Flatten, W1 = [[1, −2], [3, 0.5]], ReLU, W2 = [[1, −1], [2, 1]]; no biases."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        net[3].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
    return net


def scene(net: nn.Module | None = None, x: Tensor | None = None) -> Scene:
    # x = (2, 0.5): z = W1 x = (1, 6.25), both positive, so ReLU passes them; logits = (−5.25, 8.25).
    x = torch.tensor([2.0, 0.5]).view(1, 1, 1, 2) if x is None else x
    return Scene(
        net if net is not None else two_layers(), x, torch.zeros(len(x), dtype=torch.long), generator()
    )


def hand_gradients() -> tuple[Tensor, Tensor]:
    """Of the cross-entropy at label 0: δ = softmax − onehot; ∂W2 = δ zᵀ, ∂W1 = (W2ᵀ δ) xᵀ."""
    p = 1 / (1 + torch.exp(torch.tensor(-5.25 - 8.25)))
    delta = torch.stack([-p, p])
    z, x = torch.tensor([1.0, 6.25]), torch.tensor([2.0, 0.5])
    back = torch.tensor([[1.0, 2.0], [-1.0, 1.0]]) @ delta
    return torch.outer(back, x), torch.outer(delta, z)


def close(scores: dict[str, Tensor], first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(scores["1.weight"].float(), first, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(scores["3.weight"].float(), second, rtol=tolerance, atol=1e-7)


def test_magnitude_is_the_absolute_value_without_a_graph() -> None:
    scores = criteria.magnitude(scene())
    close(scores, torch.tensor([[1.0, 2.0], [3.0, 0.5]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
    assert not any(score.requires_grad for score in scores.values())


def test_taylor_and_snip_are_the_absolute_gradient_times_the_weight() -> None:
    s = scene()
    g1, g2 = hand_gradients()
    w1, w2 = (weight.detach() for weight in s.weights.values())
    first, second = (g1 * w1).abs(), (g2 * w2).abs()
    close(criteria.taylor(s), first, second)
    total = first.sum() + second.sum()
    close(criteria.snip(s), first / total, second / total)


def test_snip_does_not_depend_on_the_scale_of_the_loss(monkeypatch) -> None:
    before = criteria.snip(scene())
    real = F.cross_entropy
    monkeypatch.setattr(criteria.F, "cross_entropy", lambda *args: 1000 * real(*args))
    after = criteria.snip(scene())
    assert not torch.allclose(criteria.taylor(scene())["1.weight"], after["1.weight"])
    close(after, before["1.weight"], before["3.weight"])


def test_synflow_is_the_flow_of_absolute_weights_through_each_weight() -> None:
    # z = |W1| 1 = (3, 3.5); column sums of |W2|: (3, 2).
    # Through W1[i, j] flows |w|·colsum_i, through W2[k, i] |w|·z_i.
    expected_first = torch.tensor([[1.0 * 3, 2.0 * 3], [3.0 * 2, 0.5 * 2]])
    expected_second = torch.tensor([[1.0 * 3, 1.0 * 3.5], [2.0 * 3, 1.0 * 3.5]])
    s = scene()
    before = [weight.detach().clone() for weight in s.weights.values()]
    close(criteria.synflow(s), expected_first, expected_second)
    # Flow is conserved from layer to layer, and the model has its signs back.
    assert expected_first.sum() == expected_second.sum() == 16.0
    assert all(torch.equal(a, b) for a, b in zip(before, s.weights.values(), strict=True))


def test_synflow_does_not_overflow_where_float32_would() -> None:
    net = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64, bias=False) for _ in range(30)])
    with torch.no_grad():
        for weight in prunable(net).values():
            weight.fill_(1.0)  # 64^30 = 1.5e54
    scores = criteria.synflow(scene(net, torch.ones(1, 1, 8, 8)))
    assert all(torch.isfinite(score).all() for score in scores.values())
    assert not torch.isfinite(scores["1.weight"].float()).all()


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient() -> None:
    s = scene(x=torch.tensor([[2.0, 0.5], [1.0, 1.5]]).view(2, 1, 1, 2))
    weights = list(s.weights.values())
    sizes = [w.numel() for w in weights]

    def loss(flat: Tensor) -> Tensor:
        first, second = (p.view(2, 2) for p in flat.split(sizes))
        logits = torch.relu(s.inputs.flatten(1) @ first.T) @ second.T / 200
        return F.cross_entropy(logits, s.targets)

    theta = torch.cat([w.detach().flatten() for w in weights])
    gradient = torch.autograd.functional.jacobian(loss, theta)
    hessian = torch.autograd.functional.hessian(loss, theta)
    first, second = (theta * (hessian @ gradient)).split(sizes)
    scores = criteria.grasp(s)
    close(scores, first.view(2, 2), second.view(2, 2), tolerance=1e-3)
    assert any(bool((score < 0).any()) for score in scores.values())  # signed, not absolute


def test_grasp_keeps_what_carries_the_gradients_norm() -> None:
    """Its sign: removing w changes ½‖g‖² by −w·(Hg), to first order; so the highest w·(Hg) must stay."""
    s = scene(x=torch.randn(20, 1, 1, 2, generator=generator()))

    def norm(model: nn.Module) -> float:
        out = F.cross_entropy(model(s.inputs) / 200, s.targets)
        return float(sum((g**2).sum() for g in torch.autograd.grad(out, list(prunable(model).values()))))

    scores = criteria.grasp(s)
    full = norm(s.model)
    shrink = 1e-3
    for name, score in scores.items():
        for index in range(score.numel()):
            smaller = two_layers()
            with torch.no_grad():
                prunable(smaller)[name].view(-1)[index] *= 1 - shrink
            change = (norm(smaller) - full) / 2 / shrink
            assert change == pytest.approx(-float(score.flatten()[index]), rel=0.1, abs=1e-9)


def test_random_is_uniform_and_from_the_generator() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(200, 100, bias=False))
    x = torch.zeros(1, 1, 1, 200)
    one = criteria.random(Scene(net, x, torch.zeros(1).long(), generator(1)))["1.weight"]
    same = criteria.random(Scene(net, x, torch.zeros(1).long(), generator(1)))["1.weight"]
    other = criteria.random(Scene(net, x, torch.zeros(1).long(), generator(2)))["1.weight"]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < one.max() < 1
    assert abs(float(one.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("name", CRITERIA.names)
def test_no_criterion_changes_the_weights(name: str) -> None:
    s = scene()
    before = [weight.detach().clone() for weight in s.weights.values()]
    scores = CRITERIA.find(name)(s)
    assert all(torch.equal(a, b) for a, b in zip(before, s.weights.values(), strict=True))
    assert {n: score.shape for n, score in scores.items()} == {n: w.shape for n, w in s.weights.items()}


def collapsed_layers(criterion: str, rounds: int, density: float) -> int:
    """How many layers of a deep narrow net keep nothing."""
    shape, classes = (1, 8, 8), 4
    net = models.build(ModelConfig(name="mlp", hidden=[64, 32, 16, 32, 64, 16]), shape, classes, seed=0)
    images = torch.randn(40, *shape, generator=generator())
    labels = torch.arange(40) % classes
    masks, total = None, sum(weight.numel() for weight in prunable(net).values())
    for number in range(1, rounds + 1):
        if masks is not None:
            FixedMask(prunable(net), masks).apply()
        scores = CRITERIA.find(criterion)(Scene(net, images, labels, generator()))
        count = max(int(total * density ** (number / rounds)), int(total * density))
        masks = unstructured(scores, count, alive=masks, generator=generator())
    assert masks is not None
    return sum(not mask.any() for mask in masks.values())


def test_synflow_in_100_rounds_keeps_every_layer_where_snip_in_one_does_not() -> None:
    assert scoring_rounds(criteria.synflow) == 100
    assert scoring_rounds(criteria.snip) == 1
    densities = [0.1, 0.05, 0.02, 0.01, 0.005]
    snip = [collapsed_layers("snip", 1, density) for density in densities]
    assert max(snip) > 0  # found: there is a density at which SNIP cuts a layer
    assert [collapsed_layers("synflow", 100, density) for density in densities] == [0] * len(densities)
