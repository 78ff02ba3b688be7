"""The metric by which trials are compared: its name, its direction, and how it is shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Metric:
    """A number by which networks are judged; `val_<name>` and `test_<name>` hold its raw values.

    `label` is its name for people ("top-1 accuracy"). With `percent` its values are in [0, 1] and shown as
    percentages; otherwise they are shown with `unit`, if given. `worst` is the value of a network that gives
    no answer at all, such as one that diverged; no other network has a worse one. By default it is infinite.

    Decisions use `score`, of which a higher value is better for every metric. Raises ValueError for the name
    `loss`, which is taken.
    """

    name: str
    label: str
    maximize: bool = True
    percent: bool = False
    unit: str = ""
    worst: float = math.nan

    def __post_init__(self) -> None:
        if self.name == "loss":
            raise ValueError("a metric cannot be named 'loss': val_loss is the loss on the validation split")
        if math.isnan(self.worst):
            object.__setattr__(self, "worst", -math.inf if self.maximize else math.inf)

    @property
    def val(self) -> str:
        """The name under which the value on the validation split is reported, `val_<name>`."""
        return f"val_{self.name}"

    @property
    def test(self) -> str:
        """The name under which the value on the test split is reported, `test_<name>`."""
        return f"test_{self.name}"

    def one_shot(self, density: float, selection: str = "") -> str:
        """The name of the value right after pruning to a density (`one_shot_name`)."""
        return one_shot_name(self.name, density, selection)

    @property
    def noun(self) -> str:
        """The metric's name within a sentence: `accuracy`, `RMSE`."""
        return self.label if self.label.isupper() else self.name.replace("_", " ")

    @property
    def shown_unit(self) -> str:
        """The unit in which values are shown: "%", `unit`, or ""."""
        return "%" if self.percent else self.unit

    @property
    def axis(self) -> str:
        """The label of a figure's axis on which `shown` values are drawn."""
        return f"{self.label}, {self.shown_unit}" if self.shown_unit else self.label

    def score(self, value: float) -> float:
        """Turn a value into a score, of which higher is better; NaN gives the score of `worst`.

        >>> ACCURACY.score(0.9), Metric("rmse", "RMSE", maximize=False).score(53.2)
        (0.9, -53.2)
        """
        value = self.worst if math.isnan(value) else value
        return value if self.maximize else -value

    def value(self, score: float) -> float:
        """Turn a score back into the metric's value."""
        return score if self.maximize else -score

    def shown(self, value: float) -> float:
        """Convert a value to the unit in which it is shown, such as 0.975 to 97.5 for percentages."""
        return 100 * value if self.percent else value

    def text(self, value: float | None) -> str:
        """Format a value for people, with its unit; "" for None and NaN.

        >>> ACCURACY.text(0.975), ACCURACY.text(None)
        ('97.50 %', '')
        >>> price = Metric("rmse", "RMSE", maximize=False, unit="€")
        >>> price.text(53.24), price.text(60.0), price.text(0.05321), price.text(12345.6)
        ('53.2 €', '60.0 €', '0.0532 €', '12,346 €')
        """
        if value is None or math.isnan(value):
            return ""
        shown = self.shown(value)
        if self.percent:
            digits = f"{shown:.2f}"
        else:  # three significant digits, or all digits before the point
            digits = f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:#.3g}".rstrip(".")
        return f"{digits} {self.shown_unit}".rstrip()

    def plain(self) -> dict[str, Any]:
        """Convert the metric to plain data; `worst` becomes text, because JSON has no infinity."""
        return {**dataclasses.asdict(self), "worst": str(self.worst)}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Metric:
        """Make a metric from `plain` data."""
        return cls(**{**plain, "worst": float(plain["worst"])})


def one_shot_name(metric: str, density: float, selection: str = "") -> str:
    """The name under which a metric's value right after pruning to a density is reported.

    It is measured on the validation split, before any further training. `metric` is the metric's name.
    `selection` is the label of how the network is pruned (`stages.pruning.Selection.label`): values of one
    network that was pruned by other criteria have other names.

    >>> one_shot_name("accuracy", 0.032), one_shot_name("accuracy", 0.1, "0f3a9c21")
    ('oneshot_accuracy_density_0.032', 'oneshot_accuracy_density_0.1_0f3a9c21')
    """
    return f"oneshot_{metric}_density_{density:.12g}" + (f"_{selection}" if selection else "")


def accuracy(name: str, value: float | None) -> float | None:
    """Return `value` if it belongs to the metric accuracy. Raises AttributeError for another `name`."""
    if name != ACCURACY.name:
        raise AttributeError(f"the metric of this task is {name}, not accuracy")
    return value


ACCURACY = Metric("accuracy", "top-1 accuracy", percent=True, worst=0.0)
"""The share of examples whose class is predicted correctly."""
