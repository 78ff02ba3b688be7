"""Pruned layers without their empty rows and columns, against the whole layers they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from test_vectorized import changed, mask
from torch import Tensor, nn

from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.engine import compaction
from prunetune.engine.compaction import Compaction
from prunetune.engine.loop import Learner
from prunetune.methods.fixed import Pruned
from prunetune.sparsity.masks import FixedMask, prunable
from prunetune.sparsity.smoothing import softened
from prunetune.stages import stage
from prunetune.store import Store


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """It pays for layers of any size."""
    monkeypatch.setattr(compaction, "_PAYS", 0)


def sparse_mask(shape: torch.Size, *, seed: int = 0) -> Tensor:
    """A third of the rows and of the columns hold weights, some of their crossings none."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(shape)
    rows = torch.randperm(shape[0], generator=generator)[: shape[0] // 3]
    columns = torch.randperm(shape[1], generator=generator)[: shape[1] // 3]
    drawn = torch.rand(len(rows), len(columns), *shape[2:], generator=generator) < 0.7
    drawn[0], drawn[:, 0] = True, True
    found[rows[:, None], columns] = drawn.float()
    return found


def corner(shape: torch.Size) -> Tensor:
    """The first third of the rows and columns hold weights: what a layer gives, the next one takes."""
    found = torch.zeros(shape)
    found[: shape[0] // 3, : shape[1] // 3] = 1
    return found


def pruned(model: nn.Module, *, seed: int = 0) -> FixedMask:
    """Masks for all of a model's weights, applied."""
    weights = prunable(model)
    found = FixedMask(
        weights,
        {name: sparse_mask(weight.shape, seed=seed + i) for i, (name, weight) in enumerate(weights.items())},
    )
    found.apply()
    return found


def occupied(mask: Tensor) -> tuple[list[int], list[int]]:
    """The rows and columns that hold a weight."""
    rows, columns = mask.shape[:2]
    return [i for i in range(rows) if mask[i].any()], [j for j in range(columns) if mask[:, j].any()]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 9, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(81, 15),
        nn.ReLU(),
        nn.Linear(15, 6),
    ).double()


SHAPE = (3, 8, 8)


def batch(seed: int, size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(6, (size,), generator=generator)


def compacted(model: nn.Module, masks: FixedMask, shape: tuple[int, ...] = SHAPE) -> Compaction:
    return Compaction(model, masks, shape, batch_size=128)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear, no bias": (lambda: nn.Linear(12, 9, bias=False), (5, 12)),
    "linear on tokens": (lambda: nn.Linear(12, 9), (5, 4, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 3, padding=1), (5, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 9, 3), (5, 6, 8, 8)),
    "conv2d, no bias": (lambda: nn.Conv2d(6, 9, 3, bias=False), (5, 6, 8, 8)),
    "conv2d, strided": (lambda: nn.Conv2d(6, 9, 3, stride=2, padding=2, dilation=2), (5, 6, 8, 8)),
    "conv2d, same": (lambda: nn.Conv2d(6, 9, 3, padding="same"), (5, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 9, 2), (5, 6, 4, 4, 4)),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", LAYERS)
def test_a_small_layer_gives_what_the_whole_one_gives_and_the_same_gradients(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    masks = pruned(layer)
    whole_mask = masks.masks["weight"]
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    whole = layer(x)
    factor = torch.rand_like(whole)
    wanted = torch.autograd.grad((whole * factor).sum(), [x, *layer.parameters()])

    with compacted(layer, masks, shape[1:]).around([]):
        found = layer(x)
        (small,) = masks.weights.values()
        bias = [layer.bias] if layer.bias is not None else []
        gradients = torch.autograd.grad((found * factor).sum(), [x, small, *bias])

    assert small.shape[:2] == (3, whole_mask.shape[1] // 3)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(gradients[0], wanted[0])
    rows, columns = occupied(whole_mask)
    torch.testing.assert_close(gradients[1], wanted[1][rows][:, columns])
    if bias:
        torch.testing.assert_close(gradients[2], wanted[2])


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True
    ),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_small_layers_is_training_the_whole_network(name: str) -> None:
    def train(*, small: bool) -> tuple[nn.Module, torch.optim.Optimizer, FixedMask]:
        model = network()
        masks = pruned(model)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        plan = compacted(model, masks)
        assert plan.names == list(masks.masks)
        for epoch in range(3):  # the optimizer's state goes in and out
            with plan.around([optimizer]) if small else nullcontext():
                for step in range(4):
                    images, labels = batch(10 * epoch + step)
                    optimizer.zero_grad()
                    F.cross_entropy(model(images), labels).backward()
                    optimizer.step()
                    masks.apply()
        return model, optimizer, masks

    (wanted, steps, masks), (found, small_steps, _) = train(small=False), train(small=True)
    torch.testing.assert_close(found.state_dict(), wanted.state_dict())
    for (weight_name, weight), other in zip(wanted.named_parameters(), found.parameters(), strict=True):
        kept = masks.masks.get(weight_name, torch.ones_like(weight)).bool()
        assert steps.state[weight].keys() == small_steps.state[other].keys()
        for key, value in steps.state[weight].items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                torch.testing.assert_close(small_steps.state[other][key][kept], value[kept])
            else:
                assert small_steps.state[other][key] == value
    assert len(small_steps.state) == len(steps.state)


@pytest.mark.usefixtures("always")
def test_skips_and_soft_activations_act_on_small_layers_too() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 6)).double()
    masks = pruned(model)
    x = torch.rand(4, 12, dtype=torch.float64)
    plan = compacted(model, masks, (12,))
    assert plan.names == ["0.weight", "2.weight"]
    with softened(model, beta=1.5, gamma=0.5):
        wanted = model(x)
    with plan.around([]), softened(model, beta=1.5, gamma=0.5):
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.usefixtures("always")
def test_an_error_leaves_the_whole_network_with_what_was_trained() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, masks: FixedMask) -> None:
        images, labels = batch(0)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        masks.apply()

    model, wanted = network(), network()
    masks, wanted_masks = pruned(model), pruned(wanted)
    optimizer = OPTIMIZERS["momentum"](list(model.parameters()))
    other = OPTIMIZERS["momentum"](list(wanted.parameters()))
    step(wanted, other, wanted_masks)
    parameters, weights = list(model.parameters()), dict(masks.weights)
    plan = compacted(model, masks)
    assert len(plan.names) == 4

    def fail() -> None:
        with plan.around([optimizer]):
            step(model, optimizer, masks)
            raise KeyError("after a step")

    with pytest.raises(KeyError, match="after a step"):
        fail()
    assert not any("forward" in vars(module) for module in model.modules())
    group = optimizer.param_groups[0]["params"]
    assert [id(p) for p in group] == [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    assert all(masks.weights[name] is weight for name, weight in weights.items())
    torch.testing.assert_close(masks.masks, wanted_masks.masks)
    torch.testing.assert_close(model.state_dict(), wanted.state_dict())
    for name, weight in weights.items():
        kept = masks.masks[name].bool()
        found = optimizer.state[weight]["momentum_buffer"]
        torch.testing.assert_close(
            found[kept], other.state[wanted_masks.weights[name]]["momentum_buffer"][kept]
        )


@pytest.mark.usefixtures("always")
def test_a_layer_that_is_cut_gives_its_bias() -> None:
    layer = nn.Linear(12, 9)
    masks = FixedMask(prunable(layer), {"weight": torch.zeros(9, 12)})
    masks.apply()
    plan = compacted(layer, masks, (12,))
    assert plan.names == ["weight"]
    with plan.around([]):
        assert masks.weights["weight"].shape == (1, 1)
        torch.testing.assert_close(layer(torch.rand(2, 12)), layer.bias.expand(2, 9))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("empty", ["rows", "columns"])
def test_rows_or_columns_alone_may_be_empty(empty: str) -> None:
    layer = nn.Linear(12, 8)
    kept = torch.zeros(8, 12)
    if empty == "rows":
        kept[2:5] = 1
    else:
        kept[:, 3:7] = 1
    masks = FixedMask(prunable(layer), {"weight": kept})
    masks.apply()
    x = torch.rand(12)  # one image, in no batch
    wanted = layer(x)
    with compacted(layer, masks, (12,)).around([]):
        assert masks.weights["weight"].shape == ((3, 12) if empty == "rows" else (8, 4))
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.usefixtures("always")
def test_small_layers_compute_in_bf16_where_whole_ones_do() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    masks = pruned(layer)
    x = torch.rand(5, 12)
    plan = compacted(layer, masks, (12,))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
        with plan.around([]):
            found = layer(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


class Elsewhere(nn.Module):
    """The weight of a layer is used beside the layer's forward, or in its place."""

    def __init__(self, *, also: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.head = nn.Linear(12, 6)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.layer.weight)
        out: Tensor = self.head(self.layer(y) if self.also else y)
        return out


class Tied(nn.Module):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class Doubled(nn.Linear):
    """Computes something else than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DropConnect(nn.Module):
    """While training its weight is read by another than its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            out: Tensor = self.layer(x)
            return out
        return F.linear(x, F.dropout(self.layer.weight), self.layer.bias)


class Quantized(nn.Module):
    """Its layer computes with changed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: (8 * weight).round() / 8 for name, weight in self.layer.named_parameters()}
        out: Tensor = torch.func.functional_call(self.layer, weights, (x,))
        return out


class Bounded(nn.Module):
    """Its forward pass writes the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-10, 10)  # which changes nothing as yet
        out: Tensor = self.layer(x)
        return out


class Encoder(nn.Module):
    """PyTorch's fast path for validation reads the weights of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Particular(nn.Linear):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot be copied")


def clamped(layer: nn.Linear) -> nn.Module:
    """The layer, with its gradient clipped by a hook of the weight."""
    layer.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return layer


def observed(layer: nn.Linear) -> nn.Module:
    """The layer, with something that looks at each gradient."""
    layer.weight.register_post_accumulate_grad_hook(lambda weight: None)
    return layer


AS_THEY_ARE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "beside its layer": (lambda: Elsewhere(also=True), (12,)),
    "in its place": (lambda: Elsewhere(also=False), (12,)),
    "while training": (DropConnect, (12,)),
    "in validation": (Encoder, (4, 12)),
    "changed on the way": (Quantized, (12,)),
    "written": (Bounded, (12,)),
    "tied": (Tied, (12,)),
    "a subclass": (lambda: Doubled(12, 12), (12,)),
    "an uncopyable part": (lambda: nn.Sequential(nn.Linear(12, 12), Particular(12, 6)), (12,)),
    "frozen": (lambda: nn.Linear(12, 12).requires_grad_(requires_grad=False), (12,)),
    "a hook of the weight": (lambda: clamped(nn.Linear(12, 12)), (12,)),
    "a hook after its gradient": (lambda: observed(nn.Linear(12, 12)), (12,)),
    "groups": (lambda: nn.Conv2d(6, 12, 3, groups=2), (6, 8, 8)),
    "padding": (lambda: nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect"), (6, 8, 8)),
    "attention": (lambda: Attention(), (4, 12)),
}


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its `out_proj` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_what_a_small_layer_could_get_wrong_stays_as_it_is(name: str) -> None:
    make, shape = AS_THEY_ARE[name]
    torch.manual_seed(0)
    model = make()
    weights = prunable(model)
    masks = FixedMask(weights, {name: corner(weight.shape) for name, weight in weights.items()})
    masks.apply()
    assert masks.masks
    plan = compacted(model, masks, shape)
    assert plan.names == []
    model.eval()
    images = torch.rand(3, *shape)
    with torch.no_grad():
        wanted = model(images)
        with plan.around([]):
            assert torch.equal(model(images), wanted)


class Counting(nn.Module):
    """Counts and draws, whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.norm(F.dropout(self.layer(x)))
        return out


@pytest.mark.usefixtures("always")
def test_finding_out_leaves_no_trace() -> None:
    model = Counting()
    masks = pruned(model)
    model.norm.eval()  # as somebody may want it
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    assert compacted(model, masks, (12,)).names == ["layer.weight"]
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.norm.training) == (True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("rows", "columns", "batch_size", "pays"),
    [
        (100, 50, 128, True),  # half of the weights
        (100, 51, 128, False),
        (50, 50, 128, True),
        (10, 10, 27, True),  # 9,900 weights fewer × 27 images > 2¹⁸
        (10, 10, 26, False),
    ],
)
def test_layers_are_made_smaller_where_it_pays(
    rows: int, columns: int, batch_size: int, *, pays: bool
) -> None:
    layer = nn.Linear(100, 100)
    kept = torch.zeros(100, 100)
    kept[:rows, 7 : 7 + columns] = 1
    masks = FixedMask(prunable(layer), {"weight": kept})
    masks.apply()
    plan = Compaction(layer, masks, (100,), batch_size=batch_size)
    assert plan.names == (["weight"] if pays else [])


def trained(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[list[str]]]:
    """The result of a configuration, and which weights of each trained stage were made smaller."""
    made: list[list[str]] = []
    original = Compaction.__init__

    def noted(self: Compaction, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        made.append(self.names)

    with monkeypatch.context() as patch:
        patch.setattr(Compaction, "__init__", noted)
        return pipeline.run_pipeline(config, store=Store(str(folder))), made


@pytest.mark.usefixtures("always")
def test_a_configuration_gives_the_same_network_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        densities=[0.05],
        pre_pruning__mask=mask(lambda2=0.01),
        post_pruning__soft_skip={"gamma0": 0.3, "horizon": 0.7},
    )
    small, made = trained(config, tmp_path / "small", monkeypatch)
    assert made == [["hidden.0.0.weight"]]
    whole, made = trained(
        config.model_copy(update={"compact_layers": False}), tmp_path / "whole", monkeypatch
    )
    assert made == []
    torch.testing.assert_close(small.state, whole.state, rtol=1e-4, atol=1e-6)
    assert {name: m.equal(whole.masks[name]) for name, m in small.masks.items()} == dict.fromkeys(
        whole.masks, True
    )
    assert (small.nonzero, small.status) == (whole.nonzero, whole.status)


@pytest.mark.usefixtures("always")
def test_a_run_that_was_interrupted_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(densities=[0.05], pre_pruning=None, post_pruning__epochs=5)
    undisturbed, made = trained(config, tmp_path / "undisturbed", monkeypatch)
    assert made == [["hidden.0.0.weight"]]
    store = Store(str(tmp_path / "interrupted"))
    for epoch in range(1, 5):  # an epoch each, from the checkpoint of the one before
        run = pipeline.run(config, store=store, checkpoint_interval=0.0)
        reports = [next(run) for _ in range(epoch)]
        run.close()
        assert reports[-1].checkpointed
        assert not any(report.checkpointed for report in reports[:-1])
    resumed, _ = trained(config, tmp_path / "interrupted", monkeypatch)
    assert resumed.state.keys() == undisturbed.state.keys()
    assert all(tensor.equal(undisturbed.state[name]) for name, tensor in resumed.state.items())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [True]),
        ({"pruning__schedule": {"name": "iterative", "rounds": 2, "epochs": 1}}, [True, True]),
        ({"post_pruning__dynamic": {"name": "set", "every": 2}}, []),
        ({"pruning__schedule": {"name": "gradual"}}, []),
    ],
)
def test_layers_are_made_smaller_under_masks_that_rest(
    changes: dict[str, Any], wanted: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = trained(changed(densities=[0.0025], **changes), tmp_path, monkeypatch)
    assert [bool(names) for names in made] == wanted


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("device", "replicas", "wanted"), [("cpu", 1, ["1.weight"]), ("cpu", 2, None), ("cuda", 1, None)]
)
def test_replicas_and_gpus_train_the_layers_as_they_are(
    device: str, replicas: int, wanted: list[str] | None
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    learner = Learner(model, [], {}, lambda time: 1.0, Pruned(pruned(model)))
    place = SimpleNamespace(
        compact=True,
        data=SimpleNamespace(device=torch.device(device), shape=(3, 2, 2)),
        replicas=SimpleNamespace(size=replicas),
    )
    origin = SimpleNamespace(batch_size=8)
    found = stage._compaction(learner, cast("stage.Origin", origin), cast("stage.Place", place))
    assert (found.names if found is not None else None) == wanted
