"""Applies a trial's parameters, drawn by Tune, to the configuration that all trials have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from prunetune.config.distributions import is_distribution
from prunetune.config.document import Document, plain
from prunetune.config.sections import expanded
from prunetune.errors import UserError

HERE = "param_space"
"""The place of a parameter, as messages call it."""


def flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten parameters to plain values by dotted key. Raises UserError for a malformed or repeated key.

    >>> flat({"density": 0.1, "data.limit": 300, "model": {"name": "mlp", "hidden": (8, 8)}})
    {'densities': [0.1], 'data.limit': 300, 'model.name': 'mlp', 'model.hidden': [8, 8]}
    """
    found: dict[str, Any] = {}
    for key, value in _leaves(parameters, ""):
        if key == "density":
            key, value = "densities", [value]
        if not all(key.split(".")):
            raise UserError(f"{HERE}: {key!r}: expected a dotted key")
        if key in found:
            raise UserError(f"{HERE}: {key} = {value!r}: this key is written twice")
        found[key] = value
    return found


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, plain(value)  # some of Tune's distributions return NumPy scalars


def over(base: Document, values: Mapping[str, Any], place: str) -> Document:
    """Set values by dotted key in `base`; messages call their place `place`.

    Shorter keys are set first; keys below a section that is set to None are ignored. A distribution among a
    key's parents is replaced by a mapping. Raises ConfigError where a parent is not a mapping.
    """
    tree, places = copy.deepcopy(base.tree), dict(base.places)
    off: list[str] = []
    for key in sorted(values, key=lambda key: key.count(".")):
        if key.startswith(tuple(off)):
            continue
        *parents, last = key.split(".")
        node = tree
        for depth, part in enumerate(parents, start=1):
            path, child = ".".join(parents[:depth]), node.get(part)
            if child is None or is_distribution(child):
                child = {}
            child = node[part] = expanded(path, child)
            if not isinstance(child, dict):
                rule = f"is not a mapping, so {key} cannot be set"
                raise Document(base.source, tree, places).problem(path, rule, child)
            node = child
        if values[key] is None:
            off.append(f"{key}.")
        if values[key] != {} or not isinstance(node.get(last), dict) or is_distribution(node[last]):
            node[last] = values[key]
            places = {name: where for name, where in places.items() if not f"{name}.".startswith(f"{key}.")}
        places[key] = place
    return Document(base.source, tree, places)
