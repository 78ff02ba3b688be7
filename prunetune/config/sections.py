"""Finds the section of the schema at a dotted key, and expands the short form that a file may contain."""

from __future__ import annotations

import functools
import types
import typing
from typing import Any

from pydantic import BaseModel

from prunetune.config.schema import Config


@functools.cache
def section_at(path: str) -> type[BaseModel] | None:
    """Return the section at a dotted key ("" is the whole file), or None where there is no section."""
    section: type[BaseModel] | None = Config
    for part in path.split(".") if path else ():
        if section is None or part not in section.model_fields:
            return None
        section = section_in(section.model_fields[part].annotation)
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section within a type such as `Annotated[MaskConfig | None, …]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (found := section_in(argument)) is not None:
                return found
    return None


def expanded(path: str, value: Any) -> Any:
    """Return the value at a dotted key, with a name alone expanded: `adam` is short for `{name: adam}`."""
    key = getattr(section_at(path), "key", None)
    return value if key is None or not isinstance(value, str) else {key: value}
