"""A section of a configuration that chooses a component by name and gives its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import (
    InitErrorDetails,
    PydanticCustomError,
    PydanticSerializationError,
    to_jsonable_python,
)

from prunetune.errors import UserError, did_you_mean
from prunetune.kind import Kind, UnknownComponentError


class Component(BaseModel):
    """A name or import path, and options: `{name: adam, lr: 0.001}`, or just `adam` without options.

    Options are checked against the component's signature (`Kind.options`), their defaults are filled in, and
    they become attributes of the section. An option that only other components of the kind have is dropped.
    Subclasses name their `kind`, and may have fields of their own besides the options. A field that a
    component also takes as an option is passed to it too.
    """

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # an option without an annotation may be infinite: not null
        validate_default=True,
        protected_namespaces=(),
    )

    kind: ClassVar[Kind]
    key: ClassVar[str] = "name"
    """The key that holds the name in a file."""

    name: str

    _typed: dict[str, Any] = PrivateAttr(default_factory=dict)
    """The options that are not plain data, such as a tuple for which the file has a list."""

    @property
    def options(self) -> dict[str, Any]:
        """The component's keyword arguments, of the types in its annotations."""
        return {**self.plain_options, **self._typed}

    @property
    def plain_options(self) -> dict[str, Any]:
        """The options as plain data, as in a file."""
        return dict(self.model_extra or {})

    @property
    def component(self) -> Any:
        """The function or class that the section names."""
        return self.kind.find(self.name)

    def make(self, *given: Any, **provided: Any) -> Any:
        """Call the component with what its kind passes and its options.

        Raises UserError for whatever a user's own component raises, which is no fault of this project.
        """
        component = self.component
        try:
            return component(*given, **provided, **self.options)
        except UserError:
            raise
        except Exception as error:
            if self.kind.is_built_in(self.name):
                raise
            what = f"{self.kind.what} {self.name!r}: {type(error).__name__}: {error}"
            raise UserError(what) from error

    @property
    def code(self) -> str | None:
        """The digest of the source of a user's own component; None for a built-in one (`Kind.code`)."""
        return self.kind.code(self.name)

    def counts(self, option: str) -> bool:
        """Whether an option has an effect, given the values of the other options.

        A component declares this in an attribute `counts_when`, which maps an option's name to the name of
        another option and a function of that option's value.
        """
        rule = getattr(self.component, "counts_when", {}).get(option)
        if rule is None:
            return True
        sibling, counts = rule
        options = self.plain_options
        if sibling not in options:  # of a user's component only what is given is there
            options[sibling] = self.kind.options(self.name).model_fields[sibling].default
        return bool(counts(options[sibling]))

    @model_validator(mode="wrap")
    @classmethod
    def _check_options(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        is_short = isinstance(value, str)
        if is_short:
            value = {cls.key: value}
        if not isinstance(value, Mapping):
            return handler(value)
        fields = {cls.key if field == "name" else field: field for field in cls.model_fields}
        own = {fields[key]: given for key, given in value.items() if key in fields}
        rest = {key: given for key, given in value.items() if key not in fields}
        errors: list[InitErrorDetails] = []
        section: Self | None = None
        try:
            section = handler(own)
        except ValidationError as error:
            errors += [cls._located(item) for item in error.errors()]
        name = own.get("name", cls.model_fields["name"].default)
        options: dict[str, Any] = {}
        typed: dict[str, Any] = {}
        if isinstance(name, str):
            try:
                options, typed = cls._checked(name, {**rest, **cls._shared(name, own)})
            except UnknownComponentError as error:
                where = () if is_short else (cls.key,)
                errors.append(_error("unknown_component", str(error), where, name))
            except ValidationError as error:
                known = [*fields, *cls.kind.options(name).model_fields]
                errors += [_detail(item, known) for item in error.errors()]
        if errors or section is None:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        assert section.__pydantic_extra__ is not None
        section.__pydantic_extra__.update(options)
        section._typed.update(typed)
        return section

    @classmethod
    def _located(cls, item: Any) -> InitErrorDetails:
        loc = tuple(cls.key if part == "name" else part for part in item["loc"])
        return _detail({**item, "loc": loc})

    @classmethod
    def _shared(cls, name: str, own: dict[str, Any]) -> dict[str, Any]:
        """Return the section's own fields that a user's component takes too, and that are not null."""
        taken = cls.kind.options(name).model_fields
        return {
            key: given for key, given in own.items() if key in taken and key != "name" and given is not None
        }

    @classmethod
    def _checked(cls, name: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (the options as plain data, those whose annotated types are not plain data)."""
        given = {key: value for key, value in given.items() if not cls.kind.ignores(name, key)}
        if cls.kind.is_keyed:
            cls.kind.code(name)  # where it cannot be read, the file's key is to be named
        options = cls.kind.check(name, given)
        # The defaults of a user's own component need not be plain data; they stay in its code.
        fields = type(options).model_fields if cls.kind.is_built_in(name) else options.model_fields_set
        values = {
            **{key: getattr(options, key) for key in fields if key in type(options).model_fields},
            **(options.model_extra or {}),
        }
        typed = {key: value for key, value in values.items() if not _is_plain(value)}
        for key in typed:
            try:
                values[key] = to_jsonable_python(given.get(key, values[key]))
            except PydanticSerializationError:
                message = "must be plain data: numbers, texts, lists and mappings"
                error = _error("no_plain_data", message, (key,), given.get(key))
                raise ValidationError.from_exception_data(cls.__name__, [error]) from None
        return values, typed

    @model_serializer(mode="wrap")
    def _dump(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        """Dump the name first, then options and fields; only the name if there are none.

        A field that the component also takes is left out if it was not given, because the component has its
        own default.
        """
        dumped, fields = handler(self), type(self).model_fields
        options = {key: value for key, value in dumped.items() if key not in fields}
        own = {key: value for key, value in dumped.items() if key in fields}
        name = own.pop("name")
        for key in own.keys() & self.kind.options(name).model_fields.keys() - self.options.keys():
            if getattr(self, key) == fields[key].get_default(call_default_factory=True):
                del own[key]
        return {self.key: name, **options, **own} if options or own else name


def _is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(child) for key, child in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _error(kind: str, message: str, loc: tuple[str | int, ...], value: Any) -> InitErrorDetails:
    error = PydanticCustomError(kind, message)
    return InitErrorDetails(type=error, loc=loc, input=value)


def _detail(item: Any, known: list[str] | None = None) -> InitErrorDetails:
    message = (
        item["msg"].replace("a valid array", "a valid list").replace("a valid object", "a valid dictionary")
    )
    if item["type"] == "extra_forbidden" and known is not None:
        name = str(item["loc"][-1])
        message = "unknown key" + (did_you_mean(name, known) or f"; known here: {', '.join(known)}")
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        options = item["ctx"]["expected"].replace(" or ", ",").split(",")
        message += did_you_mean(item["input"], [option.strip(" '") for option in options])
    return _error(item["type"], message, item["loc"], item["input"])


def default(section: type[Component], name: str) -> Any:
    """Make a field that defaults to the component of this name, with its default options."""
    return Field(default_factory=lambda: section.model_validate(name))
