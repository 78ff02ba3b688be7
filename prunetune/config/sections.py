"""Which section of the schema a dotted key leads to, and the short form in which a file may write it."""

from __future__ import annotations

import functools
import types
import typing
from typing import Any

from pydantic import BaseModel

from prunetune.config.schema import Config


@functools.cache
def section_at(path: str) -> type[BaseModel] | None:
    """The section that a dotted key leads to ("" is the whole file), or None where it leads to none."""
    section: type[BaseModel] | None = Config
    for part in path.split(".") if path else ():
        if section is None or part not in section.model_fields:
            return None
        section = section_in(section.model_fields[part].annotation)
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a type such as `Annotated[MaskConfig | None, …]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (found := section_in(argument)) is not None:
                return found
    return None


def expanded(path: str, value: Any) -> Any:
    """What stands at a dotted key; a mapping where it is a name alone: `adam` is short for `{name: adam}`."""
    key = getattr(section_at(path), "key", None)
    return value if key is None or not isinstance(value, str) else {key: value}
