"""The search of `sweep_cost` with plain Ray Tune, as the baseline.

It runs one experiment per density, with Ray's OptunaSearch (TPE), a process per trial, and every stage
computed in every trial; FIFO, or with `--asha` Ray's ASHAScheduler over the epochs after pruning, with the
settings of the project's own. The training code is the project's own. So the differences are the sweep
itself, that collapsed stages run to their end, and that pruned layers are not compacted.

    python -m benchmarks.plain_ray_tune CONFIG RESULT.json [dotted.key=value …]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks import events
from prunetune.config import document, space
from prunetune.config.canonical import is_active
from prunetune.config.document import Document
from prunetune.config.reading import sweep_from_document, validate
from prunetune.config.schema import Config
from prunetune.engine.precision import prepare_process
from prunetune.pipeline import run_pipeline
from prunetune.search.study import suggest_value
from prunetune.stages import pre_pruning
from prunetune.store import Store


def trial(
    params: dict[str, Any],
    template: dict[str, Any],
    density: float,
    threads: int,
    *,
    only_pruned: bool,
    path: str | None,
) -> None:
    """Run one trial as a user would write it: train, prune, train, and report every epoch.

    With `only_pruned` it reports the epochs after pruning alone. A line about a trial that has reached its
    end is written to the file `path` (`benchmarks.events`).
    """
    prepare_process(threads)
    tree = space.at(template, params, is_active)
    config = validate({**tree, "densities": [density], "compact_layers": False}, Document("trial", {}))

    def tell(**report: Any) -> None:
        # With ASHA the last epoch is reported below, with the test accuracy: ASHA ends the trial at it.
        if not only_pruned or 0 < report.get("post_epoch", 0) < config.post_pruning.epochs:
            names = [name for name in ("val_accuracy", "post_epoch") if name in report]
            tune.report({name: report[name] for name in names} | {"epochs": report["epoch"]})

    # Collapsed stages run to their end here; the stages after them are skipped, as in the project's sweep.
    to_the_end = mock.patch.object(pre_pruning, "is_hopeless", return_value=False)
    with tempfile.TemporaryDirectory() as folder, to_the_end:
        result = run_pipeline(
            config,
            store=Store(folder),
            device="cuda" if ray.get_gpu_ids() else "cpu",
            report=tell,
            checkpoint_interval=1e9,
        )
    if path is not None:
        events.write(path, density, result.val_accuracy, result.test_accuracy)
    tune.report(
        {
            "val_accuracy": result.val_accuracy or 0.0,
            "test_accuracy": result.test_accuracy or 0.0,
            "epochs": result.epochs_run,
            "post_epoch": config.post_pruning.epochs,
        }
    )


def propose(asked: optuna.Trial, template: dict[str, Any]) -> None:
    """Define the search space for Optuna, by run."""
    space.resolve(template, lambda name, found: suggest_value(asked, name, found), is_active)


def scheduler(config: Config) -> ASHAScheduler | None:
    """Make Ray's ASHA with the settings of the project's own; None where the sweep has no early stopping."""
    early = config.search.early_stopping
    if early is None or early.name != "asha":
        return None
    return ASHAScheduler(
        time_attr="post_epoch",
        max_t=config.post_pruning.epochs,
        grace_period=early.options["grace_epochs"],
        reduction_factor=early.options["reduction_factor"],
    )


def main() -> None:
    """Search every density, and write the best networks' accuracies to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("output", metavar="RESULT.json")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--asha", action="store_true", help="stop trials early")
    parser.add_argument("--events", metavar="FILE", help="where a line about each complete trial is written")
    given = parser.parse_intermixed_args()
    template, config = sweep_from_document(document.override(document.read(given.config), given.overrides))
    template = {**template, "data": {**template["data"], "root": str(Path(config.data.root).absolute())}}

    warnings.filterwarnings("ignore")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    resources = {"cpu": config.resources.cpus, "gpu": config.resources.gpus}
    found: dict[str, Any] = {"epochs_run": 0, "trials": 0, "best": {}}
    for density in config.densities:
        with tempfile.TemporaryDirectory() as folder:
            grid = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(
                        trial,
                        template=template,
                        density=density,
                        threads=int(config.resources.cpus),
                        only_pruned=given.asha,
                        path=given.events,
                    ),
                    resources,
                ),
                tune_config=tune.TuneConfig(
                    metric="val_accuracy",
                    mode="max",
                    search_alg=OptunaSearch(
                        space=partial(propose, template=template),
                        metric="val_accuracy",
                        mode="max",
                        sampler=optuna.samplers.TPESampler(seed=config.seed, multivariate=True, group=True),
                    ),
                    scheduler=scheduler(config) if given.asha else None,
                    num_samples=config.search.trials_per_density,
                ),
                run_config=tune.RunConfig(name="plain", storage_path=folder, verbose=0),
            ).fit()
            results = [each.metrics for each in grid if each.metrics and "epochs" in each.metrics]
        ended = [metrics for metrics in results if "test_accuracy" in metrics]
        best = max(ended, key=lambda metrics: metrics["val_accuracy"])
        found["trials"] += len(results)
        found["epochs_run"] += sum(metrics["epochs"] for metrics in results)
        found["best"][f"{density:g}"] = {name: best[name] for name in ("val_accuracy", "test_accuracy")}
    Path(given.output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
