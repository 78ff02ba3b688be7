"""The number of trials per hour with more and more workers, measured with trials that only sleep.

Claim: search, ledger and tracking are not the bottleneck of a sweep, so 4 workers finish four times as many
trials as one. Goal: at least 0.8 of that.

Setting: each trial sleeps for 10 + 10 epochs of 50 ms; a real trial takes minutes, so the driver has a
hundred times as much to do here. Everything else is a real sweep: Ray Tune with one CPU per worker, TPE over
the digits' search space at two densities, the ledger, and MLflow in SQLite. 40 trials per worker.

How to read it: `busy` is the share of the workers' time, from the first trial's start to the last one's end,
in which trials were sleeping. The rest is waiting after reports, which matters less where epochs take longer.
The time to start Ray is excluded, the time to start further workers is included. `ending` is the time from
the last trial's end to the sweep's end, for its report and for the entries that MLflow's thread had to write.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import clocked, common
from prunetune import data as datasets
from prunetune import sweep
from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.pipeline import PipelineResult
from prunetune.stages.plan import plan
from prunetune.store import Store
from prunetune.tasks import ACCURACY

EPOCHS = 10
SECONDS = 0.05
"""The seconds of an epoch."""

_GOAL = 0.8
_SWEEP = Path(__file__).parents[1] / "sweeps" / "digits.yaml"


def waiting(
    config: Config, *, store: Store, device: str, owner: str, also: Iterable[float] = ()
) -> Generator[Epoch, None, PipelineResult]:
    """A replacement of the pipeline that only sleeps, and reports a made-up accuracy."""
    stages = plan(config, datasets.load(config.data, device).digest)
    accuracy = 0.5 + 0.4 * int(stages.final.key[:8], 16) / 2**32
    for number in range(2 * EPOCHS):
        time.sleep(SECONDS)
        stage, before = ("pre_pruning", 0) if number < EPOCHS else ("post_pruning", EPOCHS)
        yield Epoch(
            stage,
            number - before + 1,
            accuracy,
            {"train_loss": 1.0, "val_loss": 1.0, "val_accuracy": accuracy},
            key=stages.keys[stage],
            owner=owner,
            last=number + 1 == before + EPOCHS,
            epoch=number + 1,
        )
    return PipelineResult(
        status="complete",
        density=config.density,
        metric=ACCURACY,
        val=accuracy,
        test=accuracy,
        nonzero=1,
        effective_density=config.density,
        cut_layers=[],
        epochs_run=2 * EPOCHS,
        epochs_reused=0,
        seconds=2 * EPOCHS * SECONDS,
        keys=stages.keys,
        state={},
        masks={},
    )


def run_sweep(workers: int, trials: int, folder: Path) -> dict[str, Any]:
    """Run a sweep with this many workers, on a Ray with as many CPUs; return its times."""
    importlib.import_module("prunetune.execution.ray_tune")  # before Ray, whose environment it sets
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    (folder / "times").mkdir()
    arguments = [
        str(_SWEEP),
        f"storage={folder}",
        "densities=[0.1, 0.03]",
        f"pre_pruning.epochs={EPOCHS}",
        f"post_pruning.epochs={EPOCHS}",
        f"search.trials_per_density={trials // 2}",
        "search.early_stopping=null",
        "search.exploration=1.0",
        "resources.trials_per_worker=1",
    ]
    try:
        with open(folder / "output.txt", "w") as output, contextlib.redirect_stdout(output):
            code = sweep.main(arguments, clocked.Clocked(waiting, str(folder / "times")))
        returned = time.monotonic()
    finally:
        ray.shutdown()
    times = clocked.read(folder / "times")
    if code != 0 or len(times) != trials:
        raise RuntimeError(f"the sweep ended with {code}: {(folder / 'output.txt').read_text()}")
    return {
        "workers": workers,
        "processes": len({trial.process for trial in times}),
        "trials": trials,
        "seconds": max(trial.ended for trial in times) - min(trial.begun for trial in times),
        "inside": sum(trial.inside for trial in times),
        "ending": returned - max(trial.ended for trial in times),
    }


def busy(run: Mapping[str, Any]) -> float:
    """Return the share of the workers' time in which trials ran."""
    return float(run["inside"] / (run["workers"] * run["seconds"]))


def efficiency(one: Mapping[str, Any], many: Mapping[str, Any]) -> float:
    """Return the rate of trials per worker in a run with many workers, relative to the run with one."""
    rates = [run["trials"] / run["seconds"] / run["workers"] for run in (one, many)]
    return float(rates[1] / rates[0])


def render(document: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    runs = document["results"]["runs"]
    rows = [
        [
            str(run["workers"]),
            str(run["trials"]),
            common.significant(run["seconds"]),
            f"{3600 * run['trials'] / run['seconds']:,.0f}",
            f"{100 * busy(run):.0f} %",
            common.significant(run["ending"]),
        ]
        for run in runs
    ]
    last = runs[-1]
    what = f"rate of {last['workers']} workers / {last['workers']} × the rate of one"
    goal = common.judged(what, efficiency(runs[0], last), at_least=_GOAL)
    return "\n".join(
        [
            "## More workers",
            "",
            common.table(["workers", "trials", "seconds", "trials per hour", "busy", "ending, s"], rows),
            "",
            f"Goal: {goal}.",
            "",
            f"Trials that wait {2 * EPOCHS * SECONDS:g} s in {2 * EPOCHS} epochs. {common.where(document)}",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    arguments = common.parser("scaling", __doc__).parse_args()
    torch.set_num_threads(1)
    machine = common.hardware()
    runs = []
    for workers in (1,) if arguments.quick else (1, 2, 4):
        with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
            runs.append(run_sweep(workers, 4 if arguments.quick else 40 * workers, Path(folder)))
    document = common.result("scaling", "cpu", machine, {"runs": runs})
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
