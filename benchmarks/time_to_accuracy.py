"""The time until every density has the accuracy that plain Ray Tune with Optuna and ASHA ends with.

Each way searches the MNIST MLP at five densities, with 6 epochs after pruning, from the same seeds, in a
process of its own whose time counts from its start:

Ray Tune   OptunaSearch and ASHAScheduler, an experiment of 32 trials per density, every stage in every trial
λ2         the project's sweep of `sweep_cost.yaml`: 32 trials per density, which share networks of 6 epochs
path       the project's sweep of `path.yaml`: ten networks of 12 epochs, each for all densities

A trial counts when it is complete. The target of a density is the median, over the seeds, of the best
validation accuracy that Ray Tune ends with. A way has reached it when a complete trial has at least that.

    python -m benchmarks.time_to_accuracy data.root=data
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, events
from prunetune.config.document import override, read
from prunetune.config.reading import sweep_from_document

HERE = Path(__file__).parent
PEER = "Ray Tune"
WAYS = {PEER: "sweep_cost.yaml", "λ2": "sweep_cost.yaml", "path": "path.yaml"}
"""By name: the file of the search."""

_GOAL = 20.0
_QUICK = [
    "data.name=digits",
    "pre_pruning.epochs=2",
    "post_pruning.epochs=3",
    "densities=[0.1, 0.03]",
    "search.trials_per_density=2",
]


def run(way: str, seed: int, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a search; return its seconds, and the improvements of each density as lists of events."""
    written = folder / f"{way}-{seed}.jsonl"
    written.touch()
    config, changed = str(HERE / WAYS[way]), [f"seed={seed}", *overrides]
    if way == PEER:
        own = [
            "benchmarks.plain_ray_tune",
            config,
            str(folder / "best.json"),
            "--asha",
            "--events",
            str(written),
        ]
    else:
        own = ["prunetune.sweep", config, f"storage={folder / f'{way}-{seed}'}"]
        changed.append(f"tracking.trackers=[{{name: 'benchmarks.events:Events', path: '{written}'}}]")
    begun, since = time.time(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *own, *changed],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - since
    if done.returncode != 0:
        raise RuntimeError(f"{way} ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return {"seconds": round(seconds, 1), "better": improvements(events.read(written, begun))}


def improvements(found: Sequence[Mapping[str, float]]) -> dict[str, list[dict[str, float]]]:
    """The events that raised the best validation accuracy of their density, by density.

    >>> found = enumerate([0.5, 0.4, 0.6], start=1)
    >>> made = [{"seconds": s, "density": 0.1, "val": v, "test": v} for s, v in found]
    >>> [(event["seconds"], event["val"]) for event in improvements(made)["0.1"]]
    [(1, 0.5), (3, 0.6)]
    """
    better: dict[str, list[dict[str, float]]] = {}
    for event in found:
        before = better.setdefault(f"{event['density']:g}", [])
        if not before or event["val"] > before[-1]["val"]:
            before.append({name: round(event[name], 4) for name in ("seconds", "val", "test")})
    return better


def reached(better: Mapping[str, Sequence[Mapping[str, float]]], targets: Mapping[str, float]) -> float:
    """Seconds until every density had its target; infinite if one never had it.

    >>> reached({"0.1": [{"seconds": 1.0, "val": 0.5}, {"seconds": 3.0, "val": 0.6}]}, {"0.1": 0.55})
    3.0
    """
    times = [
        min(
            (event["seconds"] for event in better.get(density, []) if event["val"] >= target),
            default=math.inf,
        )
        for density, target in targets.items()
    ]
    return max(times)


def final(better: Mapping[str, Sequence[Mapping[str, float]]], density: str, split: str) -> float:
    """The accuracy of a density's best trial at the end; 0 without one."""
    return better[density][-1][split] if better.get(density) else 0.0


def render(document: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    body = document["results"]
    ways, densities = body["ways"], body["densities"]
    peer = list(ways[PEER].values())
    targets = {d: statistics.median(final(run["better"], d, "val") for run in peer) for d in densities}
    whole = statistics.median(run["seconds"] for run in peer)
    rows, ratios = [], {}
    for name, by_seed in ways.items():
        runs = list(by_seed.values())
        times = [reached(run["better"], targets) for run in runs]
        ratios[name] = whole / statistics.median(times)
        each = [
            f"{100 * statistics.median(final(run['better'], d, 'val') for run in runs):.1f} "
            f"({100 * statistics.median(final(run['better'], d, 'test') for run in runs):.1f})"
            for d in densities
        ]
        seen = ", ".join("never" if math.isinf(time) else f"{time:.0f} s" for time in times)
        rows.append([name, f"{statistics.median(run['seconds'] for run in runs):.0f} s", seen, *each])
    seeds = "one seed" if len(peer) == 1 else f"medians of {len(peer)} seeds"
    header = ["way", "whole search", "all targets reached after", *(f"d = {d}" for d in densities)]
    goal = common.judged("Ray Tune's whole search / time to its accuracies", ratios["path"], at_least=_GOAL)
    return (
        "## Time to accuracy\n\n"
        + common.table(header, rows)
        + f"\n\nAccuracy in percent at the end: validation, in brackets test; {seeds}. "
        + "Targets: "
        + " / ".join(f"{100 * target:.1f}" for target in targets.values())
        + f". Goal: {goal}.\n\n{common.where(document)}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("time_to_accuracy", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    arguments = parser.parse_intermixed_args()
    machine = common.hardware()
    overrides = [*(_QUICK if arguments.quick else []), *arguments.overrides]
    ways: dict[str, dict[str, Any]] = {name: {} for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
        for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
            for name in WAYS:  # in turns, so that a slow hour slows all ways alike
                ways[name][str(seed)] = run(name, seed, overrides, Path(folder))
                ends = {d: events[-1]["val"] for d, events in ways[name][str(seed)]["better"].items()}
                print(f"{name}, seed {seed}: {ways[name][str(seed)]['seconds']:.0f} s, {ends}", flush=True)
    _, config = sweep_from_document(override(read(str(HERE / WAYS[PEER])), overrides))
    body = {"ways": ways, "densities": [f"{density:g}" for density in config.densities]}
    document = common.result("time_to_accuracy", "cpu", machine, body)
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
