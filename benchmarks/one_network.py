"""One pre-trained network for every density, without a search, beside networks with a fixed λ2.

Claim: a single, untuned run whose mask follows a path through all densities, branched at the epoch that is
best for each, is better at every density than the median of networks with a λ2 drawn from the sweep's space,
of which each suits one density; and it comes near the best of them.

The MNIST MLP of `sweep_cost`, 6 post-pruning epochs. Learning rate, initializer, initial mask and λ1 are
drawn at random from that sweep's space (ZerO with an initial mask of 0.5, which collapses whatever λ2 is,
left out on both sides); the better of two post-pruning rates counts. Validation accuracy in percent: median
and best over the runs.

    python -m benchmarks.one_network data.root=/data
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from prunetune import pipeline
from prunetune.config import document
from prunetune.config.reading import from_document
from prunetune.engine.precision import prepare_process
from prunetune.store import Store

DENSITIES = (0.1, 0.032, 0.01, 0.0032, 0.001)
RATES = (2e-3, 6e-3)

WAYS: dict[str, tuple[int, bool]] = {
    "fixed λ2, last epoch": (6, False),
    "path, 6 epochs": (6, True),
    "path, 12 epochs": (12, True),
}
"""By name: epochs of pre-pruning, and whether the mask follows a path."""


def configuration(number: int, epochs: int, *, path: bool, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of the run with this number, without a density and a post-pruning rate."""
    draw = random.Random(number)

    def log_uniform(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    lr, lambda1, lambda2 = log_uniform(5e-4, 5e-3), log_uniform(1e-7, 1e-4), log_uniform(3e-5, 5e-3)
    warmup = draw.uniform(0.0, 0.8)
    initializer, initial = draw.choice([("kaiming", 0.5), ("kaiming", 0.9), ("zero", 0.9)])
    fixed = {"method": "penalty", "lambda2": lambda2, "lambda2_warmup": warmup}
    mask = {"method": "path", "lowest": min(DENSITIES)} if path else fixed
    tree: dict[str, Any] = {
        "name": "one-network",
        "seed": number,
        "data": {"name": "mnist", "batch_size": 128, "validation_fraction": 0.1},
        "model": {"name": "mlp", "hidden": [100] * 5},
        "pre_pruning": {
            "epochs": epochs,
            "optimizer": {"name": "adam", "lr": lr},
            "initializer": initializer,
            "mask": {**mask, "lambda1": lambda1, "initial": initial},
        },
        "pruning": {"from_epoch": "best" if path else "last"},
        "post_pruning": {"epochs": 6, "optimizer": {"name": "adam", "schedule": "cosine"}},
    }
    return document.override(document.Document("one_network", tree), overrides).tree


def run(tree: Mapping[str, Any], store: Store, densities: Sequence[float]) -> dict[str, float]:
    """The best validation accuracy of the network's branches, by density."""
    found: dict[str, float] = {}
    for density in densities:
        for rate in RATES:
            post = tree["post_pruning"]
            trial = {
                **tree,
                "densities": [density],
                "post_pruning": {**post, "optimizer": {**post["optimizer"], "lr": rate}},
            }
            config = from_document(document.Document("one_network", trial))
            running = pipeline.Outcome(pipeline.run(config, store=store, also=densities))
            for _ in running:
                pass
            value = running.value.val or 0.0
            found[f"{density:g}"] = max(found.get(f"{density:g}", 0.0), value)
    return found


def render(document: Mapping[str, Any]) -> str:
    """A result as Markdown."""
    body = document["results"]
    rows = []
    for name, runs in body["ways"].items():
        for what, choose in (("median", statistics.median), ("best", max)):
            cells = [f"{100 * choose([run[f'{d:g}'] for run in runs]):.1f}" for d in DENSITIES]
            rows.append([f"{name}: {what} of {len(runs)}", *cells])
    header = ["validation accuracy, %", *(f"d = {d:g}" for d in DENSITIES)]
    return (
        "### One network for every density\n\n"
        + common.table(header, rows)
        + f"\n\nEvery run is branched at all densities, {body['post_epochs']} epochs each. "
        + common.where(document)
    )


def main() -> None:
    """The command."""
    parser = common.parser("one_network", __doc__)
    parser.add_argument("--runs", type=int, default=9, help="networks per way (default: 9)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_intermixed_args()
    prepare_process(1)
    machine = common.hardware()
    ways: dict[str, list[dict[str, float]]] = {}
    quick = ["data.limit=600"] if arguments.quick else []
    for name, (epochs, path) in WAYS.items():
        ways[name] = []
        for number in range(1 if arguments.quick else arguments.runs):
            begun = time.monotonic()
            tree = configuration(number, epochs, path=path, overrides=[*arguments.overrides, *quick])
            with tempfile.TemporaryDirectory() as folder:
                found = run(tree, Store(folder), DENSITIES[:2] if arguments.quick else DENSITIES)
            ways[name].append({**dict.fromkeys((f"{d:g}" for d in DENSITIES), 0.0), **found})
            accuracies = " ".join(f"{100 * value:.1f}" for value in found.values())
            print(f"{name} #{number}: {accuracies} ({time.monotonic() - begun:.0f} s)", flush=True)
    document = common.result("one_network", "cpu", machine, {"ways": ways, "post_epochs": 6})
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
