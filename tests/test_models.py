"""The built-in networks' sizes and shapes, a user's own by import path, and what `build` refuses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from prunetune import models
from prunetune.config.schema import InitializerConfig, ModelConfig
from prunetune.errors import UserError
from prunetune.registry import MODELS
from prunetune.sparsity.initializers import zero_matrix, zero_paper_matrix
from prunetune.sparsity.masks import prunable

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
MLP = ModelConfig(name="mlp", hidden=[6, 5])


def weights_in(model: nn.Module) -> int:
    return sum(weight.numel() for weight in prunable(model).values())


@pytest.mark.parametrize(
    ("config", "shape", "weights", "blocks"),
    [
        (ModelConfig(name="mlp"), MNIST, 119_400, 5),
        (ModelConfig(name="vgg16"), CIFAR, 14_715_584, 13),
        (ModelConfig(name="resnet20"), CIFAR, 268_336, 9),
        (ModelConfig(name="resnet18"), CIFAR, 11_164_352, 8),
        (ModelConfig(name="vit_tiny"), CIFAR, 3_992_448, 9),
    ],
)
def test_each_model_has_its_published_size_its_output_and_its_blocks(
    config: ModelConfig, shape: tuple[int, int, int], weights: int, blocks: int
) -> None:
    model = models.build(config, shape, 10, seed=0)
    assert weights_in(model) == weights
    assert len(model.blocks()) == blocks  # type: ignore[operator]
    assert model.training
    with torch.no_grad():
        assert model(torch.zeros(3, *shape)).shape == (3, 10)


@pytest.mark.parametrize(
    "config",
    [
        MLP,
        ModelConfig(name="vgg16", width_multiplier=0.1),
        ModelConfig(name="resnet20", width_multiplier=0.25),
        ModelConfig(name="resnet18", width_multiplier=0.05),
        ModelConfig(name="vit_tiny", dim=12, depth=2),
    ],
)
def test_models_follow_the_seed_alone_and_the_shape_of_the_data(config: ModelConfig) -> None:
    one = models.build(config, CIFAR, 7, seed=3)
    before = torch.random.get_rng_state()
    torch.manual_seed(99)  # the caller's own state plays no part …
    same = models.build(config, CIFAR, 7, seed=3)
    other = models.build(config, CIFAR, 7, seed=4)
    torch.random.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        assert one(torch.randn(2, *CIFAR)).shape == (2, 7)
    assert models.build(config, (1, 32, 32), 7, seed=3)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_build_leaves_the_callers_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    models.build(MLP, MNIST, 10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_width_multiplier_scales_channels_and_keeps_at_least_one() -> None:
    half = models.build(ModelConfig(name="vgg16", width_multiplier=0.5), CIFAR, 10, seed=0)
    assert half.features[0][0].weight.shape == (32, 3, 3, 3)  # type: ignore[index, union-attr]
    assert half.features[-1][0].weight.shape == (256, 256, 3, 3)  # type: ignore[index, union-attr]
    least = models.build(ModelConfig(name="resnet20", width_multiplier=1e-6), CIFAR, 10, seed=0)
    assert least.head.weight.shape == (10, 1)


def test_mlp_weights_have_hes_spread_and_no_bias() -> None:
    model = models.build(ModelConfig(name="mlp", hidden=[400]), (1, 20, 20), 10, seed=0)
    first = model.hidden[0][0]  # type: ignore[index]
    assert float(first.weight.detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert not first.bias.any()
    assert not model.head.bias.any()


def test_initialize_draws_the_prunable_weights_anew_with_zero_biases() -> None:
    model = models.build(MLP, (1, 2, 2), 8, seed=0)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 9.0)
    models.initialize(model, InitializerConfig(name="zero"), seed=0)
    assert torch.equal(model.hidden[0][0].weight, zero_matrix(6, 4))  # type: ignore[index]
    assert torch.equal(model.head.weight, zero_matrix(8, 5))
    assert not any(bias.any() for name, bias in model.named_parameters() if name.endswith("bias"))
    models.initialize(model, InitializerConfig(name="zero_paper"), seed=0)
    assert torch.equal(model.hidden[1][0].weight, zero_paper_matrix(5, 6))  # type: ignore[index]


def test_initialize_follows_its_seed_and_default_changes_nothing() -> None:
    def weights(initializer: str, seed: int) -> list[torch.Tensor]:
        model = models.build(MLP, MNIST, 10, seed=0)
        models.initialize(model, InitializerConfig(name=initializer), seed=seed)
        return [parameter.detach() for parameter in model.parameters()]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(weights("kaiming", 1), weights("kaiming", 1))
    assert not same(weights("kaiming", 1), weights("kaiming", 2))
    assert same(weights("default", 1), weights("default", 2))
    assert not same(weights("default", 1), weights("kaiming", 1))


def test_initialize_leaves_norms_and_positions_alone() -> None:
    model = models.build(ModelConfig(name="vit_tiny", dim=6, depth=1), (3, 8, 8), 4, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    models.initialize(model, InitializerConfig(name="kaiming"), seed=0)
    for name, parameter in model.named_parameters():
        kept = "norm" in name or name == "positions"
        assert torch.equal(parameter, before[name]) or not kept
    assert not torch.equal(model.head.weight, before["head.weight"])


MODULE = """
import functools
import torch
from pydantic import ValidationError
from torch import nn

class Net(nn.Module):
    def __init__(self, width, input_shape=None, num_classes=None):
        super().__init__()
        self.seen = (width, input_shape, num_classes)
        channels, height, side = input_shape
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * side, width), nn.ReLU(),
                                   nn.Linear(width, num_classes))
    def forward(self, x):
        return self.layer(x)

class Unnamed(nn.Module):
    def __init__(self, outputs=10):
        super().__init__()
        self.layer = nn.Linear(16, outputs)
    def forward(self, x):
        return self.layer(x.flatten(1))

class Holder:
    Inner = Unnamed

def factory(num_classes):
    return Unnamed(num_classes)

partial = functools.partial(Unnamed, outputs=10)

class Fails(nn.Module):
    def __init__(self):
        raise RuntimeError("no such luck")

class NoWeights(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]

class TwoOutputs(Unnamed):
    def forward(self, x):
        return self.layer(x.flatten(1)), x

def not_a_module():
    return 7

value = "text"
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `users_net` that can be imported during the test."""
    path = tmp_path / "users_net.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("users_net", None)


def build_users(attribute: str, shape: tuple[int, int, int] = (1, 4, 4), **arguments: Any) -> nn.Module:
    config = ModelConfig.model_validate({"name": f"users_net:{attribute}", **arguments})
    return models.build(config, shape, 10, seed=0)


def test_a_users_module_gets_its_keys_and_the_datas_shape_where_it_names_them(users: Path) -> None:
    model = build_users("Net", width=3)
    assert model.seen == (3, (1, 4, 4), 10)
    assert weights_in(model) == 16 * 3 + 3 * 10


@pytest.mark.parametrize("attribute", ["Unnamed", "Holder.Inner", "factory", "partial"])
def test_any_callable_that_makes_a_module_will_do(users: Path, attribute: str) -> None:
    assert weights_in(build_users(attribute)) == 160


def test_a_users_module_is_drawn_from_the_seed(users: Path) -> None:
    assert torch.equal(build_users("Unnamed").layer.weight, build_users("Unnamed").layer.weight)


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    config = ModelConfig(name="cwd_net:Unnamed")
    assert weights_in(models.build(config, (1, 4, 4), 10, seed=0)) == 160
    sys.modules.pop("cwd_net")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("users_net:Missing", "cannot be imported: AttributeError"),
        ("users_nett:Net", "cannot be imported: ModuleNotFoundError"),
        ("users_net:Net", "width\n  Field required"),
        ("users_net:Fails", "raised RuntimeError: no such luck"),
        ("users_net:NoWeights", "has no Linear, Conv or attention weight to prune"),
        ("users_net:not_a_module", "must make a torch.nn.Module, made int"),
        ("users_net:value", "is no function and no class"),
        ("users_net:TwoOutputs", "gives outputs|gives a tuple|must give"),
        ("math:sqrt", "raised TypeError"),
    ],
)
def test_a_users_module_that_does_not_work_is_a_users_error(users: Path, name: str, words: str) -> None:
    with pytest.raises((UserError, ValidationError), match=words):
        models.build(ModelConfig(name=name), (1, 4, 4), 10, seed=0)


def test_a_users_module_with_an_error_in_its_file_is_a_users_error(users: Path) -> None:
    users.write_text("def broken(:\n")
    importlib.invalidate_caches()
    with pytest.raises(ValidationError, match="cannot be imported: SyntaxError"):
        models.build(ModelConfig(name="users_net:Net"), (1, 4, 4), 10, seed=0)


def test_a_users_module_that_does_not_fit_the_data_is_a_users_error(users: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot take images of shape \(3, 4, 4\) \(channels, height, width\)"
    ):
        build_users("Unnamed", (3, 4, 4))
    with pytest.raises(UserError, match=r"gives outputs of shape \(7,\); the data has 10 classes"):
        build_users("Unnamed", outputs=7)


def test_the_source_of_a_users_module_has_a_digest_that_follows_what_is_loaded(users: Path) -> None:
    config = ModelConfig(name="users_net:Unnamed")
    before = config.code
    assert before is not None
    assert ModelConfig(name="users_net:factory").code == before
    users.write_text(MODULE + "# changed\n")
    assert config.code == before  # the old code is what runs
    importlib.reload(sys.modules["users_net"])
    assert config.code != before
    assert MLP.code is None


@pytest.mark.parametrize("name", ["math:sqrt", "users_net:partial"])
def test_the_digest_of_what_has_no_source_is_no_traceback(users: Path, name: str) -> None:
    assert MODELS.code(name) is not None


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        (ModelConfig(name="mlp", in_channels=3), MNIST, r"model\.in_channels = 3: the data's images have 1"),
        (
            ModelConfig(name="mlp", num_classes=100),
            MNIST,
            r"model\.num_classes = 100: the data has 10 classes",
        ),
        (ModelConfig(name="vgg16"), MNIST, r"model\.name = 'vgg16': .*needs 32×32 or more; got 28×28"),
        (
            ModelConfig(name="vit_tiny", patch=5),
            CIFAR,
            r"model\.name = 'vit_tiny': patch = 5: must divide .*32×32",
        ),
        (
            ModelConfig(name="vit_tiny", dim=10),
            CIFAR,
            r"model\.name = 'vit_tiny': heads = 3: must divide dim = 10",
        ),
    ],
)
def test_a_model_that_cannot_be_made_for_the_data_names_the_key(
    config: ModelConfig, shape: tuple[int, int, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        models.build(config, shape, 10, seed=0)


def test_classes_and_channels_may_be_written_where_they_agree() -> None:
    config = ModelConfig(name="mlp", hidden=[3], num_classes=10, in_channels=1)
    assert weights_in(models.build(config, (1, 2, 2), 10, seed=0)) == 4 * 3 + 3 * 10
