"""Functions that the benchmarks share: the machine, versions, timing, files of results, Markdown."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

_PACKAGES = ("torch", "torchvision", "numpy", "ray", "optuna", "mlflow")


def hardware() -> dict[str, Any]:
    """Describe the machine; `load` is its load average before the benchmark, which reveals a busy machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages that affect the results, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the arguments that every benchmark takes."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="a smoke test: tiny, its figures mean nothing")
    made.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the result goes (default: benchmarks/results; with --quick nowhere)",
    )
    return made


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measure the seconds of each task `repeats` times, in turns, so that a slow phase slows all tasks alike.

    A task that works on a GPU must wait for it. The first `warmup` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(-warmup, repeats):
        for name, task in tasks.items():
            begun = clock()
            task()
            if number >= 0:
                seconds[name].append(clock() - begun)
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the median; NaN if there are no values."""
    return statistics.median(values) if values else float("nan")


def result(name: str, device: str, machine: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Return the document that is written: the figures `body`, the machine, the versions and the date."""
    return {
        "benchmark": name,
        "device": device,
        "date": datetime.date.today().isoformat(),
        "hardware": machine,
        "versions": versions(),
        "results": body,
    }


def write(document: dict[str, Any], arguments: argparse.Namespace) -> Path | None:
    """Write a result as `NAME-<cpu|gpu>.json`; return its path, None for a quick run without `--output`."""
    if arguments.quick and arguments.output is None:
        return None
    folder: Path = arguments.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['benchmark']}-{document['device']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def show(text: str, written: Path | None) -> None:
    """Print a benchmark's tables, and the path of its result."""
    print(text, flush=True)
    if written is not None:
        print(f"written: {written}; `python -m benchmarks.tables` puts it into the docs", flush=True)


def where(document: Mapping[str, Any]) -> str:
    """Return one line with the machine, the versions and the date of a result."""
    machine, packages = document["hardware"], document["versions"]
    gpu = f"{machine['gpu']}, " if document["device"] == "gpu" else ""
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    busy = f"; load before it {machine['load']:g}" if machine["load"] > 0.5 else ""
    return f"{gpu}{machine['cores']} cores of {machine['cpu']}; {listed}; {document['date']}{busy}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def significant(value: float, digits: int = 3) -> str:
    """Format a number with this many significant digits, without an exponent.

    >>> significant(0.012345), significant(1234.5), significant(12.0)
    ('0.0123', '1,234', '12.0')
    """
    if not math.isfinite(value):
        return "–"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:,.{max(0, decimals)}f}"


def judged(name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """Format a goal with the measured value, and whether it is met.

    >>> judged("masked / dense", 1.7, at_most=1.6)
    'masked / dense ≤ 1.6: 1.70, missed'
    """
    if at_most is not None:
        text, met = f"≤ {at_most:g}", value <= at_most
    else:
        assert at_least is not None
        text, met = f"≥ {at_least:g}", value >= at_least
    return f"{name} {text}: {significant(value)}, {'met' if met else 'missed'}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
