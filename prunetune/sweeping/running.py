"""Runs a sweep: it searches, executes, records and shows the missing trials, and returns the results."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from prunetune import pipeline, registry
from prunetune.config.document import Document
from prunetune.config.reading import absolute
from prunetune.errors import UserError
from prunetune.execution.seam import Executor, Trials
from prunetune.kind import UnknownComponentError
from prunetune.records import ledger as ledgers
from prunetune.records import report as reporting
from prunetune.records import results, retention
from prunetune.records.ledger import Ledger
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.store import Store
from prunetune.sweeping.opening import Opened, open_sweep, read
from prunetune.sweeping.result import SweepResult, best_of
from prunetune.trackers.group import Closed, Trackers
from prunetune.trackers.live import Progress
from prunetune.trackers.tracker import Listener, Sweep

logger = logging.getLogger(__name__)


def run_sweep(
    config: str | Path | Mapping[str, Any] | Document,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    executor: str | Executor = "ray",
    progress: bool = False,
) -> SweepResult:
    """Search a configuration per density, as the command `prunetune.sweep` does; a second call resumes it.

    `config` is the path of a sweep's file, or a mapping with its content. `overrides` replace values in it;
    they are texts `dotted.key=value` with values in YAML, or a mapping by dotted key. `executor` is `ray`,
    `in_process` (one trial after another, without Ray), or an `Executor`. `ray` uses the Ray that this
    process has initialised, which stays up; else it joins a running cluster, or starts Ray for this call.
    `progress` shows a live table of the trials. After a first SIGINT in the main thread, trials end in order
    and the result is `interrupted`.

    Raises UserError for a wrong file, argument or machine, and WorkError where trials only fail.
    """
    opened = open_sweep(read(config, overrides))
    return run(opened, _executor(executor), console=Console() if progress else None)


def run(
    opened: Opened,
    executor: Executor,
    *,
    steps: pipeline.Steps = pipeline.steps,
    console: Console | None = None,
) -> SweepResult:
    """Run the missing trials of an opened sweep; `steps` is the pipeline that a trial runs.

    Messages go to the console, or without one to the log. Raises the same errors as `run_sweep`.
    """
    with opened.held():
        return _Run(opened, console).run(executor, steps)


def _executor(given: str | Executor) -> Executor:
    if not isinstance(given, str):
        return given
    try:
        made: Executor = registry.EXECUTORS.find(given)()
    except UnknownComponentError as error:
        raise UserError(f"executor = {given!r}: {error}") from None
    return made


class _Run:
    """One run of a sweep, from its header in the store to its results."""

    def __init__(self, opened: Opened, console: Console | None) -> None:
        self._opened = opened
        self._console = console
        self._config, self._store = opened.config, opened.store
        self._ledger = Ledger(opened.store)
        self._header = self._open_header()
        storage = Store(self._config.storage)
        stages = storage.sub("store")
        self._search = SweepSearch(
            self._config, opened.problem, self._ledger, lambda key: stages.has("stages", key)
        )
        self._keeper = retention.Retention(
            self._config.keep,
            self._ledger,
            self._records(),
            stages,
            retention.References(storage, self._config.name),
        )

    def run(self, executor: Executor, steps: pipeline.Steps) -> SweepResult:
        sweep = Sweep(self._header["sweep_id"], self._config, self._store.path(""))
        trackers, status = Trackers.of(sweep), "failed"
        try:
            trackers.begin(self._opened.source.tree, self._records())
            interrupted = len(self._search) > 0 and self._execute(executor, trackers, steps)
            status = "interrupted" if interrupted else "finished"
        finally:  # write the results, whatever has ended the search
            closed = self._close(trackers, status)
            done = [record for record in self._records() if record.status != "running"]
            results.write(self._store, done, trackers.run_ids, self._config)
            report = reporting.write_report(self._store, self._config.name)
        self._keep(going_on=interrupted)
        return SweepResult(
            folder=self._store.path("").rstrip("/"),
            interrupted=interrupted,
            trials=results.trials_frame(done, trackers.run_ids, self._config),
            best=best_of(done, self._config, self._store),
            studies=self._search.studies,
            metric=self._opened.problem.metric,
            records=done,
            report=report,
            trackers=closed,
        )

    def _records(self) -> list[TrialRecord]:
        return self._ledger.fitting(self._opened.problem)

    def _execute(self, executor: Executor, trackers: Trackers, steps: pipeline.Steps) -> bool:
        finished = sum(record.finished for record in self._records())
        self._say(
            f"{self._config.name}: {len(self._search)} trials to run"
            + (f", {finished} finished before" if finished else "")
            + f"; results in {self._store.path('')}"
        )
        opened, view = self._opened, self._view()
        with view or nullcontext():
            listeners: list[Listener] = [trackers, *([view] if view else []), self._keeper]
            return executor.run(
                Trials(absolute(self._config), opened.problem, self._search, listeners, steps, opened.source)
            )

    def _view(self) -> Progress | None:
        if self._console is None:
            return None
        config, metric = self._config, self._opened.problem.metric
        return Progress(self._console, self._search, config.densities, config.name, metric)

    def _close(self, trackers: Trackers, status: str) -> list[Closed]:
        best = results.best_records(self._records())
        name = self._opened.problem.metric.val
        trackers.finish(
            status,
            {f"best_{name}_density_{d:g}": r.val for d, r in best.items() if r.val is not None},
            {
                f"best/{ledgers.density_name(d)}.yaml": results.best_yaml(r, self._config, {})
                for d, r in best.items()
            },
        )
        return trackers.close()

    def _keep(self, *, going_on: bool) -> None:
        keys = self._keeper.apply(going_on=going_on)
        if keys is not None and not going_on:
            self._store.write_record("sweep", {**self._header, "kept": sorted(keys)})

    def _open_header(self) -> dict[str, Any]:
        """Write the sweep's header to the store, and tell the user if the search space has changed."""
        header, problem = self._store.read_record("sweep"), self._opened.problem
        if not isinstance(header, dict):
            header = {"sweep_id": uuid.uuid4().hex}
        elif header.get("space") != problem.hash:
            self._say_what_changed(header)
        # While `kept` is None, other sweeps delete no stage that this sweep's trials may need.
        header.update(space=problem.hash, described=problem.described, kept=None)
        self._store.write_record("sweep", header)
        return header

    def _say_what_changed(self, header: dict[str, Any]) -> None:
        config, problem = self._config, self._opened.problem
        past = [record for record in self._ledger.records() if record.finished]
        fit = sum(problem.fit(record) is not None for record in past)
        self._say(f"the search space of {config.name} has changed since the last run:")
        for line in problem.changes(header.get("described", {})):
            self._say(f"  {line}")
        self._say(
            f"{fit} of {len(past)} finished trials still fit: Optuna knows them as past results, and they "
            f"can be best; the others stay in {self._store.path('trials')}, out of the results. "
            f"{config.search.trials_per_density} trials per density are run in the new space."
        )

    def _say(self, message: str) -> None:
        if self._console is None:
            logger.info("%s", message)
        else:
            self._console.print(message, markup=False, soft_wrap=True, highlight=False)
