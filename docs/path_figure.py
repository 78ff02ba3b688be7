"""Trains a network whose mask follows a path, and draws images/path.svg from its epochs.

python docs/path_figure.py data.root=data
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from prunetune import pipeline
from prunetune.config import document
from prunetune.config.reading import from_document
from prunetune.engine.epoch import Epoch
from prunetune.sparsity.control import log_path
from prunetune.store import Store

IMAGE = Path(__file__).parent / "images" / "path.svg"

DENSITIES = (0.1, 0.032, 0.01, 0.0032, 0.001)
EPOCHS = 20

RUN: dict[str, Any] = {
    "name": "path-figure",
    "seed": 0,
    "data": {"name": "mnist", "batch_size": 128, "validation_fraction": 0.1},
    "model": {"name": "mlp", "hidden": [100] * 5},
    "densities": [0.1],
    "pre_pruning": {
        "epochs": EPOCHS,
        "optimizer": {"name": "adam", "lr": 2e-3},
        "mask": {"method": "path", "lowest": min(DENSITIES)},
    },
    "pruning": {"from_epoch": "best"},
    "post_pruning": {"epochs": 1, "optimizer": {"name": "adam", "lr": 2e-3}},
}


def trained(overrides: Sequence[str]) -> tuple[list[Epoch], dict[str, Any]]:
    """The epochs of the pre-training, and the mask's options."""
    config = from_document(document.override(document.Document("figure", RUN), overrides))
    with tempfile.TemporaryDirectory() as folder:
        epochs = []
        for epoch in pipeline.run(config, store=Store(folder), also=DENSITIES):
            if epoch.stage != "pre_pruning":
                break
            print({name: f"{value:.3g}" for name, value in epoch.metrics.items()}, flush=True)
            epochs.append(epoch)
    assert config.pre_pruning is not None
    assert config.pre_pruning.mask is not None
    return epochs, config.pre_pruning.mask.options


def draw(epochs: Sequence[Epoch], mask: dict[str, Any]) -> None:
    """Write the image, the same bytes for the same epochs."""
    numbers = [epoch.stage_epoch for epoch in epochs]
    names = ("opening", "end", "power")
    final = mask["factor"] * mask["lowest"]
    goal = log_path(mask["initial"], mask["start"], final, **{name: mask[name] for name in names})
    with pyplot.rc_context({"svg.hashsalt": "prunetune", "font.family": "DejaVu Sans", "font.size": 10}):
        figure, (above, middle, below) = pyplot.subplots(
            3, 1, figsize=(7.2, 7.2), sharex=True, layout="constrained", height_ratios=[3, 2, 4]
        )
        times = [step / 200 for step in range(201)]
        above.plot(
            [time * len(epochs) for time in times],
            [math.exp(goal(time)) for time in times],
            color="#9e9e9e",
            label="prescribed",
        )
        above.plot(
            numbers, [e.metrics["mask_density"] for e in epochs], "o", color="#00796b", label="mean of M"
        )
        for density in DENSITIES:
            above.axhline(density, color="#e0e0e0", zorder=0)
            above.annotate(f"{density:g}", (0, density), (2, 2), textcoords="offset points", color="#757575")
        above.set_yscale("log")
        above.set_ylabel("expected density ρ")
        above.legend(frameon=False)
        middle.plot(numbers, [e.metrics["lambda2"] for e in epochs], "o-", color="#00796b")
        middle.set_yscale("log")
        middle.set_ylabel("λ2")
        colours = pyplot.get_cmap("viridis")
        for index, density in enumerate(DENSITIES):
            values = [100 * e.metrics[f"oneshot_accuracy_density_{density:g}"] for e in epochs]
            colour = colours(0.9 * index / (len(DENSITIES) - 1))
            below.plot(numbers, values, "-", color=colour, label=f"{density:g}")
            best = values.index(max(values))
            below.plot(numbers[best], values[best], "o", color=colour)
        below.set_ylabel("accuracy right after\npruning, %")
        below.set_xlabel("epoch of pre-pruning; a dot is where a density's branches start")
        below.legend(
            title="pruned to density", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5
        )
        below.set_xticks(range(0, len(epochs) + 1, 2))
        below.set_xlim(0, len(epochs) + 0.3)
        for axes in (above, middle, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.minorticks_off()
        figure.savefig(IMAGE, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    draw(*trained(sys.argv[1:]))
    print(f"written: {IMAGE}")
