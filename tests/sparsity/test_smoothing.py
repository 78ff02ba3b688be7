"""Soft activations and skips, and invariant 4: after them the very same model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prunetune import models
from prunetune.config.schema import ModelConfig
from prunetune.sparsity.smoothing import PSwish, pswish, relus, resized, skip_blocks, softened


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pswish_is_half_the_identity_at_zero_and_relu_at_infinity() -> None:
    t = torch.linspace(-3, 3, 61)
    assert torch.equal(pswish(t, 0.0), t / 2)
    torch.testing.assert_close(pswish(t, 1e4), torch.relu(t), atol=1e-4, rtol=0)
    assert torch.equal(PSwish(2.0)(t), pswish(t, 2.0))


def test_pswish_by_hand() -> None:
    # 1·σ(1) = 0.731059, −1·σ(−1) = −0.268941; 1·σ(2) = 0.880797
    values = pswish(torch.tensor([1.0, -1.0, 0.0]), 1.0)
    torch.testing.assert_close(values, torch.tensor([0.731059, -0.268941, 0.0]), atol=1e-6, rtol=0)
    assert pswish(torch.tensor(1.0), 2.0).item() == pytest.approx(0.880797, abs=1e-6)


def test_resized_leaves_the_same_shape_alone() -> None:
    z = torch.randn(2, 3, generator=generator())
    assert resized(z, z.shape) is z


def test_resized_interpolates_features_by_hand() -> None:
    z = torch.tensor([[0.0, 4.0]])
    # align_corners=False: output i lies at (i + ½)·2/4 − ½ = −¼, ¼, ¾, 1¼; clamped at the ends
    assert resized(z, torch.Size((1, 4))).tolist() == [[0.0, 1.0, 3.0, 4.0]]
    assert resized(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), torch.Size((1, 2))).tolist() == [[2.0, 6.0]]


def test_resized_interpolates_each_dimension_that_differs() -> None:
    z = torch.tensor([[[1.0], [3.0]]])  # (B=1, 2 rows, 1 column)
    assert resized(z, torch.Size((1, 1, 1))).tolist() == [[[2.0]]]
    assert resized(z, torch.Size((1, 2, 2))).tolist() == [[[1.0, 1.0], [3.0, 3.0]]]
    image = torch.randn(2, 4, 8, 8, generator=generator())
    smaller = resized(image, torch.Size((2, 4, 4, 4)))
    torch.testing.assert_close(smaller, nn.functional.avg_pool2d(image, 2))  # halving is a mean of 2×2
    fewer = resized(image, torch.Size((2, 2, 8, 8)))
    torch.testing.assert_close(fewer, (image[:, ::2] + image[:, 1::2]) / 2)  # channels like height and width


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1, 8, 8), (2, 16)), ((2, 16), (2, 1, 4, 4)), ((2, 3, 4, 4, 4), (2, 5, 4, 4, 4)), ((2, 7), (2, 5))],
)
def test_resized_gives_the_shape_that_was_asked_for(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    out = resized(torch.ones(before), torch.Size(after))
    assert out.shape == after
    torch.testing.assert_close(out, torch.ones(after))  # interpolation keeps a constant


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU()),
        nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)),
        nn.Linear(4, 3),
    )


def snapshot(model: nn.Module) -> list[tuple[str, int, int, int]]:
    """Every module by name and identity, and its hooks."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_softened_swaps_every_relu_within_and_restores_the_very_same_modules() -> None:
    model = toy()
    before = snapshot(model)
    keys = list(model.state_dict())
    with softened(model, beta=1.0, gamma=0.5):
        assert relus(model) == []
        assert sum(isinstance(m, PSwish) for m in model.modules()) == 2
        assert len(model[0]._forward_hooks) == 1
        assert list(model.state_dict()) == keys
    assert snapshot(model) == before


def test_softened_restores_the_model_after_an_exception_too() -> None:
    model = toy()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), softened(model, beta=1.0, gamma=0.5):
        model(torch.zeros(1, 5))
    assert snapshot(model) == before
    with pytest.raises(KeyboardInterrupt), softened(model, beta=1.0, gamma=0.5):
        raise KeyboardInterrupt
    assert snapshot(model) == before


@pytest.mark.parametrize(("beta", "gamma"), [(None, 0.0), (2.0, 0.0), (None, 0.5)])
def test_each_smoothing_is_switched_on_by_itself(beta: float | None, gamma: float) -> None:
    model = toy()
    with softened(model, beta=beta, gamma=gamma):
        assert (relus(model) == []) is (beta is not None)
        assert any(module._forward_hooks for module in model.modules()) is (gamma != 0)


def test_soft_activations_by_hand() -> None:
    model = toy()
    x = torch.randn(5, 4, generator=generator())
    with torch.no_grad(), softened(model, beta=3.0, gamma=0.0):
        out = model(x)
    hidden = pswish(
        pswish(x @ model[0][0].weight.T + model[0][0].bias, 3.0) @ model[1][0].weight.T + model[1][0].bias,
        3.0,
    )
    torch.testing.assert_close(out, hidden @ model[2].weight.T + model[2].bias)


def test_skips_by_hand() -> None:
    model = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(4, 4, bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        model[1].weight.zero_()
        model[2].weight.copy_(torch.eye(4))
    x = torch.tensor([[1.0, 3.0]])
    with torch.no_grad(), softened(model, beta=None, gamma=0.5):
        out = model(x)
    # Block 1: (6, 1) + ½ (1, 3) = (6.5, 2.5). Block 2: 0 + ½ of that stretched to four values
    # (6.5, 5.5, 3.5, 2.5). The last layer gives the logits and gets no skip.
    assert out.tolist() == [[3.25, 2.75, 1.75, 1.25]]


def test_a_skip_around_a_residual_block_adds_the_resized_input() -> None:
    model = models.build(ModelConfig(name="resnet20", width_multiplier=0.25), (3, 8, 8), 10, seed=0).eval()
    block = model.blocks()[3]  # halves the image, doubles the channels
    x = torch.randn(2, 4, 8, 8, generator=generator())
    with torch.no_grad():
        plain = block(x)
        with softened(model, beta=None, gamma=0.25):
            skipped = block(x)
    torch.testing.assert_close(skipped, plain + 0.25 * resized(x, plain.shape))
    assert plain.shape == (2, 8, 4, 4)


def test_softening_is_part_of_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.constant_(model[0].bias, -100.0)  # dead under ReLU
    x = torch.ones(1, 2)
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    assert not model[0].weight.grad.any()
    with softened(model, beta=0.01, gamma=0.0):
        model(x).sum().backward()
    assert model[0].weight.grad.any()


def test_a_relu_module_in_two_places_is_swapped_in_both_and_restored() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    with softened(model, beta=1.0, gamma=0.0):
        assert not any(isinstance(module, nn.ReLU) for module in model)
    assert model[1] is act
    assert model[3] is act


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: models.build(ModelConfig(name="mlp", hidden=[8, 8, 8]), (1, 4, 4), 3, seed=0), 3),
        (lambda: models.build(ModelConfig(name="vgg16", width_multiplier=0.05), (3, 32, 32), 10, seed=0), 13),
        (lambda: models.build(ModelConfig(name="resnet20"), (3, 8, 8), 10, seed=0), 9),
        (lambda: models.build(ModelConfig(name="resnet18", width_multiplier=0.1), (3, 8, 8), 10, seed=0), 8),
        (lambda: models.build(ModelConfig(name="vit_tiny", dim=6), (3, 8, 8), 10, seed=0), 9),
        (toy, 2),  # declares no blocks: its children with weights, without the last
    ],
)
def test_skip_blocks_and_a_smoothed_pass_through_each_model(
    build: Callable[[], nn.Module], count: int
) -> None:
    model = build()
    assert len(skip_blocks(model)) == count
    assert relus(model)
    assert skip_blocks(model)[-1] is not list(model.children())[-1]


def test_declared_blocks_may_be_a_list_of_modules() -> None:
    class Usual(nn.Module):  # as most published transformers have it
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            out: Tensor = self.head(x)
            return out

    model = Usual()
    assert skip_blocks(model)
    x = torch.randn(2, 2, generator=generator())
    with torch.no_grad():
        plain = model(x)
        with softened(model, beta=None, gamma=0.5):
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)
