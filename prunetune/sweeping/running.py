"""Running a sweep: what is missing of it is searched, executed, recorded, shown and handed over."""

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
    """Search a configuration per density, as the command `prunetune.sweep` does; called again, it goes on.

    `config` is a sweep's file by its path, or what would stand in one; `overrides` replace values of it, as
    `dotted.key=value` with YAML, or by dotted key. `executor` is `ray` (the Ray that this process has
    initialised, which stays up; else the cluster that there is, else a Ray for the time of the call),
    `in_process` (one trial after another, without Ray), or an `Executor`. `progress` shows a table of what
    runs. Where a first SIGINT comes to the main thread, trials end in order and the result is `interrupted`.

    Raises UserError for a wrong file, argument or machine, WorkError where no trial works.
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
    """Run the trials of an opened sweep that are missing; `steps` is what each runs.

    What a person should know on the way goes to the console; without one, to the log. Raises as `run_sweep`.
    """
    with opened.held():
        return _Run(opened, console).run(executor, steps)


def _executor(given: str | Executor) -> Executor:
    if not isinstance(given, str):
        return given
    try:
        made: Executor = registry.EXECUTORS.find(given)()
    except registry.UnknownComponentError as error:
        raise UserError(f"executor = {given!r}: {error}") from None
    return made


class _Run:
    """One run of a sweep."""

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
        finally:  # what was found is handed over, whatever has ended the search
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
        """The sweep's header in the store; says what a changed search space means."""
        header, problem = self._store.read_record("sweep"), self._opened.problem
        if not isinstance(header, dict):
            header = {"sweep_id": uuid.uuid4().hex}
        elif header.get("space") != problem.hash:
            self._say_what_changed(header)
        # Until it says what it has kept, other sweeps spare all that its trials may need.
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
