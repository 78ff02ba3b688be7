"""Trials computed together against the same trials computed alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunetune import pipeline, vectorized
from prunetune.config.schema import Config
from prunetune.engine.loop import EpochWork
from prunetune.pipeline import PipelineResult
from prunetune.store import Store
from prunetune.testing import side_by_side

Tree = dict[str, Any]

BASE: Tree = {
    "name": "tiny",
    "seed": 0,
    "data": {"name": "digits", "batch_size": 32, "limit": 160, "validation_fraction": 0.2},
    "model": {"name": "mlp", "hidden": [16, 16]},
    "densities": [0.3],
    "pre_pruning": {"epochs": 2, "optimizer": {"name": "adam", "lr": 3e-3}, "initializer": "kaiming"},
    "post_pruning": {"epochs": 3, "optimizer": {"name": "adam", "lr": 2e-3, "schedule": {"name": "cosine"}}},
}


def changed(**changes: Any) -> Config:
    """BASE with `section__key=value` set."""
    tree = copy.deepcopy(BASE)
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return Config.model_validate(tree)


Report = dict[str, Any]


def mask(**values: Any) -> Tree:
    return {"lambda1": 1e-4, "lambda2": 1e-3, "initial": 0.7, **values}


def together(
    configs: list[Config], folder: Path, device: str = "cpu"
) -> list[tuple[list[Report], PipelineResult]]:
    trials = [
        pipeline.steps(config, store=Store(str(folder / f"together-{i}")), device=device)
        for i, config in enumerate(configs)
    ]
    return [([epoch.report() for epoch in epochs], result) for epochs, result in side_by_side(trials)]


def alone(
    configs: list[Config], folder: Path, device: str = "cpu"
) -> list[tuple[list[Report], PipelineResult]]:
    found = []
    for i, config in enumerate(configs):
        reports: list[Report] = []
        trial = pipeline.run(config, store=Store(str(folder / f"alone-{i}")), device=device)
        while True:
            try:
                reports.append(next(trial).report())
            except StopIteration as end:
                found.append((reports, end.value))
                break
    return found


ADAM = {"name": "adam", "lr": 3e-3}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
PIECES = {
    "label_smoothing": {"alpha0": 0.2, "horizon": 0.5},
    "soft_activation": {"beta0": 1.0, "horizon": 0.7},
    "soft_skip": {"gamma0": 0.5, "horizon": 0.9},
}

CASES: dict[str, list[Config]] = {
    "learning rates": [changed(pre_pruning__optimizer__lr=lr) for lr in (1e-3, 3e-3, 1e-2)],
    "masks": [
        changed(pre_pruning__mask=mask(lambda2=l2, initial=initial, lr=lr, lambda2_warmup=warmup))
        for l2, initial, lr, warmup in ((1e-4, 0.5, 0.02, 0.0), (1e-3, 0.9, 0.01, 0.5), (0.0, 0.7, 0.05, 0.0))
    ],
    "masks with a target": [
        changed(pre_pruning__mask=mask(method="target", initial=i), densities=[d])
        for i, d in ((0.9, 0.3), (0.5, 0.1))
    ],
    "masks on a path": [
        changed(pre_pruning__mask={"method": "path", "lowest": low, "power": power, "travel": travel})
        for low, power, travel in ((0.1, 1.0, 5.0), (0.05, 3.0, 12.0))
    ],
    "bf16": [
        changed(precision="bf16", post_pruning__optimizer__lr=lr, pre_pruning__epochs=1)
        for lr in (1e-4, 3e-4)
    ],
    "soft pieces": [
        changed(),
        changed(**{f"post_pruning__{name}": piece for name, piece in PIECES.items()}),
        changed(post_pruning__soft_activation={"beta0": 3.0, "horizon": 0.3}),
        changed(post_pruning__soft_skip={"gamma0": 0.2, "horizon": 1.0}),
    ],
    "sgd": [
        changed(pre_pruning__optimizer=SGD, post_pruning__optimizer={**SGD, "momentum": m, "weight_decay": w})
        for m, w in ((0.9, 0.0), (0.5, 1e-2))
    ],
    "sgd without nesterov": [
        changed(pre_pruning__optimizer={**SGD, "nesterov": False, "momentum": m}) for m in (0.9, 0.5, 0.0)
    ],
    "weight decay": [
        changed(
            pre_pruning__optimizer={**ADAM, "weight_decay": w},
            post_pruning__optimizer={"name": "adamw", "lr": 1e-2, "weight_decay": 10 * w},
        )
        for w in (0.0, 1e-2)
    ],
    "seeds": [changed(seed=seed, pre_pruning__mask=mask()) for seed in (0, 1, 1)],
    "different lengths": [changed(pre_pruning__epochs=n, post_pruning__epochs=5 - n) for n in (1, 2, 3)],
    "densities": [changed(densities=[d]) for d in (0.5, 0.1)],
    "augmentation": [
        changed(data__augmentation={"crop_padding": 1, "flip": False}, seed=seed, pre_pruning__mask=mask())
        for seed in (0, 1)
    ],
    "batch norm": [
        changed(
            model={"name": "resnet20", "width_multiplier": 0.25},
            data__limit=64,
            pre_pruning__epochs=1,
            post_pruning__epochs=1,
            pre_pruning__optimizer={**SGD, "lr": lr},
            pre_pruning__mask=mask(),
        )
        for lr in (0.01, 0.03)
    ],
    "attention": [  # with SGD: the key's bias has no gradient but rounding, which Adam would blow up
        changed(
            model={"name": "vit_tiny", "patch": 4, "dim": 12, "depth": 1, "heads": 2},
            pre_pruning__epochs=1,
            post_pruning__epochs=1,
            pre_pruning__optimizer=SGD,
            post_pruning__optimizer={**SGD, "lr": lr},
        )
        for lr in (0.01, 0.03)
    ],
    "no pre-pruning": [
        changed(pre_pruning=None, seed=seed, pruning={"criterion": "snip"}) for seed in (0, 1)
    ],
    "one diverges": [
        changed(pre_pruning__optimizer=SGD, post_pruning__optimizer={**SGD, "lr": lr}) for lr in (0.05, 1e12)
    ],
}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batched programs that were run."""
    sizes: list[int] = []
    run = vectorized.Program.run

    def counted(self: vectorized.Program) -> Any:
        found = run(self)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(vectorized.Program, "run", counted)
    return sizes


def assert_close(one: Tensor, other: Tensor, name: str, times: float = 1.0) -> None:
    torch.testing.assert_close(one, other, rtol=2e-3 * times, atol=2e-4 * times, msg=lambda m: f"{name}: {m}")


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_trials_give_together_what_they_give_alone(
    name: str, device: str, tmp_path: Path, programs: list[int]
) -> None:
    configs, coarse = CASES[name], 10.0 if name == "bf16" else 1.0  # of 8 bits
    if device == "cuda" and name != "bf16":  # there `auto` is bf16
        configs = [config.model_copy(update={"precision": "fp32"}) for config in configs]
    for (reports, result), (expected_reports, expected) in zip(
        together(configs, tmp_path, device), alone(configs, tmp_path, device), strict=True
    ):
        assert result.status == expected.status
        assert [r["epoch"] for r in reports] == [r["epoch"] for r in expected_reports]
        for report, other in zip(reports, expected_reports, strict=True):
            assert report.keys() == other.keys()
            for metric in ("train_loss", "val_loss", "mask_density"):
                if metric in report:
                    assert report[metric] == pytest.approx(other[metric], rel=1e-3 * coarse)
            assert report["val_accuracy"] == pytest.approx(other["val_accuracy"], abs=1 / 32 + 1e-9)
        assert result.nonzero == expected.nonzero
        assert result.masks.keys() == expected.masks.keys()
        for weight, state in result.state.items():
            assert_close(state.float(), expected.state[weight].float(), weight, coarse)
        for weight, kept in result.masks.items():
            assert not result.state[weight][~kept].any()  # exactly zero
    assert max(programs) == len(configs)


@pytest.mark.parametrize(
    "section",
    [
        {"post_pruning__dynamic": "set"},
        {"pruning__schedule": "gradual"},
    ],
)
def test_what_moves_its_mask_trains_beside_others_as_it_does_alone(
    section: Tree, tmp_path: Path, programs: list[int]
) -> None:
    configs = [changed(**section, seed=seed) for seed in (0, 1)]
    for (_, result), (_, expected) in zip(together(configs, tmp_path), alone(configs, tmp_path), strict=True):
        assert result.status == expected.status
        for name, state in result.state.items():
            assert_close(state, expected.state[name], name)


class Noisy(nn.Module):
    """Draws random numbers of its own, as dropout written by hand does."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 8)
        self.outer = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x.flatten(1)).relu()
        if self.training:
            hidden = hidden * (torch.rand_like(hidden) > 0.1)
        out: Tensor = self.outer(hidden)
        return out


def test_a_model_that_cannot_be_batched_runs_alone_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, programs: list[int]
) -> None:
    configs = [
        changed(model={"name": "test_vectorized:Noisy"}, post_pruning__optimizer__lr=lr)
        for lr in (1e-3, 3e-3)
    ]
    with caplog.at_level(logging.WARNING, logger="prunetune.vectorized"):
        found = together(configs, tmp_path)
    assert "Noisy cannot be batched" in caplog.text
    assert programs == []
    for (_, result), (_, expected) in zip(found, alone(configs, tmp_path), strict=True):
        assert all(torch.equal(state, expected.state[name]) for name, state in result.state.items())


def works(configs: list[Config], folder: Path) -> Iterator[EpochWork]:
    for i, config in enumerate(configs):
        step = next(pipeline.steps(config, store=Store(str(folder / str(i)))))
        assert isinstance(step, EpochWork)
        yield step


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "mlp", "hidden": [16, 17]}},
        {"data__batch_size": 16},
        {"pre_pruning__optimizer": SGD},
        {"pre_pruning__optimizer": {"name": "adamw", "lr": 3e-3}},
        {"pre_pruning__mask": mask()},
        {"data__augmentation": {"crop_padding": 1}},
        {"data__split_seed": 1},
    ],
)
def test_what_is_no_part_of_one_program(change: Tree, tmp_path: Path) -> None:
    one, other, same = works([changed(), changed(**change), changed(seed=1)], tmp_path)
    assert vectorized.signature(one) == vectorized.signature(same)
    assert vectorized.signature(one) != vectorized.signature(other)


def test_networks_of_equal_modules_and_shapes_may_compute_otherwise(tmp_path: Path) -> None:
    vit = {"name": "vit_tiny", "patch": 4, "dim": 12, "depth": 1}
    two, four = works([changed(model={**vit, "heads": heads}) for heads in (2, 4)], tmp_path)
    assert repr(two.learner.model) == repr(four.learner.model)
    assert vectorized.signature(two) != vectorized.signature(four)


def test_a_model_with_dropout_runs_alone(tmp_path: Path) -> None:
    (work,) = works([changed()], tmp_path)
    work.learner.model.add_module("dropout", nn.Dropout(0.5))
    assert vectorized.signature(work) is None


def test_too_little_memory_halves_the_program(
    tmp_path: Path, programs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = vectorized.Program.run

    def small(self: vectorized.Program) -> Any:
        if len(self._works) > 2:
            raise torch.cuda.OutOfMemoryError
        return run(self)

    monkeypatch.setattr(vectorized.Program, "run", small)
    wanted = list(works([changed(pre_pruning__optimizer__lr=1e-3 * (1 + i)) for i in range(5)], tmp_path))
    vectorized.run_together(wanted)
    assert sorted(programs) == [2, 2]  # and one alone
    assert [work.metrics is None for work in wanted].count(True) == 1


def test_a_checkpoint_of_a_trial_computed_together_is_resumed_alone(tmp_path: Path) -> None:
    configs = [changed(pre_pruning__mask=mask(lambda2=l2)) for l2 in (1e-4, 1e-3)]
    stores = [Store(str(tmp_path / f"resumed-{i}")) for i in range(2)]
    trials = [
        pipeline.steps(config, store=store, checkpoint_interval=0.0)
        for config, store in zip(configs, stores, strict=True)
    ]
    first = [next(trial) for trial in trials]
    vectorized.run_together([step for step in first if isinstance(step, EpochWork)])
    for trial in trials:
        next(trial)  # the report; the checkpoint is written
        trial.close()
    resumed = [
        pipeline.run_pipeline(config, store=store) for config, store in zip(configs, stores, strict=True)
    ]
    for result, (_, expected) in zip(resumed, alone(configs, tmp_path), strict=True):
        for name, state in result.state.items():
            assert_close(state, expected.state[name], name)
