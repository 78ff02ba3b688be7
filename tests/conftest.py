"""What several tests share: tiny configurations, the digits, and where the larger data sets may be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs as pafs
from small_sweep import TEXT, make_sweep

from prunetune.config.schema import Config
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.store import Store

SHARED_DATA = Path(os.environ.get("PRUNETUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""MNIST and CIFAR-10, where this machine has them."""


@pytest.fixture(autouse=True)
def _process() -> None:
    """As it is before a command, tested in this process, has prepared it."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PRUNETUNE_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mnist_root() -> str:
    if not (SHARED_DATA / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {SHARED_DATA} (set PRUNETUNE_DATA)")
    return str(SHARED_DATA)


@pytest.fixture
def cifar_root() -> str:
    if not (SHARED_DATA / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 parquet in {SHARED_DATA} (set PRUNETUNE_DATA)")
    return str(SHARED_DATA / "cifar10")


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A whole training configuration on digits that runs in about a second."""
    return {
        "name": "tiny",
        "seed": 0,
        "data": {"name": "digits", "batch_size": 64, "limit": 300, "validation_fraction": 0.2},
        "model": {"name": "mlp", "hidden": [16, 16]},
        "densities": [0.2],
        "pre_pruning": {
            "epochs": 3,
            "optimizer": {"name": "adam", "lr": 3e-3},
            "initializer": "kaiming",
            "mask": {"lambda1": 1e-6, "lambda2": 1e-4, "lambda2_warmup": 0.5, "initial": 0.9},
        },
        "post_pruning": {
            "epochs": 4,
            "optimizer": {"name": "adam", "lr": 3e-3},
            "label_smoothing": {"alpha0": 0.1, "horizon": 0.5},
            "soft_activation": {"beta0": 1.0, "beta_max": 20.0, "horizon": 0.5},
            "soft_skip": {"gamma0": 0.5, "horizon": 0.5},
        },
    }


@pytest.fixture
def remote() -> Store:
    """A store on a filesystem that is not the local disk, as an object store's client gives one."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return Store("bucket/runs", pafs.PyFileSystem(pafs.FSSpecHandler(memory)))


@pytest.fixture
def text() -> str:
    return TEXT


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Config, Problem, Ledger]:
    return make_sweep(tmp_path)
