"""Effective density against a brute-force walk over the graph, and at its ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunetune import models
from prunetune.config.schema import ModelConfig
from prunetune.sparsity.effective import effective_density, effective_weights
from prunetune.sparsity.masks import prunable


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    g = generator(seed)
    return {name: torch.rand(w.shape, generator=g) < density for name, w in prunable(model).items()}


def full_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model).items()}


def on_a_path(layers: list[np.ndarray]) -> list[np.ndarray]:
    """Which edges of a layered graph, one boolean (out, in) matrix per layer, lie on an input-output path."""
    forward = [np.ones(layers[0].shape[1], dtype=bool)]
    for layer in layers:
        forward.append((layer & forward[-1][None, :]).any(1))
    backward = [np.ones(layers[-1].shape[0], dtype=bool)]
    for layer in reversed(layers):
        backward.insert(0, (layer & backward[0][:, None]).any(0))
    return [layer & forward[i][None, :] & backward[i + 1][:, None] for i, layer in enumerate(layers)]


def test_the_reference_walk_by_hand() -> None:
    first = np.array([[1, 0], [0, 0], [0, 1]], dtype=bool)  # units 0 and 2 are reached
    second = np.array([[1, 1, 0], [0, 1, 0]], dtype=bool)  # units 0 and 1 are read
    found = on_a_path([first, second])
    assert found[0].tolist() == [[True, False], [False, False], [False, False]]
    assert found[1].tolist() == [[True, False, False], [False, False, False]]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_an_mlp_against_the_walk(density: float, seed: int) -> None:
    model = models.build(ModelConfig(name="mlp", hidden=[12, 8, 10]), (1, 3, 3), 4, seed=0)
    masks = random_masks(model, density, seed)
    expected = on_a_path([mask.numpy() for mask in masks.values()])
    found = effective_weights(model, masks, (1, 3, 3))
    assert list(found) == list(masks)
    for one, other in zip(found.values(), expected, strict=True):
        assert torch.equal(one, torch.from_numpy(other))
    share = sum(e.sum() for e in expected) / sum(e.size for e in expected)
    assert effective_density(model, masks, (1, 3, 3)) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_convolutions_against_the_walk_over_channels(seed: int) -> None:
    # Images are large enough that every tap of a kernel meets every channel, so channels are the units.
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    masks = random_masks(model, 0.08, seed)
    channels = [mask.flatten(2).any(2) if mask.dim() == 4 else mask for mask in masks.values()]
    expected = on_a_path([channel.numpy() for channel in channels])
    found = effective_weights(model, masks, (2, 8, 8))
    for mask, one, edges in zip(masks.values(), found.values(), expected, strict=True):
        whole = torch.from_numpy(edges)
        assert torch.equal(one, mask & (whole[:, :, None, None] if mask.dim() == 4 else whole))
    assert 0 < sum(int(one.sum()) for one in found.values()) < sum(int(m.sum()) for m in masks.values())


def test_a_residual_connection_is_a_path_of_its_own() -> None:
    model = models.build(ModelConfig(name="resnet20", width_multiplier=0.25), (3, 8, 8), 10, seed=0)
    masks = full_masks(model)
    masks["body.0.conv1.weight"][:] = False
    found = effective_weights(model, masks, (3, 8, 8))
    assert not found["body.0.conv2.weight"].any()  # only zeros come in
    assert found["stem.0.weight"].all()  # the shortcut goes past
    assert found["body.1.conv1.weight"].all()


@pytest.mark.parametrize("cut", ["hidden.0.0.weight", "hidden.1.0.weight", "head.weight"])
def test_a_layer_that_is_cut_through_leaves_nothing(cut: str) -> None:
    model = models.build(ModelConfig(name="mlp", hidden=[6, 6]), (1, 3, 3), 4, seed=0)
    masks = full_masks(model)
    masks[cut][:] = False
    assert effective_density(model, masks, (1, 3, 3)) == 0.0


def test_the_effective_density_is_never_above_the_density_and_does_not_depend_on_the_weights() -> None:
    model = models.build(ModelConfig(name="mlp", hidden=[20, 20]), (1, 4, 4), 4, seed=0)
    masks = random_masks(model, 0.1, 0)
    density = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    found = effective_density(model, masks, (1, 4, 4))
    assert 0 < found < density
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    assert effective_density(model, masks, (1, 4, 4)) == found
    assert effective_density(model, masks, (1, 4, 4), seed=7) == found


def test_the_model_is_left_as_it_was() -> None:
    model = models.build(ModelConfig(name="resnet20", width_multiplier=0.25), (3, 8, 8), 10, seed=0)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    effective_density(model, full_masks(model), (3, 8, 8))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (ModelConfig(name="mlp"), (1, 28, 28)),
        (ModelConfig(name="vgg16"), (3, 32, 32)),
        (ModelConfig(name="resnet20"), (3, 32, 32)),
        (ModelConfig(name="resnet18"), (3, 32, 32)),
        (ModelConfig(name="vit_tiny"), (3, 32, 32)),
    ],
)
def test_a_full_mask_is_wholly_effective_in_every_built_in_model(
    config: ModelConfig, shape: tuple[int, int, int]
) -> None:
    model = models.build(config, shape, 10, seed=0)
    assert effective_density(model, full_masks(model), shape) == 1.0


def test_a_deep_and_sparse_network_does_not_underflow() -> None:
    model = models.build(ModelConfig(name="mlp", hidden=[50] * 40), (1, 4, 4), 10, seed=0)
    masks = random_masks(model, 0.2, 0)
    expected = on_a_path([mask.numpy() for mask in masks.values()])
    found = effective_weights(model, masks, (1, 4, 4))
    assert sum(int(m.sum()) for m in found.values()) == sum(int(e.sum()) for e in expected)
    assert any(e.any() for e in expected)


def test_attention_projections_and_shared_weights_are_counted() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(2)
            z, _ = self.attention(z, z, z, need_weights=False)
            out: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(z)))).mean(1))
            return out

    model = Attends()
    masks = full_masks(model)
    assert len(masks) == 4
    assert effective_density(model, masks, (3, 2, 2)) == 1.0
    masks["head.weight"][:] = False
    assert effective_density(model, masks, (3, 2, 2)) == 0.0


def test_a_pool_that_rounds_up_keeps_its_output_shape() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(18, 2))
    assert model(torch.zeros(1, 1, 5, 5)).shape == (1, 2)
    assert effective_density(model, full_masks(model), (1, 5, 5)) == 1.0


def test_a_pool_in_two_places_is_a_mean_in_both() -> None:
    pool = nn.MaxPool2d(2)
    # On a 2×2 image each corner tap of the kernel serves one position, so a maximum would drop most.
    model = nn.Sequential(pool, nn.Conv2d(1, 1, 3, padding=1), pool, nn.Flatten(), nn.Linear(1, 1))
    assert effective_density(model, full_masks(model), (1, 4, 4)) == 1.0
