"""The rate of trials' epochs as one batched program of K trials, compared with one trial after the other.

Claim: on a GPU a program of 64 MLPs trains at 20 times the rate of trials one by one, because a single
trial's step spends its time on launching kernels. On a CPU core the MNIST MLP, whose step keeps the core
busy, gains nothing; a tiny model gains.

Setting: the models and data of `sweeps/digits.yaml` and `sweeps/mnist.yaml`, a full epoch with validation,
before pruning with a learnable mask, and after pruning under a fixed mask with soft activations. Trials
differ in their learning rates. It runs on one core, or on the GPU if there is one, there also with
`cuda_graphs: true`.

How to read it: `times` is the time of K epochs one by one, without graphs, divided by the program's time.

    python -m benchmarks.vectorized --root data
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import common
from prunetune import pipeline, vectorized
from prunetune.config.schema import Config
from prunetune.engine.loop import EpochWork
from prunetune.store import Store

_GOAL = 20.0

MODELS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": {"name": "digits", "batch_size": 32},
        "model": {"name": "mlp", "hidden": [100, 100, 100]},
    },
    "mnist": {"data": {"name": "mnist", "batch_size": 128}, "model": {"name": "mlp"}},
}
STAGES = ("masked", "post-pruning")


def works(
    name: str, stage: str, count: int, device: str, overrides: Mapping[str, Any], graphs: bool
) -> list[EpochWork]:
    """Make the first epochs of `count` trials that differ in their learning rates."""
    found = []
    for number in range(count):
        optimizer = {"name": "adam", "lr": 1e-3 * (1 + number / count)}
        pre = {"epochs": 9, "optimizer": optimizer, "mask": {"lambda1": 1e-5, "lambda2": 1e-3}}
        config = Config.model_validate(
            {
                "name": "vectorized",
                "densities": [0.1],
                "cuda_graphs": graphs,
                **MODELS[name],
                "data": {**MODELS[name]["data"], **overrides},
                "pre_pruning": pre if stage == "masked" else None,
                "post_pruning": {"epochs": 9, "optimizer": optimizer, "soft_activation": {"beta0": 1.0}},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            step = next(pipeline.steps(config, store=Store(folder), device=device))
        assert isinstance(step, EpochWork)
        found.append(step)
    return found


def seconds(
    name: str, stage: str, count: int, device: str, overrides: Mapping[str, Any], graphs: bool = False
) -> float:
    """Measure the seconds of the first epochs of `count` trials as one program; a single trial runs alone."""
    epochs = works(name, stage, count, device, overrides, graphs)
    begun = time.perf_counter()
    if count == 1:
        epochs[0].run()
    else:
        vectorized.run_together(epochs)
    ended = time.perf_counter()  # the device is done, because the metrics are on the host
    if any(epoch.metrics is None for epoch in epochs):
        raise RuntimeError(f"{name}, {stage}: {count} trials did not run as one program")
    return ended - begun


def render(document: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    body = document["results"]
    counts = sorted({int(k) for row in body["rows"] for k in row["seconds"]})
    alone = {
        (row["model"], row["stage"]): row["seconds"]["1"] for row in body["rows"] if not row.get("graphs")
    }
    rows, best = [], 0.0
    for row in body["rows"]:
        launched = alone[row["model"], row["stage"]]
        times = {k: launched * k / row["seconds"][str(k)] for k in counts[1:] if str(k) in row["seconds"]}
        best = max(best, *times.values())
        ratios = [f"{times[k]:.1f} ×" if k in times else "" for k in counts[1:]]
        stage = row["stage"] + (", as graphs" if row.get("graphs") else "")
        rows.append([row["model"], stage, f"{1000 * row['seconds']['1']:,.0f} ms", *ratios])
    header = ["model", "stage", "an epoch alone", *(f"K = {k}" for k in counts[1:])]
    goal = (
        f"Goal: {common.judged('times, the best', best, at_least=_GOAL)}. "
        if document["device"] == "gpu"
        else ""
    )
    return "\n".join(
        [
            f"## Trials side by side on {'a GPU' if document['device'] == 'gpu' else 'a CPU core'}",
            "",
            common.table(header, rows),
            "",
            f"{goal}{common.where(document)}",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("vectorized", __doc__)
    parser.add_argument("--root", default="data", help="the folder of MNIST")
    arguments = parser.parse_args()
    machine = common.hardware()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    counts: tuple[int, ...] = (1, 2, 4, 8, 16) if device == "cpu" else (1, 4, 16, 64)
    repeats = 3
    if arguments.quick:
        counts, repeats = (1, 2), 1
    rows = []
    for name in MODELS:
        overrides: dict[str, Any] = {} if name == "digits" else {"root": arguments.root}
        if arguments.quick and name != "digits":
            continue
        if device == "cpu" and name != "digits":
            overrides["limit"] = 6000
        for stage, graphs in itertools.product(STAGES, (False, True) if device == "cuda" else (False,)):
            measured: dict[str, list[float]] = {str(k): [] for k in counts}
            for number in range(-1, repeats):  # the first round warms up
                for k in counts:
                    took = seconds(name, stage, k, device, overrides, graphs)
                    if number >= 0:
                        measured[str(k)].append(took)
            medians = {k: statistics.median(values) for k, values in measured.items()}
            rows.append({"model": name, "stage": stage, "graphs": graphs, "seconds": medians})
    document = common.result(
        "vectorized", "gpu" if device == "cuda" else "cpu", machine, {"limit": 6000, "rows": rows}
    )
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
