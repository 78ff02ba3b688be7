"""Sweeps on a Ray cluster whose nodes are processes of this machine: they join, leave, and differ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster

import prunetune

pytestmark = pytest.mark.slow

SWEEP = """
name: tiny
data: {name: image_folder, root: pictures, batch_size: 32, validation_fraction: 0.2}
model: {name: 'nets:Slow'}
densities: [0.5]
post_pruning: {epochs: 8, optimizer: {name: adam, lr: {loguniform: [1e-4, 3e-2]}}}
search: {trials_per_density: 4, early_stopping: null}
"""
STEPS, EPOCHS, TRIALS = 5, 8, 4

NETS = """
import os, time
from pathlib import Path
import ray
from torch import nn

LOG = Path(__file__).parent / "steps"
HOLD = Path(__file__).parent / "hold"

class Slow(nn.Sequential):
    # Logs the node of each training step; an epoch of five takes more than a second. While the file `hold` is
    # there, a process waits in the step whose number it holds.
    steps = 0

    def __init__(self, input_shape, num_classes):
        c, h, w = input_shape
        super().__init__(nn.Flatten(), nn.Linear(c * h * w, num_classes))

    def forward(self, x):
        if self.training and len(x) > 2:
            time.sleep(0.25)
            with open(LOG, "a") as log:
                log.write(ray.get_runtime_context().get_node_id() + chr(10))
            Slow.steps += 1
            while HOLD.exists() and Slow.steps >= int(HOLD.read_text()):
                time.sleep(0.1)
        return super().forward(x)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    (tmp_path / "nets.py").write_text(NETS)
    drawn = np.random.default_rng(0)
    for part, count in (("train", 100), ("test", 10)):
        for name, brightness in (("bright", 255), ("dark", 60)):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = drawn.integers(0, brightness, (4, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / part / name / f"{index}.png")
    return tmp_path


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that takes no trials. Its address is told to nobody else on this machine."""
    monkeypatch.setattr("ray._private.utils.write_ray_address", lambda *arguments: None)
    monkeypatch.setattr("ray._common.utils.reset_ray_address", lambda *arguments: None)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.connect()
    yield made
    ray.shutdown()
    made.shutdown()  # whose drivers die with it


def start(folder: Path, cluster: Cluster, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "prunetune.sweep", "tiny.yaml", *overrides],
        cwd=folder,
        stdout=(folder / "out").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "RAY_ADDRESS": cluster.address},
    )


def finish(folder: Path, process: subprocess.Popen[str], code: int = 0) -> str:
    process.wait()
    out = (folder / "out").read_text()
    assert process.returncode == code, out
    assert "Traceback" not in out
    return out


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], folder: Path) -> None:
    while not condition():  # pytest's own timeout ends it
        assert process.poll() is None, (folder / "out").read_text()
        time.sleep(0.1)


def steps(folder: Path) -> Counter[str]:
    """Training steps so far, by node."""
    log = folder / "steps"
    return Counter(log.read_text().split()) if log.exists() else Counter()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text())["body"] for p in sorted(folder.glob("runs/tiny/trials/*/*.json"))]


def test_nodes_that_join_are_used_and_nodes_that_leave_cost_an_epoch(folder: Path, cluster: Cluster) -> None:
    first = cluster.add_node(num_cpus=1)
    hold = folder / "hold"
    hold.write_text(str(2 * STEPS + 1))
    process = start(folder, cluster)
    wait_for(lambda: steps(folder)[first.node_id] == 2 * STEPS + 1, process, folder)
    shutil.rmtree(folder / "pictures")  # the data came with the sweep
    groups = [group["state"] for group in ray.util.placement_group_table().values()]
    assert groups.count("CREATED") == 1
    assert groups.count("PENDING") <= TRIALS - 1  # what an autoscaler would see

    second = cluster.add_node(num_cpus=1)
    wait_for(lambda: steps(folder)[second.node_id], process, folder)
    cluster.remove_node(first, allow_graceful=False)
    hold.unlink()

    finish(folder, process)
    found = records(folder)
    assert [record["status"] for record in found] == ["complete"] * TRIALS
    assert all([entry["epoch"] for entry in r["curve"]] == list(range(1, EPOCHS + 1)) for r in found)
    # Lost are the step under way and, where a checkpoint took long to write, the epoch before it.
    lost = sum(steps(folder).values()) - TRIALS * EPOCHS * STEPS
    assert 0 < lost <= STEPS + 1
    assert not list(folder.glob("runs/tiny/probe*"))


@pytest.fixture
def older(folder: Path) -> dict[str, str]:
    """The environment of a node that has another version of this project."""
    shutil.copytree(Path(prunetune.__file__).parent, folder / "older" / "prunetune")
    (folder / "older" / "prunetune" / "errors.py").open("a").write("\n# once\n")
    return {"PYTHONPATH": str(folder / "older")}


def test_a_node_with_another_version_is_told_before_the_first_trial(
    folder: Path, cluster: Cluster, older: dict[str, str]
) -> None:
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1, env_vars=older)
    out = finish(folder, start(folder, cluster), code=2)
    assert "1 of the 3 nodes of the Ray cluster cannot run this sweep:" in out
    assert f"prunetune is {prunetune.__version__} (sources " in out
    assert [record for record in records(folder) if record["status"] != "running"] == []
    assert not list(folder.glob("runs/tiny/probe*"))


def test_a_node_that_joins_with_another_version_is_told_once_and_left_out(
    folder: Path, cluster: Cluster, older: dict[str, str]
) -> None:
    good = cluster.add_node(num_cpus=1)
    hold = folder / "hold"
    hold.write_text("1")
    process = start(folder, cluster, "search.trials_per_density=3")
    wait_for(lambda: steps(folder)[good.node_id], process, folder)
    cluster.add_node(num_cpus=1, env_vars=older)
    told = "no trial is run on this node: prunetune is"
    wait_for(lambda: told in (folder / "out").read_text(), process, folder)
    hold.unlink()
    out = finish(folder, process)
    assert out.count(told) == 1
    assert [record["status"] for record in records(folder)] == ["complete"] * 3
    assert set(steps(folder)) == {good.node_id}
