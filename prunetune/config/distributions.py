"""Distributions as a YAML file writes them: `{uniform: [0, 1]}`, `{choice: [a, b]}` and so on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prunetune.config.document import Document
from prunetune.errors import ConfigError


@dataclass(frozen=True)
class Uniform:
    """A float in [low, high]."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"uniform [{self.low:g}, {self.high:g}]"

    def contains(self, value: Any) -> bool:
        """Whether `value` could have been drawn."""
        return _is_number(value) and self.low <= value <= self.high

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for the whole distribution when a rule is checked."""
        return (self.low, self.high, self.low + 0.381966 * (self.high - self.low))


@dataclass(frozen=True)
class LogUniform(Uniform):
    """A float in [low, high], uniform in its logarithm; low > 0."""

    def __str__(self) -> str:
        return f"loguniform [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Int:
    """An integer in {low, …, high}, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"int [{self.low}, {self.high}]"

    def contains(self, value: Any) -> bool:
        """Whether `value` could have been drawn."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for the whole distribution when a rule is checked."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of `options`: scalars, lists, null, or mappings, which may hold distributions of their own.

    `labels` names the options, uniquely, for Optuna and for people.
    """

    options: tuple[Any, ...]
    labels: tuple[str | int | float | bool | None, ...]

    def __str__(self) -> str:
        return "choice [" + ", ".join("null" if x is None else str(x) for x in self.labels) + "]"

    def probes(self) -> tuple[Any, ...]:
        """The labels of all options."""
        return self.labels


Distribution = Uniform | LogUniform | Int | Choice
_KINDS = ("uniform", "loguniform", "int", "choice")


def parse(document: Document) -> dict[str, Any]:
    """The template in a document: each `{uniform|loguniform|int|choice: …}` becomes a Distribution.

    Raises ConfigError for a malformed one (wrong length, lower > upper, empty choice, …).
    """
    template = _parse(document.tree, "", document)
    assert isinstance(template, dict)
    return template


def is_distribution(node: Any) -> bool:
    """Whether this part of a file is a distribution; `parse` says whether it is a right one."""
    return isinstance(node, dict) and len(node) == 1 and next(iter(node)) in _KINDS


def _parse(node: Any, key: str, document: Document) -> Any:
    if isinstance(node, dict):
        if is_distribution(node):
            ((kind, argument),) = node.items()
            return _distribution(kind, argument, key, document)
        return {name: _parse(child, join(key, str(name)), document) for name, child in node.items()}
    if isinstance(node, list):
        return [_parse(child, f"{key}.{i}", document) for i, child in enumerate(node)]
    return node


def _distribution(kind: str, argument: Any, key: str, document: Document) -> Distribution:
    def wrong(rule: str) -> ConfigError:
        return document.problem(key, f"{kind}: {rule}", argument)

    if not isinstance(argument, list):
        raise wrong("takes a list")
    if kind == "choice":
        if not argument:
            raise wrong("needs at least one option")
        options = tuple(_parse(child, f"{key}.choice.{i}", document) for i, child in enumerate(argument))
        if any(isinstance(option, Distribution) for option in options):
            raise wrong("an option may be a value or a mapping, not a distribution")
        labels = _labels(options)
        if len(set(labels)) < len(labels):  # 1, 1.0 and true are equal, to Optuna too
            raise wrong("has the same option twice")
        return Choice(options, labels)
    if len(argument) != 2 or not all(_is_number(bound) for bound in argument):
        raise wrong("takes two numbers, [lower, upper]")
    low, high = argument
    if not (math.isfinite(low) and math.isfinite(high)):
        raise wrong("bounds must be finite")
    if low > high:
        raise wrong("the lower bound is above the upper one")
    if kind == "int":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise wrong("bounds must be whole numbers")
        return Int(low, high)
    if kind == "loguniform":
        if low <= 0:
            raise wrong("the lower bound must be greater than 0")
        return LogUniform(float(low), float(high))
    return Uniform(float(low), float(high))


def _labels(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Scalars stand for themselves, lists for their text, a mapping for its `name`.

    A mapping without one is `on` where it is the only mapping (`{choice: [null, {…}]}`), else `option N`.
    """
    mappings = sum(isinstance(option, dict) for option in options)
    labels: list[Any] = []
    for index, option in enumerate(options):
        if isinstance(option, dict):
            name = option.get("name")
            usable = isinstance(name, str) and name not in labels
            label: Any = name if usable else "on" if mappings == 1 else f"option {index}"
        elif isinstance(option, list):
            label = str(option)
        else:
            label = option
        labels.append(label)
    return tuple(labels)


def join(prefix: str, field: str) -> str:
    """A dotted key, one field longer."""
    return f"{prefix}.{field}" if prefix else field


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
