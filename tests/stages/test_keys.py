"""What a stage reads is what is hashed: every field of the schema is changed, one at a time.

A field that nobody has thought of is found in the schema, and must be in the keys of the stages that it has
to do with, or be declared in `DOES_NOT_DETERMINE`.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from prunetune import data as datasets
from prunetune.config.canonical import configuration_hash
from prunetune.config.component import Component
from prunetune.config.schema import DOES_NOT_DETERMINE, Config, DataConfig
from prunetune.config.sections import section_in
from prunetune.stages.plan import plan

Tree = dict[str, Any]

BASE: Tree = {
    "name": "base",
    "data": {"name": "digits", "batch_size": 32, "limit": 60, "augmentation": {}},
    "model": {"name": "mlp", "hidden": [6]},
    "densities": [0.5],
    "pre_pruning": {
        "epochs": 4,
        "optimizer": {"name": "sgd", "lr": 0.1, "schedule": {"name": "step"}},
        "mask": {"lambda1": 1e-6, "lambda2": 1e-4, "initial": 0.9},
    },
    "pruning": {"schedule": {"name": "iterative"}, "rewind": 2},
    "post_pruning": {
        "epochs": 4,
        "optimizer": {"name": "adam", "lr": 0.1},
        "label_smoothing": {"alpha0": 0.1},
        "soft_activation": {"beta0": 1.0},
        "soft_skip": {"gamma0": 0.1},
        "rescaled_init": {},
        "dynamic": {"name": "rigl"},
    },
}
"""A configuration in which as much as possible is switched on."""

ALSO: tuple[Tree, ...] = (
    {"pruning": {"schedule": {"name": "gradual"}}, "post_pruning": {"dynamic": None}},
    {"pre_pruning": {"mask": {"method": "target"}}},
    {"pre_pruning": {"mask": {"method": "path", "lowest": 0.2}}, "pruning": {"from_epoch": "best"}},
    {"pruning": {"structure": "channel", "schedule": "one_shot"}, "post_pruning": {"dynamic": None}},
    {"pre_pruning": None, "pruning": {"rewind": "none"}},
)
"""What has to be changed of it for the other fields to count."""

VALUES: dict[str, Any] = {
    "pruning.structure": "channel",
    "pruning.rewind": "init",
    "pre_pruning.mask.factor": 2.0,
    "storage": "elsewhere",
    "resources.trials_per_worker": 3,
    "tracking.trackers": [],
    "model.in_channels": 1,
    "model.num_classes": 10,
}
"""Where another value cannot be found from the type alone."""

STAGES = ("pre_pruning", "pruning", "post_pruning")
FIRST_STAGE = {"pre_pruning": 0, "pruning": 1, "post_pruning": 2, "densities": 1}
"""The first of the stages that a section has to do with; all else has to do with all of them."""


def merged(base: Tree, changes: Mapping[str, Any]) -> Tree:
    tree = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict) and "method" not in value
        tree[key] = merged(tree[key], value) if both else copy.deepcopy(value)
    return tree


def bases() -> list[Tree]:
    """With all defaults filled in; and each of them with every other built-in component in its place."""
    made = [filled(tree) for tree in (BASE, *(merged(BASE, changes) for changes in ALSO))]
    for path, section in COMPONENTS:
        for name in section.kind.names if path != "data" else ():
            if (tree := with_component(made[0], path, section, name)) is not None:
                made.append(tree)
    return made


def fields(section: type[BaseModel], key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every field of the schema, and of every option of every component."""
    for name, field in section.model_fields.items():
        dotted = f"{key}.{name}" if key else name
        inner = section_in(field.annotation)
        if inner is None:
            yield dotted, field.annotation
            continue
        yield from fields(inner, dotted)
        if type(None) in typing.get_args(field.annotation):
            yield dotted, None  # it can be switched off
    if issubclass(section, Component):
        for component in section.kind.names:
            for name, field in section.kind.options(component).model_fields.items():
                yield f"{key}.{name}", field.annotation


def another(annotation: Any, value: Any, key: str) -> Any:
    """A value of the type that is not `value`."""
    if key in VALUES:
        return VALUES[key]
    if typing.get_origin(annotation) is typing.Annotated:
        return another(typing.get_args(annotation)[0], value, key)
    if typing.get_origin(annotation) is typing.Literal:
        return next(option for option in typing.get_args(annotation) if option != value)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return another(kinds[0], value, key)
    if annotation is bool:
        return not value
    if annotation is int:
        return (value or 0) + 3
    if annotation is float:
        return 0.5 * value if value else 0.05
    if annotation is str:
        return f"{value}-other"
    if typing.get_origin(annotation) is list and isinstance(value, list):
        return [*value[:-1], 0.7 * value[-1] if isinstance(value[-1], float) else value[-1] + 1]
    raise AssertionError(f"{key}: {annotation}: say in VALUES what else its value may be")


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return PydanticUndefined
        tree = tree[part]
    return tree


def changed(tree: Tree, key: str, value: Any) -> Tree:
    tree = copy.deepcopy(tree)
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


def keys(tree: Tree) -> dict[str, str | None]:
    """The key of each stage; for pruning that of its masks."""
    config = Config.model_validate(tree)
    found = plan(config, datasets.load(config.data).digest).keys
    return {stage: found.get(stage) for stage in STAGES}


def filled(tree: Tree) -> Tree:
    """With all defaults, and components as mappings."""
    return _mappings(Config.model_validate(tree))


def _mappings(value: Any) -> Any:
    if isinstance(value, Component):
        inner = {
            value.key if name == "name" else name: getattr(value, name) for name in type(value).model_fields
        }
        return {name: _mappings(child) for name, child in {**inner, **value.options}.items()}
    if isinstance(value, BaseModel):
        return {name: _mappings(getattr(value, name)) for name in type(value).model_fields}
    return value


def with_component(tree: Tree, path: str, section: type[Component], name: str) -> Tree | None:
    """The tree with this component in the place of another one, with what both take."""
    present = value_at(tree, path)
    if not isinstance(present, dict):
        return None
    frame = set(section.model_fields) - {"name"}
    kept = {key: value for key, value in present.items() if key in frame or section.kind.takes(name, key)}
    return valid(changed(tree, path, kept | {section.key: name}))


def valid(tree: Tree) -> Tree | None:
    try:
        return filled(tree)
    except ValueError:
        return None


def components(section: type[BaseModel], key: str = "") -> Iterator[tuple[str, type[Component]]]:
    """(dotted key, section) of all that names a component."""
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not None:
            dotted = f"{key}.{name}" if key else name
            if issubclass(inner, Component):
                yield dotted, inner
            yield from components(inner, dotted)


COMPONENTS = list(components(Config))
FIELDS = sorted(
    {
        key
        for key, _ in fields(Config)
        # What a data source is told shows in what it gives, which is in `Dataset.digest`.
        if not key.startswith("data.") or key.removeprefix("data.").split(".")[0] in DataConfig.model_fields
    }
    - {"data.name"}
)
ANNOTATIONS = dict(fields(Config))
NEVER_COUNTS = {"model.num_classes", "model.in_channels"}
"""They can only be what the data have."""


CLOSING = ("pruning.schedule.start", "pruning.schedule.end", "pruning.schedule.every")


def expectation(key: str, tree: Tree) -> set[str]:
    """The stages whose keys must move."""
    schedule = tree["pruning"]["schedule"]["name"]
    if schedule == "gradual" and (key == "densities" or key in CLOSING):
        return {"post_pruning"}  # the last stage prunes while it trains
    if key == "densities" and (tree["pre_pruning"] or {}).get("mask", {}).get("method") == "target":
        return set(STAGES)  # the mask aims at it
    if schedule == "gradual" and key in ("pruning.allocation", "pruning.dense_layers"):
        return {"pruning", "post_pruning"}
    if key == "pruning.rewind" and schedule != "iterative":
        return {"post_pruning"}  # from where it goes on; the same weights are chosen
    alone = tree["pre_pruning"] is None and schedule == "iterative"
    if alone and key.startswith("post_pruning.optimizer"):
        return {"pruning", "post_pruning"}  # it trains the rounds, too
    return set(STAGES[FIRST_STAGE.get(key.partition(".")[0], 0) :])


@pytest.mark.parametrize("key", FIELDS)
def test_every_field_is_in_the_keys_or_declared_to_determine_nothing(key: str) -> None:
    """In each base in which the field counts; it counts in one at least."""
    top = key.partition(".")[0]
    declared = key in DOES_NOT_DETERMINE or top in DOES_NOT_DETERMINE
    counted = 0
    for tree, before, one in BASES:
        after = another_tree(tree, key)
        if after is None:
            continue
        now = keys(after)
        moved = {stage for stage in STAGES if before[stage] != now[stage]}
        if declared:
            assert moved == set()
        elif moved:
            # Where there is no such stage its key cannot move.
            assert moved == {s for s in expectation(key, tree) if before[s] is not None or now[s] is not None}
        other = configuration_hash(Config.model_validate(after))
        assert (one != other) == bool(moved), "two trials are the same if their stages are"
        counted += bool(moved)
    assert declared or counted or key in NEVER_COUNTS, (
        f"{key}: changing it moves no key. If it determines what is computed, a stage must have it among its "
        "fields; if it does not, DOES_NOT_DETERMINE must say why"
    )


def another_tree(tree: Tree, key: str) -> Tree | None:
    """The tree with another value for a key, or None where it does not apply, or cannot be."""
    path, _, field = key.rpartition(".")
    section = dict(COMPONENTS).get(path)
    if section is not None and field == "name":
        present = value_at(tree, path)
        if not isinstance(present, dict):
            return None
        other = next((name for name in section.kind.names if name != present[section.key]), "")
        return with_component(tree, path, section, other) if other else None
    value = value_at(tree, key)
    annotation = ANNOTATIONS[key]
    if value is PydanticUndefined or (annotation is None and value is None):
        return None
    return valid(changed(tree, key, None if annotation is None else another(annotation, value, key)))


BASES = [(tree, keys(tree), configuration_hash(Config.model_validate(tree))) for tree in bases()]


def test_many_rounds_are_planned_at_once() -> None:
    """Every round builds on the one before by several ways; each is visited once."""
    schedule = {"name": "iterative", "rounds": 60, "epochs": 1}
    config = Config.model_validate({**BASE, "pruning": {"schedule": schedule, "rewind": 2}})
    stages = plan(config, "").stages
    # A mask and a retraining for each round but the last, the state to rewind to, and the three stages.
    assert len({stage.key for stage in stages}) == len(stages) == 2 * 59 + 1 + 3
