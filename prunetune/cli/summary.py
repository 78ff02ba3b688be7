"""Prints the progress and the results of the commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from prunetune.cli import commands
from prunetune.config.schema import Config
from prunetune.pipeline import PipelineResult
from prunetune.tasks import Metric

if TYPE_CHECKING:
    from prunetune.records.garbage import Found
    from prunetune.sweeping.result import SweepResult


def sweep(console: Console, result: SweepResult, arguments: list[str]) -> None:
    """Print the best trial per density, what went wrong, and what to do next.

    `arguments` are those of the command.
    """
    from prunetune.records import results
    from prunetune.trackers import live

    console.print(live.results_table(results.rows(result.records, result.metric)))
    for line in _troubles(result):
        console.print(line, markup=False)
    if result.interrupted:
        _print(console, interrupted(commands.command_line("sweep", arguments)))
        return
    for line in _cut(result):
        console.print(line, markup=False)
    for best in result.best.values():
        _print(console, f"  {commands.command_line('train', [best.path])}")
    for line in [*result.report, *(closed.look for closed in result.trackers if closed.look)]:
        _print(console, f"  {line}")


def interrupted(again: str) -> str:
    """The message for an interrupted sweep, which the command `again` resumes."""
    return f"interrupted; everything finished so far is kept. To go on:\n  {again}"


def _troubles(result: SweepResult) -> list[str]:
    lines = []
    failed = [record for record in result.records if record.status == "failed"]
    if failed:
        first = (failed[0].error or "").strip().splitlines()
        lines.append(
            f"{len(failed)} trials failed and will be tried again by the same command; the first: "
            f"{first[-1] if first else 'no message'}"
        )
    lines += [
        f"{closed.title}: {closed.unwritten} entries could not be written (above, why); "
        "the same command tries again"
        for closed in result.trackers
        if closed.unwritten
    ]
    return lines


def _cut(result: SweepResult) -> list[str]:
    return [
        f"warning: at density {density:g} the best network is cut through: no weight of "
        f"{', '.join(best.record.cut_layers)} is on a path from input to output"
        for density, best in result.best.items()
        if best.record.cut_layers
    ]


def garbage(console: Console, config: Config, found: Found, store: str, *, dry_run: bool) -> None:
    """Print which files of the store (at the path `store`) are deleted and which stay, by description."""
    from prunetune.records import garbage as collecting

    for title, items in (("would go" if dry_run else "removed", found.garbage), ("kept", found.staying)):
        table = Table(title=title, title_justify="left")
        table.add_column(store, overflow="fold")
        for name in ("number", "MB"):
            table.add_column(name, justify="right")
        for what, number, size in collecting.totals(items):
            table.add_row(what, f"{number:,}", f"{size / 1e6:,.1f}")
        table.add_section()
        table.add_row("all", f"{len(items):,}", f"{sum(item.size for item in items) / 1e6:,.1f}")
        console.print(table, markup=False)
    if not found.finished:
        console.print(f"{config.name} has trials to run: what they may start from stays", markup=False)


def epoch(metrics: Mapping[str, Any], metric: Metric) -> str:
    """Return a line with the progress of a training, from the values that `run_pipeline` reports."""
    mask = f"  mask {metrics['mask_density']:.4f}" if "mask_density" in metrics else ""
    return (
        f"  {metrics['stage']:<12} epoch {metrics['stage_epoch']:>3}  loss {metrics['train_loss']:.4f}  "
        f"val {metric.text(metrics[metric.val])}{mask}" + ("  (stored)" if metrics["reused"] else "")
    )


def training(
    console: Console, result: PipelineResult, weights: int, saved: list[Path], run_id: str | None
) -> None:
    """Print a training's result, of a model with `weights` prunable weights, and where it is saved."""
    console.print(
        f"{result.status}: validation {result.metric.text(result.val)}, "
        f"test {result.metric.text(result.test)}, {result.nonzero:,} of {weights:,} weights, "
        f"effective density {result.effective_density:.3g}; {result.epochs_run} epochs trained, "
        f"{result.epochs_reused} taken from the store",
        highlight=False,
        soft_wrap=True,
    )
    *files, model = saved
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print(f"  mlflow.pyfunc.load_model({str(model)!r})", highlight=False, soft_wrap=True)
    if run_id:
        console.print(f"  MLflow run {run_id}", highlight=False)


def training_interrupted(console: Console, again: str) -> None:
    """Print the message for an interrupted training, which the command `again` resumes."""
    said = "interrupted; finished stages and the newest epoch checkpoint are kept. To go on:\n  "
    _print(console, said + again)


def _print(console: Console, text: str) -> None:
    """Print text unchanged, without markup and line breaks, so that it can be copied."""
    console.print(text, markup=False, soft_wrap=True, highlight=False)
