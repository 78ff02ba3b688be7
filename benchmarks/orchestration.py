"""The seconds per trial that a sweep takes in addition to the trials' own work.

Claim: proposing, starting, reporting, recording and tracking a trial costs a fraction of a second, so a sweep
whose trials take a minute runs at the speed of its training. Goal: at most 0.3 s (median) on two CPU cores.

Setting: 100 trials of the smallest useful kind (digits, an MLP with one hidden layer of 16, 1 + 1 epochs,
density 0.1, random search) by `python -m prunetune.sweep`, including Ray Tune, the ledger, Optuna, and MLflow
in SQLite. Two trials run at once, and the driver shares their two cores.

How to read it: a worker process runs one trial after the other. Of the time from one trial's end to the next
one's end, `work` is the pipeline's time (data, training, the store). The rest is overhead, either `between`
the trials (recording the old one, proposing and starting the new one) or `within` a trial (waiting after a
report). Each process's first trial is left out, because there is no trial before it; the times to start Ray
and to end the sweep are reported separately. `--profile` prints a profile of the driver instead.
"""

from __future__ import annotations

import contextlib
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import clocked, common
from prunetune import pipeline, sweep

SWEEP = """
name: orchestration
data: {name: digits, batch_size: 64, limit: 400, validation_fraction: 0.2}
model: {name: mlp, hidden: [16]}
densities: [0.1]
pre_pruning: {epochs: 1, optimizer: {name: adam, lr: {loguniform: [1.0e-4, 1.0e-1]}}}
post_pruning: {epochs: 1, optimizer: {name: adam, lr: {loguniform: [1.0e-4, 1.0e-1]}}}
search: {sampler: random, exploration: 1.0, max_concurrent: 2}
"""

_GOAL = 0.3


def run_sweep(folder: Path, trials: int, profile: cProfile.Profile | None = None) -> dict[str, Any]:
    """Run the sweep in a folder; return its overheads and work per trial, and the times to start and end."""
    (folder / "times").mkdir()
    (folder / "sweep.yaml").write_text(SWEEP)
    arguments = [str(folder / "sweep.yaml"), f"storage={folder}", f"search.trials_per_density={trials}"]
    begun = time.monotonic()
    with open(folder / "output.txt", "w") as output, contextlib.redirect_stdout(output):
        if profile is not None:
            profile.enable()
        code = sweep.main(arguments, clocked.Clocked(pipeline.steps, str(folder / "times")))
        if profile is not None:
            profile.disable()
    ended = time.monotonic()
    times = clocked.read(folder / "times")
    if code != 0 or len(times) != trials:
        raise RuntimeError(f"the sweep ended with {code}: {(folder / 'output.txt').read_text()}")
    beyond = clocked.beyond(times)
    return {
        "trials": trials,
        "processes": len({trial.process for trial in times}),
        "starting": min(trial.begun for trial in times) - begun,
        "ending": ended - times[-1].ended,
        "work": [round(trial.inside, 6) for trial in beyond],
        "between": [round(trial.between, 6) for trial in beyond],
        "within": [round(trial.within, 6) for trial in beyond],
    }


def render(document: Mapping[str, Any]) -> str:
    """Format a result as Markdown."""
    body = document["results"]
    total = [between + within for between, within in zip(body["between"], body["within"], strict=True)]
    rows = [
        [name, common.significant(common.median(values)), common.significant(statistics.mean(values))]
        for name, values in (
            ("between trials", body["between"]),
            ("within a trial, waiting", body["within"]),
            ("overhead", total),
            ("the trial's work", body["work"]),
        )
    ]
    return "\n".join(
        [
            "## What a sweep adds to a trial",
            "",
            common.table(["seconds per trial", "median", "mean"], rows),
            "",
            f"Goal: {common.judged('overhead, median', common.median(total), at_most=_GOAL)}.",
            "",
            f"{body['trials']} tiny trials in {body['processes']} processes; "
            f"{common.significant(body['starting'])} s to the first trial, "
            f"{common.significant(body['ending'])} s from the last one's end to the sweep's. "
            f"{common.where(document)}",
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("orchestration", __doc__)
    parser.add_argument("--profile", action="store_true", help="print where the driver's main thread spends")
    arguments = parser.parse_args()
    machine = common.hardware()
    if hasattr(os, "sched_setaffinity"):  # use two cores on every machine, as the goal says
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    profile = cProfile.Profile() if arguments.profile else None
    with tempfile.TemporaryDirectory(prefix="prunetune-") as folder:
        body = run_sweep(Path(folder), 6 if arguments.quick else 100, profile)
    if profile is not None:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    document = common.result("orchestration", "cpu", machine, body)
    common.show(render(document), common.write(document, arguments))


if __name__ == "__main__":
    main()
