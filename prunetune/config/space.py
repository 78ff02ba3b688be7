"""Search spaces: configuration trees with distributions, and how they become plain values.

A *template* is the tree of a YAML file in which any value may be a `Distribution`. `resolve` walks it once,
asks for a value at each distribution, and leaves out fields that other values have switched off. Optuna's
sampling, the check of a space against the schema, and the list of its parameters all use this walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from prunetune.config.distributions import Choice, Distribution, Int, LogUniform, Uniform, join, parse
from prunetune.config.sections import expanded

__all__ = [
    "PENDING",
    "Active",
    "Choice",
    "Distribution",
    "Int",
    "LogUniform",
    "Suggest",
    "Uniform",
    "assignments",
    "at",
    "enumerate_finite",
    "flatten",
    "leaves",
    "parameters",
    "parse",
    "recover",
    "resolve",
]

Suggest = Callable[[str, Distribution], Any]
"""A function that returns the value of the parameter with this name; for a Choice, the option's label."""

Active = Callable[[str, Mapping[str, Any]], bool]
"""A function that says whether the field with this dotted key counts, given the values of its siblings.

A sibling whose value is not known yet is PENDING; then the answer is no, and the function is called again
later. A missing sibling has the schema's default.
"""

PENDING: Any = object()


def resolve(template: Mapping[str, Any], suggest: Suggest, active: Active) -> dict[str, Any]:
    """Turn a template into plain values; `suggest` is called once for each distribution that counts.

    A distribution whose key is not `active` is left out, so that the schema's default applies. The names
    passed to `suggest` are dotted keys. Within a mapping that a Choice has chosen, the chosen label is part
    of the name (`pre_pruning.optimizer[sgd].lr`), because each option may have its own range.
    """
    values = _resolve(template, "", "", suggest, active)
    assert isinstance(values, dict)
    return values


def at(template: Mapping[str, Any], params: Mapping[str, Any], active: Active) -> dict[str, Any]:
    """Turn a template into plain values at these parameters; a missing parameter has its first probe."""
    return resolve(template, lambda name, d: params.get(name, d.probes()[0]), active)


def parameters(template: Mapping[str, Any], active: Active) -> dict[str, Distribution]:
    """List all distributions that can be active, by name, in the order of the file."""
    found: dict[str, Distribution] = {}
    for _ in assignments(template, active, found):
        pass
    return found


def leaves(template: Any, name: str = "") -> dict[str, Any]:
    """List all values and distributions, also those inside options of choices, named like parameters.

    >>> leaves({"a": Choice((None, {"b": 1, "c": Int(1, 2)}), (None, "on"))})["a[on].b"]
    1
    """
    if isinstance(template, Mapping):
        children = [leaves(child, join(name, str(field))) for field, child in template.items()]
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
    """Yield assignments of probe values in which every parameter takes each of its probes at least once.

    Each is `{name: value}` with only the values that differ from the parameter's first probe. All
    distributions are written into `found`, if given.
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
    template: Mapping[str, Any],
    active: Active,
    limit: int = 1000,
    *,
    fixed: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]] | None:
    """List all distinct parameter assignments of a space; None where there are more than `limit`.

    Only assignments in which the parameters in `fixed` have these values are listed. A space counts as
    infinite if a float distribution is neither fixed nor a single point.
    """
    try:
        found = list(islice(_enumerate(template, active, dict(fixed or {})), limit + 1))
    except _InfiniteError:
        return None
    return found if len(found) <= limit else None


def recover(
    template: Mapping[str, Any], values: Mapping[str, Any], active: Active
) -> Iterator[dict[str, Any]]:
    """Yield parameter assignments under which `template` may resolve to `values`, a complete tree.

    This is the inverse of `resolve`, for results of an earlier space. The caller must resolve each candidate
    and compare; there are several candidates where options of a choice look alike.
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
    """Flatten a tree to its leaves by dotted key; lists are leaves.

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
    """Yield all assignments depth first: set the first free parameter to each of its values in turn."""
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
        # Resolve siblings without a condition first, because the conditions read them.
        values: dict[str, Any] = {}
        pending = dict.fromkeys(node, PENDING)
        later: list[str] = []
        for field, child in node.items():
            if _is_open(child) and not active(join(key, field), pending | values):
                later.append(field)
            else:
                values[field] = _resolve(child, join(key, field), join(name, field), suggest, active)
        for field in later:
            if active(join(key, field), values):
                values[field] = _resolve(node[field], join(key, field), join(name, field), suggest, active)
        return {field: values[field] for field in node if field in values}
    if isinstance(node, list):
        return [_resolve(child, f"{key}.{i}", f"{name}.{i}", suggest, active) for i, child in enumerate(node)]
    return node


def _recover(node: Any, value: Any, key: str, name: str) -> Iterator[dict[str, Any]]:
    value = expanded(key, value)
    if isinstance(node, Choice):
        for label, written in zip(node.labels, node.options, strict=True):
            option = expanded(key, written)
            if isinstance(option, dict) and isinstance(value, dict):
                if _other_name(option, value):
                    continue
                for inner in _recover(option, value, key, f"{name}[{label}]"):
                    yield {name: label, **inner}
            elif option == value:
                yield {name: label}
    elif isinstance(node, Uniform | Int):
        if node.contains(value):
            yield {name: value}
    elif isinstance(node, dict):
        candidates: list[dict[str, Any]] = [{}]
        for field, child in node.items():
            if not isinstance(value, Mapping) or field not in value:
                continue
            inner_candidates = list(_recover(child, value[field], join(key, field), join(name, field)))
            candidates = [{**outer, **inner} for outer in candidates for inner in inner_candidates or [{}]]
        yield from candidates
    elif isinstance(node, list) and isinstance(value, list) and len(node) == len(value):
        merged: dict[str, Any] = {}
        for i, (child, item) in enumerate(zip(node, value, strict=True)):
            merged.update(next(_recover(child, item, f"{key}.{i}", f"{name}.{i}"), {}))
        yield merged
    else:
        yield {}


def _other_name(option: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether the two name components that are not the same."""
    names = [(option[key], value[key]) for key in ("name", "method") if key in option and key in value]
    return any(isinstance(one, str) and one != other for one, other in names)


def _is_open(node: Any) -> bool:
    """True if the value is a distribution, or a list that contains one."""
    return isinstance(node, Distribution) or (isinstance(node, list) and any(map(_is_open, node)))
