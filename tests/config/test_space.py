"""Distributions in a tree: parsing, resolving with conditions and nested choices, listing, enumerating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from prunetune.config import canonical, document, space
from prunetune.config.space import Choice, Int, LogUniform, Uniform
from prunetune.errors import ConfigError


def is_active(key: str, siblings: Mapping[str, Any]) -> bool:
    """As in the sections that these templates are pieces of."""
    before = "post_pruning.optimizer." if key.startswith("schedule") else "post_pruning."
    return canonical.is_active(before + key, siblings)


def template(text: str) -> dict[str, Any]:
    return space.parse(document.parse(text, "f.yaml"))


def always(key: str, siblings: Any) -> bool:
    return True


def picker(values: dict[str, Any]) -> tuple[space.Suggest, list[str]]:
    """A `suggest` that answers from `values` and notes what it was asked for."""
    asked: list[str] = []

    def suggest(name: str, distribution: space.Distribution) -> Any:
        asked.append(name)
        return values.get(name, distribution.probes()[0])

    return suggest, asked


def test_each_kind_is_parsed() -> None:
    parsed = template(
        "a: {uniform: [0, 1]}\nb: {loguniform: [1e-5, 1e-3]}\nc: {int: [1, 3]}\n"
        "d: {choice: [x, null, 2]}\ne: 5\n"
    )
    assert parsed == {
        "a": Uniform(0.0, 1.0),
        "b": LogUniform(1e-5, 1e-3),
        "c": Int(1, 3),
        "d": Choice(("x", None, 2), ("x", None, 2)),
        "e": 5,
    }


def test_distributions_are_shown_as_they_are_written() -> None:
    assert str(Uniform(0, 0.5)) == "uniform [0, 0.5]"
    assert str(LogUniform(1e-5, 1)) == "loguniform [1e-05, 1]"
    assert str(Int(1, 3)) == "int [1, 3]"
    assert str(Choice(("a", None), ("a", None))) == "choice [a, null]"


def test_contains_knows_the_ends_and_the_type() -> None:
    assert Uniform(0, 1).contains(0)
    assert Uniform(0, 1).contains(1.0)
    assert not Uniform(0, 1).contains(1.01)
    assert not Uniform(0, 1).contains(True)
    assert not Uniform(0, 1).contains("0.5")
    assert Int(1, 3).contains(3)
    assert not Int(1, 3).contains(4)
    assert not Int(1, 3).contains(2.0)
    assert not Int(0, 3).contains(True)


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("{choice: []}", "choice: needs at least one option"),
        ("{choice: x}", "choice: takes a list"),
        ("{choice: [1, 2, 1]}", "choice: has the same option twice"),
        ("{choice: [1, true]}", "choice: has the same option twice"),
        ("{choice: [{uniform: [0, 1]}, 2]}", "not a distribution"),
        ("{uniform: [1, 0.5]}", "uniform: the lower bound is above the upper one"),
        ("{int: [3, 2]}", "int: the lower bound is above the upper one"),
        ("{uniform: [1]}", "uniform: takes two numbers"),
        ("{uniform: [1, 2, 3]}", "uniform: takes two numbers"),
        ("{uniform: [a, b]}", "uniform: takes two numbers"),
        ("{uniform: [false, true]}", "uniform: takes two numbers"),
        ("{uniform: {low: 1}}", "uniform: takes a list"),
        ("{uniform: [0, .inf]}", "uniform: bounds must be finite"),
        ("{uniform: [.nan, 1]}", "uniform: bounds must be finite"),
        ("{loguniform: [0, 1]}", "loguniform: the lower bound must be greater than 0"),
        ("{loguniform: [-1, 1]}", "loguniform: the lower bound must be greater than 0"),
        ("{int: [1, 2.5]}", "int: bounds must be whole numbers"),
    ],
)
def test_a_malformed_distribution_names_line_key_and_rule(written: str, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        template(f"first: 1\nsection:\n  lr: {written}\n")
    message = str(error.value)
    assert message.startswith("f.yaml:3: section.lr = ")
    assert rule in message


def test_a_malformed_distribution_inside_an_option_names_its_own_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^f\.yaml:4: optimizer\.choice\.1\.lr = \[2, 1\]: uniform: the lower"
    ):
        template(
            "optimizer:\n  choice:\n    - {name: a}\n    - {name: b, lr: {uniform: [2, 1]}}\n",
        )


def test_resolve_asks_once_per_distribution_and_keeps_the_order_of_the_file() -> None:
    suggest, asked = picker({"b.lr": 0.25, "l.1": 7})
    tree = space.resolve(
        template("a: 1\nb: {lr: {uniform: [0, 1]}}\nl: [1, {int: [5, 9]}]\nc: {choice: [[1, 2], null]}\n"),
        suggest,
        always,
    )
    assert tree == {"a": 1, "b": {"lr": 0.25}, "l": [1, 7], "c": [1, 2]}
    assert list(tree) == ["a", "b", "l", "c"]
    assert asked == ["b.lr", "l.1", "c"]


def test_options_have_their_own_ranges_under_their_own_names() -> None:
    parsed = template(
        "optimizer:\n"
        "  choice:\n"
        "    - {name: sgd, lr: {loguniform: [0.01, 1]}}\n"
        "    - {name: adam, lr: {loguniform: [1e-5, 1e-3]}}\n"
    )
    found = space.parameters(parsed, always)
    assert found == {
        "optimizer": Choice(parsed["optimizer"].options, ("sgd", "adam")),
        "optimizer[sgd].lr": LogUniform(0.01, 1.0),
        "optimizer[adam].lr": LogUniform(1e-5, 1e-3),
    }
    suggest, asked = picker({"optimizer": "adam", "optimizer[adam].lr": 5e-4})
    assert space.resolve(parsed, suggest, always) == {"optimizer": {"name": "adam", "lr": 5e-4}}
    assert asked == ["optimizer", "optimizer[adam].lr"]


def test_choices_nest_in_choices() -> None:
    parsed = template("a: {choice: [{name: x, b: {choice: [{name: y, c: {int: [1, 2]}}, null]}}, off]}\n")
    assert list(space.parameters(parsed, always)) == ["a", "a[x].b", "a[x].b[y].c"]
    assert space.enumerate_finite(parsed, always) == [
        {"a": "x", "a[x].b": "y", "a[x].b[y].c": 1},
        {"a": "x", "a[x].b": "y", "a[x].b[y].c": 2},
        {"a": "x", "a[x].b": None},
        {"a": False},  # YAML 1.1's off
    ]


def test_options_without_a_name_are_on_or_numbered() -> None:
    parsed = template("m: {choice: [null, {x: {int: [1, 2]}}]}\n")
    assert parsed["m"].labels == (None, "on")
    assert "m[on].x" in space.parameters(parsed, always)
    parsed = template("m: {choice: [null, {x: {int: [1, 2]}}, {name: a, y: 1}, [1, 2]]}\n")
    assert parsed["m"].labels == (None, "option 1", "a", "[1, 2]")
    suggest, _ = picker({"m": "option 1", "m[option 1].x": 2})
    assert space.resolve(parsed, suggest, always) == {"m": {"x": 2}}


def test_two_options_may_have_the_same_name() -> None:
    parsed = template("m: {choice: [{name: a, y: 1}, {name: a, y: 2}]}\n")
    one, other = parsed["m"].labels
    assert space.at(parsed, {"m": one}, always) == {"m": {"name": "a", "y": 1}}
    assert space.at(parsed, {"m": other}, always) == {"m": {"name": "a", "y": 2}}


CONDITIONAL = """\
optimizer:
  momentum: {uniform: [0, 0.99]}
  name: {choice: [adam, sgd]}
label_smoothing:
  horizon: {uniform: [0.1, 1]}
  alpha0: {choice: [0, 0.1]}
soft_skip: {gamma0: 0, horizon: {uniform: [0.1, 1]}}
mask: null
"""


@pytest.mark.parametrize(
    ("values", "sampled"),
    [
        ({}, {"optimizer.name", "label_smoothing.alpha0"}),
        ({"optimizer.name": "sgd"}, {"optimizer.name", "optimizer.momentum", "label_smoothing.alpha0"}),
        (
            {"label_smoothing.alpha0": 0.1},
            {"optimizer.name", "label_smoothing.alpha0", "label_smoothing.horizon"},
        ),
    ],
)
def test_parameters_that_do_not_count_are_not_sampled(values: dict[str, Any], sampled: set[str]) -> None:
    suggest, asked = picker(values)
    tree = space.resolve(template(CONDITIONAL), suggest, is_active)
    assert set(asked) == sampled
    assert set(space.flatten(tree)) == sampled | {"soft_skip.gamma0", "mask"}


def test_at_gives_the_first_probe_for_what_is_not_given() -> None:
    tree = space.at(template(CONDITIONAL), {"optimizer.name": "sgd", "optimizer.momentum": 0.5}, is_active)
    assert tree["optimizer"] == {"momentum": 0.5, "name": "sgd"}
    assert tree["label_smoothing"] == {"alpha0": 0}
    assert space.at(template("a: {uniform: [2, 3]}\n"), {}, always) == {"a": 2.0}


def test_a_fixed_value_switches_its_dependants_off() -> None:
    found = space.parameters(template("optimizer: {name: adam, momentum: {uniform: [0, 1]}}\n"), is_active)
    assert found == {}
    found = space.parameters(template("soft_skip: {gamma0: 0.1, horizon: {uniform: [0.1, 1]}}\n"), is_active)
    assert list(found) == ["soft_skip.horizon"]


def test_everything_in_a_null_option_is_not_sampled() -> None:
    parsed = template("mask: {choice: [null, {lambda1: {uniform: [0, 1]}, lambda2: 1}]}\n")
    suggest, asked = picker({"mask": None})
    assert space.resolve(parsed, suggest, is_active) == {"mask": None}
    assert asked == ["mask"]


def test_a_condition_holds_inside_the_option_of_a_choice() -> None:
    parsed = template(
        "optimizer:\n"
        "  choice:\n"
        "    - {name: adam, momentum: {uniform: [0, 0.5]}}\n"
        "    - {name: sgd, momentum: {uniform: [0.5, 0.9]}}\n"
    )
    assert list(space.parameters(parsed, is_active)) == ["optimizer", "optimizer[sgd].momentum"]


def test_a_list_of_distributions_that_does_not_count_is_not_sampled() -> None:
    written = "schedule: {name: %s, milestones: [{uniform: [0.1, 0.4]}, 0.75]}\n"
    assert list(space.parameters(template(written % "step"), is_active)) == ["schedule.milestones.0"]
    assert space.parameters(template(written % "constant"), is_active) == {}


def test_assignments_try_every_probe_of_every_parameter() -> None:
    parsed = template(
        "a: {int: [1, 3]}\nb: {choice: [p, {name: q, c: {uniform: [0, 1]}}]}\nd: {loguniform: [1, 4]}\n"
    )
    found: dict[str, space.Distribution] = {}
    tried: dict[str, set[Any]] = {}
    for assignment in space.assignments(parsed, always, found):

        def suggest(name: str, dist: space.Distribution, given: dict[str, Any] = assignment) -> Any:
            value = given.get(name, dist.probes()[0])
            tried.setdefault(name, set()).add(value)
            return value

        space.resolve(parsed, suggest, always)
    assert set(found) == {"a", "b", "b[q].c", "d"}
    assert tried == {name: set(distribution.probes()) for name, distribution in found.items()}


def test_enumerate_finite_lists_every_distinct_assignment_once() -> None:
    parsed = template(CONDITIONAL.replace("{uniform: [0, 0.99]}", "{choice: [0, 0.9]}"))
    assert space.enumerate_finite(parsed, is_active) is None  # a horizon is a float
    parsed = template(
        "optimizer: {name: {choice: [adam, sgd]}, momentum: {choice: [0, 0.9]}}\n"
        "epochs: {int: [1, 2]}\nlr: {uniform: [0.5, 0.5]}\n"
    )
    found = space.enumerate_finite(parsed, is_active)
    assert found is not None
    short = [tuple(assignment.values()) for assignment in found]
    assert len(found) == 6  # adam has no momentum
    assert len(set(map(str, short))) == 6
    assert {"optimizer.name": "adam", "epochs": 2, "lr": 0.5} in found
    assert all(("optimizer.momentum" in a) == (a["optimizer.name"] == "sgd") for a in found)


def test_enumerate_finite_of_nothing_to_search_is_one_empty_assignment() -> None:
    assert space.enumerate_finite(template("a: 1\n"), always) == [{}]


def test_enumerate_finite_gives_up_above_the_limit() -> None:
    parsed = template("a: {int: [1, 10]}\nb: {int: [1, 10]}\n")
    assert space.enumerate_finite(parsed, always, limit=99) is None
    assert len(space.enumerate_finite(parsed, always, limit=100) or []) == 100


def test_enumerate_finite_does_not_build_a_huge_range() -> None:
    assert space.enumerate_finite(template("seed: {int: [0, 1000000000000000]}\n"), always) is None


def test_flatten_keeps_lists_and_nulls_as_leaves() -> None:
    assert space.flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None}) == {
        "a.b.c": 1,
        "a.d": [1, {"e": 2}],
        "f": None,
    }
