"""The benchmarks' arithmetic and tables. Nothing here measures."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    bounds,
    clocked,
    common,
    events,
    history,
    orchestration,
    plain_loop,
    scaling,
    step_time,
    sweep_cost,
    tables,
    time_to_accuracy,
    vectorized,
)
from prunetune import data as datasets
from prunetune import pipeline
from prunetune.config import reading as configuration
from prunetune.config.document import Document, override, read
from prunetune.config.reading import sweep_from_document
from prunetune.config.schema import Config, DataConfig, ModelConfig, SearchConfig
from prunetune.engine.loop import EpochWork
from prunetune.models import build
from prunetune.records.ledger import Ledger
from prunetune.search.queue import SweepSearch
from prunetune.store import Store

MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 4.0, "gpu": None, "load": 0.1}


def result(name: str, body: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    return {**common.result(name, device, MACHINE, body), "date": "2026-01-01", "versions": {"torch": "2"}}


# --- what they share


def test_tasks_take_turns_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    seconds = common.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=2,
        warmup=1,
        clock=lambda: float(next(ticks)),
    )
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (1.0, "1.00"),
        (99.99, "100.0"),
        (1234.5, "1,234"),
        (0.0, "0.00"),
        (-3.14159, "-3.14"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert common.significant(value) == text


def test_a_goal_says_whether_it_is_met() -> None:
    assert common.judged("x", 1.6, at_most=1.6) == "x ≤ 1.6: 1.60, met"
    assert common.judged("x", 14.99, at_least=15) == "x ≥ 15: 15.0, missed"


def test_a_quick_result_is_not_written_unless_asked(tmp_path: Path) -> None:
    document = result("step_time", {"x": 1})
    quick = argparse.Namespace(quick=True, output=None)
    assert common.write(document, quick) is None
    path = common.write(document, argparse.Namespace(quick=True, output=tmp_path / "new"))
    assert path == tmp_path / "new" / "step_time-cpu.json"
    assert json.loads(path.read_text()) == document


# --- the bounds of a step


def test_macs_of_the_papers_mlp_are_its_weights() -> None:
    model = build(ModelConfig(name="mlp", hidden=[100] * 5), (1, 28, 28), 10, seed=0)
    assert bounds.macs(model, (1, 28, 28)) == 119_400
    assert bounds.step_flops(119_400, 128) == 91_699_200


def test_macs_of_vgg16_are_the_sum_over_its_layers() -> None:
    stages = [(64, 2, 32), (128, 2, 16), (256, 3, 8), (512, 3, 4), (512, 3, 2)]  # channels, layers, side
    expected, channels = 512 * 10, 3
    for out, layers, side in stages:
        for _ in range(layers):
            expected += channels * out * 9 * side**2
            channels = out
    model = build(ModelConfig(name="vgg16"), (3, 32, 32), 10, seed=0)
    assert bounds.macs(model, (3, 32, 32)) == expected


def test_the_optimizers_traffic() -> None:
    # SGD with momentum: w and v read and written, g read: 5 values. Adam: 7.
    assert bounds.optimizer_bytes(100, 0, states=1) == 100 * 5 * 4
    assert bounds.optimizer_bytes(100, 0, states=2) == 100 * 7 * 4
    # 60 of them masked: Adam on M, and the drawn weights.
    assert bounds.optimizer_bytes(100, 60, states=2) == 100 * 7 * 4 + 60 * 8 * 4


def test_a_step_is_bound_by_the_slower_of_arithmetic_and_traffic() -> None:
    rates = {"matmul_flops_per_second": 1e9, "copy_bytes_per_second": 1e6}
    assert bounds.bound_seconds(2e9, 1e6, rates) == 2.0
    assert bounds.bound_seconds(1e9, 3e6, rates) == 3.0


# --- its data and configurations


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("parquet", (3, 32, 32))])
def test_the_project_and_the_plain_loop_read_the_same_images(
    tmp_path: Path, name: Any, shape: tuple[int, int, int]
) -> None:
    root = str(tmp_path / name)
    images, labels = plain_loop.write_images(name, Path(root), shape, 17)
    data = datasets.load(DataConfig(name=name, root=root, validation_fraction=1e-9))
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 1, 10)
    rows = {tuple(image.flatten().tolist()): int(label) for image, label in zip(images, labels, strict=True)}
    for image, label in zip(data.train.inputs, data.train.targets, strict=True):
        assert rows[tuple(image.flatten().tolist())] == label
    x, y = plain_loop.plain_source(name, root, images, labels)[3]
    assert y == labels[3]
    if name == "mnist":  # no augmentation
        torch.testing.assert_close(x, (images[3] / 255 - 0.5) / 0.25)


def test_the_plain_loop_trains_all_but_the_last_small_batch() -> None:
    source = [(torch.full((3,), float(index)), index % 2) for index in range(9)]
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            steps.append(1)
            super().step(closure)

    running = plain_loop.plain_epochs(
        source,  # type: ignore[arg-type]
        model,
        Counting(model.parameters(), lr=0.1),
        batch_size=4,
        device="cpu",
    )
    next(running)
    assert len(steps) == 2
    assert not torch.equal(model.weight, before)


def test_each_kind_of_step_is_a_valid_configuration_of_its_stage(tmp_path: Path) -> None:
    workload = step_time.workloads("cpu", quick=True)["mlp"]
    plain_loop.write_images("mnist", tmp_path, workload.image, workload.steps * step_time.BATCH + 1)
    for kind in ("dense", "mask", "target", "post_pruning"):
        tree = step_time.tree(workload, kind, str(tmp_path), 3)
        config = configuration.from_document(Document(kind, tree))
        steps = pipeline.run(config, store=Store(str(tmp_path / kind)))
        report = next(steps)
        steps.close()
        assert report.stage == ("post_pruning" if kind == "post_pruning" else "pre_pruning")
        assert ("mask_density" in report.metrics) == (kind in ("mask", "target"))
        assert math.isfinite(report.metrics["train_loss"])


def test_on_a_gpu_each_kind_but_the_plain_loop_is_measured_as_a_graph_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step_time.kinds("cpu") == list(step_time.STEPS)
    kinds = step_time.kinds("cuda")
    assert len(kinds) == 2 * len(step_time.STEPS) - 1
    driven = []

    def epochs(config: Config, folder: str, device: str) -> Iterator[None]:
        driven.append((Path(folder).name, config.cuda_graphs))
        while True:
            yield

    monkeypatch.setattr(step_time, "kinds", lambda device: [kind for kind in kinds if kind != "plain"])
    monkeypatch.setattr(step_time, "epochs", epochs)
    found = step_time.measure(step_time.workloads("cpu", quick=True)["mlp"], "cpu", [], tmp_path)
    assert driven == [(kind, kind.endswith("+graph")) for kind in kinds if kind != "plain"]
    assert found["bytes"]["mask+graph"] == found["bytes"]["mask"] > found["bytes"]["dense+graph"]


# --- a clock around trials


@pytest.mark.parametrize("steps", [pipeline.run, pipeline.steps])
def test_a_clocked_pipeline_is_the_pipeline(tmp_path: Path, tiny: dict[str, Any], steps: Any) -> None:
    config = configuration.from_document(Document("tiny", tiny))

    def drive(steps: Any, store: str) -> tuple[list[Any], Any]:
        reports = []
        running = steps(config, store=Store(str(tmp_path / store)), device="cpu", owner="me")
        while True:
            try:
                step = next(running)
            except StopIteration as end:
                return reports, end.value
            reports.append("work" if isinstance(step, EpochWork) else step)

    plain_reports, plain = drive(steps, "a")
    reports, clocked_result = drive(clocked.Clocked(steps, str(tmp_path)), "b")
    assert reports == plain_reports
    assert clocked_result.val_accuracy == plain.val_accuracy
    (times,) = clocked.read(tmp_path)
    assert 0 < times.inside <= times.ended - times.begun


def test_a_trial_that_is_stopped_leaves_its_times_too(tmp_path: Path, tiny: dict[str, Any]) -> None:
    config = configuration.from_document(Document("tiny", tiny))
    steps = clocked.Clocked(pipeline.run, str(tmp_path))
    running = steps(config, store=Store(str(tmp_path / "store")), device="cpu", owner="me")
    next(running)
    running.close()
    assert len(clocked.read(tmp_path)) == 1


def test_what_a_slot_spends_beyond_its_trials() -> None:
    trials = [
        clocked.Times(process=1, begun=0.0, ended=5.0, inside=5.0),
        clocked.Times(process=2, begun=0.0, ended=6.0, inside=1.0),  # the first of its process
        clocked.Times(process=1, begun=5.25, ended=7.25, inside=1.5),
        clocked.Times(process=1, begun=8.25, ended=9.25, inside=1.0),
    ]
    first, second = clocked.beyond(trials)
    assert (first.between, first.within, first.inside, first.total) == (0.25, 0.5, 1.5, 0.75)
    assert (second.between, second.within) == (1.0, 0.0)


# --- trials that only wait, and a past that never was


def test_a_waiting_trial_reports_like_a_real_one(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    config = configuration.from_document(Document("tiny", tiny))
    store = Store(str(tmp_path))
    real = list(pipeline.run(config, store=store))
    waited = list(scaling.waiting(config, store=store, device="cpu", owner="me"))
    assert [epoch.epoch for epoch in waited] == list(range(1, 21))
    assert [epoch.post_epoch for epoch in waited if epoch.post_epoch] == list(range(1, 11))
    for stage in ("pre_pruning", "post_pruning"):
        theirs, ours = (next(e for e in epochs if e.stage == stage) for epochs in (real, waited))
        assert ours.key == theirs.key
        assert set(ours.metrics) == set(theirs.metrics) - {"mask_density", "mask_open"}


def test_the_made_up_past_is_one_that_a_sweep_takes_for_its_own(tmp_path: Path) -> None:
    config, problem, ledger = history.make(tmp_path, trials=12, proposals=1)
    stages = Store(config.storage).sub("store")
    history.write_past(problem, ledger, stages, config.densities, 12)
    again = Ledger(ledger.store)
    search = SweepSearch(config, problem, again, lambda key: stages.has("stages", key))
    assert len(search.past) == len(again.fitting(problem)) == 12 * 5
    assert len(search) == 5
    explored = {r.keys["pre_pruning"] for r in again.records() if not r.branched}
    branches = [r for r in again.records() if r.branched]
    assert len(branches) > 20
    assert {r.keys["pre_pruning"] for r in branches} <= explored
    for record in again.records():
        assert len(record.curve) == (
            80 if record.status == "complete" else 40 + (record.curve[-1].post_epoch or 0)
        )
        assert record.epochs_reused == (40 if record.branched else 0)
    assert {r.status for r in again.records()} == {"complete", "stopped"}
    proposed = search.next()
    assert proposed is not None
    assert proposed.number == 12


# --- tables


STEP_TIME = {
    "rates": {"matmul_flops_per_second": 1e12, "copy_bytes_per_second": 1e9},
    "workloads": {
        "mlp": {
            "title": "MLP",
            "batch": 1000,
            "steps": 10,
            "macs": 100_000,
            "parameters": 1,
            "bytes": {"dense": 0, "mask": 2e6},
            "seconds_per_step": {
                "dense": [0.001, 0.002, 0.006],
                "mask": [0.004] * 3,
                "plain": [0.008],
            },
        }
    },
}


def test_the_step_times_table() -> None:
    # Arithmetic: 6·1e5·1000 = 6e8 operations take 0.6 ms; the mask's traffic takes 2 ms.
    body = json.loads(json.dumps(STEP_TIME))
    body["workloads"]["mlp"]["bytes"]["plain"] = 0
    text = step_time.render(result("step_time", body))
    assert "| dense | 2.00 | 1.00 – 6.00 | 1.00 | 4.00 × | 30 % |" in text
    assert "| mask, penalty | 4.00 | 4.00 – 4.00 | 2.00 | 2.00 × | 50 % |" in text
    assert "mask / dense ≤ 1.6: 2.00, missed" in text
    assert "2 cores of a CPU; torch 2; 2026-01-01." in text


def test_the_step_times_table_of_a_gpu_has_graphs_beside_launched_kernels() -> None:
    body = json.loads(json.dumps(STEP_TIME))
    workload = body["workloads"].pop("mlp") | {
        "bytes": dict.fromkeys(("dense", "mask", "plain", "dense+graph", "mask+graph"), 0),
        "seconds_per_step": {
            "dense": [0.002],
            "mask": [0.003],
            "plain": [0.016],
            "dense+graph": [0.001],
            "mask+graph": [0.00125],
        },
    }
    body["workloads"]["vgg16"] = workload
    text = step_time.render(result("step_time", body, "gpu"))
    assert "| mask, penalty, as a graph | 1.25 | 1.25 – 1.25 | 0.62 | 12.8 × | 48 % |" in text
    assert "mask / dense ≤ 1.3: 1.50, missed; plain / dense ≥ 15: 8.00, missed" in text
    assert "mask / dense, as graphs ≤ 1.3: 1.25, met; plain / dense, as graphs ≥ 15: 16.0, met" in text
    assert "share of the matrix rate, as graphs ≥ 0.4: 0.600, met" in text


def test_the_table_of_trials_side_by_side_compares_with_launched_kernels_alone() -> None:
    row = {"model": "mnist", "stage": "masked"}
    rows = [
        {**row, "graphs": False, "seconds": {"1": 1.0, "4": 2.0}},
        {**row, "graphs": True, "seconds": {"1": 0.5, "4": 0.16}},
    ]
    text = vectorized.render(result("vectorized", {"limit": 0, "rows": rows}, "gpu"))
    assert "| mnist | masked | 1,000 ms | 2.0 × |" in text
    assert "| mnist | masked, as graphs | 500 ms | 25.0 × |" in text
    assert "times, the best ≥ 20: 25.0, met" in text


def test_the_orchestration_table() -> None:
    body = {
        "trials": 4,
        "processes": 1,
        "starting": 9.0,
        "ending": 1.0,
        "work": [1.0, 1.0, 4.0],
        "between": [0.125, 0.25, 0.5],
        "within": [0.125, 0.0, 0.25],
    }
    text = orchestration.render(result("orchestration", body))
    assert "| overhead | 0.250 | 0.417 |" in text
    assert "| the trial's work | 1.00 | 2.00 |" in text
    assert "overhead, median ≤ 0.3: 0.250, met" in text


def test_the_scaling_table() -> None:
    one = {"workers": 1, "processes": 1, "trials": 10, "seconds": 12.5, "inside": 10.0, "ending": 2.0}
    four = {"workers": 4, "processes": 4, "trials": 40, "seconds": 20.0, "inside": 40.0, "ending": 3.0}
    assert scaling.efficiency(one, four) == 0.625
    text = scaling.render(result("scaling", {"runs": [one, four]}))
    assert "| 1 | 10 | 12.5 | 2,880 | 80 % | 2.00 |" in text
    assert "| 4 | 40 | 20.0 | 7,200 | 50 % | 3.00 |" in text
    assert "4 × the rate of one ≥ 0.8: 0.625, missed" in text


def test_the_history_table() -> None:
    seconds = dict.fromkeys(history.TITLES, 2.0) | {"open": 30.0, "search": 20.0, "rungs": 11.0}
    text = history.render(result("history", {"densities": 5, "trials": 2000, "seconds": seconds}))
    assert "After 10,000 trials" in text
    assert "| propose one more trial | 2.00 |" in text
    assert "resume ≤ 60: 61.0, missed; propose ≤ 1: 2.00, missed; report ≤ 60: 4.00, met" in text


def test_tables_go_between_the_markers_and_nowhere_else() -> None:
    text = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
    once = tables.replaced(text, "new")
    assert once == f"a\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nb\n"
    assert tables.replaced(once, "new") == once
    with pytest.raises(ValueError, match="once"):
        tables.replaced("no markers", "new")


def test_committed_results_name_no_place_of_the_machine() -> None:
    files = sorted(common.RESULTS.glob("*.json"))
    assert files
    for path in files:
        assert not re.search(r"[\"=]/|[A-Z]:\\\\", path.read_text(encoding="utf-8")), path.name


def test_the_page_shows_the_committed_results() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.replaced(text, tables.tables()) == text


def cost(seconds: float, **best: float) -> dict[str, Any]:
    """What a way of `sweep_cost` found; validation accuracy by density, a point less in the test."""
    return {
        "seconds": seconds,
        "epochs_run": 1234,
        "best": {
            density.removeprefix("d"): {"val_accuracy": accuracy, "test_accuracy": accuracy - 0.01}
            for density, accuracy in best.items()
        },
    }


def test_a_sweeps_cost_is_told_against_plain_ray_tune() -> None:
    ways = {"plain": cost(1200, **{"d0.1": 0.975, "d0.01": 0.96}), "compact": cost(150, **{"d0.1": 0.98})}
    text = sweep_cost.render(result("sweep_cost", {"setting": "A search.", "ways": ways}))
    assert "| plain | 20.0 min | 1.0 × | 1,234 | 97.50 (96.50) | 96.00 (95.00) |" in text
    assert "| compact | 2.5 min | 8.0 × | 1,234 | 98.00 (97.00) | none |" in text
    assert "times cheaper than plain Ray Tune ≥ 6: 8.00, met" in text


def test_without_plain_ray_tune_no_ratio_is_told() -> None:
    ways = {"stopping": cost(300, **{"d0.1": 0.975}), "compact": cost(150, **{"d0.1": 0.98, "d0.01": 0.9})}
    text = sweep_cost.render(result("sweep_cost", {"setting": "A search.", "ways": ways}))
    assert "| stopping | 5.0 min |  | 1,234 | 97.50 (96.50) | none |" in text
    assert "| compact | 2.5 min |  | 1,234 | 98.00 (97.00) | 90.00 (89.00) |" in text
    assert "Goal" not in text


def test_each_way_of_a_sweep_adds_one_saving() -> None:
    def config(way: str) -> Config:
        overrides = sweep_cost.WAYS[way]
        assert overrides is not None
        _, found = sweep_from_document(override(read(sweep_cost.CONFIG), overrides))
        return found

    workers, reuse, stopping, compact = map(config, ("workers", "reuse", "stopping", "compact"))
    assert [way.search.exploration == 1 for way in (workers, reuse, stopping, compact)] == [
        True,
        *[False] * 3,
    ]
    found = [way.search.early_stopping is None for way in (workers, reuse, stopping, compact)]
    assert found == [True, True, False, False]
    assert [way.compact_layers for way in (workers, reuse, stopping, compact)] == [False, False, False, True]
    default = SearchConfig(trials_per_density=32, early_stopping=stopping.search.early_stopping)
    assert compact.search == stopping.search == default


# --- time to accuracy


def test_a_density_is_reached_by_its_first_good_trial_and_the_whole_by_the_last_density() -> None:
    better = {
        "0.1": [{"seconds": 5.0, "val": 0.7}, {"seconds": 9.0, "val": 0.9}],
        "0.01": [{"seconds": 7.0, "val": 0.6}],
    }
    assert time_to_accuracy.reached(better, {"0.1": 0.7, "0.01": 0.5}) == 7.0
    assert time_to_accuracy.reached(better, {"0.1": 0.8, "0.01": 0.5}) == 9.0
    assert math.isinf(time_to_accuracy.reached(better, {"0.1": 0.8, "0.01": 0.7}))
    assert math.isinf(time_to_accuracy.reached(better, {"0.001": 0.1}))


def test_the_time_to_accuracy_by_hand() -> None:
    def run(seconds: float, at: float, val: float) -> dict[str, Any]:
        return {"seconds": seconds, "better": {"0.1": [{"seconds": at, "val": val, "test": val - 0.1}]}}

    ways = {
        "Ray Tune": {"0": run(100.0, 90.0, 0.8), "1": run(300.0, 90.0, 0.9), "2": run(200.0, 90.0, 0.7)},
        "path": {"0": run(20.0, 10.0, 0.85), "1": run(20.0, 8.0, 0.8), "2": run(20.0, 10.0, 0.6)},
    }
    page = time_to_accuracy.render(result("time_to_accuracy", {"ways": ways, "densities": ["0.1"]}))
    # The target is the median, 0.8; the third seed of the path never had it.
    assert "| path | 20 s | 10 s, 8 s, never | 80.0 (70.0) |" in page
    assert "time to its accuracies ≥ 20: 20.0, met" in page


def test_lines_of_trials_are_in_order_of_time_since_the_start(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [{"time": 12.0, "density": 0.1, "val": 0.5, "test": 0.4}]
    lines.insert(0, {**lines[0], "time": 15.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["seconds"] for line in events.read(path, begun=10.0)] == [2.0, 5.0]


def test_the_searches_that_are_compared_train_the_same_network_on_the_same_data() -> None:
    folder = Path(time_to_accuracy.__file__).parent
    one, other = (
        sweep_from_document(read(str(folder / file)))[1] for file in ("sweep_cost.yaml", "path.yaml")
    )
    assert one.densities == other.densities
    assert one.data == other.data
    assert one.model == other.model
    assert one.post_pruning.epochs == other.post_pruning.epochs
    assert one.search.early_stopping == other.search.early_stopping
