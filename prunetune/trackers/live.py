"""Shows a running sweep: a live table on a terminal, elsewhere a line of text per trial."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prunetune.engine.epoch import Epoch
from prunetune.records.results import Row, best_records
from prunetune.records.trial import TrialRecord
from prunetune.search.queue import SweepSearch
from prunetune.tasks import ACCURACY, Metric


class Progress:
    """A `Listener` that shows the sweep's progress within its context (`with`)."""

    def __init__(
        self,
        console: Console,
        search: SweepSearch,
        densities: list[float],
        title: str,
        metric: Metric = ACCURACY,
    ) -> None:
        self._console = console
        self._search = search
        self._densities = densities
        self._title = title
        self._metric = metric
        self._done: list[TrialRecord] = [r for r in search.past if r.density in densities]
        self._before = len(self._done)
        self._running: dict[str, tuple[TrialRecord, Epoch | None]] = {}
        self._since: float | None = None  # when the first trial was running
        self._opened = time.monotonic()
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=2, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def started(self, record: TrialRecord) -> None:
        """Show the trial as running."""
        self._since = self._since or time.monotonic()
        self._running[record.uid] = (record, None)

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Show the newest epoch of the running trial."""
        self._running[record.uid] = (record, epochs[-1])

    def ended(self, record: TrialRecord) -> None:
        """Count the trial as done; without a terminal, print a line with its result."""
        self._running.pop(record.uid, None)
        self._done.append(record)
        if not self._console.is_terminal:
            self._console.print(self._line(record), soft_wrap=True, highlight=False)

    def _line(self, record: TrialRecord) -> str:
        total = sum(self._search.total(density) for density in self._densities)
        value = "" if record.val is None else f" val {self._metric.text(record.val)}"
        best = best_records(self._done).get(record.density)
        best_text = "" if best is None else f" (best {self._metric.text(best.val)})"
        reused = f", {record.epochs_reused} reused" if record.epochs_reused else ""
        left = self._left()
        left_text = f", {left} left" if left else ""
        return (
            f"[{len(self._done)}/{total}] d={record.density:g} #{record.number} {record.status}{value}"
            f"{best_text}, {record.epochs_run} epochs{reused}, {record.seconds:.0f} s{left_text}"
        ).replace("[", r"\[", 1)

    def _left(self) -> str:
        """The estimated time to the end as text, from the trials finished in this run; "" if unknown."""
        finished = len(self._done) - self._before
        missing = len(self._search) + len(self._running)
        if self._since is None or not finished or not missing:
            return ""
        return duration((time.monotonic() - self._since) / finished * missing)

    def _view(self) -> Group:
        table = Table(title=self._title, title_justify="left", title_style="bold")
        for name in (
            "density",
            "sparsity",
            "done",
            "running",
            "total",
            "stopped",
            "failed",
            "best val",
            "now",
        ):
            table.add_column(name, justify="left" if name == "now" else "right")
        best = best_records(self._done)
        running = list(self._running.values())
        for density in self._densities:
            statuses = Counter(r.status for r in self._done if r.density == density)
            here = [(r, epoch) for r, epoch in running if r.density == density]
            winner = best.get(density)
            table.add_row(
                f"{density:g}",
                f"{100 * (1 - density):g} %",
                str(statuses.total()),
                str(len(here)),
                str(self._search.total(density)),
                str(statuses["stopped"]),
                str(statuses["failed"]),
                "" if winner is None else self._metric.text(winner.val),
                "; ".join(_now(record, epoch) for record, epoch in here),
            )
        run = sum(r.epochs_run for r in self._done)
        reused = sum(r.epochs_reused for r in self._done)
        share = f" ({100 * reused / (run + reused):.0f} %)" if run + reused else ""
        left = self._left()
        footer = (
            f"{duration(time.monotonic() - self._opened)} passed"
            + (f", about {left} left" if left else "")
            + f"; {run} epochs trained, {reused} saved by reuse{share}"
        )
        return Group(table, Text(footer))


def results_table(rows: list[Row]) -> Table:
    """The final table of a sweep: the best trial at each density."""
    noun = rows[0].metric.noun if rows else ACCURACY.noun
    table = Table(title=f"Best per density (chosen by validation {noun})", title_justify="left")
    for name in ("density", "sparsity", "val", "test", "nonzero", "effective", "status", "trial", "trials"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.cells())
    return table


def duration(seconds: float) -> str:
    """Format a duration for people: `1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


def _now(record: TrialRecord, epoch: Epoch | None) -> str:
    if epoch is None:
        return f"#{record.number} starting"
    return f"#{record.number} {epoch.stage.partition('_')[0]} epoch {epoch.epoch}"
