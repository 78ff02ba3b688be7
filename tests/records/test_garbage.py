"""`prunetune.sweep --gc`, and what sweeps, trainings and extensions find after it; without Ray."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune import pipeline, sweep
from prunetune.cli import commands
from prunetune.config.reading import load
from prunetune.execution import ray_tune as runner
from prunetune.execution.seam import Trials
from prunetune.records import garbage, lock
from prunetune.records.garbage import Owners, survey
from prunetune.records.ledger import Ledger
from prunetune.records.trial import TrialRecord, trial_config
from prunetune.store import File, Store
from prunetune.trackers.mlflow import tracker as tracking

TEXT = """
name: tiny
data: {name: digits, batch_size: 64, limit: 400, validation_fraction: 0.2}
model: {name: mlp, hidden: [8]}
densities: [0.3, 0.1]
pre_pruning: {epochs: 2, optimizer: {name: adam, lr: {choice: [1.0e-3, 1.0e-2]}}}
pruning: {schedule: {name: iterative, rounds: 2, epochs: 1}, rewind: 1}
post_pruning: {epochs: 2, optimizer: {name: adam, lr: {loguniform: [3.0e-3, 3.0e-2]}}}
search: {trials_per_density: 3, early_stopping: null}
"""

HOUR = 3600
A_BLOB, B_BLOB = "a." + 64 * "0", "b." + 64 * "1"


class StoppedError(BaseException):
    """In place of `kill -9`."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep's file, where sweeps run their trials in this process, without MLflow."""
    (tmp_path / "tiny.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner.RayTune, "run", in_this_process())
    monkeypatch.setattr(tracking, "Tracker", NoTracker)
    return tmp_path


class NoTracker:
    """No MLflow."""

    def __init__(self, *arguments: Any) -> None:
        self.run_ids: dict[str, str] = {}
        self.begin = self.started = self.epochs = self.ended = self.finish = lambda *a: None

    def close(self) -> int:
        return 0


def in_this_process(die_after: float = float("inf"), interrupt_after: float = float("inf")) -> Any:
    """A `RayTune.run` that runs one trial after the other: dies, or is interrupted, after so many epochs."""

    def run(self: runner.RayTune, trials: Trials) -> bool:
        config, search, listeners = trials.config, trials.search, trials.listeners
        store, epochs = Store(config.storage).sub("store"), 0
        while (record := search.next()) is not None:
            for listener in listeners:
                listener.started(record)
            trial = pipeline.run(
                trial_config(record, config),
                store=store,
                owner=record.uid,
                checkpoint_interval=0,
                also=config.densities,
            )
            while True:
                try:
                    report = next(trial)
                except StopIteration as end:
                    result: pipeline.PipelineResult = end.value
                    break
                epochs += 1
                if epochs >= die_after:
                    raise StoppedError
                if epochs >= interrupt_after:
                    return True
                record.curve.append(report)
                search.progressed(record)
            record.take(result.metrics())
            record.count_epochs()
            search.tell(record)
            for listener in listeners:
                listener.ended(record)
        return False

    return run


def records(name: str = "tiny") -> list[TrialRecord]:
    return Ledger(Store("runs").sub(name)).records()


def stages() -> set[str]:
    return set(Store("runs").sub("store").keys("stages"))


def of(*chosen: TrialRecord) -> set[str]:
    return {key for record in chosen for key in record.keys.values()}


def best(name: str = "tiny") -> list[TrialRecord]:
    every = records(name)
    return [
        max((r for r in every if r.density == d), key=lambda r: (r.val_accuracy or 0, -r.number))
        for d in (0.3, 0.1)
    ]


def epochs_to_train(density: float, name: str = "tiny") -> int:
    """How many epochs `prunetune.train` on the sweep's best would train."""
    config = load(f"runs/{name}/best/density-{density:g}.yaml")
    return pipeline.run_pipeline(config, store=Store("runs").sub("store"), device="cpu").epochs_run


def age(seconds: float = 2 * HOUR) -> None:
    """Make everything in the store older."""
    for path in Path("runs").rglob("*"):
        if path.is_file() and "store" in path.parts:
            os.utime(path, (time.time() - seconds,) * 2)


def content() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path("runs").rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_after_a_sweep_the_store_holds_the_best_and_they_are_taken_from_it(folder: Path) -> None:
    assert sweep.main(["tiny.yaml"]) == 0
    assert stages() == of(*best())
    assert [epochs_to_train(density) for density in (0.3, 0.1)] == [0, 0]
    header = Store("runs/tiny").read_record("sweep")
    assert set((header or {})["kept"]) == of(*best())


def test_gc_of_a_finished_sweep_removes_nothing_and_everything_goes_on(folder: Path, capsys) -> None:
    sweep.main(["tiny.yaml"])
    before = content()
    age()
    assert sweep.main(["tiny.yaml", "--gc"]) == 0
    out = capsys.readouterr().out
    assert "removed" in out
    assert "of this sweep" in out
    assert content() == before
    assert [epochs_to_train(density) for density in (0.3, 0.1)] == [0, 0]
    known = records()
    sweep.main(["tiny.yaml"])
    assert records() == known
    sweep.main(["tiny.yaml", "search.trials_per_density=4"])
    assert len(records()) == 8
    assert [r for r in records() if r.number < 3] == known
    assert stages() == of(*best())


def test_pre_pruned_models_stay_for_a_later_extension_where_the_file_says_so(folder: Path) -> None:
    sweep.main(["tiny.yaml", "keep.pre_pruning=always"])
    shared = {key for r in records() for name, key in r.keys.items() if name.startswith("pre_pruning")}
    assert shared < stages()
    age()
    sweep.main(["tiny.yaml", "keep.pre_pruning=always", "--gc"])
    assert shared < stages()
    sweep.main(["tiny.yaml", "--gc"])  # the policy has changed
    assert stages() == of(*best())


def test_all_networks_stay_where_the_file_says_so(folder: Path) -> None:
    sweep.main(["tiny.yaml", "keep.post_pruning=all"])
    assert stages() == of(*records())


@pytest.mark.parametrize("epochs", [1, 4, 9, 17])
def test_killed_anywhere_and_cleaned_the_sweep_ends_like_an_undisturbed_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    sweep.main(["tiny.yaml", "name=calm", "storage=elsewhere"])
    calm = Ledger(Store("elsewhere").sub("calm")).records()
    monkeypatch.setattr(runner.RayTune, "run", in_this_process(die_after=epochs))
    with pytest.raises(StoppedError):
        sweep.main(["tiny.yaml"])
    age()
    checkpoints = Store("runs").sub("store").keys("checkpoints")
    finished = [r for r in records() if r.finished]
    sweep.main(["tiny.yaml", "--gc"])
    assert Store("runs").sub("store").keys("checkpoints") == checkpoints
    monkeypatch.setattr(runner.RayTune, "run", in_this_process())
    sweep.main(["tiny.yaml"])
    assert [r for r in records() if r in finished] == finished
    assert [(r.params, r.val_accuracy, r.epochs_run) for r in records()] == [
        (r.params, r.val_accuracy, r.epochs_run) for r in calm
    ]
    assert stages() == of(*best())
    assert Store("runs").sub("store").keys("checkpoints") == []


def test_interrupted_the_pre_pruned_models_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.RayTune, "run", in_this_process(interrupt_after=17))
    assert sweep.main(["tiny.yaml"]) == commands.EXIT_INTERRUPTED
    finished = [r for r in records() if r.finished]
    shared = {r.keys["pre_pruning"] for r in finished}
    assert shared <= stages()
    age()
    sweep.main(["tiny.yaml", "--gc"])
    assert shared <= stages()
    assert (Store("runs/tiny").read_record("sweep") or {})["kept"] is None


def test_branch_points_at_other_densities_stay_for_the_trials_there_and_go_with_the_networks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_networks = ["search.exploration=1.0", "pre_pruning.optimizer.lr={loguniform: [1.0e-3, 1.0e-2]}"]
    words = ["tiny.yaml", "pruning={from_epoch: best}", *own_networks]
    monkeypatch.setattr(runner.RayTune, "run", in_this_process(interrupt_after=7))
    assert sweep.main(words) == commands.EXIT_INTERRUPTED
    # The first trial, at 0.3, has found the branch point at 0.1 as well.
    (first,) = (r for r in records() if r.finished)
    assert len(first.watched) == 2
    assert set(first.watched) <= stages()
    age()
    sweep.main([*words, "--gc"])
    assert set(first.watched) <= stages()
    monkeypatch.setattr(runner.RayTune, "run", in_this_process())
    sweep.main([*words, "keep.pre_pruning=always"])
    never_taken = {key for r in records() for key in r.watched} - of(*records())
    assert len(never_taken) == 6  # every trial has a network of its own
    assert never_taken <= stages()
    sweep.main([*words, "--gc"])  # the policy has changed: they go at once, as the networks do
    assert stages() == of(*best())


def test_what_nobody_refers_to_goes_when_it_is_old(folder: Path, capsys) -> None:
    sweep.main(["tiny.yaml"])
    store, before = Store("runs").sub("store"), stages()
    store.save("stages", "nobodys", {"x": torch.ones(1000)}, {})
    store.save("checkpoints", "nobodys", {"x": torch.ones(1000)}, {})
    store.write_file("stages/nobodys2." + 64 * "0", b"killed before the manifest")
    store.write_file("stages/key.json." + 32 * "0" + ".tmp", b"killed")
    Path("runs/tiny/trials/x." + 32 * "0" + ".tmp").write_text("killed")
    store.write_file("damaged/k.json.12345678", b"")
    sweep.main(["tiny.yaml", "--gc"])
    assert "nobodys" in stages()
    assert "stages nobody refers to, new" in capsys.readouterr().out
    age()
    os.utime("runs/tiny/trials/x." + 32 * "0" + ".tmp", (0, 0))
    there = content()
    assert sweep.main(["tiny.yaml", "--gc", "--dry-run"]) == 0
    assert content() == there
    assert "would go" in capsys.readouterr().out
    sweep.main(["tiny.yaml", "--gc"])
    out = capsys.readouterr().out
    for line in ("stages nobody refers to", "checkpoints", "blobs without a manifest", "temporary files"):
        assert line in out
    assert stages() == before
    assert {path.name for path in Path("runs/store").rglob("*") if path.is_file()} == {
        name for key in before for name in (f"{key}.json", store.blob("stages", key))
    }
    assert not list(Path("runs").rglob("*.tmp"))


def test_what_another_sweep_or_a_training_refers_to_stays(folder: Path) -> None:
    sweep.main(["tiny.yaml"])
    sweep.main(["tiny.yaml", "name=other", "seed=1"])
    config = load("runs/tiny/best/density-0.1.yaml", ["seed=2", "name=mine"])
    pipeline.run_pipeline(config, device="cpu")
    before = stages()
    assert before > of(*best(), *best("other"))
    age()
    sweep.main(["tiny.yaml", "--gc"])
    assert stages() == before
    assert [epochs_to_train(0.1), epochs_to_train(0.1, "other")] == [0, 0]
    assert pipeline.run_pipeline(config, device="cpu", owner="again").epochs_run == 0
    shutil.rmtree("runs/other")  # and so lets go of its networks
    sweep.main(["tiny.yaml", "--gc"])
    folder = Store("runs").sub("mine")
    (name,) = folder.records("trained")
    mine = set((folder.read_record(name) or {})["keys"].values())
    assert stages() == of(*best()) | mine


def test_gc_says_what_is_wrong(folder: Path, capsys) -> None:
    def message(*arguments: str) -> str:
        assert commands.run(sweep.main, ["tiny.yaml", "--gc", *arguments]) == 2
        return capsys.readouterr().err

    assert "no sweep was run here" in message()
    assert not Path("runs").exists()
    sweep.main(["tiny.yaml"])
    before = content()
    wrong = message("post_pruning.epochs=3")
    assert "another search space" in wrong
    assert "post_pruning.epochs: was 2, is now 3" in wrong
    with lock.exclusive(Store("runs/tiny")):
        assert "runs this sweep" in message()
    assert content() == before


def test_the_data_of_a_space_may_differ_between_trials(folder: Path) -> None:
    choice = "data={name: digits, batch_size: 64, limit: {choice: [150, 200]}}"
    sweep.main(["tiny.yaml", choice, "search.trials_per_density=4"])
    assert {r.tree["data"]["limit"] for r in records()} == {150, 200}
    assert stages() == of(*best())


def files(*names: str, old: bool = True) -> list[File]:
    written = datetime.now(UTC) - (timedelta(hours=2) if old else timedelta())
    return [File(name, 10, written) for name in names]


def sorted_out(
    stages: list[File], checkpoints: list[File] | None = None, **references: Any
) -> tuple[set[str], set[str]]:
    """Names of what goes and of what stays."""
    found = {"stages": stages, "checkpoints": checkpoints or [], "damaged": [], "objects": []}
    who = Owners(**{"kept": set(), "dropped": {}, "others": set(), **references})
    goes, stays = survey(Store("nowhere"), found, who)
    return {name for item in goes for name in item.names}, {name for item in stays for name in item.names}


A = ("a.json", A_BLOB)
A_PATHS = {"stages/a.json", f"stages/{A_BLOB}"}


@pytest.mark.parametrize(
    ("references", "old", "goes"),
    [
        ({"kept": {"a"}}, True, False),
        ({"others": {"a"}}, True, False),
        ({"others": {"a"}, "dropped": {"a": "pruning"}}, True, False),
        ({"dropped": {"a": "pruning"}}, False, True),  # a finished trial's: nobody writes it
        ({"kept": {"a"}, "dropped": {"a": "pruning"}}, True, False),
        ({}, True, True),
        ({}, False, False),
    ],
)
def test_an_artefact_goes_by_reference_and_age(references, old: bool, goes: bool) -> None:
    assert sorted_out(files(*A, old=old), **references) == ((A_PATHS, set()) if goes else (set(), A_PATHS))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", ["a.json", A_BLOB, A_BLOB + "." + 32 * "f" + ".tmp"])
def test_halves_and_leftovers_go_when_old_whoever_refers_to_them(name: str, old: bool) -> None:
    goes, stays = sorted_out(files(name, old=old), kept={"a"})
    assert (goes, stays) == (({f"stages/{name}"}, set()) if old else (set(), {f"stages/{name}"}))


def test_a_checkpoint_of_a_finished_stage_goes(tmp_path: Path) -> None:
    goes, stays = sorted_out(files(*A), files(*A, "b.json", B_BLOB), kept={"a", "b"})
    assert goes == {"checkpoints/a.json", f"checkpoints/{A_BLOB}"}
    assert stays == A_PATHS | {"checkpoints/b.json", f"checkpoints/{B_BLOB}"}


def test_where_the_filesystem_knows_no_age_only_what_is_dropped_goes() -> None:
    unknown = [File(name, 10, None) for name in (*A, "b.json", B_BLOB, "c." + 64 * "2")]
    goes, stays = sorted_out(unknown, dropped={"a": "post_pruning"})
    assert goes == A_PATHS
    assert stays == {"stages/b.json", f"stages/{B_BLOB}", "stages/c." + 64 * "2"}


def test_on_a_remote_filesystem_a_blob_that_was_replaced_is_found(remote: Store) -> None:
    remote.save("stages", "a", {"x": torch.ones(2)}, {})
    blob = remote.blob("stages", "a")
    remote.write_file(f"stages/{A_BLOB}", b"")
    found = garbage.listing(remote)
    assert {f.name for f in found["stages"]} == {"a.json", blob, A_BLOB}
    goes, stays = survey(remote, found, Owners({"a"}, {}, set()))
    assert [item.what for item in stays] == ["of this sweep", "blobs without a manifest, new"]
    assert goes == []
