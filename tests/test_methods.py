"""The methods inside the pipeline: counts, rewinding, moving masks; and all can be interrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunetune import data as datasets
from prunetune import models, pipeline
from prunetune.config.document import Document
from prunetune.config.reading import from_document
from prunetune.engine.seeds import seed_of
from prunetune.methods import dynamic
from prunetune.pipeline import PipelineResult
from prunetune.sparsity.masks import prunable
from prunetune.sparsity.rescaling import rescale
from prunetune.stages.plan import plan
from prunetune.store import Store

TOTAL = 64 * 16 + 16 * 16 + 16 * 10


def configured(tiny: dict[str, Any], **sections: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tiny)
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            tree[key].update(value)
        else:
            tree[key] = value
    return tree


def run(tree: dict[str, Any], folder: Path, stop_after: int | None = None) -> PipelineResult | None:
    """Run; with `stop_after`, close the pipeline after so many reports, as an interruption would."""
    steps = pipeline.run(from_document(Document("t", tree)), store=Store(str(folder)), checkpoint_interval=0)
    done = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: PipelineResult = end.value
            return result
        done += 1
        if done == stop_after:
            steps.close()
            return None


def finished(tree: dict[str, Any], folder: Path) -> PipelineResult:
    result = run(tree, folder)
    assert result is not None
    return result


PLAIN = {"epochs": 3, "optimizer": {"name": "adam", "lr": 3e-3}, "initializer": "kaiming", "mask": None}
METHODS: dict[str, dict[str, Any]] = {
    "random": {"pre_pruning": None, "pruning": {"criterion": "random"}},
    "snip, erk": {"pre_pruning": None, "pruning": {"criterion": "snip", "allocation": "erk"}},
    "grasp": {"pre_pruning": None, "pruning": {"criterion": "grasp"}},
    "synflow": {"pre_pruning": None, "pruning": {"criterion": "synflow"}},
    "taylor, uniform": {"pre_pruning": PLAIN, "pruning": {"criterion": "taylor", "allocation": "uniform"}},
    "lottery ticket": {"pre_pruning": PLAIN, "pruning": {"rewind": "init"}},
    "imp": {
        "pre_pruning": PLAIN,
        "pruning": {"schedule": {"name": "iterative", "rounds": 3, "epochs": 2}, "rewind": 1},
    },
    "iterative from scratch": {
        "pre_pruning": None,
        "pruning": {"schedule": {"name": "iterative", "rounds": 2, "epochs": 2}},
    },
    "gradual": {"pre_pruning": PLAIN, "pruning": {"schedule": {"name": "gradual", "every": 2}}},
    "rigl": {
        "pre_pruning": None,
        "pruning": {"criterion": "random", "allocation": "erk"},
        "post_pruning": {"dynamic": {"name": "rigl", "every": 3}},
    },
    "set": {
        "pre_pruning": None,
        "pruning": {"criterion": "random", "allocation": "erk"},
        "post_pruning": {"dynamic": {"name": "set", "every": 3}},
    },
    "lrsi": {
        "pre_pruning": None,
        "pruning": {"criterion": "snip"},
        "post_pruning": {"rescaled_init": {"iterations": 5}},
    },
    "mask with a target": {
        "pre_pruning": PLAIN | {"mask": {"method": "target", "initial": 0.9, "lambda1": 1e-6}},
    },
    "first and last dense": {"pre_pruning": PLAIN, "pruning": {"dense_layers": "last"}},
    "redraw": {"pre_pruning": None, "pruning": {"criterion": "snip", "sanity_check": "redraw"}},
    "shuffle": {"pre_pruning": None, "pruning": {"criterion": "snip", "sanity_check": "shuffle"}},
    "invert": {"pre_pruning": None, "pruning": {"criterion": "magnitude", "sanity_check": "invert"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_exact_count_and_pruned_weights_at_zero(tiny, tmp_path, name: str) -> None:
    result = finished(configured(tiny, **METHODS[name]), tmp_path)
    assert result.status in ("complete", "collapsed")
    assert sum(int(mask.sum()) for mask in result.masks.values()) == int(0.2 * TOTAL)
    for weight, mask in result.masks.items():
        assert not result.state[weight][~mask].any()
    assert 0 <= result.effective_density <= 0.2


@pytest.mark.parametrize("name", ["imp", "gradual", "rigl", "set", "lrsi", "mask with a target"])
def test_every_method_interrupted_anywhere_gives_the_same_bits(tiny, tmp_path, name: str) -> None:
    tree = configured(tiny, **METHODS[name])
    calm = finished(tree, tmp_path / "calm")
    for stop_after in range(1, calm.epochs_run):
        folder = tmp_path / str(stop_after)
        assert run(tree, folder, stop_after) is None
        again = finished(tree, folder)
        assert all(torch.equal(again.state[n], t) for n, t in calm.state.items()), stop_after
        assert all(torch.equal(again.masks[n], t) for n, t in calm.masks.items()), stop_after
        assert again.epochs_run + again.epochs_reused == calm.epochs_run


def initial_network(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = from_document(Document("t", tree))
    model = models.build(config.model, (1, 8, 8), 10, seed=seed_of(config.seed, "model"))
    models.initialize(model, config.pre_pruning.initializer, seed=seed_of(config.seed, "initializer"))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("rewind", "same"), [("init", True), ("none", False)])
def test_rewinding_goes_back_to_the_initial_values(tiny, tmp_path, rewind: str, same: bool) -> None:
    tree = configured(
        tiny,
        pre_pruning=PLAIN,
        pruning={"rewind": rewind},
        # A learning rate that changes nothing shows where training began.
        post_pruning={"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-30}},
    )
    result = finished(tree, tmp_path)
    start = initial_network(tree)
    kept = [torch.equal(result.state[n][m], start[n][m]) for n, m in result.masks.items()]
    assert all(kept) == same


def test_rewinding_to_an_epoch_takes_the_weights_of_that_epoch(tiny, tmp_path) -> None:
    frozen = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-30}}
    tree = configured(tiny, pre_pruning=PLAIN, pruning={"rewind": 2}, post_pruning=frozen)
    result = finished(tree, tmp_path / "a")
    # With a constant learning rate the first two epochs of three are those of a stage of two.
    short = configured(tiny, pre_pruning=PLAIN | {"epochs": 2}, densities=[1.0], post_pruning=frozen)
    early = finished(short, tmp_path / "b")
    for name, mask in result.masks.items():
        assert torch.equal(result.state[name][mask], early.state[name][mask])
    assert (result.epochs_run, result.epochs_reused) == (3 + 2 + 1, 0)


def test_a_redrawn_network_keeps_the_mask_and_not_the_weights(tiny, tmp_path) -> None:
    frozen = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-30}}
    base = {"pre_pruning": None, "post_pruning": frozen}
    plain = finished(configured(tiny, **base, pruning={"criterion": "snip"}), tmp_path)
    redrawn = finished(
        configured(tiny, **base, pruning={"criterion": "snip", "sanity_check": "redraw"}), tmp_path
    )
    for name, mask in plain.masks.items():
        assert torch.equal(redrawn.masks[name], mask)
        assert not mask.any() or not torch.equal(redrawn.state[name][mask], plain.state[name][mask])


@pytest.mark.parametrize("kind", ["rigl", "set"])
def test_moving_masks_keep_each_layers_count_at_every_update_and_do_move(
    tiny, tmp_path, monkeypatch, kind: str
) -> None:
    updates: list[dict[str, int]] = []
    real = dynamic._Update.__call__

    def update(self, time: float, step: int) -> None:
        before = {name: mask.clone() for name, mask in self._mask.masks.items()}
        real(self, time, step)
        for name, mask in self._mask.masks.items():
            assert int(mask.sum()) == int(before[name].sum())
            assert not self._mask.weights[name][mask == 0].any()
            grown = (mask > 0) & (before[name] == 0)
            assert not self._mask.weights[name][grown].any()  # new weights are 0
            state = self._optimizer.state[self._mask.weights[name]]
            assert not state["exp_avg"][grown].any()
            assert not state["exp_avg_sq"][grown].any()
        updates.append({name: int((mask != before[name]).sum()) for name, mask in self._mask.masks.items()})

    monkeypatch.setattr(dynamic._Update, "__call__", update)
    finished(configured(tiny, **METHODS[kind]), tmp_path)
    # 240 images in batches of 64: 3 steps an epoch, 12 in all; updates at steps 3 and 6, the end at step 9.
    assert len(updates) == 2
    assert all(sum(changed.values()) > 0 for changed in updates)


def test_a_rigl_update_takes_the_place_of_the_step(tiny, tmp_path, monkeypatch) -> None:
    steps = 0
    real = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    finished(configured(tiny, **METHODS["rigl"]), tmp_path / "rigl")
    rigl, steps = steps, 0
    finished(configured(tiny, **METHODS["set"]), tmp_path / "set")
    assert (rigl, steps) == (12 - 2, 12)


def test_a_mask_with_a_target_opens_the_share_that_is_asked_for(tiny, tmp_path) -> None:
    curve: list[dict[str, Any]] = []
    config = from_document(Document("t", configured(tiny, **METHODS["mask with a target"])))
    steps = pipeline.run(config, store=Store(str(tmp_path)))
    curve.extend(epoch.metrics for epoch in steps if epoch.stage == "pre_pruning")
    assert curve[-1]["mask_density"] == pytest.approx(0.2, abs=1e-3)
    assert curve[0]["mask_density"] > 0.2


def test_pre_pruning_is_shared_between_densities_unless_the_mask_has_a_target(tiny) -> None:
    def keys(density: float, **sections: Any):
        config = from_document(Document("t", configured(tiny, densities=[density], **sections)))
        return plan(config, datasets.load(config.data).digest).keys

    assert keys(0.1)["pre_pruning"] == keys(0.2)["pre_pruning"]
    target = METHODS["mask with a target"]
    assert keys(0.1, **target)["pre_pruning"] != keys(0.2, **target)["pre_pruning"]


def test_a_network_that_is_cut_through_is_reported(tiny, tmp_path, caplog) -> None:
    # The lowest magnitudes instead of the highest, at a few weights: no path is left.
    tree = configured(tiny, **METHODS["invert"], densities=[0.002])
    result = finished(tree, tmp_path)
    assert result.cut_layers == ["hidden.0.0.weight", "hidden.1.0.weight", "head.weight"]
    assert result.effective_density == 0.0
    assert "layer collapse" in caplog.text


def test_channels_and_two_of_four_reach_the_trained_network(tiny, tmp_path) -> None:
    channel = finished(
        configured(tiny, pre_pruning=PLAIN, pruning={"structure": "channel"}, densities=[0.5]), tmp_path
    )
    for name, mask in list(channel.masks.items())[:-1]:
        assert ((mask.sum(1) == 0) | (mask.sum(1) == mask.shape[1])).all(), name
    half = finished(
        configured(tiny, pre_pruning=PLAIN, pruning={"structure": "2:4"}, densities=[0.5]), tmp_path
    )
    for mask in half.masks.values():
        assert (mask.view(-1, 4).sum(1) == 2).all()


def test_rescaling_lowers_the_loss_after_a_step_and_leaves_pruned_weights_and_buffers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        net[1].weight.mul_(5)  # badly scaled
        net[1].weight[0] = 0
    x, y = torch.randn(64, 1, 2, 4), torch.randint(0, 4, (64,))

    def batches():
        while True:
            yield x, y

    def loss_after_step() -> float:
        clone = copy.deepcopy(net).train()
        weights = list(prunable(clone).values())
        gradients = torch.autograd.grad(nn.functional.cross_entropy(clone(x), y), weights)
        norm = torch.stack([(g**2).sum() for g in gradients]).sum().sqrt()
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.1 * gradient / norm
        return float(nn.functional.cross_entropy(clone(x), y))

    before, mean = loss_after_step(), net[2].running_mean.clone()
    scales = rescale(net, batches(), iterations=60, eta=0.1, gamma=1.0, lr=0.01, min_scale=0.01)
    assert loss_after_step() < before
    assert set(scales) == set(prunable(net))
    assert all(scale >= 0.01 for scale in scales.values())
    assert not net[1].weight[0].any()
    assert torch.equal(net[2].running_mean, mean)


@pytest.mark.parametrize("schedule", [{"end": 1.0}, {"end": 1.0, "every": 1000}, {"start": 0.9, "end": 0.99}])
def test_gradual_pruning_reaches_the_exact_count_whatever_its_end(tiny, tmp_path, schedule) -> None:
    tree = configured(tiny, pre_pruning=None, pruning={"schedule": {"name": "gradual", **schedule}})
    result = finished(tree, tmp_path)
    assert sum(int(mask.sum()) for mask in result.masks.values()) == int(0.2 * TOTAL)


@pytest.mark.parametrize("name", ["rigl", "set", "gradual"])
def test_a_moving_mask_over_weights_that_diverged_is_a_divergence(tiny, tmp_path, name: str) -> None:
    tree = configured(tiny, **METHODS[name])
    tree["pre_pruning"] = None
    tree["post_pruning"]["optimizer"] = {"name": "sgd", "lr": 1e30}
    assert finished(tree, tmp_path).status == "diverged"


@pytest.mark.parametrize("name", ["grasp", "lrsi"])
def test_second_derivatives_work_through_attention(tiny, tmp_path, name: str) -> None:
    vit = {"name": "vit_tiny", "dim": 12, "depth": 1, "heads": 2}
    tree = configured(tiny, **METHODS[name])
    tree["model"] = vit
    tree["post_pruning"]["epochs"] = 1
    assert finished(tree, tmp_path).status in ("complete", "collapsed")


def test_rescaling_leaves_a_network_that_is_cut_through_as_it_is() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        net[3].weight.zero_()
    before = net[1].weight.clone()
    batch = (torch.ones(2, 1, 2, 4), torch.tensor([0, 1]))
    rescale(net, iter([batch] * 20), iterations=10, eta=0.1, gamma=1.0, lr=0.01, min_scale=0.01)
    assert torch.equal(net[1].weight, before)
