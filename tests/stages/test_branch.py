"""Branches inside pre-pruning: the best epoch at each density, found during its training, or later."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune import data as datasets
from prunetune import pipeline, tasks
from prunetune.config.document import Document
from prunetune.config.reading import from_document
from prunetune.config.schema import Config, CriterionConfig
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import evaluate
from prunetune.engine.seeds import seed_of
from prunetune.engine.statistics import renew_statistics
from prunetune.pipeline import PipelineResult
from prunetune.sparsity.masks import FixedMask, prunable
from prunetune.stages.branch import Branch
from prunetune.stages.plan import plan, watched
from prunetune.stages.pruning import Selection, prune
from prunetune.stages.state import load_state
from prunetune.store import Store

EPOCHS = 5
DENSITIES = (0.3, 0.1, 0.03)

TREE: dict[str, Any] = {
    "name": "branch",
    "seed": 1,
    "data": {"name": "digits", "limit": 400, "batch_size": 32, "validation_fraction": 0.25},
    "model": {"name": "mlp", "hidden": [16, 16]},
    "densities": [0.1],
    "pre_pruning": {
        "epochs": EPOCHS,
        "optimizer": {"name": "adam", "lr": 0.01},
        "mask": {"lambda2": 0.01, "initial": 0.9, "lr": 0.05},
    },
    "pruning": {"from_epoch": "best"},
    "post_pruning": {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}},
}


SWEEP = """
import json, os, signal, sys
from pathlib import Path

from prunetune import run_sweep
from prunetune.engine import checkpoint, loop

tree, killed_after = json.loads(sys.argv[1]), int(sys.argv[2])
train, save = loop.train_epoch, checkpoint.EpochCheckpoint.save
checkpoint.checkpoint_wait = lambda *times: 0.0

def counted(*arguments, **settings):
    with open("trained", "a") as file:
        file.write("an epoch\\n")
    return train(*arguments, **settings)

def dying(self, learner, curve):
    written = save(self, learner, curve)
    if len(curve) == killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return written

loop.train_epoch, checkpoint.EpochCheckpoint.save = counted, dying
found = run_sweep(tree, executor="in_process")
results = [[r.density, r.number, r.val, r.test, r.epochs_run, r.epochs_reused] for r in found.records]
Path("results.json").write_text(json.dumps(sorted(results)))
"""
"""A sweep that counts the epochs it trains, and is killed after so many epochs of a stage."""


def config(density: float = 0.1, **pre: Any) -> Config:
    tree = copy.deepcopy(TREE)
    tree["densities"] = [density]
    tree["pre_pruning"].update(pre)
    return from_document(Document("branch", tree))


def run(
    config: Config, store: Store, also: Any = (), stop: int | None = None
) -> tuple[PipelineResult | None, list[Epoch]]:
    """The result and the epochs; with `stop` it is broken off after so many."""
    running = pipeline.run(config, store=store, checkpoint_interval=0.0, also=also)
    epochs: list[Epoch] = []
    while len(epochs) != stop:
        try:
            epochs.append(next(running))
        except StopIteration as end:
            return end.value, epochs
    running.close()
    return None, epochs


def branch_of(config: Config) -> Branch:
    (found,) = watched(config, datasets.load(config.data).digest, config.densities)
    assert isinstance(found, Branch)
    return found


def same(one: PipelineResult, other: PipelineResult) -> bool:
    return all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_the_branch_is_the_state_of_the_epoch_with_the_best_one_shot_score(store: Store) -> None:
    """As measured here, epoch by epoch, on networks that were trained so far and no further."""
    data = datasets.load(config().data)
    task = tasks.make(config().task, data.form)
    scores, states = [], []
    for epoch in range(1, EPOCHS + 1):
        tree = copy.deepcopy(TREE)
        tree["pruning"] = {"rewind": epoch}  # keeps the network after so many epochs
        early = from_document(Document("early", tree))
        run(early, store)
        key = plan(early, data.digest).keys[f"pre_pruning to epoch {epoch}"]
        found = store.load("stages", key)
        assert found is not None
        network = tasks.network(early.model, task, seed=0)
        load_state(network, found.tensors)
        masks = prune(network, Selection(early.pruning.criterion), 0.1, seed=seed_of(1, "pruning"))
        FixedMask(prunable(network), masks).apply()
        scores.append(evaluate(network, data, data.validation)[0])
        states.append(found.tensors)
    result, _ = run(config(), store)
    assert result is not None
    branch = store.load("stages", branch_of(config()).key)
    assert branch is not None
    assert branch.meta["scores"] == pytest.approx(scores)
    best = scores.index(max(scores))
    assert branch.meta["epoch"] == best + 1
    assert best + 1 < EPOCHS, "the last epoch is the best: this says nothing"
    assert all(torch.equal(tensor, states[best][name]) for name, tensor in branch.tensors.items())


RESNET: dict[str, Any] = {"name": "resnet20", "width_multiplier": 0.25}


@pytest.mark.parametrize("model", [TREE["model"], RESNET], ids=["mlp", "batch norm"])
def test_from_the_last_epoch_its_one_shot_value_alone_is_measured(
    model: dict[str, Any], store: Store
) -> None:
    """By hand: pruned, with batch norm's statistics computed anew, and evaluated."""
    tree = {**copy.deepcopy(TREE), "model": model, "pruning": {}}
    tree["pre_pruning"]["epochs"] = 2
    given = from_document(Document("last", tree))
    result, epochs = run(given, store, also=DENSITIES)
    assert result is not None
    names = [f"oneshot_accuracy_density_{density:g}" for density in DENSITIES]
    assert not any(name in epochs[0].metrics for name in names)
    data = datasets.load(given.data)
    task = tasks.make(given.task, data.form)
    found = store.load("stages", result.keys["pre_pruning"])
    assert found is not None
    values = []
    for density in DENSITIES:
        network = tasks.network(given.model, task, seed=0)
        load_state(network, found.tensors)
        masks = prune(network, Selection(given.pruning.criterion), density, seed=seed_of(1, "pruning"))
        FixedMask(prunable(network), masks).apply()
        renew_statistics(network, data, seed=seed_of(1, "pruning"))
        values.append(evaluate(network, data, data.validation)[0])
    assert [epochs[1].metrics[name] for name in names] == pytest.approx(values)
    _, again = run(given, store, also=DENSITIES)  # what is read from the store says it, too
    assert [again[1].metrics[name] for name in names] == pytest.approx(values)


def test_another_criterion_has_values_of_its_own() -> None:
    by_magnitude = Selection(config().pruning.criterion)
    by_snip = Selection(CriterionConfig.model_validate("snip"))
    erk = Selection(config().pruning.criterion, allocation="erk")
    assert by_magnitude.label == ""
    assert len({by_magnitude.label, by_snip.label, erk.label}) == 3


def test_a_stage_of_no_epochs_has_a_mask_on_a_path(store: Store) -> None:
    result, _ = run(config(epochs=0, mask={"method": "path", "lowest": 0.1}), store)
    assert result is not None
    assert result.nonzero > 0


def test_one_training_serves_every_density_that_is_asked_for(store: Store) -> None:
    _, epochs = run(config(0.1), store, also=DENSITIES)
    names = {name for epoch in epochs[:EPOCHS] for name in epoch.metrics if name.startswith("oneshot")}
    assert names == {f"oneshot_accuracy_density_{density:g}" for density in DENSITIES}
    for density in DENSITIES[::2]:
        result, _ = run(config(density), store, also=DENSITIES)
        assert result is not None
        assert (result.epochs_run, result.epochs_reused) == (2, EPOCHS)


def test_a_density_that_was_not_asked_for_is_trained_again_to_the_same_branch(
    store: Store, tmp_path: Path
) -> None:
    run(config(0.1), store)
    later, _ = run(config(0.03), store)
    alone, _ = run(config(0.03), Store(str(tmp_path / "alone")))
    assert later is not None
    assert alone is not None
    assert later.epochs_run == EPOCHS + 2  # the pre-training, for its branch, and post-pruning
    assert same(later, alone)


@pytest.mark.parametrize("stop", range(1, EPOCHS + 2))
def test_interrupted_anywhere_nothing_is_trained_twice_and_the_bits_are_the_same(
    store: Store, tmp_path: Path, stop: int
) -> None:
    whole, _ = run(config(0.1), Store(str(tmp_path / "whole")), also=DENSITIES)
    run(config(0.1), store, also=DENSITIES, stop=stop)
    again, _ = run(config(0.1), store, also=DENSITIES)
    assert whole is not None
    assert again is not None
    assert same(whole, again)
    # Of a stage, the last epoch comes with its result, which was not written yet.
    is_last = stop in (EPOCHS, EPOCHS + 2)
    assert again.epochs_reused == (stop - 1 if is_last else stop)
    for density in DENSITIES:
        key = branch_of(config(density)).key
        one, other = (s.load("stages", key) for s in (store, Store(str(tmp_path / "whole"))))
        assert one is not None
        assert other is not None
        assert one.meta["scores"] == other.meta["scores"]
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_a_branch_that_a_checkpoint_knows_nothing_of_is_found_all_the_same(
    store: Store, tmp_path: Path
) -> None:
    run(config(0.1), store, stop=3)
    run(config(0.1), store, also=DENSITIES)  # goes on from the third epoch
    late, _ = run(config(0.03), store, also=DENSITIES)
    alone, _ = run(config(0.03), Store(str(tmp_path / "alone")))
    assert late is not None
    assert alone is not None
    assert same(late, alone)


def test_a_network_that_collapses_in_the_end_can_be_branched_from_before(store: Store) -> None:
    mask = {"lambda2": 10.0, "lambda2_warmup": 1.0, "initial": 0.9, "lr": 0.05}
    closing = config(0.1, mask=mask)
    result, epochs = run(closing, store)
    assert result is not None
    network = store.load("stages", result.keys["pre_pruning"])
    assert network is not None
    assert network.meta["status"] == "collapsed"
    assert result.nonzero > 0
    assert epochs[-1].stage == "post_pruning"
    tree = copy.deepcopy(TREE)
    tree["pre_pruning"]["mask"] = mask
    tree["pruning"] = {}
    last, _ = run(from_document(Document("last", tree)), store)
    assert last is not None
    assert (last.status, last.nonzero) == ("collapsed", 0)


def test_a_sweep_that_is_killed_between_branch_points_trains_no_epoch_twice(tmp_path: Path) -> None:
    tree = {
        **copy.deepcopy(TREE),
        "densities": list(DENSITIES),
        "search": {"trials_per_density": 2, "early_stopping": None},
        "resources": {"trials_per_worker": 1},
        "tracking": {"trackers": []},
    }
    tree["post_pruning"]["optimizer"]["lr"] = {"choice": [0.01, 0.003]}

    def run_it(folder: Path, killed_after: int) -> int:
        folder.mkdir(exist_ok=True)
        words = [sys.executable, "-c", SWEEP, json.dumps(tree), str(killed_after)]
        return subprocess.run(words, cwd=folder, check=False).returncode

    def trained(folder: Path) -> int:
        return len((folder / "trained").read_text().splitlines())

    assert run_it(tmp_path / "calm", 0) == 0
    assert run_it(tmp_path / "killed", 3) == -signal.SIGKILL
    assert trained(tmp_path / "killed") == 3
    assert run_it(tmp_path / "killed", 0) == 0
    # One pre-training for six trials, and two epochs of post-pruning for each of them.
    assert trained(tmp_path / "killed") == trained(tmp_path / "calm") == EPOCHS + 6 * 2
    one, other = ((tmp_path / name / "results.json").read_text() for name in ("calm", "killed"))
    assert one == other


def test_without_pre_pruning_every_epoch_is_the_same(store: Store) -> None:
    best, last = (
        from_document(Document("none", {**TREE, "pre_pruning": None, "pruning": {"from_epoch": epoch}}))
        for epoch in ("best", "last")
    )
    digest = datasets.load(best.data).digest
    assert plan(best, digest).keys == plan(last, digest).keys
