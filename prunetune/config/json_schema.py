"""A JSON Schema of a sweep's file, with which editors complete keys, explain them and check values.

It is generated from the sections (`schema.py`) and from the signatures of the built-in components, so it is
always up to date. It allows keys to be missing, because they may come from an extended file or from the
command line; rules that involve several keys are left to `reading.py`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, final

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from prunetune.config.canonical import determining_fields
from prunetune.config.component import Component
from prunetune.config.schema import Config

Schema = dict[str, Any]

_IMPORT_PATH = {
    "type": "string",
    "pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
    "description": "an import path, 'package.module:object'",
}
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def sweep_schema() -> Schema:
    """Return the schema of a whole file; it allows distributions for values that determine results."""
    maker = _Maker()
    searched = determining_fields()
    keys = {
        name: maker.field(field, searched=name in searched) for name, field in Config.model_fields.items()
    }
    keys["extends"] = {
        "description": "a file, or files, on top of which this one stands; paths relative to this one",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
    }
    return {
        "$schema": _DIALECT,
        "title": "A sweep of prunetune",
        "description": "One file: for a sweep with distributions, for a training with values.",
        **_closed(keys),
        "$defs": _distributions() | maker.sections,
    }


def _distributions() -> dict[str, Schema]:
    def pair(kind: str, what: str, **rules: Any) -> Schema:
        items = {"type": kind, **rules}
        return {"type": "array", "items": items, "minItems": 2, "maxItems": 2, "description": what}

    logarithmic = pair("number", "[lowest, highest], uniform in the logarithm", exclusiveMinimum=0)
    return {
        "uniform": _one("uniform", pair("number", "[lowest, highest]")),
        "loguniform": _one("loguniform", logarithmic),
        "int": _one("int", pair("integer", "[lowest, highest], both included")),
    }


def _one(name: str, value: Schema) -> Schema:
    return {**_closed({name: value}), "required": [name]}


def _closed(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _or_distribution(value: Schema) -> Schema:
    """Return the schema of a value, or of a distribution of such values."""
    options = [value, _one("choice", {"type": "array", "items": value, "minItems": 1})]
    kinds = _types(value)
    if "number" in kinds:
        options += [_reference("uniform"), _reference("loguniform")]
    if kinds & {"integer", "number"}:
        options.append(_reference("int"))
    return {"anyOf": options}


def _types(value: Schema) -> set[str]:
    """The JSON types that a schema allows at its top level; "number" if it allows anything."""
    if not value:
        return {"number"}
    if "anyOf" in value:
        return set().union(*map(_types, value["anyOf"]))
    return {value["type"]} if "type" in value else set()


@final
class _Maker:
    """Makes schemas of types; the schema of each section is stored once, in `sections`, and referred to."""

    def __init__(self) -> None:
        self.sections: dict[str, Schema] = {}

    def field(self, field: FieldInfo, *, searched: bool) -> Schema:
        """The schema of a key's value; if the key is `searched`, also of a distribution of values."""
        value = self._value(field.annotation, field.metadata, searched=searched)
        if searched:
            value = _or_distribution(value)
        return {"description": field.description, **value} if field.description else value

    def _value(self, annotation: Any, metadata: list[Any], *, searched: bool) -> Schema:
        """The schema of a type: a section, a list of sections, a union, or plain data."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return self._value(arguments[0], [*arguments[1:], *metadata], searched=searched)
        if not _has_section(annotation):
            return _plain(annotation, metadata)
        if origin is list:
            return {"type": "array", "items": self._value(arguments[0], [], searched=searched)}
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self._value(option, [], searched=searched) for option in arguments]}
        section = self._section(annotation, searched=searched)
        short = _short_forms(annotation, metadata)
        return {"anyOf": [{"enum": short}, section]} if short else section

    def _section(self, section: type[BaseModel], *, searched: bool) -> Schema:
        name = section.__name__.removesuffix("Config") + ("" if searched else " (values)")
        if name not in self.sections:
            if issubclass(section, Component):
                made = self._component(section, searched=searched)
            else:
                made = _closed(self._fields(section, searched=searched))
            self.sections[name] = {"description": _first_line(section), **made}
        return _reference(name)

    def _fields(self, model: type[BaseModel], *, searched: bool) -> dict[str, Schema]:
        return {name: self.field(field, searched=searched) for name, field in model.model_fields.items()}

    def _component(self, section: type[Component], *, searched: bool) -> Schema:
        """The schema of a component: a name, or a mapping with a name and options.

        For a built-in component the options are checked; for an import path any option is allowed.
        """
        kind, key = section.kind, section.key
        own = self._fields(section, searched=searched)
        del own["name"]
        options = {name: self._fields(kind.options(name), searched=searched) for name in kind.names}
        every = {option: value for fields in options.values() for option, value in fields.items()}
        default = section.model_fields["name"].default
        built_in = []
        for name in kind.names:
            # Options that only other components have are allowed, because the name may be searched.
            ignored = [option for option in every if kind.ignores(name, option)]
            others = {option: {"description": "of another one: ignored"} for option in ignored}
            variant = _closed({key: {"const": name}, **others, **options[name], **own})
            required = {} if name == default else {"required": [key]}
            built_in.append({"description": _first_line(kind.find(name)), **variant, **required})
        users = {"type": "object", "properties": {key: _IMPORT_PATH, **own}, "required": [key]}
        alone: list[Schema] = [{"enum": list(kind.names)}, _IMPORT_PATH]
        names = _one("choice", {"type": "array", "items": {"anyOf": alone}, "minItems": 1})
        among = {**_closed({key: names, **every, **own}), "required": [key]}
        return {"anyOf": [*alone, *built_in, users, *([among] if searched else [])]}


def _has_section(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_has_section(argument) for argument in typing.get_args(annotation))


def _adapter(annotation: Any, metadata: list[Any]) -> TypeAdapter[Any]:
    whole: Any = typing.Annotated[annotation, *metadata] if metadata else annotation
    return TypeAdapter(whole)


def _plain(annotation: Any, metadata: list[Any]) -> Schema:
    """Pydantic's own schema of a type; {} (anything) for a type that has none."""
    try:
        return _adapter(annotation, metadata).json_schema()
    except PydanticUserError:
        return {}


def _short_forms(section: type[BaseModel], metadata: list[Any]) -> list[str]:
    """The names that may replace a section, other than a component, such as a schedule's `one_shot`."""
    if issubclass(section, Component) or not metadata or "name" not in section.model_fields:
        return []
    adapter, short = _adapter(section, metadata), []
    for name in typing.get_args(section.model_fields["name"].annotation):
        try:
            adapter.validate_python(name)
        except ValidationError:
            continue
        short.append(name)
    return short


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]
