"""Whole sweeps through Ray, MLflow and the commands, as a person runs them: in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import safetensors.torch
from mlflow import MlflowClient

pytestmark = pytest.mark.slow

SWEEP = """
name: tiny
seed: 0
data: {name: digits, batch_size: 64, limit: 400, validation_fraction: 0.2}
model: {name: mlp, hidden: [16]}
densities: [0.3, 0.1]
pre_pruning:
  epochs: 3
  optimizer: {name: adam, lr: {choice: [1e-3, 3e-3, 1e-2]}}
  mask: {choice: [null, {lambda1: 1e-6, lambda2: {loguniform: [1e-5, 1e-3]}}]}
post_pruning:
  epochs: 6
  optimizer: {name: adam, lr: {loguniform: [1e-4, 3e-2]}}
  soft_skip: {gamma0: {uniform: [0, 0.5]}, horizon: 0.5}
search: {trials_per_density: 5, max_concurrent: 1}
"""

NETS = """
import os, time
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes, width=16):
        c, h, w = input_shape
        super().__init__(nn.Flatten(), nn.Linear(c * h * w, width), nn.ReLU(), nn.Linear(width, num_classes))

class Held(Net):
    # Training stops before the step whose number is in the file `hold`, for as long as that file is there.
    steps = 0
    hold = Path(__file__).with_name("hold")
    def forward(self, x):
        type(self).steps += self.training and len(x) > 2
        if self.hold.exists() and type(self).steps >= int(at := self.hold.read_text()):
            self.hold.with_name(f"held-{at}").touch()
            while self.hold.exists():
                time.sleep(0.02)
        return super().forward(x)

class DiesOnce(Net):
    # The worker is gone, as with an out-of-memory kill, at its 20th training step; only once.
    steps = 0
    def __init__(self, input_shape, num_classes, flag, at=20):
        super().__init__(input_shape, num_classes)
        self.flag, self.at = Path(flag), at
    def forward(self, x):
        type(self).steps += self.training and len(x) > 2
        if type(self).steps == self.at and not self.flag.exists():
            self.flag.write_text("")
            os._exit(1)
        return super().forward(x)

class Broken(Net):
    def forward(self, x):
        if self.training and len(x) > 2:
            raise RuntimeError("this network cannot be trained")
        return super().forward(x)
"""

DIES = """
import os, signal, sys
from prunetune import sweep
from prunetune.records.ledger import Ledger

publish, ended = Ledger.publish, set()

def dying(ledger, record):
    publish(ledger, record)
    ended.update([record.uid] if record.status != "running" else [])
    if len(ended) == int(sys.argv[1]):
        os.killpg(0, signal.SIGKILL)

Ledger.publish = dying
sweep.main(sys.argv[2:])
"""
"""A sweep that is killed, with all of its processes, when so many of its trials have ended."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def start(folder: Path, *words: str, by: str = "-m") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, by, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # As from a terminal, even where the suite itself runs in the background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate()
    assert process.returncode == code, out
    assert "Traceback" not in out
    return out


def sweep(folder: Path, *overrides: str, code: int = 0) -> str:
    return finish(start(folder, "prunetune.sweep", "tiny.yaml", *overrides), code)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, however slow the machine is; pytest ends a test that hangs."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def records(folder: Path) -> list[dict]:
    paths = sorted(folder.glob("runs/tiny/trials/*/*.json"))
    return [json.loads(path.read_text())["body"] for path in paths]


def finished(folder: Path) -> list[dict]:
    return [record for record in records(folder) if record["status"] != "running"]


def outcome(folder: Path) -> list[tuple]:
    """What a sweep found, without what depends on the clock."""
    names = ("density", "number", "params", "status", "val", "test", "nonzero")
    return [tuple(record[name] for name in names) for record in records(folder)]


def stored(folder: Path) -> dict[str, int]:
    """When each finished stage was written, by key."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("runs/store/stages/*.json")}


def of_the_best(folder: Path) -> set[str]:
    """The keys of the best trials' stages."""
    keys: set[str] = set()
    for density in (0.3, 0.1):
        done = [r for r in finished(folder) if r["density"] == density and r["val"] is not None]
        complete = [r for r in done if r["status"] == "complete"]
        best = min(complete, key=lambda r: (-r["val"], r["number"]))
        keys |= set(best["keys"].values())
    return keys


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(SWEEP)
    (folder / "out.txt").write_text(sweep(folder))
    return folder


def test_a_sweep_leaves_what_the_contract_promises(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    frame = pd.read_parquet(run / "results.parquet")
    assert len(frame) == 10
    assert set(frame["status"]) <= {"complete", "stopped", "collapsed"}
    assert {p.name for p in (run / "best").iterdir()} == {"density-0.3.yaml", "density-0.1.yaml"}
    assert {p.name for p in (run / "report").iterdir()} == {"summary.md", "accuracy.png", "networks.png"}
    done = frame[frame["status"] == "complete"]
    assert (done["nonzero"] <= (done["density"] * 1184).astype(int)).all()
    assert (done["effective_density"] <= done["density"]).all()
    # Choices make pre-pruning stages repeat: some epochs were not trained again.
    assert frame["epochs_reused"].sum() > 0

    out = (undisturbed / "out.txt").read_text()
    assert "Best per density" in out
    assert not list((undisturbed / "runs" / "store" / "checkpoints").glob("*"))  # of stopped trials neither
    assert f"mlflow ui --backend-store-uri sqlite:///{run}/mlflow.db" in out
    assert "ray" not in out.lower().replace("array", "")  # no stream of Ray's log lines

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 11
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert set(frame["mlflow_run_id"]) == {r.info.run_id for r in runs if "density" in r.data.tags}


def test_running_it_again_repeats_nothing_and_more_trials_extend_it(undisturbed: Path) -> None:
    before, stages = outcome(undisturbed), stored(undisturbed)
    out = sweep(undisturbed)
    assert "trials to run" not in out
    assert (outcome(undisturbed), stored(undisturbed)) == (before, stages)
    out = sweep(undisturbed, "search.trials_per_density=6")
    assert "2 trials to run, 10 finished before" in out
    after = outcome(undisturbed)
    assert len(after) == 12
    assert [row for row in after if row[1] < 5] == before
    # What was kept and is still the best was not computed again; of the others nothing stays.
    assert set(stored(undisturbed)) == of_the_best(undisturbed)
    assert all(stages.get(key, written) == written for key, written in stored(undisturbed).items())
    extended = stored(undisturbed)
    out = sweep(undisturbed, "search.trials_per_density=6", "--gc")
    assert "of this sweep" in out
    assert (outcome(undisturbed), stored(undisturbed)) == (after, extended)
    best = finish(start(undisturbed, "prunetune.train", "runs/tiny/best/density-0.3.yaml"))
    assert "0 epochs trained, 9 taken from the store" in best


@pytest.mark.parametrize("after", [1, 4])
def test_a_sweep_killed_half_way_ends_like_an_undisturbed_one(folder: Path, undisturbed, after: int) -> None:
    finish(start(folder, DIES, str(after), "tiny.yaml", by="-c"), -signal.SIGKILL)
    kept, stages = finished(folder), stored(folder)
    assert len(kept) == after
    sweep(folder)
    assert outcome(folder) == [row for row in outcome(undisturbed) if row[1] < 5]
    for record in kept:  # to the second: not run again
        assert record in records(folder)
        key = record["keys"]["post_pruning"]
        assert stored(folder).get(key) in (stages.get(key), None)
    assert set(stored(folder)) == of_the_best(folder)
    client = MlflowClient(f"sqlite:///{folder}/runs/tiny/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 11
    assert {r.info.status for r in runs} == {"FINISHED"}


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(folder: Path) -> None:
    process = start(folder, "prunetune.sweep", "tiny.yaml", "search.trials_per_density=500")
    wait_for(lambda: len(finished(folder)) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    out = finish(process, 130)
    assert "To go on:\n  python -m prunetune.sweep tiny.yaml search.trials_per_density=500" in out
    frame = pd.read_parquet(folder / "runs" / "tiny" / "results.parquet")
    assert 2 <= len(frame) == len(finished(folder)) < 1000
    client = MlflowClient(f"sqlite:///{folder}/runs/tiny/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    assert "RUNNING" not in {r.info.status for r in client.search_runs([experiment.experiment_id])}


def test_a_changed_space_is_said_and_what_fits_is_kept(undisturbed: Path) -> None:
    fit = [r for r in finished(undisturbed) if r["params"]["post_pruning.optimizer.lr"] >= 1e-3]
    out = sweep(
        undisturbed, "post_pruning.optimizer.lr={loguniform: [1e-3, 3e-2]}", "search.trials_per_density=1"
    )
    assert "the search space of tiny has changed since the last run" in out
    assert "post_pruning.optimizer.lr: was loguniform [0.0001, 0.03], is now loguniform [0.001, 0.03]" in out
    frame = pd.read_parquet(undisturbed / "runs" / "tiny" / "results.parquet")
    assert len(frame) == len(fit) + 2


def test_several_trials_run_side_by_side_on_a_worker(folder: Path, undisturbed: Path) -> None:
    packed = ["resources.trials_per_worker=5", "search.max_concurrent=5"]
    sweep(folder, *packed)
    done, alone = records(folder), records(undisturbed)
    assert {r["status"] for r in done} <= {"complete", "stopped"}
    assert len(done) == 10
    # The first proposal at each density is the same, and what it gives is, too.
    for density in (0.3, 0.1):
        one, other = (
            next(r for r in rs if (r["density"], r["number"]) == (density, 0)) for rs in (done, alone)
        )
        assert one["params"] == other["params"]
        first, second = one["curve"][1]["metrics"], other["curve"][1]["metrics"]
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-3)


def test_a_users_own_network_and_a_worker_that_dies(folder: Path) -> None:
    """The trial goes on in another worker, from the store, and its result is that of an undisturbed one."""
    overrides = [
        "densities=[0.3]",
        "search.trials_per_density=1",
        "pre_pruning.mask=null",
        "pre_pruning.optimizer.lr=1e-3",
        "post_pruning.optimizer.lr=1e-2",
    ]
    sweep(folder, f"model={{name: 'nets:DiesOnce', flag: {folder / 'died'}}}", *overrides)
    assert (folder / "died").exists()
    (died,) = records(folder)
    assert died["status"] == "complete"
    assert [m["epoch"] for m in died["curve"]] == list(range(1, 10))
    # The same again with the flag set from the start: nothing dies, nothing is shared but the code.
    sweep(folder, f"model={{name: 'nets:DiesOnce', flag: {folder / 'died'}}}", "storage=calm", *overrides)
    (path,) = folder.glob("calm/tiny/trials/*/*.json")
    calm = json.loads(path.read_text())["body"]
    assert died["val"] == calm["val"]
    assert [m["score"] for m in died["curve"]] == [m["score"] for m in calm["curve"]]


def test_a_network_that_cannot_be_trained_ends_the_sweep_with_its_error(folder: Path) -> None:
    process = start(folder, "prunetune.sweep", "tiny.yaml", "model={name: 'nets:Broken'}")
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "the first 3 trials failed" in out
    assert "RuntimeError: this network cannot be trained" in out
    assert {record["status"] for record in finished(folder)} == {"failed"}


def test_diverged_and_collapsed_trials_are_results_and_the_sweep_goes_on(folder: Path) -> None:
    out = sweep(
        folder,
        "pre_pruning={epochs: 1, optimizer: {name: sgd, lr: {choice: [1e30, 0.1]}}, "
        "mask: {choice: [null, {lambda1: 0, lambda2: 100.0, initial: 0.05}]}}",
        "post_pruning={epochs: 3, optimizer: {name: adam, lr: 1e-2}}",
        "densities=[0.3]",
        "search.trials_per_density=9",
    )
    statuses = {
        (r["params"]["pre_pruning.optimizer.lr"], r["params"]["pre_pruning.mask"]): r["status"]
        for r in records(folder)
    }
    assert len(statuses) == 4  # the whole of a finite space, each point once
    assert statuses[0.1, None] in ("complete", "stopped")
    assert statuses[1e30, None] == "diverged"
    assert statuses[0.1, "on"] == "collapsed"
    assert "1 collapsed" in out


def test_the_best_configuration_is_trained_exported_and_served(undisturbed: Path) -> None:
    best = undisturbed / "runs" / "tiny" / "best" / "density-0.1.yaml"
    out = finish(start(undisturbed, "prunetune.train", "runs/tiny/best/density-0.1.yaml"))
    record = min(
        (r for r in finished(undisturbed) if r["density"] == 0.1 and r["status"] == "complete"),
        key=lambda r: (-r["val"], r["number"]),
    )
    assert f"validation {100 * record['val']:.2f} %" in out
    assert "0 epochs trained, 9 taken from the store" in out

    saved = undisturbed / "runs" / "tiny" / "trained" / "density-0.1"
    metrics = json.loads((saved / "metrics.json").read_text())
    assert metrics["test_accuracy"] == record["test"]
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    nonzero = sum(int(t.count_nonzero()) for name, t in weights.items() if t.dim() == 2)
    assert nonzero == metrics["nonzero"] <= int(0.1 * 1184)

    import mlflow

    from prunetune import data
    from prunetune.config.reading import load

    model = mlflow.pyfunc.load_model(str(saved / "mlflow_model"))
    test = data.load(load(str(best)).data).test
    probabilities = model.predict(test.inputs.numpy())
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (probabilities.argmax(1) == test.targets.numpy()).mean() == pytest.approx(metrics["test_accuracy"])

    frame = pd.read_parquet(undisturbed / "runs" / "tiny" / "results.parquet")
    run_id = frame[(frame["density"] == 0.1) & (frame["trial"] == record["number"])]["mlflow_run_id"].item()
    again = finish(start(undisturbed, "prunetune.train", "--run-id", run_id, "--output", "by-run"))
    assert f"validation {100 * record['val']:.2f} %" in again
    other = safetensors.torch.load_file(undisturbed / "by-run" / "model.safetensors")
    assert all(other[name].equal(tensor) for name, tensor in weights.items())


TRAIN = """
name: slow
data: {name: digits, batch_size: 64, limit: 400}
model: {name: 'nets:Held'}
densities: [0.2]
pre_pruning: {epochs: 4, optimizer: {name: adam, lr: 3e-3}}
post_pruning: {epochs: 20, optimizer: {name: adam, lr: 3e-3}}
"""


def hold(folder: Path, step: int) -> Path:
    """Let `nets:Held` wait before this training step of a process; the file that says that it does."""
    (folder / "hold").write_text(str(step))
    return folder / f"held-{step}"


def test_training_goes_on_after_ctrl_c(folder: Path) -> None:
    (folder / "train.yaml").write_text(TRAIN)
    held = hold(folder, step=40)  # six an epoch: within post-pruning's third
    process = start(folder, "prunetune.train", "train.yaml")
    wait_for(held.exists, process)
    os.kill(process.pid, signal.SIGINT)
    assert "To go on:\n  python -m prunetune.train train.yaml" in finish(process, 130)
    (folder / "hold").unlink()
    out = finish(start(folder, "prunetune.train", "train.yaml"))
    assert "pre_pruning  epoch   4" in out
    first = safetensors.torch.load_file(folder / "runs/slow/trained/density-0.2/model.safetensors")
    finish(start(folder, "prunetune.train", "train.yaml", "storage=calm"))
    calm = safetensors.torch.load_file(folder / "calm/slow/trained/density-0.2/model.safetensors")
    assert all(calm[name].equal(tensor) for name, tensor in first.items())


def trained(folder: Path, storage: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / storage / "slow/trained/density-0.2/model.safetensors")


def assert_like_one_worker(folder: Path, *overrides: str) -> None:
    """What is in runs/ is what one worker gives: the same weights are zero, the others are close."""
    finish(start(folder, "prunetune.train", "train.yaml", "storage=calm", *overrides))
    ours, alone = trained(folder, "runs"), trained(folder, "calm")
    assert ours.keys() == alone.keys()
    for name, tensor in alone.items():
        assert np.array_equal(ours[name] == 0, tensor == 0)
        assert np.allclose(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_training_over_two_workers_survives_the_death_of_one(folder: Path) -> None:
    mask = "pre_pruning.mask={lambda1: 1e-6, lambda2: 1e-4}"
    dies = f"model={{name: 'nets:DiesOnce', flag: {folder / 'died'}, at: 45}}"  # in post-pruning
    (folder / "train.yaml").write_text(TRAIN)
    out = finish(start(folder, "prunetune.train", "train.yaml", mask, dies, "--workers", "2"))
    assert (folder / "died").exists()
    assert "a worker was lost; training goes on" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("  post_pruning")] == [
        str(epoch)
        for epoch in range(1, 21)  # each once
    ]
    assert "24 epochs trained, 0 taken from the store" in out
    assert_like_one_worker(folder, mask, dies)


def test_training_over_two_workers_goes_on_after_ctrl_c_and_kill(folder: Path) -> None:
    (folder / "train.yaml").write_text(TRAIN)
    words = ("prunetune.train", "train.yaml", "--workers", "2")
    held = hold(folder, step=40)
    process = start(folder, *words)
    wait_for(held.exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stages = stored(folder)
    assert len(stages) == 2  # of what is before post-pruning
    held = hold(folder, step=15)  # another name: workers of the killed run may still be there
    process = start(folder, *words)
    wait_for(held.exists, process)
    os.kill(process.pid, signal.SIGINT)
    assert "To go on:\n  python -m prunetune.train train.yaml --workers 2" in finish(process, 130)
    (folder / "hold").unlink()
    assert "post_pruning epoch  20" in finish(start(folder, *words))
    assert stages.items() <= stored(folder).items()  # not trained again
    assert "; 0 epochs trained, 24 taken from the store" in finish(start(folder, *words))
    assert_like_one_worker(folder)


def test_a_network_that_cannot_be_trained_ends_training_over_two_workers(folder: Path) -> None:
    (folder / "train.yaml").write_text(TRAIN)
    broken = "model={name: 'nets:Broken'}"
    process = start(folder, "prunetune.train", "train.yaml", broken, "--workers", "2")
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "RuntimeError: this network cannot be trained" in out
    out = finish(start(folder, "prunetune.train", "train.yaml", "--workers", "50"), 2)
    assert "--workers 50: they need 50 CPUs (resources.cpus each); this machine has" in out
