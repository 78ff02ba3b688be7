"""Distributions as a YAML file writes them: `{uniform: [0, 1]}`, `{choice: [a, b]}` and so on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prunetune.config.document import Document
from prunetune.errors import ConfigError


@dataclass(frozen=True)
class Uniform:
    """A float drawn uniformly from [low, high]."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"uniform [{self.low:g}, {self.high:g}]"

    def contains(self, value: Any) -> bool:
        """Whether `value` is a number within the bounds."""
        return _is_number(value) and self.low <= value <= self.high

    def probes(self) -> tuple[Any, ...]:
        """Values that represent the distribution when the schema's rules are checked."""
        return (self.low, self.high, self.low + 0.381966 * (self.high - self.low))


@dataclass(frozen=True)
class LogUniform(Uniform):
    """A float drawn from [low, high] with a uniform logarithm; low > 0."""

    def __str__(self) -> str:
        return f"loguniform [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Int:
    """An integer drawn from {low, …, high}, bounds included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"int [{self.low}, {self.high}]"

    def contains(self, value: Any) -> bool:
        """Whether `value` is an integer within the bounds."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def probes(self) -> tuple[Any, ...]:
        """Values that represent the distribution when the schema's rules are checked."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of `options`: scalars, lists, null, or mappings, which may contain distributions themselves.

    `labels` are unique names of the options, for Optuna and for people.
    """

    options: tuple[Any, ...]
    labels: tuple[str | int | float | bool | None, ...]

    def __str__(self) -> str:
        return "choice [" + ", ".join("null" if x is None else str(x) for x in self.labels) + "]"

    def probes(self) -> tuple[Any, ...]:
        """The labels of all options, all of which are tried when the schema's rules are checked."""
        return self.labels


Distribution = Uniform | LogUniform | Int | Choice
_KINDS = ("uniform", "loguniform", "int", "choice")


def parse(document: Document) -> dict[str, Any]:
    """Return the document's tree with each `{uniform|loguniform|int|choice: …}` as a Distribution.

    Raises ConfigError for a malformed distribution (wrong length, lower > upper, empty choice, …).
    """
    template = _parse(document.tree, "", document)
    assert isinstance(template, dict)
    return template


def is_distribution(node: Any) -> bool:
    """Whether this part of a file has the form of a distribution; `parse` checks its arguments."""
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
    """Return a label for each option: a scalar itself, the text of a list, the `name` of a mapping.

    A mapping without a name is labelled `on` if it is the only mapping (`{choice: [null, {…}]}`), otherwise
    `option N`.
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
    """Append a field to a dotted key."""
    return f"{prefix}.{field}" if prefix else field


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
