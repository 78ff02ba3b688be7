"""The figures of a report: something over density, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def over_density(draw: Callable[[Axes], None], densities: Iterable[float], label: str, title: str) -> bytes:
    """A PNG figure in which `draw` draws values over the densities; `label` names the values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes)
    ticks = list(densities)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{density:g}" for density in ticks])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel("density (share of prunable weights kept)")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()
