"""What runs otherwise on a GPU: bf16, channels-last, masks and batches drawn there. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_vectorized import CASES, together

from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.pipeline import PipelineResult, run_pipeline
from prunetune.store import Store

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

RESNET = {
    "model": {"name": "resnet20", "width_multiplier": 0.25},
    "data": {
        "name": "digits",
        "batch_size": 64,
        "limit": 300,
        "validation_fraction": 0.2,
        "augmentation": {"crop_padding": 1, "flip": False},
    },
}

METHODS: dict[str, dict[str, Any]] = {
    "mask": {},
    "target": {"mask": {"method": "target", "lambda1": 1e-6}},
    "path": {"mask": {"method": "path", "lowest": 0.1}},
    "resnet": RESNET,
    "vit": {"model": {"name": "vit_tiny", "patch": 4, "dim": 12, "depth": 1, "heads": 2}},
    "snip": {"pre_pruning": None, "pruning": {"criterion": "snip"}},
    "grasp": {"pre_pruning": None, "pruning": {"criterion": "grasp"}},
    "synflow": {"pre_pruning": None, "pruning": {"criterion": "synflow"}},
    "taylor": {"pruning": {"criterion": "taylor", "allocation": "erk"}},
    "channel": {**RESNET, "densities": [0.6], "pruning": {"structure": "channel"}},
    "2:4": {"densities": [0.5], "pruning": {"structure": "2:4"}},
    "iterative, rewound": {
        "pruning": {"schedule": {"name": "iterative", "rounds": 2, "epochs": 1}, "rewind": "init"}
    },
    "gradual": {"pruning": {"schedule": {"name": "gradual", "start": 0.0, "end": 0.5, "every": 2}}},
    "rigl": {"pre_pruning": None, "pruning": {"criterion": "random"}, "post": {"dynamic": "rigl"}},
    "rescaled": {"pre_pruning": None, "pruning": {"criterion": "random"}, "post": {"rescaled_init": {}}},
}


def config(tiny: dict[str, Any], precision: str, change: dict[str, Any]) -> Config:
    tree = {**tiny, "precision": precision, **{k: v for k, v in change.items() if k not in ("mask", "post")}}
    if "mask" in change:
        tree["pre_pruning"] = {**tiny["pre_pruning"], "mask": change["mask"]}
    if "post" in change:
        tree["post_pruning"] = {**tiny["post_pruning"], **change["post"]}
    return Config.model_validate(tree)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name: str, precision: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    asked = config(tiny, precision, METHODS[name])
    result = run_pipeline(asked, store=Store(str(tmp_path)), device=DEVICE)
    assert result.status in ("complete", "collapsed")
    assert result.masks
    for weight, kept in result.masks.items():
        assert not result.state[weight].cpu()[~kept.cpu()].any()
    again = run_pipeline(asked, store=Store(str(tmp_path)), device=DEVICE, owner="another")
    assert (again.epochs_run, again.val_accuracy) == (0, result.val_accuracy)


def test_in_float32_it_computes_what_a_cpu_computes(tiny: dict[str, Any], tmp_path: Path) -> None:
    """No mask, whose draws are the device's own."""
    asked = config(tiny, "fp32", {"mask": None})
    curves: dict[str, list[float]] = {}
    results: dict[str, PipelineResult] = {}
    for device in ("cpu", DEVICE):
        curves[device] = []
        results[device] = run_pipeline(
            asked,
            store=Store(str(tmp_path / device)),
            device=device,
            report=lambda device=device, **metrics: curves[device].append(metrics["train_loss"]),
        )
    assert curves[DEVICE] == pytest.approx(curves["cpu"], rel=1e-3)
    for name, kept in results["cpu"].masks.items():  # weights of nearly the same size may change places
        assert (results[DEVICE].masks[name].cpu() == kept).float().mean() > 0.98


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_computes_what_its_kernels_compute(
    name: str, tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(tiny, "fp32", METHODS[name])
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"batch_size": 16})})
    losses: dict[bool, list[float]] = {False: [], True: []}
    for graphs, found in losses.items():
        run_pipeline(
            asked.model_copy(update={"cuda_graphs": graphs}),
            store=Store(str(tmp_path / str(graphs))),
            device=DEVICE,
            report=lambda found=found, **metrics: found.append(metrics["train_loss"]),
        )
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert "cannot be a CUDA graph" not in caplog.text


@pytest.mark.parametrize("name", CASES)
def test_a_graph_of_trials_together_computes_what_its_kernels_compute(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Five steps of each epoch at least, of which the last two are replayed."""
    configs = [
        each.model_copy(update={"data": each.data.model_copy(update={"batch_size": 8}), "precision": "fp32"})
        for each in CASES[name]
    ]
    expected = together(configs, tmp_path / "without", DEVICE)
    graphs = [each.model_copy(update={"cuda_graphs": True}) for each in configs]
    for (reports, result), (others, other) in zip(
        together(graphs, tmp_path / "with", DEVICE), expected, strict=True
    ):
        assert result.status == other.status
        assert [r["train_loss"] for r in reports] == pytest.approx(
            [r["train_loss"] for r in others], rel=1e-2, nan_ok=True
        )
    assert "cannot be a CUDA graph" not in caplog.text


def test_a_step_that_cannot_be_a_graph_leaves_the_gpu_usable(
    tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The recording fails half-way, and what follows is computed as without it."""
    asked = config({**tiny, "model": {"name": "test_cuda_graphs:Counting"}}, "fp32", {})
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"batch_size": 16})})
    results = [
        run_pipeline(
            asked.model_copy(update={"cuda_graphs": graphs}),
            store=Store(str(tmp_path / str(graphs))),
            device=DEVICE,
        )
        for graphs in (False, True)
    ]
    assert "cannot be a CUDA graph" in caplog.text
    assert results[0].val_accuracy == pytest.approx(results[1].val_accuracy, abs=0.05)


def test_an_interrupted_stage_goes_on(tiny: dict[str, Any], tmp_path: Path) -> None:
    asked = config(tiny, "auto", {})
    trial = pipeline.run(asked, store=Store(str(tmp_path)), device=DEVICE, checkpoint_interval=0.0)
    next(trial), next(trial)
    trial.close()
    result = run_pipeline(asked, store=Store(str(tmp_path)), device=DEVICE, owner="another")
    assert (result.epochs_reused, result.epochs_run) == (2, 5)
