"""Replicas against one process: the same masks, weights and measurements, up to the order of additions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.engine import loop as training
from prunetune.engine.replicas import ALONE, Replicas, checksum
from prunetune.engine.seeds import seed_of
from prunetune.errors import UserError, WorkError
from prunetune.store import Store

Tree = dict[str, Any]

EPOCHS = 7
"""Of the `tiny` configuration, over both stages."""


def variants(tiny: Tree) -> dict[str, Tree]:
    """A configuration for each thing that could differ between replicas."""
    target = copy.deepcopy(tiny)
    target["pre_pruning"]["mask"] = {"lambda1": 1e-6, "method": "target", "initial": 0.9}
    target["pruning"] = {"criterion": "snip"}
    path = copy.deepcopy(tiny)
    path["pre_pruning"]["mask"] = {"method": "path", "lowest": 0.1}
    path["pruning"] = {"from_epoch": "best"}
    rigl = copy.deepcopy(tiny)
    rigl["pre_pruning"] = None
    rigl["pruning"] = {"criterion": "random", "allocation": "erk"}
    rigl["post_pruning"] |= {
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "dynamic": {"name": "rigl", "every": 3},
        "rescaled_init": {"iterations": 3},
    }
    gradual = copy.deepcopy(tiny)
    gradual["pre_pruning"]["mask"] = None
    gradual["pruning"] = {"schedule": {"name": "gradual", "start": 0.1, "end": 0.7, "every": 2}}
    rounds = copy.deepcopy(tiny)
    rounds["pruning"] = {"schedule": {"name": "iterative", "rounds": 2, "epochs": 1}, "rewind": 1}
    images = copy.deepcopy(tiny)
    images["data"] |= {"augmentation": {"crop_padding": 1, "flip": True}, "batch_size": 50}
    images["model"] = {"name": "resnet20", "width_multiplier": 0.25}  # batch normalization everywhere
    # Adam's first steps are the gradients' signs, and those near zero would turn a rounding into a step.
    sgd = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    images["pre_pruning"] |= {"mask": None, "epochs": 1, "optimizer": sgd}
    images["post_pruning"] |= {"epochs": 1, "optimizer": sgd, "soft_activation": None, "soft_skip": None}
    return {
        "mask": tiny,
        "target": target,
        "path": path,
        "rigl": rigl,
        "gradual": gradual,
        "rounds": rounds,
        "images": images,
    }


def train(tree: Tree, folder: Path, replicas: Replicas = ALONE, stop: int | None = None) -> Tree:
    """What a run gives, and its curve; with `stop` it is broken off after so many epochs."""
    steps = pipeline.run(
        Config.model_validate(tree),
        store=Store(str(folder)),
        owner="me",
        checkpoint_interval=1e9 if stop is None else 0,
        replicas=replicas,
    )
    curve: list[Tree] = []
    while len(curve) != stop:
        try:
            curve.append(next(steps).report())
        except StopIteration as end:
            result = end.value
            return {"state": result.state, "masks": result.masks, "curve": curve, **result.metrics()}
    steps.close()
    return {}


def raises(kind: type[Exception], function: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        function()
    return str(caught.value)


def _alone_fails(replicas: Replicas) -> None:
    def compute() -> None:
        if replicas.rank != 0:
            raise AssertionError("computed by another one than the first")
        raise UserError("the storage is not there")

    replicas.once(compute)


def _whole_and_part(replicas: Replicas) -> Tree:
    """A batch norm over the whole batch, and over its parts: how far apart all that it computes is."""
    torch.manual_seed(0)
    x, weights = 3 + 2 * torch.randn(7, 3, 4, 4), torch.randn(7, 3, 4, 4)
    whole, part = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    nn.init.normal_(whole.weight)
    part.load_state_dict(whole.state_dict())
    own = replicas.part(7)
    here, there = x.clone().requires_grad_(), x[own].clone().requires_grad_()
    expected = whole(here)
    (expected * weights).sum().backward()
    with replicas.around(part):
        out = part(there)
    (out * weights[own]).sum().backward()
    replicas.sum_gradients(part.parameters())
    assert here.grad is not None
    assert there.grad is not None
    pairs = {
        "output": (out, expected[own]),
        "input": (there.grad, here.grad[own]),
        "weight": (part.weight.grad, whole.weight.grad),
        "bias": (part.bias.grad, whole.bias.grad),
        "running_mean": (part.running_mean, whole.running_mean),
        "running_var": (part.running_var, whole.running_var),
        "count": (part.num_batches_tracked, whole.num_batches_tracked),
    }
    distances = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}  # type: ignore[operator]
    return {"distances": distances, "restored": "forward" not in vars(part)}


def work(rank: int, size: int, folder: Path, tiny: Tree) -> None:
    """One of the replicas; what it saw goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    replicas = Replicas.joined()
    # Only the first one's store is used.
    store = folder / ("store" if rank == 0 else f"unused{rank}")
    seen: Tree = {name: train(tree, store, replicas) for name, tree in variants(tiny).items()}
    for stop in (2, 5):  # within the first stage, within the last
        train(tiny, store / "again", replicas, stop)
    seen["again"] = train(tiny, store / "again", replicas)
    seen["batch_norm"] = _whole_and_part(replicas)
    few = {**tiny, "data": {**tiny["data"], "batch_size": 1}}
    seen["too many"] = raises(UserError, lambda: train(few, store, replicas))
    seen["once"] = raises(UserError, lambda: _alone_fails(replicas))
    for name, tensor in (("equal", torch.zeros(3)), ("other", torch.eye(size)[rank])):
        if name == "equal":
            replicas.check_same("the masks", {name: tensor})
        else:
            seen["same"] = raises(WorkError, lambda t=tensor: replicas.check_same("the masks", {"m": t}))
    torch.save(seen, folder / f"seen{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tree() -> Tree:
    return {
        "name": "tiny",
        "seed": 1,
        "data": {"name": "digits", "batch_size": 64, "limit": 300, "validation_fraction": 0.2},
        "model": {"name": "mlp", "hidden": [16, 16]},
        "densities": [0.2],
        "pre_pruning": {
            "epochs": 3,
            "optimizer": {"name": "adam", "lr": 3e-3},
            "mask": {"lambda1": 1e-6, "lambda2": 1e-4, "initial": 0.9},
        },
        "post_pruning": {
            "epochs": 4,
            "optimizer": {"name": "adam", "lr": 3e-3},
            "label_smoothing": {"alpha0": 0.1, "horizon": 0.5},
            "soft_activation": {"beta0": 1.0, "beta_max": 20.0, "horizon": 0.5},
            "soft_skip": {"gamma0": 0.5, "horizon": 0.5},
        },
    }


@pytest.fixture(scope="module", params=[2, 3], ids=["2 replicas", "3 replicas"])
def seen(request, tree: Tree, tmp_path_factory) -> list[Tree]:
    """What each replica saw; 3 do not divide the batch of 64."""
    folder = tmp_path_factory.mktemp(f"replicas{request.param}")
    torch.multiprocessing.spawn(work, (request.param, folder, tree), nprocs=request.param)  # type: ignore[no-untyped-call]
    assert {path.name for path in folder.iterdir()} == {  # the others wrote nothing
        "store",
        *(f"seen{rank}" for rank in range(request.param)),
    } | ({"meeting"} if (folder / "meeting").exists() else set())
    return [torch.load(folder / f"seen{rank}") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone(tree: Tree, tmp_path_factory) -> dict[str, Tree]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(variant, folder) for name, variant in variants(tree).items()}


@pytest.mark.parametrize("name", ["mask", "target", "rigl", "gradual", "rounds", "images"])
def test_replicas_give_what_one_process_gives(name: str, seen: list[Tree], alone: dict[str, Tree]) -> None:
    one, first = alone[name], seen[0][name]
    assert first["masks"].keys() == one["masks"].keys()
    assert all(first["masks"][layer].equal(mask) for layer, mask in one["masks"].items())
    assert first["nonzero"] == one["nonzero"]
    assert first["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.011)  # one image of 100
    for key, tensor in one["state"].items():
        torch.testing.assert_close(first["state"][key], tensor, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(first["curve"], one["curve"], strict=True):
        assert (mine["stage"], mine["epoch"]) == (theirs["stage"], theirs["epoch"])
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["mask", "target", "rigl", "gradual", "rounds", "images"])
def test_all_replicas_have_the_same_bits(name: str, seen: list[Tree]) -> None:
    for other in seen[1:]:
        for kind in ("masks", "state"):
            for key, tensor in seen[0][name][kind].items():
                assert other[name][kind][key].equal(tensor)
        measured = [
            [{k: v for k, v in epoch.items() if k != "checkpointed"} for epoch in one[name]["curve"]]
            for one in (seen[0], other)
        ]
        assert measured[0] == measured[1]


def test_replicas_that_were_interrupted_end_with_the_same_bits(seen: list[Tree]) -> None:
    for one in seen:
        assert len(one["again"]["curve"]) == EPOCHS
        assert all(one["again"]["state"][key].equal(tensor) for key, tensor in one["mask"]["state"].items())


def test_batch_normalization_is_that_of_the_whole_batch(seen: list[Tree]) -> None:
    for one in seen:
        assert one["batch_norm"]["distances"] == pytest.approx(
            dict.fromkeys(one["batch_norm"]["distances"], 0.0), abs=2e-5
        )
        assert one["batch_norm"]["restored"]


def test_what_is_wrong_is_said_by_every_replica(seen: list[Tree]) -> None:
    for one in seen:
        assert one["too many"] == f"a batch has 1 examples: too few for {len(seen)} workers"
        assert one["once"] == "the storage is not there"
        assert one["same"] == "the masks differ between workers 0 and 1: m"


@settings(deadline=None)
@given(count=st.integers(1, 1000), size=st.integers(1, 20))
def test_the_parts_make_up_the_whole_and_differ_by_one_at_most(count: int, size: int) -> None:
    parts = [range(count)[Replicas(rank, size).part(count)] for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sum(Replicas(rank, size).share(count) for rank in range(size)) == pytest.approx(1)


def test_one_process_needs_no_process_group() -> None:
    tensor = torch.ones(2, requires_grad=True)
    tensor.sum().backward()
    model = nn.Sequential(nn.BatchNorm1d(2))
    with ALONE.around(model):
        assert "forward" not in vars(model[0])
    ALONE.sum(tensor)
    ALONE.sum_gradients(model.parameters())
    ALONE.copy_first({"t": tensor})
    ALONE.check_same("these", {"t": tensor})
    assert (ALONE.once(lambda: 3), ALONE.part(5), ALONE.share(5)) == (3, slice(0, 5), 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_a_checksum_sees_values_and_their_order(dtype: torch.dtype) -> None:
    one = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    assert checksum(one) == checksum(one.clone())
    assert checksum(one) != checksum(one.roll(1))
    assert checksum(one) != checksum(torch.zeros_like(one))
    assert checksum(one.view(5, 1)[::2]) == checksum(one[::2].clone())  # not contiguous
    assert checksum(one[:0]) == checksum(torch.tensor(0).to(dtype)) == 0


def test_dropout_draws_otherwise_on_each_replica(monkeypatch) -> None:
    seeds = []
    monkeypatch.setattr(training, "seeded", lambda seed, device: seeds.append(seed) or training.suppress())
    monkeypatch.setattr(training, "train_epoch", lambda *args, **kwargs: float("nan"))
    for rank in (0, 1, 2):
        learner = training.Learner(
            nn.Linear(1, 1), [], {}, lambda time: 1.0, replicas=Replicas(rank, 3 if rank else 1)
        )
        data = type("Data", (), {"device": torch.device("cpu")})()
        training.EpochWork(learner, data, 4, 10, 8, None, 7).run()  # type: ignore[arg-type]
    assert seeds[0] == seed_of(7, "modules", 4)
    assert len(set(seeds)) == 3
