"""The project's invariants over the whole pipeline, and what is computed only once.

1. A mask of density d over n weights keeps exactly floor(d·n) of them, ties included.
2. A pruned weight is exactly zero after every optimizer step, and in what is saved.
3. The same configuration gives the same bits on a CPU, interrupted and resumed anywhere or not.
4. After the horizons the network is the original one: no smoothing, plain ReLU, no skip.
6. What is in the store is whole; a damaged entry is reported, set aside and computed again.
7. A trial that diverges or collapses is a result with a status.

The fifth, that trials are compared only within a density, is in `search/test_early_stopping.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from prunetune import data as datasets
from prunetune import models, pipeline
from prunetune.config.canonical import kept
from prunetune.config.schema import Config, PostPruningConfig, PrePruningConfig
from prunetune.data import Dataset
from prunetune.engine import loop as training
from prunetune.engine.checkpoint import EpochCheckpoint
from prunetune.engine.optimizers import make_optimizer, make_schedule
from prunetune.engine.seeds import seed_of
from prunetune.errors import UserError
from prunetune.pipeline import PipelineResult, run_pipeline
from prunetune.sparsity.masks import pack, prunable
from prunetune.sparsity.smoothing import relus
from prunetune.stages import pre_pruning
from prunetune.stages.initial import Initial
from prunetune.stages.plan import plan
from prunetune.stages.post_pruning import PostPruning, smoothing_at
from prunetune.stages.pruning import Masks, Selection
from prunetune.stages.stage import Origin, Place
from prunetune.stages.state import load_state, state_of
from prunetune.store import Artefact, Store

WEIGHTS = 64 * 16 + 16 * 16 + 16 * 10
"""Prunable weights of the `tiny` network."""

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "cosine"}

Tree = dict[str, Any]


def change(tree: Tree, **changes: Any) -> Tree:
    """A copy with dotted keys (`__` for the dot) set."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree


@pytest.fixture
def small(tiny: Tree) -> Tree:
    """`tiny` with fewer images and epochs, for tests that run it often."""
    return change(tiny, data__limit=100, data__batch_size=32, pre_pruning__epochs=2, post_pruning__epochs=3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Store:
    """A second, empty store."""
    return Store(str(tmp_path / "elsewhere"))


@dataclass
class Ran:
    """A run that came to its end: every report, and the result."""

    reports: list[dict[str, Any]]
    result: PipelineResult

    def curve(self) -> list[dict[str, Any]]:
        """The reports without what says where they came from."""
        return [{k: v for k, v in r.items() if k not in ("checkpointed", "reused")} for r in self.reports]


def drive(
    tree: Tree,
    store: Store,
    *,
    owner: str = "me",
    interval: float = 1e9,
    also: tuple[float, ...] = (),
) -> Ran:
    reports: list[dict[str, Any]] = []
    config = Config.model_validate(tree)
    steps = pipeline.run(config, store=store, owner=owner, checkpoint_interval=interval, also=also)
    while True:
        try:
            reports.append(next(steps).report())
        except StopIteration as end:
            return Ran(reports, end.value)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same(one: Ran, other: Ran) -> None:
    """The same state, masks, curve and measurements, bit for bit."""
    assert one.result.state
    assert_same_bits(one.result.state, other.result.state)
    assert_same_bits(one.result.masks, other.result.masks)
    assert one.curve() == other.curve()
    own = {"seconds", "epochs_run", "epochs_reused"}
    left, right = one.result.metrics(), other.result.metrics()
    assert {k: v for k, v in left.items() if k not in own} == {k: v for k, v in right.items() if k not in own}


def keys_of(tree: Tree) -> dict[str, str]:
    config = Config.model_validate(tree)
    return plan(config, datasets.load(config.data).digest).keys


def prunable_of(state: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in masks}


# --- what a run reports and gives


def test_a_run_reports_every_epoch_and_gives_a_network_of_the_density(tiny: Tree, store: Store) -> None:
    ran = drive({**tiny, "seed": 1}, store)  # one that is well above chance
    assert [r["epoch"] for r in ran.reports] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["stage"] for r in ran.reports] == ["pre_pruning"] * 3 + ["post_pruning"] * 4
    assert [r["stage_epoch"] for r in ran.reports] == [1, 2, 3, 1, 2, 3, 4]
    assert [r.get("post_epoch") for r in ran.reports] == [None, None, None, 1, 2, 3, 4]
    assert not any(r["reused"] or r["checkpointed"] for r in ran.reports)
    assert all(r["key"] == ran.result.keys[r["stage"]] for r in ran.reports)
    assert {"train_loss", "val_loss", "val_accuracy"} < set(ran.reports[-1])
    assert {"mask_density", "mask_open"} <= set(ran.reports[0])
    result = ran.result
    assert result.status == "complete"
    assert result.density == 0.2
    assert result.nonzero == kept(0.2, WEIGHTS) == 288
    assert 0 < result.effective_density <= 0.2
    assert result.val_accuracy == ran.reports[-1]["val_accuracy"]
    assert 0.1 < (result.test_accuracy or 0) <= 1
    assert (result.epochs_run, result.epochs_reused) == (7, 0)
    assert result.seconds > 0
    model = models.build(Config.model_validate(tiny).model, (1, 8, 8), 10, seed=9)
    load_state(model, result.state)  # the state is that of the configured network
    accuracy, _ = training.evaluate(model, data := datasets.load(Config.model_validate(tiny).data), data.test)
    assert accuracy == result.test_accuracy


def test_run_pipeline_takes_a_config_a_mapping_or_a_file(
    small: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunetune.config import document

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(document.dump(small))
    reports: list[dict[str, Any]] = []
    first = run_pipeline(small, report=lambda **metrics: reports.append(metrics), device="cpu")
    assert [r["epoch"] for r in reports] == [1, 2, 3, 4, 5]
    assert (tmp_path / "runs" / "store" / "stages").is_dir()
    folder = Store("runs").sub(small["name"])
    (trained,) = folder.records("trained")  # so that its stages are kept
    keys = (folder.read_record(trained) or {})["keys"].values()
    assert sorted(keys) == Store("runs").sub("store").keys("stages")
    for config in (Config.model_validate(small), "run.yaml"):
        again = run_pipeline(config, device="cpu")
        assert again.keys == first.keys
        assert_same_bits(again.state, first.state)


def test_run_pipeline_names_what_is_wrong_with_a_mapping(small: Tree, store: Store) -> None:
    with pytest.raises(UserError, match=r"configuration: post_pruning\.epochs = 0: must be greater"):
        run_pipeline(change(small, post_pruning__epochs=0), store=store)
    with pytest.raises(UserError, match="one density"):
        run_pipeline(change(small, densities=[0.1, 0.2]), store=store)


def test_the_test_split_is_measured_once_at_the_end(
    small: Tree, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    evaluate = training.evaluate

    def spying(model: nn.Module, data: Dataset, split: Any, *precision: Any) -> tuple[float, float]:
        measured.append("test" if split is data.test else "validation")
        return evaluate(model, data, split, *precision)

    monkeypatch.setattr(training, "evaluate", spying)
    monkeypatch.setattr("prunetune.stages.post_pruning.evaluate", spying)
    drive(small, store)
    assert measured.count("test") == 1
    assert measured.count("validation") >= 5
    assert measured[-1] == "test"


# --- invariant 1


def test_invariant_1_exactly_floor_dn_are_kept_after_the_mask_drove_most_weights_to_zero(
    tiny: Tree, store: Store
) -> None:
    mask = {"lambda1": 0, "lambda2": 1.0, "lambda2_warmup": 0.9, "initial": 0.3, "lr": 0.05}
    tree = change(tiny, pre_pruning__mask=mask)
    for density in (0.29, 0.5, 0.999):
        ran = drive({**tree, "densities": [density]}, store)
        dense = store.load("stages", ran.result.keys["pre_pruning"])
        assert dense is not None
        zeros = sum(int((dense.tensors[name] == 0).sum()) for name in ran.result.masks)
        assert 0.8 * WEIGHTS < zeros < WEIGHTS  # so the threshold is a tie at zero
        assert sum(int(m.sum()) for m in ran.result.masks.values()) == kept(density, WEIGHTS)
        # What was not zero is kept, and the rest is drawn from all layers.
        for name, kept_here in ran.result.masks.items():
            assert kept_here[dense.tensors[name] != 0].all()
            assert kept_here.any()
            assert density > 0.9 or not kept_here.all()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.29, 1.0])
def test_invariant_1_exactly_floor_dn_are_kept_of_a_zero_initialized_network(
    small: Tree, store: Store, density: float
) -> None:
    tree = change(small, pre_pruning__epochs=0, pre_pruning__initializer="zero", pre_pruning__mask=None)
    ran = drive({**tree, "densities": [density]}, store)
    assert sum(int(m.sum()) for m in ran.result.masks.values()) == kept(density, WEIGHTS)


# --- invariant 2


@pytest.mark.parametrize("optimizer", [SGD, {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}])
@pytest.mark.parametrize("pre", [True, False])
def test_invariant_2_pruned_weights_are_exactly_zero_after_every_step_and_in_all_that_is_stored(
    small: Tree, store: Store, elsewhere: Store, optimizer: Tree, pre: bool
) -> None:
    tree = change(small, post_pruning__optimizer=optimizer)
    if not pre:
        tree["pre_pruning"] = None
    masks = drive(tree, elsewhere).result.masks
    by_shape = {mask.shape: mask for mask in masks.values()}
    assert len(by_shape) == len(masks)
    steps: list[int] = []
    moved: list[bool] = []

    def check(o: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in o.param_groups for p in group["params"] if p.shape in by_shape]
        if len(parameters) < len(masks):
            return  # pre-pruning with a mask steps one flat θ
        for parameter in parameters:
            pruned = ~by_shape[parameter.shape]
            assert not parameter[pruned].any()
            assert parameter.grad is not None
            moved.append(bool(parameter.grad[pruned].any()))
        steps.append(1)

    hook = register_optimizer_step_pre_hook(check)
    try:
        # Closed after the second post-pruning epoch, to look at its checkpoint.
        stepper = pipeline.run(Config.model_validate(tree), store=store, checkpoint_interval=0)
        for report in stepper:
            if report.post_epoch == 2:
                break
        stepper.close()
        result = drive(tree, store).result
    finally:
        hook.remove()
    assert len(steps) == 3 * 2  # 80 images in batches of 32
    assert any(moved)  # a plain optimizer would have moved them
    final = store.load("stages", result.keys["post_pruning"])
    assert final is not None
    for state in (result.state, final.tensors):
        for name, weight in prunable_of(state, masks).items():
            assert not weight[~masks[name]].any()
            assert weight[masks[name]].all()
    assert result.nonzero == kept(0.2, WEIGHTS)


def test_invariant_2_the_epoch_checkpoint_is_sparse_too(small: Tree, store: Store) -> None:
    stepper = pipeline.run(
        Config.model_validate(change(small, post_pruning__optimizer=SGD)), store=store, checkpoint_interval=0
    )
    keys = keys_of(small)
    for report in stepper:
        if report.post_epoch == 1:
            break
    stepper.close()
    (name,) = store.records("checkpoints")
    found = store.load("checkpoints", name.removeprefix("checkpoints/"))
    pruning = store.load("stages", keys["pruning"])
    assert found is not None
    assert pruning is not None
    assert sum(int(found.tensors[n].count_nonzero()) for n in pruning.tensors) == kept(0.2, WEIGHTS)


# --- invariant 3


VARIANTS: dict[str, Callable[[Tree], Tree]] = {
    "adam, mask": lambda tree: tree,
    "sgd, mask": lambda tree: change(tree, pre_pruning__optimizer=SGD, post_pruning__optimizer=SGD),
    "sgd, no mask": lambda tree: change(
        tree, pre_pruning__optimizer=SGD, post_pruning__optimizer=SGD, pre_pruning__mask=None
    ),
    "sgd without momentum, no mask": lambda tree: change(
        tree,
        pre_pruning__optimizer={"name": "sgd", "lr": 0.1, "momentum": 0},
        post_pruning__optimizer={"name": "sgd", "lr": 0.1, "momentum": 0},
        pre_pruning__mask=None,
    ),
    "batch norm, augmentation": lambda tree: change(
        tree,
        model={"name": "resnet20", "width_multiplier": 0.1},
        data__augmentation={"crop_padding": 1},
        data__limit=40,
        data__batch_size=16,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_invariant_3_the_same_configuration_gives_the_same_bits(
    small: Tree, store: Store, elsewhere: Store, variant: str
) -> None:
    tree = VARIANTS[variant](small)
    torch.manual_seed(1)
    one = drive(tree, store)
    torch.manual_seed(2)  # the process's own random state plays no part
    other = drive(tree, elsewhere)
    assert_same(one, other)
    different = drive({**tree, "seed": 1}, store)
    assert not all(torch.equal(one.result.state[n], t) for n, t in different.result.state.items())


def test_invariant_3_ties_of_the_pruning_are_drawn_from_the_seed(
    small: Tree, store: Store, elsewhere: Store
) -> None:
    mask = {"lambda1": 0, "lambda2": 3e-3, "initial": 0.3, "lr": 0.1}
    tree = change(small, densities=[0.5], pre_pruning__mask=mask)
    one, other = drive(tree, store), drive(tree, elsewhere)
    dense = store.load("stages", one.result.keys["pre_pruning"])
    assert dense is not None
    assert sum(int((dense.tensors[name] == 0).sum()) for name in one.result.masks) > 0.6 * WEIGHTS
    assert_same(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_invariant_3_closed_after_any_report_and_run_again_gives_the_same_bits(
    small: Tree, tmp_path: Path, variant: str
) -> None:
    tree = VARIANTS[variant](small)
    undisturbed = drive(tree, Store(str(tmp_path / "undisturbed")))
    total = len(undisturbed.reports)
    assert total == 5
    for count in range(1, total + 1):
        store = Store(str(tmp_path / f"closed-after-{count}"))
        stepper = pipeline.run(Config.model_validate(tree), store=store, owner="me", checkpoint_interval=0)
        seen = [next(stepper) for _ in range(count)]
        stepper.close()
        resumed = drive(tree, store)
        assert_same(resumed, undisturbed)
        assert [epoch.checkpointed for epoch in seen] == [epoch.epoch not in (2, 5) for epoch in seen]
        stored = count if seen[-1].checkpointed else count - 1  # a stage's last epoch comes with its result
        assert (resumed.result.epochs_run, resumed.result.epochs_reused) == (total - stored, stored)


def test_invariant_3_interrupted_again_and_again_gives_the_same_bits(
    small: Tree, store: Store, elsewhere: Store
) -> None:
    tree = VARIANTS["sgd, mask"](small)
    undisturbed = drive(tree, elsewhere)
    # A stage's last epoch is stored with its result, so the second one is let on into the third stage.
    for count in (1, 3, 4):
        stepper = pipeline.run(Config.model_validate(tree), store=store, owner="me", checkpoint_interval=0)
        for _ in range(count):
            next(stepper)
        stepper.close()
    assert_same(drive(tree, store), undisturbed)


def test_invariant_3_killed_at_any_write_and_run_again_gives_the_same_bits(
    small: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = VARIANTS["sgd, mask"](small)
    undisturbed = drive(tree, Store(str(tmp_path / "undisturbed")))
    write = Store._write

    def run_and_die_at(limit: int, store: Store) -> int:
        """How many writes there were before the run ended, or died at number `limit`."""
        writes = 0

        def dying(self: Store, name: str, content: bytes) -> None:
            nonlocal writes
            if writes == limit:
                raise KeyboardInterrupt
            writes += 1
            write(self, name, content)

        with monkeypatch.context() as patched:
            patched.setattr(Store, "_write", dying)
            try:
                drive(tree, store, interval=0)
            except KeyboardInterrupt:
                assert writes == limit
        return writes

    total = run_and_die_at(10**6, Store(str(tmp_path / "counted")))
    assert total == 2 * (1 + 1 + 1 + 2 + 1)  # checkpoints of 2 and 3 epochs, three stages; blob and manifest
    for limit in range(total):
        store = Store(str(tmp_path / f"died-at-{limit}"))
        run_and_die_at(limit, store)
        assert_same(drive(tree, store), undisturbed)


def test_invariant_3_killed_within_an_epoch_and_run_again_gives_the_same_bits(
    small: Tree, tmp_path: Path
) -> None:
    tree = VARIANTS["sgd, mask"](small)
    undisturbed = drive(tree, Store(str(tmp_path / "undisturbed")))
    for limit in (1, 3, 5, 9):
        store = Store(str(tmp_path / f"died-at-{limit}"))
        steps = iter(range(10**6))

        def die(*args: Any, steps: Iterator[int] = steps, limit: int = limit) -> None:
            if next(steps) == limit:
                raise KeyboardInterrupt

        hook = register_optimizer_step_post_hook(die)
        try:
            with pytest.raises(KeyboardInterrupt):
                drive(tree, store, interval=0)
        finally:
            hook.remove()
        assert_same(drive(tree, store), undisturbed)


def test_invariant_3_trials_that_share_a_stage_at_the_same_time_do_not_disturb_each_other(
    small: Tree, store: Store, elsewhere: Store, caplog: pytest.LogCaptureFixture
) -> None:
    densities = (0.1, 0.3, 0.5)
    trees = [{**small, "densities": [density]} for density in densities]
    running = {
        index: pipeline.run(
            Config.model_validate(tree),
            store=store,
            owner=f"t{index}",
            checkpoint_interval=0,
            also=densities,
        )
        for index, tree in enumerate(trees)
    }
    reports: dict[int, list[dict[str, Any]]] = {index: [] for index in running}
    results: dict[int, PipelineResult] = {}
    while running:
        for index, stepper in list(running.items()):
            try:
                reports[index].append(next(stepper).report())
            except StopIteration as end:
                results[index] = end.value
                del running[index]
    for index, tree in enumerate(trees):
        alone = drive(tree, elsewhere, also=densities)
        assert_same(Ran(reports[index], results[index]), alone)
    assert "damaged" not in caplog.text


# --- invariant 4


PIECES: dict[str, Tree] = {
    "label_smoothing": {"alpha0": 0.2, "horizon": 0.5},
    "soft_activation": {"beta0": 1.0, "beta_max": 20.0, "horizon": 0.5},
    "soft_skip": {"gamma0": 0.5, "horizon": 0.5},
}


def snapshot(model: nn.Module) -> list[tuple[str, int, int, int]]:
    """Every module by name and identity, and its hooks."""
    return [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


def post_config(tree: Tree, **sections: Any) -> PostPruningConfig:
    return PostPruningConfig.model_validate(
        {"epochs": 4, "optimizer": tree["post_pruning"]["optimizer"], **sections}
    )


class Toy:
    """The last stage alone: masks of density one half, the networks that it builds, and where it runs."""

    def __init__(self, tree: Tree, store: Store, monkeypatch: pytest.MonkeyPatch, **place: Any) -> None:
        config = Config.model_validate(tree)
        data = datasets.load(config.data)
        self.origin = Origin(data.digest, config.data.batch_size, None, config.model, 0, "auto", config.task)
        self.built: list[nn.Module] = []
        build = models.build

        def noted(*args: Any, **kwargs: Any) -> nn.Module:
            self.built.append(build(*args, **kwargs))
            return self.built[-1]

        monkeypatch.setattr(models, "build", noted)
        self.place = Place(data, store, "me", **{"checkpoint_interval": 1e9, **place})
        model = build(config.model, data.shape, data.classes, seed=seed_of(0, "model"))
        g = torch.Generator().manual_seed(0)
        masks = {name: torch.rand(w.shape, generator=g) < 0.5 for name, w in prunable(model).items()}
        self.initial = Initial(self.origin, None)
        selection = Selection(config.pruning.criterion)
        self.masks = Masks(self.origin, self.initial, selection, 0.5)
        self.place.results[self.initial.key] = Artefact(state_of(model), {})
        shapes = {"shapes": {name: list(mask.shape) for name, mask in masks.items()}}
        self.place.results[self.masks.key] = Artefact({n: pack(m) for n, m in masks.items()}, shapes)

    def stage(self, config: PostPruningConfig) -> PostPruning:
        return PostPruning(self.origin, self.masks, self.initial, config)

    def run(self, config: PostPruningConfig) -> Artefact:
        after: Artefact = finish(self.stage(config).run(self.place))
        return after


def finish(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("pieces", [[name] for name in PIECES] + [list(PIECES)])
def test_invariant_4_after_the_horizons_there_is_no_smoothing(tiny: Tree, pieces: list[str]) -> None:
    model = models.build(Config.model_validate(tiny).model, (1, 8, 8), 10, seed=0)
    before = snapshot(model)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    config = post_config(tiny, **{name: PIECES[name] for name in pieces})
    for epoch, soft in ((0, True), (1, True), (2, False), (3, False), (4, False)):
        smoothing = smoothing_at(config, epoch)
        assert (smoothing.label_smoothing > 0) is (soft and "label_smoothing" in pieces)
        with smoothing.around(model):
            assert (relus(model) == []) is (soft and "soft_activation" in pieces)
            hooked = sum(len(module._forward_hooks) for module in model.modules())
            assert hooked == (2 if soft and "soft_skip" in pieces else 0)
            changed = soft and pieces != ["label_smoothing"]
            assert torch.equal(model(x), plain) is not changed
        assert snapshot(model) == before


def test_invariant_4_values_of_the_smoothing_by_hand(tiny: Tree) -> None:
    model = models.build(Config.model_validate(tiny).model, (1, 8, 8), 10, seed=0)
    config = post_config(
        tiny,
        label_smoothing={"alpha0": 0.2, "horizon": 1.0},
        soft_activation={"beta0": 1.0, "beta_max": 21.0, "horizon": 0.75},
    )
    assert [smoothing_at(config, e).label_smoothing for e in range(5)] == pytest.approx(
        [0.2, 0.15, 0.1, 0.05, 0.0]
    )
    betas = []
    for epoch in range(4):
        with smoothing_at(config, epoch).around(model):
            betas.append(getattr(model.hidden[0][1], "beta", None))  # type: ignore[index]
    assert betas == [1.0, pytest.approx(23 / 3), pytest.approx(43 / 3), None]


def test_invariant_4_the_network_at_the_end_of_the_stage_is_the_original_one(
    tiny: Tree, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = post_config(tiny, **{name: {**piece, "horizon": 1.0} for name, piece in PIECES.items()})
    toy = Toy(tiny, store, monkeypatch)
    after = toy.run(config)
    (model,) = toy.built
    fresh = toy.origin.build(toy.place)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert all(type(model.get_submodule(n)) is nn.ReLU for n in ("hidden.0.1", "hidden.1.1"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # The last validation saw it as it is stored.
    load_state(fresh, after.tensors)
    accuracy, loss = training.evaluate(fresh, toy.place.data, toy.place.data.validation)
    assert after.meta["curve"][-1]["val_accuracy"] == after.meta["val_accuracy"] == accuracy
    assert after.meta["curve"][-1]["val_loss"] == loss


@pytest.mark.parametrize("pieces", [[name] for name in PIECES] + [list(PIECES)])
def test_invariant_4_training_beyond_the_horizons_is_training_without_smoothing(
    tiny: Tree, store: Store, elsewhere: Store, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = change(tiny, post_pruning__optimizer=SGD)
    smooth = post_config(tree, **{name: PIECES[name] for name in pieces})
    plain = post_config(tree)
    whole = Toy(tree, store, monkeypatch).run(smooth)

    # Two epochs with smoothing, then the checkpoint is handed to a stage that knows of none.
    toy = Toy(tree, elsewhere, monkeypatch, checkpoint_interval=0)
    stepper = toy.stage(smooth).run(toy.place)
    for _ in range(2):
        assert isinstance(next(stepper), training.EpochWork)  # an epoch to run: it runs when resumed
        next(stepper)
    stepper.close()
    found = elsewhere.load("checkpoints", toy.stage(smooth).key)
    assert found is not None
    elsewhere.save("checkpoints", toy.stage(plain).key, found.tensors, found.meta)
    rest = toy.run(plain)
    assert_same_bits(rest.tensors, whole.tensors)
    assert rest.meta["curve"] == whole.meta["curve"]
    unsmoothed = Toy(tree, store, monkeypatch).run(plain)
    assert unsmoothed.meta["curve"] != whole.meta["curve"]  # the smoothing did something


# --- invariant 6


@pytest.mark.parametrize("stage", ["pre_pruning", "pruning", "post_pruning"])
@pytest.mark.parametrize("part", ["manifest", "blob"])
def test_invariant_6_a_damaged_stage_is_computed_again_to_the_same_result(
    small: Tree, store: Store, caplog: pytest.LogCaptureFixture, stage: str, part: str
) -> None:
    first = drive(small, store)
    key = first.result.keys[stage]
    manifest = f"stages/{key}.json"
    body = store.read_record(f"stages/{key}")
    assert body is not None
    name = manifest if part == "manifest" else f"stages/{key}.{body['blob']}"
    content = bytearray(store.read_file(name) or b"")
    content[-10] ^= 1
    store.write_file(name, bytes(content))
    with caplog.at_level(logging.WARNING, logger="prunetune.store"):
        again = drive(small, store)
    assert "damaged" in caplog.text
    assert_same(again, first)
    caplog.clear()
    assert_same(drive(small, store), first)
    assert caplog.text == ""


def test_invariant_6_a_damaged_checkpoint_is_not_resumed_from(
    small: Tree, store: Store, elsewhere: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = drive(small, elsewhere)
    stepper = pipeline.run(Config.model_validate(small), store=store, owner="me", checkpoint_interval=0)
    next(stepper)
    stepper.close()
    (name,) = store.records("checkpoints")
    body = store.read_record(name)
    assert body is not None
    (blob,) = tmp_path.rglob(f"*{body['blob']}*")
    blob.write_bytes(b"damaged")
    assert_same(drive(small, store), undisturbed)
    assert "damaged" in caplog.text


def test_invariant_6_a_longer_stage_does_not_damage_a_finished_shorter_one(
    small: Tree, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    # SGD without momentum and with a constant rate: two epochs of three are the stage of two.
    short = VARIANTS["sgd without momentum, no mask"](small)
    long = change(short, pre_pruning__epochs=3)
    drive(short, store, owner="one")
    drive(long, store, owner="two", interval=0)
    again = drive(short, store, owner="three")
    assert "damaged" not in caplog.text
    assert (again.result.epochs_run, again.result.epochs_reused) == (0, 5)


@pytest.mark.parametrize(
    ("accuracies", "hopeless"),
    [
        ([], False),
        ([0.1, 0.1], False),  # fewer than 3
        ([0.1, 0.1, 0.1], False),  # fewer than a quarter of 16
        ([0.1, 0.1, 0.1, 0.05], True),
        ([0.1, 0.1, 0.11, 0.1], False),
        ([0.3, 0.1, 0.1, 0.1, 0.1], True),
    ],
)
def test_a_stage_at_chance_for_a_quarter_of_its_epochs_is_hopeless(
    accuracies: list[float], hopeless: bool
) -> None:
    section = {"epochs": 16, "optimizer": {"name": "sgd", "lr": 0.1}}
    curve = [{"val_accuracy": accuracy, "mask_density": 0.5} for accuracy in accuracies]
    assert pre_pruning.is_hopeless(curve, PrePruningConfig(**section), 0.1) is hopeless
    patient = PrePruningConfig(**section, chance_patience=None)
    assert pre_pruning.is_hopeless(curve, patient, 0.1) is False


# --- invariant 7


@pytest.mark.parametrize("stage", ["pre_pruning", "post_pruning"])
@pytest.mark.parametrize("lr", [1e9, 1e30])
def test_invariant_7_a_diverged_run_is_a_result_with_a_status(
    small: Tree, store: Store, stage: str, lr: float
) -> None:
    tree = change(small, pre_pruning__mask=None)
    tree[stage]["optimizer"] = {"name": "sgd", "lr": lr, "momentum": 0.9}
    ran = drive(tree, store, owner="one")
    result = ran.result
    assert result.status == "diverged"
    assert result.val_accuracy is None
    assert result.test_accuracy is None
    assert (result.nonzero, result.effective_density) == (0, 0.0)
    again = drive(tree, store, owner="two")  # known, and not computed again
    assert again.result.status == "diverged"
    assert again.result.epochs_run == 0
    assert len(again.reports) == len(ran.reports)


def test_invariant_7_a_mask_that_closes_wholly_is_a_collapse(small: Tree, store: Store) -> None:
    mask = {"lambda1": 0, "lambda2": 1e6, "initial": 0.5, "lr": 0.5}
    ran = drive(change(small, pre_pruning__mask=mask), store)
    result = ran.result
    assert result.status == "collapsed"
    assert [(r["stage"], r["last"]) for r in ran.reports] == [("pre_pruning", True)]  # it ends at once
    assert ran.reports[-1]["mask_density"] == 0
    assert result.val_accuracy == ran.reports[-1]["val_accuracy"]
    assert result.test_accuracy is None
    assert (result.nonzero, result.effective_density) == (0, 0.0)
    assert drive(change(small, pre_pruning__mask=mask), store).result.status == "collapsed"


def test_invariant_7_chance_accuracy_is_a_collapse(small: Tree, store: Store) -> None:
    result = drive({**small, "densities": [1e-6]}, store).result
    assert result.status == "collapsed"  # no weight is left, the biases name one class
    assert result.nonzero == 0
    assert result.effective_density == 0.0
    assert result.val_accuracy is not None
    assert result.test_accuracy is not None


def test_invariant_7_always_naming_the_most_frequent_class_is_a_collapse(
    tiny: Tree, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy(tiny, store, monkeypatch)
    data = toy.place.data
    train, validation = (
        datasets.Split(split.inputs, torch.zeros_like(split.targets))
        for split in (data.train, data.validation)
    )
    toy.place.data = replace(data, train=train, validation=validation)
    config = post_config(change(tiny, post_pruning__optimizer={"name": "adam", "lr": 0.1}))
    after = toy.run(config)
    assert after.meta["val_accuracy"] == 1.0  # there is one class only
    assert after.meta["status"] == "collapsed"


# --- reuse


def test_a_second_density_reuses_the_pre_pruning_stage(small: Tree, store: Store, elsewhere: Store) -> None:
    both = (0.2, 0.1)
    first = drive(small, store, owner="one", also=both)
    second = drive({**small, "densities": [0.1]}, store, owner="two", also=both)
    assert (first.result.epochs_run, first.result.epochs_reused) == (5, 0)
    assert (second.result.epochs_run, second.result.epochs_reused) == (3, 2)
    assert [r["reused"] for r in second.reports] == [True, True, False, False, False]
    assert second.result.keys["pre_pruning"] == first.result.keys["pre_pruning"]
    alone = drive({**small, "densities": [0.1]}, elsewhere, also=both)
    assert_same(second, alone)  # no better and no worse for it


def test_another_run_of_the_same_configuration_computes_nothing(small: Tree, store: Store) -> None:
    first = drive(small, store, owner="one")
    again = drive(small, store, owner="two")
    assert_same(again, first)
    assert (again.result.epochs_run, again.result.epochs_reused) == (0, 5)
    assert all(r["reused"] for r in again.reports)


def test_the_same_owners_stored_epochs_are_from_the_store_too(small: Tree, store: Store) -> None:
    drive(small, store, owner="one")
    again = drive(small, store, owner="one")
    assert (again.result.epochs_run, again.result.epochs_reused) == (0, 5)
    assert all(r["reused"] for r in again.reports)


def test_another_owners_unfinished_epochs_are_reused(small: Tree, store: Store, elsewhere: Store) -> None:
    stepper = pipeline.run(Config.model_validate(small), store=store, owner="one", checkpoint_interval=0)
    next(stepper)
    stepper.close()
    ran = drive(small, store, owner="two")
    assert [r["reused"] for r in ran.reports] == [True, False, False, False, False]
    assert (ran.result.epochs_run, ran.result.epochs_reused) == (4, 1)
    assert_same(ran, drive(small, elsewhere))


def test_who_computed_an_epoch_does_not_change_when_the_trial_is_run_again(small: Tree, store: Store) -> None:
    def owners(owner: str) -> list[str]:
        steps = pipeline.run(Config.model_validate(small), store=store, owner=owner, checkpoint_interval=0)
        return [epoch.owner for epoch in steps]

    stepper = pipeline.run(Config.model_validate(small), store=store, owner="one", checkpoint_interval=0)
    next(stepper)
    stepper.close()
    computed = ["one"] + ["two"] * 4
    assert owners("two") == computed
    assert owners("two") == computed
    assert owners("three") == computed


def test_finished_stages_leave_no_checkpoint(small: Tree, store: Store) -> None:
    drive(small, store, interval=0)
    assert store.records("checkpoints") == []
    assert len(store.records("stages")) == 3


def test_no_checkpoint_is_written_before_it_is_time(
    small: Tree, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunetune.engine.checkpoint._LONG_EPOCH", float("inf"))
    assert not any(r["checkpointed"] for r in drive(small, store, interval=1e9).reports)
    assert EpochCheckpoint(store, "k").interval == 5.0


KEYS = {
    "seed": 5,
    "precision": "bf16",
    "data__batch_size": 16,
    "data__augmentation": {"flip": False},
    "data__limit": 99,
    "data__split_seed": 4,
    "model__hidden": [16, 8],
    "pre_pruning__epochs": 5,
    "pre_pruning__initializer": "zero",
    "pre_pruning__optimizer": {"name": "adam", "lr": 1e-3},
    "pre_pruning__mask": None,
}


@pytest.mark.parametrize("key", KEYS)
def test_what_determines_the_first_stage_is_in_every_key(small: Tree, key: str) -> None:
    before, after = keys_of(small), keys_of(change(small, **{key: KEYS[key]}))
    assert before["pre_pruning"] != after["pre_pruning"]
    assert before["pruning"] != after["pruning"]
    assert before["post_pruning"] != after["post_pruning"]


def test_later_fields_are_in_later_keys_and_what_computes_nothing_is_in_none(small: Tree) -> None:
    def keys(**changes: Any) -> dict[str, str]:
        return keys_of(change(small, **changes))

    before = keys()
    density = keys(densities=[0.1])
    assert density["pre_pruning"] == before["pre_pruning"]
    assert density["pruning"] != before["pruning"]
    assert density["post_pruning"] != before["post_pruning"]
    post = keys(post_pruning__epochs=9)
    assert (post["pre_pruning"], post["pruning"]) == (before["pre_pruning"], before["pruning"])
    assert post["post_pruning"] != before["post_pruning"]
    adam = {"name": "adam", "lr": 3e-3, "momentum": 0.5}  # Adam has none
    assert keys(pre_pruning__optimizer=adam) == before
    assert keys(name="other", storage="else/where", resources={"cpus": 2}, data__root="moved") == before
    assert keys(model={"name": "mlp", "hidden": [16, 16], "num_classes": 10, "in_channels": 1}) == before


@pytest.mark.parametrize(
    "pruning",
    [
        {"schedule": {"name": "iterative", "rounds": 3, "epochs": 1}},
        {"schedule": {"name": "iterative", "rounds": 2, "epochs": 1}, "rewind": 1},
        {"rewind": 1},
        {"rewind": "init"},
        {"schedule": {"name": "gradual"}},
    ],
)
def test_the_stored_keys_are_all_that_a_run_leaves(small: Tree, store: Store, pruning: Tree) -> None:
    tree = {**small, "pruning": pruning}
    drive(tree, store)
    assert store.keys("stages") == sorted(keys_of(tree).values())


def test_the_number_of_classes_is_in_every_key(small: Tree) -> None:
    config = Config.model_validate(small)
    data = datasets.load(config.data)
    split = datasets.Split(data.train.inputs, data.train.targets)

    def keys(classes: int) -> Any:
        made = datasets.dataset.split_off_validation(split, split, classes, fraction=0.2, seed=0)
        return plan(config, made.digest).keys

    assert keys(10) == keys(10)
    assert keys(10)["pre_pruning"] != keys(11)["pre_pruning"]  # another output layer


# --- the corners of a configuration


def test_without_pre_pruning_the_initialization_is_pruned(small: Tree, store: Store) -> None:
    ran = drive({**small, "pre_pruning": None}, store)
    assert [r["stage"] for r in ran.reports] == ["post_pruning"] * 3
    assert ran.result.nonzero == kept(0.2, WEIGHTS)
    config = Config.model_validate(small)
    model = models.build(config.model, (1, 8, 8), 10, seed=seed_of(0, "model"))
    flat = torch.cat([w.detach().abs().flatten() for w in prunable(model).values()])
    masks = torch.cat([ran.result.masks[name].flatten() for name in prunable(model)])
    assert flat[masks].min() >= flat[~masks].max()


def test_a_pre_pruning_stage_of_no_epochs_only_initializes(small: Tree, store: Store) -> None:
    tree = change(small, pre_pruning__epochs=0, pre_pruning__mask=None, pre_pruning__initializer="zero")
    ran = drive(tree, store)
    assert [r["stage"] for r in ran.reports] == ["post_pruning"] * 3
    stored = store.load("stages", ran.result.keys["pre_pruning"])
    assert stored is not None
    assert torch.equal(stored.tensors["hidden.0.0.weight"], torch.eye(16, 64))
    assert ran.result.status in ("complete", "collapsed")
    assert ran.result.nonzero <= kept(0.2, WEIGHTS)


def test_a_mask_scales_the_weights_of_a_stage_without_epochs_too(small: Tree, store: Store) -> None:
    mask = {"lambda1": 0, "lambda2": 0, "initial": 0.25}
    plain = change(small, pre_pruning__epochs=0, pre_pruning__mask=None)
    states = []
    for tree in (plain, change(plain, pre_pruning__mask=mask)):
        found = store.load("stages", drive(tree, store).result.keys["pre_pruning"])
        assert found is not None
        states.append(found.tensors)
    without, scaled = states
    assert torch.equal(scaled["head.weight"], 0.25 * without["head.weight"])


def test_density_one_is_the_dense_network(small: Tree, store: Store, elsewhere: Store) -> None:
    tree = change(small, densities=[1.0], pre_pruning__mask=None)
    ran = drive(tree, store)
    assert all(mask.all() for mask in ran.result.masks.values())
    assert ran.result.nonzero == WEIGHTS
    assert ran.result.effective_density == 1.0
    # Training from the same start without any mask at all gives the same bits.
    config = Config.model_validate(tree)
    stored = store.load("stages", ran.result.keys["pre_pruning"])
    assert stored is not None
    model = models.build(config.model, (1, 8, 8), 10, seed=0)
    load_state(model, stored.tensors)
    post = config.post_pruning
    learner = training.Learner(
        model,
        [make_optimizer(post.optimizer, list(model.parameters()))],
        state_of(model),
        make_schedule(post.optimizer.schedule),
        smoothing=lambda epoch: smoothing_at(post, epoch),
    )
    data = datasets.load(config.data)
    seed = seed_of(config.seed, "post_pruning")
    for work in training.epochs(learner, data, total=3, batch_size=32, augmentation=None, seed=seed):
        work.run()
    assert_same_bits(state_of(model), ran.result.state)


def test_the_stored_network_before_pruning_is_theta_times_the_mask(small: Tree, store: Store) -> None:
    mask = {"lambda1": 0, "lambda2": 0.2, "initial": 0.5, "lr": 0.05}
    stepper = pipeline.run(
        Config.model_validate(change(small, pre_pruning__mask=mask, pre_pruning__epochs=3)),
        store=store,
        checkpoint_interval=0,
    )
    next(stepper)
    next(stepper)
    (name,) = store.records("checkpoints")
    two = store.load("checkpoints", name.removeprefix("checkpoints/"))
    assert two is not None
    names = ("hidden.0.0.weight", "hidden.1.0.weight", "head.weight")
    theta, m = two.tensors["prunetune:theta"], two.tensors["prunetune:mask"]
    assert torch.equal(torch.cat([two.tensors[n].flatten() for n in names]), theta * m)
    assert 0 <= m.min() < m.max() <= 1
    stepper.close()


def test_the_pipeline_learns(tiny: Tree, store: Store) -> None:
    result = drive(change(tiny, data__limit=None, densities=[0.3]), store).result
    assert (result.val_accuracy or 0) > 0.6
    assert (result.test_accuracy or 0) > 0.6
