"""What a kind of components is: how they are found by name or import path, and what their options are.

A `Kind` is one sort of component, such as criteria; `registry.py` lists the kinds. It knows the built-in
components by name; your own are given by their import path, `package.module:object`. Components are imported
at first use, so that listing names is cheap and frameworks that are not used are not loaded.

A component is a function or a class. Its *options*, which are the further keys in a configuration, are its
parameters, except those that this project passes itself: the first ones (the kind's `positional` says how
many) and those named in the kind's `provided` and `required`. Options are checked against their annotations,
such as `lr: Annotated[float, Field(gt=0)]`. Built-in components have keyword-only options.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import PydanticSerializationError, to_json

from prunetune import source_code
from prunetune.errors import did_you_mean

_SETTINGS = ConfigDict(
    extra="forbid",
    frozen=True,
    strict=True,
    allow_inf_nan=False,
    arbitrary_types_allowed=True,
    protected_namespaces=(),
)


class UnknownComponentError(ValueError):
    """Raised where there is no component of a name, or where it cannot be imported."""


@final
class Kind:
    """One sort of component, such as criteria; `what` is its name in messages, such as "criterion"."""

    def __init__(
        self,
        what: str,
        built_in: Mapping[str, str],
        *,
        positional: int = 0,
        provided: Iterable[str] = (),
        required: Iterable[str] = (),
        is_tolerant: bool = True,
        is_keyed: bool = True,
    ) -> None:
        """`built_in` maps names to import paths.

        The first `positional` parameters of a component, and those in `provided` and `required`, are not
        options; it need not have those in `provided`. With `is_tolerant`, an option that only another
        built-in component has is ignored: so `momentum` may be given beside an optimizer's name that is
        searched over `sgd` and `adam`. `is_keyed` says whether the component determines what a trial
        computes; then its code is part of the key.
        """
        self.what = what
        self.is_keyed = is_keyed
        self._built_in = dict(built_in)
        self._provided = frozenset(provided)
        self._required = frozenset(required)
        self._positional = positional
        self._is_tolerant = is_tolerant

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the built-in components."""
        return tuple(self._built_in)

    def is_built_in(self, name: str) -> bool:
        """Whether this is the name of a built-in component."""
        return name in self._built_in

    def find(self, name: str) -> Any:
        """Import the component, which is a function or a class, and return it.

        Raises UnknownComponentError for a name that is neither built in nor an import path, and for a path
        that cannot be imported, or whose object cannot be called.
        """
        if name in self._built_in:
            return _load_once(self._built_in[name])
        found = _load(self._path(name))
        if not callable(found):
            raise UnknownComponentError(f"is no function and no class, it is of type {type(found).__name__}")
        source_code.remember(_module_of(name))
        return found

    def options(self, name: str) -> type[BaseModel]:
        """Return a pydantic model whose fields are the component's options, with their defaults and rules.

        Raises UnknownComponentError as `find`, and for a component that cannot be called as its kind is.
        """
        component = self.find(name)
        # An object that defines `__eq__` can be called, but is no key of a cache.
        made = _options if isinstance(component, Hashable) else _options.__wrapped__
        return made(component, self._path(name), self._positional, self._required, self._provided)

    def check(self, name: str, given: Mapping[str, Any]) -> BaseModel:
        """Check the options that a file gives; return them with the types of the component's annotations.

        A file has no tuples, sets, paths or members of enumerations: lists and texts stand for them. Raises
        ValidationError for what breaks a rule, UnknownComponentError as `options`.
        """
        model = self.options(name)
        try:
            return model.model_validate(given)
        except ValidationError as error:
            try:
                text = to_json(dict(given), inf_nan_mode="constants")
            except PydanticSerializationError:  # not from a file
                raise error from None
        return model.model_validate_json(text)

    def takes(self, name: str, option: str) -> bool:
        """Whether the component has this option; True for an unknown component, reported elsewhere."""
        try:
            model = self.options(name)
        except UnknownComponentError:
            return True
        return option in model.model_fields or model.model_config.get("extra") == "allow"

    def ignores(self, name: str, option: str) -> bool:
        """Whether an option is ignored: the component does not have it, but another built-in one does."""
        if not self._is_tolerant or self.takes(name, option):
            return False
        return any(option in self.options(other).model_fields for other in self.names)

    def code(self, name: str) -> str | None:
        """Return the SHA-256 of the source of a user's own component; None for a built-in one.

        It covers the module of the import path and the user's own modules that it imports
        (`source_code.py`), as they were when they were loaded; a later edit counts after they are loaded
        again. It is part of what determines a result: the same path with other code is another component.

        Raises UnknownComponentError if there is no source, because a change would not be noticed.
        """
        if name in self._built_in:
            return None
        found = source_code.digest(_module_of(name), self.find(name))
        if found is None:
            raise UnknownComponentError(
                "its source cannot be read, so a change would not be noticed: "
                "put it in a file that can be imported"
            )
        return found

    def _path(self, name: str) -> str:
        if name in self._built_in:
            return self._built_in[name]
        module, colon, attribute = name.partition(":")
        parts = [*module.split("."), *attribute.split(".")]
        if not colon or not all(part.isidentifier() for part in parts):
            raise UnknownComponentError(
                f"must be one of {', '.join(self.names)}, or an import path 'package.module:object'"
                + did_you_mean(name, self.names)
            )
        return name


def _module_of(path: str) -> str:
    return path.partition(":")[0]


def _load(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # `python -m` does so, the console script does not
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise UnknownComponentError(
            f"cannot be imported: {type(error).__name__}: {error} "
            "(searched the working folder and the installed packages)"
        ) from error
    return found


_load_once = functools.cache(_load)
"""For built-in components, which a configuration looks up many times and nobody edits."""


@functools.cache
def _options(
    component: Any, path: str, positional: int, required: frozenset[str], provided: frozenset[str]
) -> type[BaseModel]:
    # Cached by the component and not only by its path, because a module may be edited and loaded again.
    try:
        parameters = list(inspect.signature(component).parameters.values())
    except (TypeError, ValueError):  # a function written in C has no signature
        parameters, is_open = [], True
    else:
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        _check_call(parameters, positional, required)
        parameters = parameters[positional:]
    names = _globals(component)
    fields: dict[str, Any] = {}
    for parameter in parameters:
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.name not in provided | required:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (_hint(parameter, names), default)
    settings = ConfigDict(**{**_SETTINGS, "extra": "allow" if is_open else "forbid"})
    try:
        return _model(path, settings, fields)
    except Exception:  # annotations that pydantic does not support
        loose: dict[str, Any] = {name: (Any, default) for name, (_, default) in fields.items()}
        return _model(path, settings, loose)


def _check_call(parameters: list[inspect.Parameter], positional: int, required: frozenset[str]) -> None:
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_place) < positional and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UnknownComponentError(
            f"is called with {positional} argument(s) by position, and takes {len(by_place)}"
        )
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = sorted(required - by_name)
    if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise UnknownComponentError(f"is called with {missing[0]}=, and has no such parameter")


def _model(name: str, settings: ConfigDict, fields: dict[str, Any]) -> type[BaseModel]:
    made: type[BaseModel] = create_model(name, __config__=settings, **fields)
    return made


def _hint(parameter: inspect.Parameter, names: dict[str, Any]) -> Any:
    """Return the annotation of a parameter, with its names looked up in `names`; Any if there is none."""
    if parameter.annotation is parameter.empty:
        return Any
    # Each parameter by itself, because an annotation may exist only for type checkers.
    alone = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(alone, names, include_extras=True)[parameter.name]
    except Exception:
        return Any


def _globals(component: Any) -> dict[str, Any]:
    """Return the global names of the module in which a component's annotations are written."""
    while isinstance(component, functools.partial):
        component = component.func
    if inspect.isclass(component):
        function: Any = component.__init__
    elif inspect.isroutine(component):
        function = component
    else:  # an object that can be called
        function = type(component).__call__
    function = inspect.unwrap(function)
    return getattr(function, "__globals__", {})
