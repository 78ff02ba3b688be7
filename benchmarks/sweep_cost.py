"""The cost of the same search with plain Ray Tune, and with each of the project's savings added in turn.

Claim: on MNIST/MLP, five densities × 32 trials on two cores, the sweep takes at most a sixth of plain Ray
Tune's wall time, and finds networks that are as good within the noise of seeds. (On a GPU with vectorized
trials the goal is 20 × the trials per hour.)

Each way searches the same space with the same number of trials per density from the same seed, in a process
of its own, which is timed from start to end:

plain       plain Ray Tune: OptunaSearch per density, FIFO, a process per trial, every stage in every trial
workers     the project's sweep without early stopping or planned reuse; its workers run many trials each
reuse       as workers, and trials branch from stored pre-pruned networks
stopping    as reuse, and bad trials are stopped early after pruning
compact     as stopping, and pruned layers compute without their empty inputs and outputs: the default
vectorized  as compact, with 8 trials per worker as batched programs (only with --vectorized)
graphs      as vectorized, with steps as CUDA graphs (only with --ways; for a GPU)

How to read it: `epochs` counts the epochs that were trained; a branch counts only its own. The best network
is chosen by validation accuracy, and the test accuracy is that of the same network.

    python -m benchmarks.sweep_cost data.root=data
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import common
from prunetune.config import document
from prunetune.config.reading import sweep_from_document
from prunetune.stages.plan import most_epochs

CONFIG = Path(__file__).parent / "sweep_cost.yaml"
_GOAL = 6.0

_NO_STOPPING = "search.early_stopping=null"
_ONE = "resources.trials_per_worker=1"
_WHOLE = "compact_layers=false"
WAYS: dict[str, list[str] | None] = {
    "plain": None,
    "workers": [_ONE, _WHOLE, _NO_STOPPING, "search.exploration=1.0"],
    "reuse": [_ONE, _WHOLE, _NO_STOPPING],
    "stopping": [_ONE, _WHOLE],
    "compact": [_ONE],
    "vectorized": ["resources.trials_per_worker=8"],
    "graphs": ["resources.trials_per_worker=8", "cuda_graphs=true"],
}
_QUICK = [
    "data.name=digits",
    "pre_pruning.epochs=2",
    "post_pruning.epochs=3",
    "densities=[0.1, 0.03]",
    "search.trials_per_density=4",
]


def run_way(name: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run the search in one way; return its seconds, its epochs and the best networks by density."""
    own = WAYS[name]
    output = folder / f"{name}.json"
    if own is None:
        command = ["benchmarks.plain_ray_tune", str(CONFIG), str(output), *overrides]
    else:
        command = ["prunetune.sweep", str(CONFIG), f"storage={folder / name}", *overrides, *own]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=CONFIG.parent.parent,
        env={**os.environ, "PYTHONPATH": str(CONFIG.parent.parent)},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - begun
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = json.loads(output.read_text()) if own is None else _of_sweep(folder / name / "sweep-cost")
    return {"seconds": round(seconds, 1), **found}


def _of_sweep(folder: Path) -> dict[str, Any]:
    results = pd.read_parquet(folder / "results.parquet")
    complete = results[results.status == "complete"]
    best = complete.loc[complete.groupby("density").val_accuracy.idxmax()]
    return {
        "epochs_run": int(results.epochs_run.sum()),
        "trials": len(results),
        "best": {
            f"{row.density:g}": {"val_accuracy": row.val_accuracy, "test_accuracy": row.test_accuracy}
            for row in best.sort_values("density", ascending=False).itertuples()
        },
    }


def setting(overrides: list[str]) -> str:
    """Describe the search in a sentence."""
    template, config = sweep_from_document(document.override(document.read(CONFIG), overrides))
    budget = most_epochs(template)
    epochs = f"{budget.pre_pruning} + {budget.post_pruning}"
    return (
        f"{config.data.name}, {config.model.name}, {len(config.densities)} densities × "
        f"{config.search.trials_per_density} trials, {epochs} epochs, {config.search.sampler}, one seed."
    )


def render(found: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    ways = found["results"]["ways"]
    plain = ways.get("plain")  # --ways may leave it out
    densities = list(dict.fromkeys(d for way in ways.values() for d in way["best"]))
    rows = []
    for name, way in ways.items():
        accuracies = [
            f"{100 * way['best'][d]['val_accuracy']:.2f} ({100 * way['best'][d]['test_accuracy']:.2f})"
            if d in way["best"]
            else "none"
            for d in densities
        ]
        rows.append(
            [
                name,
                f"{way['seconds'] / 60:.1f} min",
                f"{plain['seconds'] / way['seconds']:.1f} ×" if plain else "",
                f"{way['epochs_run']:,}",
                *accuracies,
            ]
        )
    judged = ""
    if plain:
        best = max(plain["seconds"] / way["seconds"] for way in ways.values())
        judged = f" Goal: {common.judged('times cheaper than plain Ray Tune', best, at_least=_GOAL)}."
    header = ["way", "wall time", "cheaper", "epochs", *(f"d = {d}" for d in densities)]
    return "\n".join(
        [
            "## What a sweep costs",
            "",
            common.table(header, rows),
            "",
            "Accuracy in percent of the best network at each density: validation, in brackets test." + judged,
            "",
            f"{found['results']['setting']} {common.where(found)}",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("sweep_cost", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--vectorized", action="store_true", help="also with batched programs")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="only these")
    arguments = parser.parse_args()
    machine = common.hardware()
    overrides = [*(_QUICK if arguments.quick else []), *arguments.overrides]
    chosen = arguments.ways or [
        name for name in WAYS if name != "graphs" and (name != "vectorized" or arguments.vectorized)
    ]
    ways = {}
    with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
        for name in chosen:
            ways[name] = run_way(name, overrides, Path(folder))
            print(f"{name}: {ways[name]['seconds']:.0f} s, {ways[name]['epochs_run']} epochs", flush=True)
    # The folder of the data on this machine does not belong to the search's description.
    asked = [override for override in arguments.overrides if not override.startswith("data.root=")]
    body = {"setting": setting(overrides), "overrides": asked, "ways": ways}
    device = "gpu" if torch.cuda.is_available() else "cpu"
    found = common.result("sweep_cost", device, machine, body)
    common.show(render(found), common.write(found, arguments))


if __name__ == "__main__":
    main()
