"""Writes the tables of docs/benchmarks.md from the results in `benchmarks/results/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import (
    common,
    history,
    one_network,
    orchestration,
    scaling,
    step_time,
    sweep_cost,
    time_to_accuracy,
    vectorized,
)

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "sweep_cost": sweep_cost.render,
    "time_to_accuracy": time_to_accuracy.render,
    "one_network": one_network.render,
    "step_time": step_time.render,
    "vectorized": vectorized.render,
    "orchestration": orchestration.render,
    "scaling": scaling.render,
    "history": history.render,
}
"""The benchmarks in the page's order, each with the function that formats its result as Markdown."""


def tables(folder: Path = common.RESULTS) -> str:
    """Format all committed results as Markdown, each benchmark's CPU result before its GPU result."""
    parts = []
    for name, render in RENDERERS.items():
        for device in ("cpu", "gpu"):
            path = folder / f"{name}-{device}.json"
            if path.exists():
                parts.append(render(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def replaced(text: str, tables: str) -> str:
    """Replace the text between the markers by `tables`. Raises ValueError unless each marker occurs once."""
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{marker} must stand in the file once; it is there {text.count(marker)} times")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    """Run the command, which rewrites the page."""
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
