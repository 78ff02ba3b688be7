"""Distributions in a configuration tree, and turning such a tree into plain values.

A *template* is the tree of a YAML file in which any scalar may be a `Distribution`. `resolve` walks it once,
asks for a value wherever it meets a distribution, and leaves out what other values have switched off; the
same walk serves Optuna's sampling, the check of a space against the schema, and listing it for a person.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from prunetune.document import Document
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

Suggest = Callable[[str, Distribution], Any]
"""Gives the value of the parameter with this name; for a Choice, the label of the option."""

Active = Callable[[str, Mapping[str, Any]], bool]
"""Whether the field with this dotted key counts, given the values of its siblings.

A sibling whose value is not known yet is PENDING (then the answer is no, and it is asked again later); one
that is not there has the schema's default.
"""

PENDING: Any = object()


def parse(document: Document) -> dict[str, Any]:
    """The template in a document: each `{uniform|loguniform|int|choice: …}` becomes a Distribution.

    Raises ConfigError for a malformed one (wrong length, lower > upper, empty choice, …).
    """
    template = _parse(document.tree, "", document)
    assert isinstance(template, dict)
    return template


def resolve(template: Mapping[str, Any], suggest: Suggest, active: Active) -> dict[str, Any]:
    """Plain values for a template: `suggest` is asked once per distribution that counts.

    A distribution whose key is not `active` is left out, so the schema's default stands. The names passed
    to `suggest` are dotted keys; inside the mapping chosen by a Choice the chosen label is part of the
    name (`pre_pruning.optimizer[sgd].lr`), because each option may have its own range.
    """
    values = _resolve(template, "", "", suggest, active)
    assert isinstance(values, dict)
    return values


def at(template: Mapping[str, Any], params: Mapping[str, Any], active: Active) -> dict[str, Any]:
    """Plain values at these parameters; one that is not given has its first probe."""
    return resolve(template, lambda name, d: params.get(name, d.probes()[0]), active)


def parameters(template: Mapping[str, Any], active: Active) -> dict[str, Distribution]:
    """Every distribution that can be reached, by name, in the order of the file."""
    found: dict[str, Distribution] = {}
    for _ in assignments(template, active, found):
        pass
    return found


def leaves(template: Any, name: str = "") -> dict[str, Any]:
    """Every value and distribution by the name that parameters have, those inside options of choices too.

    >>> leaves({"a": Choice((None, {"b": 1, "c": Int(1, 2)}), (None, "on"))})["a[on].b"]
    1
    """
    if isinstance(template, Mapping):
        children = [leaves(child, _join(name, str(field))) for field, child in template.items()]
        return {key: value for child in children for key, value in child.items()}
    found = {name: template}
    if isinstance(template, Choice):
        for label, option in zip(template.labels, template.options, strict=True):
            if isinstance(option, Mapping):
                found.update(leaves(option, f"{name}[{label}]"))
    return found


def assignments(
    template: Mapping[str, Any], active: Active, found: dict[str, Distribution] | None = None
) -> Iterator[dict[str, Any]]:
    """Assignments of probe values under which every parameter takes each of its probes at least once.

    Yields `{name: value}` with only the values that differ from a parameter's first probe. `found`, where
    given, is filled with each distribution met.
    """
    found = {} if found is None else found
    pending: list[dict[str, Any]] = [{}]
    while pending:
        assignment = pending.pop(0)
        fresh: list[tuple[str, Distribution]] = []

        def suggest(
            name: str,
            distribution: Distribution,
            assignment: dict[str, Any] = assignment,
            fresh: list[tuple[str, Distribution]] = fresh,
        ) -> Any:
            if name not in found:
                found[name] = distribution
                fresh.append((name, distribution))
            return assignment.get(name, distribution.probes()[0])

        resolve(template, suggest, active)
        yield assignment
        for name, distribution in fresh:
            pending.extend({**assignment, name: probe} for probe in distribution.probes()[1:])


def enumerate_finite(
    template: Mapping[str, Any], active: Active, limit: int = 1000
) -> list[dict[str, Any]] | None:
    """All distinct parameter assignments of a space, or None where it has more than `limit`.

    A space with a float distribution that is not a single point counts as infinite.
    """
    try:
        found = list(islice(_enumerate(template, active, {}), limit + 1))
    except _InfiniteError:
        return None
    return found if len(found) <= limit else None


def recover(
    template: Mapping[str, Any], values: Mapping[str, Any], active: Active
) -> Iterator[dict[str, Any]]:
    """Candidate parameter assignments under which `template` may resolve to `values` (a complete tree).

    The inverse of `resolve`, for results of an earlier space. Which candidate is right, if any, shows when
    it is resolved and compared; several come up where options of a choice look alike.
    """
    for candidate in _recover(template, values, "", ""):
        asked: dict[str, Any] = {}

        def suggest(
            name: str,
            distribution: Distribution,
            candidate: dict[str, Any] = candidate,
            asked: dict[str, Any] = asked,
        ) -> Any:
            asked[name] = candidate[name]
            return candidate[name]

        try:
            resolve(template, suggest, active)
        except KeyError:  # a parameter which the old values do not have
            continue
        yield asked


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves; lists are leaves.

    >>> flatten({"a": {"b": 1, "c": [1, 2]}, "d": None})
    {'a.b': 1, 'a.c': [1, 2], 'd': None}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, name + "."))
        else:
            flat[name] = value
    return flat


class _InfiniteError(Exception):
    pass


def _enumerate(
    template: Mapping[str, Any], active: Active, fixed: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Depth first: fix the first parameter not fixed yet to each of its values in turn."""
    first: list[tuple[str, Distribution]] = []

    def suggest(name: str, distribution: Distribution) -> Any:
        if name in fixed:
            return fixed[name]
        if not first:
            first.append((name, distribution))
        return distribution.probes()[0]

    resolve(template, suggest, active)
    if not first:
        yield fixed
        return
    name, distribution = first[0]
    if isinstance(distribution, Uniform):
        if distribution.low != distribution.high:
            raise _InfiniteError
        values: Sequence[Any] = (distribution.low,)
    elif isinstance(distribution, Int):
        values = range(distribution.low, distribution.high + 1)
    else:
        values = distribution.labels
    for value in values:
        yield from _enumerate(template, active, {**fixed, name: value})


def _resolve(node: Any, key: str, name: str, suggest: Suggest, active: Active) -> Any:
    if isinstance(node, Choice):
        label = suggest(name, node)
        option = node.options[node.labels.index(label)]
        nested = isinstance(option, dict | list)
        return _resolve(option, key, f"{name}[{label}]" if nested else name, suggest, active)
    if isinstance(node, Distribution):
        return suggest(name, node)
    if isinstance(node, dict):
        # Siblings without a condition first: the conditions read them.
        values: dict[str, Any] = {}
        pending = dict.fromkeys(node, PENDING)
        later: list[str] = []
        for field, child in node.items():
            if _is_open(child) and not active(_join(key, field), pending | values):
                later.append(field)
            else:
                values[field] = _resolve(child, _join(key, field), _join(name, field), suggest, active)
        for field in later:
            if active(_join(key, field), values):
                values[field] = _resolve(node[field], _join(key, field), _join(name, field), suggest, active)
        return {field: values[field] for field in node if field in values}
    if isinstance(node, list):
        return [_resolve(child, f"{key}.{i}", f"{name}.{i}", suggest, active) for i, child in enumerate(node)]
    return node


def _recover(node: Any, value: Any, key: str, name: str) -> Iterator[dict[str, Any]]:
    if isinstance(node, Choice):
        for label, option in zip(node.labels, node.options, strict=True):
            if isinstance(option, dict) and isinstance(value, dict):
                for inner in _recover(option, value, key, f"{name}[{label}]"):
                    yield {name: label, **inner}
            elif option == value or (isinstance(value, dict) and option == value.get("name")):
                yield {name: label}
    elif isinstance(node, Uniform | Int):
        if node.contains(value):
            yield {name: value}
    elif isinstance(node, dict):
        candidates: list[dict[str, Any]] = [{}]
        for field, child in node.items():
            if not isinstance(value, Mapping) or field not in value:
                continue
            inner_candidates = list(_recover(child, value[field], _join(key, field), _join(name, field)))
            candidates = [{**outer, **inner} for outer in candidates for inner in inner_candidates or [{}]]
        yield from candidates
    elif isinstance(node, list) and isinstance(value, list) and len(node) == len(value):
        merged: dict[str, Any] = {}
        for i, (child, item) in enumerate(zip(node, value, strict=True)):
            merged.update(next(_recover(child, item, f"{key}.{i}", f"{name}.{i}"), {}))
        yield merged
    else:
        yield {}


def _parse(node: Any, key: str, document: Document) -> Any:
    if isinstance(node, dict):
        if len(node) == 1 and next(iter(node)) in _KINDS:
            ((kind, argument),) = node.items()
            return _distribution(kind, argument, key, document)
        return {name: _parse(child, _join(key, str(name)), document) for name, child in node.items()}
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


def _is_open(node: Any) -> bool:
    """Whether there is a distribution in it, other than in a mapping with conditions of its own."""
    return isinstance(node, Distribution) or (isinstance(node, list) and any(map(_is_open, node)))


def _join(prefix: str, field: str) -> str:
    return f"{prefix}.{field}" if prefix else field


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
