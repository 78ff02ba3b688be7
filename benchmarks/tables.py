"""Writes the tables of docs/benchmarks.md anew, from the results in `benchmarks/results/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, history, orchestration, scaling, step_time, sweep_cost, vectorized

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "sweep_cost": sweep_cost.render,
    "step_time": step_time.render,
    "vectorized": vectorized.render,
    "orchestration": orchestration.render,
    "scaling": scaling.render,
    "history": history.render,
}
"""Benchmarks in the page's order, and what makes their results Markdown."""


def tables(folder: Path = common.RESULTS) -> str:
    """Every committed result as Markdown, the CPU's before the GPU's."""
    parts = []
    for name, render in RENDERERS.items():
        for device in ("cpu", "gpu"):
            path = folder / f"{name}-{device}.json"
            if path.exists():
                parts.append(render(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def replaced(text: str, tables: str) -> str:
    """A text with `tables` between its markers. Raises ValueError unless each marker is there once."""
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{marker} must stand in the file once; it is there {text.count(marker)} times")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    """The command."""
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
