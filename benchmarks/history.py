"""The cost of a long sweep's past: resuming, proposing and reporting after 10,000 finished trials.

Claim: the sweep's own bookkeeping takes seconds, at a size that takes weeks of training. Goals: resuming
takes at most 60 s, one more proposal at most 1 s, the report at most 60 s, and MLflow's thread checks 1,000
complete runs within 6 s.

Setting: 2,000 trials at each of 5 densities in the space of `sweeps/cifar.yaml` (TPE, multivariate, grouped).
A quarter of them pre-trained a network, the others branched from one. Each has a curve of 40 + 40 epochs, cut
where ASHA would have stopped it. The records are made up and written through the ledger; only code that a
sweep runs is timed. One process, a local disk.

How to read it: each line is one measurement. For proposals it is the median of several at each density, each
of which is then recorded and told to the study as in a sweep. MLflow gets only the first 1,000 trials,
because it needs a tenth of a second to write each. `--trials N` sets another number of trials per density.
"""

from __future__ import annotations

import importlib
import io
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from prunetune.config import document, space
from prunetune.config.canonical import is_active
from prunetune.config.reading import sweep_from_document
from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.records import report as reporting
from prunetune.records import results
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.stages.plan import most_epochs
from prunetune.store import Store

_SWEEP = Path(__file__).parents[1] / "sweeps" / "cifar.yaml"
_RUNGS = (4, 12, 36)
"""The post-pruning epochs after which ASHA keeps a third of the trials."""

TITLES = {
    "open": "open the ledger",
    "search": "rebuild Optuna's studies and the networks to branch from",
    "rungs": "fill the rungs of early stopping",
    "propose": "propose one more trial",
    "tell": "record a trial's end",
    "keep": "remove what is not kept, after a trial",
    "view": "draw the live view once",
    "results": "write results.parquet and best/",
    "report": "write report/",
    "rebuild": "MLflow, in the background: write {runs:,} runs anew",
    "reconcile": "MLflow, in the background: find {runs:,} runs in order",
}

_GOALS = {"resume": 60.0, "propose": 1.0, "report": 60.0, "reconcile": 6.0}

_RUNS = 1000
"""The number of trials that are written to MLflow."""


# --- the made-up past


def make(folder: Path, trials: int, proposals: int) -> tuple[Config, Problem, Ledger]:
    """Make a sweep in a folder, with room for `trials` past and `proposals` new trials per density.

    Returns (its configuration, its problem, its empty ledger).
    """
    overrides = [f"storage={folder}", f"search.trials_per_density={trials + proposals}"]
    template, config = sweep_from_document(document.override(document.read(str(_SWEEP)), overrides))
    problem = Problem.of(template, data_digest=lambda data: "made up")
    return config, problem, Ledger(Store(config.storage).sub(config.name))


def write_past(problem: Problem, ledger: Ledger, stages: Store, densities: list[float], trials: int) -> None:
    """Write finished trials at every density to the ledger, and the networks they branch from to `stages`."""
    from prunetune.search.branching import determining

    draw = random.Random(0)
    networks: list[dict[str, Any]] = []
    for _ in range(trials):
        for density in densities:
            params = drawn(problem, draw)
            branched = bool(networks) and draw.random() > 0.25
            if branched:
                params = drawn(problem, draw, draw.choice(networks))
            else:
                networks.append(determining(params))
            tree = space.at(problem.template, params, is_active)
            record = ledger.propose(problem, density, params, tree, branched=branched)
            if not branched:
                stages.save("stages", record.keys["pre_pruning"], {}, {})
            finish(record, accuracy(params, density) + draw.gauss(0, 0.02), draw)
            ledger.publish(record)


def drawn(problem: Problem, draw: random.Random, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Draw a point of the space; parameters in `fixed` keep their values if they apply."""
    params: dict[str, Any] = {}

    def suggest(name: str, distribution: space.Distribution) -> Any:
        if name in (fixed or {}):
            params[name] = (fixed or {})[name]
        else:
            params[name] = _value(distribution, draw)
        return params[name]

    space.resolve(problem.template, suggest, is_active)
    return params


def _value(distribution: space.Distribution, draw: random.Random) -> Any:
    match distribution:
        case space.LogUniform(low, high):
            return math.exp(draw.uniform(math.log(low), math.log(high)))
        case space.Uniform(low, high):
            return draw.uniform(low, high)
        case space.Int(low, high):
            return draw.randint(low, high)
        case space.Choice(labels=labels):
            return draw.choice(labels)


def accuracy(params: Mapping[str, Any], density: float) -> float:
    """A made-up accuracy, which has an optimal learning rate at every density."""
    rate = params["post_pruning.optimizer.lr"]
    return 0.9 + 0.05 * math.log10(density) - 0.05 * abs(math.log10(rate) + 1 + 0.2 * math.log10(density))


def finish(record: TrialRecord, value: float, draw: random.Random) -> None:
    """Give a record a curve, cut where early stopping would have ended it, and the results that follow."""
    epochs = 40
    last = next((rung for rung in _RUNGS if draw.random() > 1 / 3), epochs)
    masked = record.tree["pre_pruning"]["mask"] is not None
    for number in range(1, epochs + last + 1):
        pre = number <= epochs
        done = (number if pre else number - epochs) / epochs
        mask = {"mask_density": 1 - 0.9 * done, "mask_open": 1 - 0.9 * done} if masked and pre else {}
        reused, score = pre and record.branched, value * (0.5 + 0.5 * done)
        metrics = {
            "train_loss": 2.3 - 2 * done * draw.random(),
            "val_loss": 2.3 - 2 * done * draw.random(),
            "val_accuracy": score,
            **mask,
        }
        record.curve.append(
            Epoch(
                "pre_pruning" if pre else "post_pruning",
                number if pre else number - epochs,
                score,
                metrics,
                owner="another" if reused else record.uid,
                reused=reused,
                epoch=number,
            )
        )
    record.status = "complete" if last == epochs else "stopped"
    record.val = record.curve[-1].score
    record.epochs_reused = sum(epoch.reused for epoch in record.curve)
    record.epochs_run = len(record.curve) - record.epochs_reused
    record.seconds = 3.0 * record.epochs_run
    if record.status == "complete":
        record.test, record.effective_density = value - 0.01, 0.98 * record.density
        record.nonzero = int(record.density * 14_715_584)


# --- the measurements


def measure(trials: int, proposals: int, folder: Path) -> dict[str, Any]:
    """Measure the seconds of everything in `TITLES`, after `trials` trials at every density."""
    importlib.import_module("prunetune.execution.ray_tune")  # before Ray, whose environment it sets
    from prunetune.search.early_stopping import EarlyStopping
    from prunetune.search.queue import SweepSearch

    config, problem, empty = make(folder, trials, proposals)
    store, stages = empty.store, Store(config.storage).sub("store")
    write_past(problem, empty, stages, config.densities, trials)

    seconds: dict[str, float] = {}

    def timed(name: str, task: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        value = task()
        seconds[name] = round(time.perf_counter() - begun, 4)
        return value

    ledger = timed("open", lambda: Ledger(store))
    search = timed(
        "search", lambda: SweepSearch(config, problem, ledger, lambda key: stages.has("stages", key))
    )
    timed("rungs", lambda: EarlyStopping(config, search.past, most_epochs(problem.template).post_pruning))
    seconds |= _live(search, ledger, config, proposals)
    records = [record for record in ledger.records() if record.finished]
    timed("results", lambda: results.write(store, records, {}, config))
    timed("report", lambda: reporting.write_report(store, config.name))
    timed("rebuild", lambda: _track(config, records[:_RUNS]))
    timed("reconcile", lambda: _track(config, records[:_RUNS]))
    return {"densities": len(config.densities), "trials": trials, "seconds": seconds}


def _live(search: Any, ledger: Ledger, config: Config, proposals: int) -> dict[str, float]:
    """Measure the medians of the work that is done once per trial, and of drawing the live view."""
    from rich.console import Console

    from prunetune.records.retention import References, Retention
    from prunetune.trackers.live import Progress

    console = Console(file=io.StringIO(), width=140)
    view = Progress(console, search, config.densities, config.name)
    storage = Store(config.storage)
    keeper = Retention(
        config.keep, ledger, ledger.records(), storage.sub("store"), References(storage, config.name)
    )
    found: dict[str, list[float]] = {"propose": [], "tell": [], "keep": [], "view": []}
    draw = random.Random(1)
    for _ in range(proposals * len(config.densities)):
        begun = time.perf_counter()
        record = search.next()
        proposed = time.perf_counter()
        finish(record, accuracy(record.params, record.density), draw)
        told = time.perf_counter()
        search.progressed(record)
        search.tell(record)
        recorded = time.perf_counter()
        keeper.ended(record)
        kept = time.perf_counter()
        console.print(view._view())
        found["propose"].append(proposed - begun)
        found["tell"].append(recorded - told)
        found["keep"].append(kept - recorded)
        found["view"].append(time.perf_counter() - kept)
    return {name: round(common.median(values), 4) for name, values in found.items()}


def _track(config: Config, records: list[TrialRecord]) -> None:
    """Run the work that MLflow's thread does at the start of a resumed sweep."""
    from prunetune.trackers.mlflow import experiments
    from prunetune.trackers.mlflow import tracker as tracking

    tracker = tracking.Tracker(experiments.place(config), "made-up", config.name)
    tracker.begin(config.tree(), records)
    if tracker.close():
        raise RuntimeError("MLflow could not be written")


def render(document: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    body = document["results"]
    seconds = body["seconds"]
    total = body["densities"] * body["trials"]
    runs = min(_RUNS, total)
    rows = [[title.format(runs=runs), common.significant(seconds[name])] for name, title in TITLES.items()]
    values = {
        "resume": seconds["open"] + seconds["search"] + seconds["rungs"],
        "propose": seconds["propose"],
        "report": seconds["results"] + seconds["report"],
        "reconcile": seconds["reconcile"],
    }
    goals = [common.judged(name, value, at_most=_GOALS[name]) for name, value in values.items()]
    return "\n".join(
        [
            f"## After {total:,} trials",
            "",
            common.table([f"{body['densities']} densities × {body['trials']:,} trials", "seconds"], rows),
            "",
            f"Goals (seconds): {'; '.join(goals)}.",
            "",
            common.where(document),
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("history", __doc__)
    parser.add_argument("--trials", type=int, default=2000, metavar="N", help="per density")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = common.hardware()
    trials, proposals = (10, 1) if arguments.quick else (arguments.trials, 5)
    with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
        body = measure(trials, proposals, Path(folder))
    document = common.result("history", "cpu", machine, body)
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
