"""Canonical forms of configurations, as plain data and as hashes: equal if they compute the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from prunetune.config import space
from prunetune.config.component import Component
from prunetune.config.schema import COUNTS_WHEN, DOES_NOT_DETERMINE, Config
from prunetune.config.sections import section_at


def determining_fields() -> tuple[str, ...]:
    """The top-level keys that determine what a trial computes at a density, in the order of the schema.

    They are all keys except `densities` and those that `DOES_NOT_DETERMINE` names. Only their values may be
    distributions.
    """
    return tuple(
        name for name in Config.model_fields if name not in DOES_NOT_DETERMINE and name != "densities"
    )


def determining(config: Config) -> dict[str, Any]:
    """The values that determine what a configuration computes at its density, as plain data.

    Fields that have no effect beside other values have their defaults; a user's own components include the
    digest of their code.
    """
    if config.pre_pruning is None:  # there are no epochs to choose from
        pruning = config.pruning.model_copy(update={"from_epoch": "last"})
        config = config.model_copy(update={"pruning": pruning})
    return {name: canonical(getattr(config, name), name) for name in determining_fields()}


def configuration_hash(config: Config) -> str:
    """The hash of what a configuration computes at its density; it does not depend on where the data are."""
    return digest(determining(config), config.density)


def own_code(config: Config) -> set[str]:
    """The digests of the code of all user's own components that determine what a configuration computes."""

    def digests(node: Any) -> set[str]:
        if not isinstance(node, Mapping):
            return set()
        here = {node["(code)"]} if "(code)" in node else set()
        return here.union(*map(digests, node.values()))

    return digests(determining(config))


def is_active(key: str, siblings: Mapping[str, Any]) -> bool:
    """Whether the field with this dotted key has an effect, given its siblings' values (`space.Active`)."""
    path, _, field = key.rpartition(".")
    section = section_at(path)
    if section is None:
        return True
    if issubclass(section, Component) and field not in section.model_fields and field != section.key:
        name = siblings.get(section.key, section.model_fields["name"].default)
        if name is space.PENDING:
            return False
        if not isinstance(name, str):  # missing or wrong: the schema reports it
            return name is not PydanticUndefined
        return _option_counts(section, name, field, siblings)
    rule = COUNTS_WHEN.get((section, field))
    return rule is None or _holds(rule, siblings)


def _option_counts(section: type[Component], name: str, option: str, siblings: Mapping[str, Any]) -> bool:
    if section.kind.ignores(name, option):
        return False
    try:
        rule = getattr(section.kind.find(name), "counts_when", {}).get(option)
    except ValueError:
        return True
    if rule is None:
        return True
    sibling, counts = rule
    default = section.kind.options(name).model_fields[sibling].default
    return _holds((sibling, default, counts), siblings)


def _holds(rule: tuple[str, Any, Any], siblings: Mapping[str, Any]) -> bool:
    sibling, default, counts = rule
    value = siblings.get(sibling, default)
    if value is space.PENDING:
        return False
    try:
        return bool(counts(value))
    except TypeError:  # a value of the wrong type, which the schema reports
        return True


def canonical(value: Any, key: str | None = None) -> Any:
    """Convert a section or a value to plain data, in which fields without an effect have their defaults.

    `key` is its dotted key, if it has one; fields that `DOES_NOT_DETERMINE` names are left out.
    """
    if isinstance(value, list):
        return [canonical(item) for item in value]
    if not isinstance(value, BaseModel):
        return value
    if isinstance(value, Component):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        defaults = value.kind.options(value.name).model_fields
        for option, given in value.plain_options.items():
            if value.counts(option):
                fields[option] = given
            elif value.kind.is_built_in(value.name):
                fields[option] = defaults[option].default
            # Else it is left out, as a user's option that is not given.
        if (code := value.code) is not None:
            fields["(code)"] = code
    else:
        fields = {name: getattr(value, name) for name in type(value).model_fields}
    data: dict[str, Any] = {}
    for name, child in fields.items():
        dotted = None if key is None else f"{key}.{name}"
        if dotted in DOES_NOT_DETERMINE:
            continue
        rule = COUNTS_WHEN.get((type(value), name))
        if rule is not None and not _holds(rule, fields):
            child = type(value).model_fields[name].get_default(call_default_factory=True)
        data[name] = None if getattr(child, "is_zero", False) is True else canonical(child, dotted)
    return data


def digest(*parts: Any) -> str:
    """SHA-256 (hex, 32 characters) of plain data, independent of the order of mapping keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def kept(density: float, weights: int) -> int:
    """Return floor(d·n), computed exactly from the decimal digits of the density d.

    >>> kept(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return int(Fraction(repr(density)) * weights)
