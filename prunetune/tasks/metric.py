"""What trials are compared by: its name, its direction, and how people read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Metric:
    """A number by which networks are judged; `val_<name>` and `test_<name>` hold it as it is.

    `label` is for people ("top-1 accuracy"). With `percent` it is in [0, 1] and shown as a percentage; else
    shown with its `unit`, if it has one. `worst` is what a network counts that gives no answer at all, such
    as one that diverged: no network that gives one is worse. By default it is infinitely bad.

    Decisions read `score`, of which the higher is the better for any metric. Raises ValueError for the name
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
        """The name of the value on the validation split."""
        return f"val_{self.name}"

    @property
    def test(self) -> str:
        """The name of the value on the test split."""
        return f"test_{self.name}"

    @property
    def noun(self) -> str:
        """Its name in a sentence: `accuracy`, `RMSE`."""
        return self.label if self.label.isupper() else self.name.replace("_", " ")

    @property
    def shown_unit(self) -> str:
        """In which unit it is shown: "%", `unit`, or ""."""
        return "%" if self.percent else self.unit

    @property
    def axis(self) -> str:
        """As the label of a figure's axis, whose numbers are `shown`."""
        return f"{self.label}, {self.shown_unit}" if self.shown_unit else self.label

    def score(self, value: float) -> float:
        """The value turned so that higher is better; one that is not a number is the worst.

        >>> ACCURACY.score(0.9), Metric("rmse", "RMSE", maximize=False).score(53.2)
        (0.9, -53.2)
        """
        value = self.worst if math.isnan(value) else value
        return value if self.maximize else -value

    def value(self, score: float) -> float:
        """The inverse of `score`."""
        return score if self.maximize else -score

    def shown(self, value: float) -> float:
        """In the unit in which it is shown."""
        return 100 * value if self.percent else value

    def text(self, value: float | None) -> str:
        """For people; "" for None and NaN.

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
        else:  # three digits, or all before the point
            digits = f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:#.3g}".rstrip(".")
        return f"{digits} {self.shown_unit}".rstrip()

    def plain(self) -> dict[str, Any]:
        """As plain data; what is infinite as text, for JSON has no such number."""
        return {**dataclasses.asdict(self), "worst": str(self.worst)}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Metric:
        """The inverse of `plain`."""
        return cls(**{**plain, "worst": float(plain["worst"])})


def accuracy(name: str, value: float | None) -> float | None:
    """A value of the metric with this name, if that is accuracy. Raises AttributeError for another."""
    if name != ACCURACY.name:
        raise AttributeError(f"the metric of this task is {name}, not accuracy")
    return value


ACCURACY = Metric("accuracy", "top-1 accuracy", percent=True, worst=0.0)
"""The share of examples whose class is named right."""
