"""Draws images/accuracy-over-density.svg from the table of MNIST in README.md.

python docs/figure.py
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

README = Path(__file__).parents[1] / "README.md"
IMAGE = Path(__file__).parent / "images" / "accuracy-over-density.svg"

OURS, PAPERS = "test", "the paper's best (test)"
"""Columns of the table."""


def curves(text: str) -> dict[str, list[tuple[float, float]]]:
    """(density, accuracy in percent) by column, from the first table that compares with the paper.

    >>> curves("| density | test | the paper's best (test) |\\n|---|---|---|\\n| 0.1 | 97.5 % | none |")
    {'test': [(0.1, 97.5)], "the paper's best (test)": []}
    """
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and PAPERS in line)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    header, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table)
    found: dict[str, list[tuple[float, float]]] = {OURS: [], PAPERS: []}
    for row in rows:
        values = dict(zip(header, row, strict=True))
        for column, points in found.items():
            if match := re.fullmatch(r"([\d.]+) %", values[column]):
                points.append((float(values["density"]), float(match[1])))
    return found


def draw(found: dict[str, list[tuple[float, float]]]) -> None:
    """Write the image, the same bytes for the same figures."""
    with pyplot.rc_context({"svg.hashsalt": "prunetune", "font.family": "DejaVu Sans", "font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
        styles = {
            OURS: ("#00796b", "prunetune", (14, -6), "left", (3, 7)),
            PAPERS: ("#757575", "the paper's best", (-14, 4), "right", (-3, -15)),
        }
        for column, (colour, name, beside, side, place) in styles.items():
            densities, accuracies = zip(*found[column], strict=True)
            axes.plot(densities, accuracies, "o-", color=colour, linewidth=2.5, markersize=6)
            text = {"textcoords": "offset points", "color": colour}
            for density, accuracy in found[column]:
                axes.annotate(f"{accuracy:.1f}", (density, accuracy), place, ha=side, fontsize=10, **text)
            fourth = found[column][3]  # where they are furthest apart
            axes.annotate(name, fourth, beside, ha=side, va="center", weight="bold", **text)
        axes.set_xscale("log")
        axes.set_xlim(0.14, 0.0007)
        axes.set_xticks([d for d, _ in found[OURS]], [f"{100 * d:g} %" for d, _ in found[OURS]])
        axes.minorticks_off()
        axes.set_ylim(62, 104)
        axes.set_yticks([70, 80, 90, 100])
        axes.set_xlabel("density: share of the weights that stay")
        axes.set_ylabel("test accuracy, %")
        axes.grid(axis="y", color="#e0e0e0")
        axes.spines[["top", "right"]].set_visible(False)
        IMAGE.parent.mkdir(exist_ok=True)
        figure.savefig(IMAGE, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    draw(curves(README.read_text(encoding="utf-8")))
    print(f"written: {IMAGE}")
