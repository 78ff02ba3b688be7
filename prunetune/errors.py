"""The exceptions for users, whose messages name the place, the key, the value and the rule."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class UserError(Exception):
    """Raised for a wrong file, value or argument; commands print the message and exit with code 2."""


class WorkError(Exception):
    """Raised when the work itself fails, such as when every trial crashes; commands exit with code 1."""


@dataclass(frozen=True)
class Problem:
    """One mistake in one key of a configuration: the place `where`, the key, the broken rule, the value."""

    where: str  # "sweeps/cifar.yaml:12" or "command line"
    key: str  # dotted, "pre_pruning.optimizer.lr"
    rule: str  # "must be greater than 0"
    value: Any = None
    has_value: bool = True

    def __str__(self) -> str:
        shown = f" = {_short(self.value)}" if self.has_value else ""
        return f"{self.where}: {self.key}{shown}: {self.rule}"


class ConfigError(UserError):
    """Raised for a configuration that breaks rules; `problems` lists each mistake as a `Problem`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the most similar known name, or "" if none is similar.

    >>> did_you_mean("epoch", ["epochs", "optimizer"])
    "; did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _short(value: Any, limit: int = 80) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
