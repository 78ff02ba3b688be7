"""What a component's signature says about its options, and what is no component."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prunetune.config.canonical import canonical
from prunetune.config.component import Component
from prunetune.config.schema import CriterionConfig, EarlyStoppingConfig

MODULE = """\
from __future__ import annotations
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from pydantic import Field

if TYPE_CHECKING:
    from nowhere import Scene, Scores

def typed(scene: Scene, *, other: Scene = None, count: Annotated[int, Field(ge=1)] = 2) -> Scores: ...

half = partial(typed, other=1)

class Typed:
    def __call__(self, scene: Scene, *, other=None, count: Annotated[int, Field(ge=1)] = 2) -> Scores: ...

    def __eq__(self, other): return self is other

made = Typed()

table = {"a": 1}
number = 3

class Colour(Enum):
    RED = "red"

def rich(scene, *, hidden: tuple[int, ...] = (), path: Path = Path(), names: frozenset[str] = frozenset(),
         colour: Colour = Colour.RED, scale: float = 1.0, anything=None): ...

class Patient:
    def __init__(self, *, patience: int = 3, longest: int): ...

class Endless:
    def __init__(self, *, patience: int = 3): ...

def nothing(*, power: float = 1.0): ...
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module above, as `own_parts`."""
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("own_parts", None)


def options(section: type[Component], name: str, **given: Any) -> dict[str, Any]:
    return section.model_validate({"name": f"own_parts:{name}", **given}).options


def test_what_is_passed_by_name_is_no_option_wherever_it_stands() -> None:
    assert options(EarlyStoppingConfig, "Patient", patience=2) == {"patience": 2}
    with pytest.raises(ValidationError, match="unknown key"):
        options(EarlyStoppingConfig, "Patient", longest=2)


@pytest.mark.parametrize(
    ("section", "name", "words"),
    [
        (EarlyStoppingConfig, "Endless", "is called with longest=, and has no such parameter"),
        (CriterionConfig, "nothing", r"is called with 1 argument\(s\) by position, and takes 0"),
    ],
)
def test_what_cannot_be_called_as_its_kind_is_refused(
    section: type[Component], name: str, words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        options(section, name)


@pytest.mark.parametrize("name", ["typed", "half", "made"])
def test_a_name_for_type_checkers_costs_only_its_own_parameter_the_rule(name: str) -> None:
    assert options(CriterionConfig, name, other="anything", count=1) == {"other": "anything", "count": 1}
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        options(CriterionConfig, name, count=0)


RICH = {"hidden": [4, 5], "path": "a/b", "names": ["x"], "colour": "red"}


def test_lists_and_texts_stand_for_what_a_file_has_not() -> None:
    section = CriterionConfig.model_validate({"name": "own_parts:rich", "scale": 2, **RICH})
    colour = CriterionConfig.model_validate("own_parts:rich").component.__kwdefaults__["colour"]
    assert section.options == {
        "hidden": (4, 5),
        "path": Path("a/b"),
        "names": frozenset("x"),
        "colour": colour,
        "scale": 2.0,
    }
    dumped = section.model_dump()
    assert dumped == {"name": "own_parts:rich", "scale": 2.0, **RICH}
    assert CriterionConfig.model_validate(dumped) == section
    assert canonical(section).items() >= dumped.items()


def test_infinity_stays_infinity_beside_an_option_that_is_converted() -> None:
    found = options(CriterionConfig, "rich", hidden=[4], anything=float("inf"))
    assert found == {"hidden": (4,), "anything": float("inf")}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden": ["4"]}, r"hidden\.0\n  Input should be a valid integer"),
        ({"hidden": 4}, "Input should be a valid list"),
        ({"colour": "blue"}, "Input should be 'red'"),
        ({"path": 3}, "path\\n  Input should be a valid string"),
        ({"hidden": [4], "scale": float("inf")}, "finite number"),
        ({"hidden": [4], "scale": "2"}, "scale\n  Input should be a valid number"),
        ({"anything": object()}, "must be plain data"),
    ],
)
def test_they_are_checked_as_strictly(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        options(CriterionConfig, "rich", **given)
    assert len(caught.value.errors()) == 1


@pytest.mark.parametrize(("name", "what"), [("table", "dict"), ("number", "int")])
def test_what_cannot_be_called_is_no_component(name: str, what: str) -> None:
    with pytest.raises(ValidationError, match=f"is no function and no class, it is of type {what}"):
        options(CriterionConfig, name)
