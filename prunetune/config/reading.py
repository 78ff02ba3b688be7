"""Reads and checks configurations; `schema.py` defines what they may contain.

A `Config` holds plain values. A sweep's file is the same tree with distributions in it (`space.py`). To check
it, the ends and options of its distributions are filled in and the resulting configurations are validated, so
that every rule is written only once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunetune.config import document, space
from prunetune.config.canonical import determining_fields, is_active
from prunetune.config.component import Component
from prunetune.config.distributions import join
from prunetune.config.document import Document
from prunetune.config.schema import Config, pattern
from prunetune.config.sections import expanded, section_at
from prunetune.errors import ConfigError, Problem, did_you_mean
from prunetune.kind import UnknownComponentError


def load(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a training configuration from a file. Raises UserError for everything that is wrong in it."""
    return from_document(document.override(document.read(path), overrides))


def from_document(source: Document) -> Config:
    """Make a training configuration, which has no distributions and one density. Raises ConfigError."""
    template = completed(space.parse(source))
    found = space.parameters(template, is_active)
    if found:
        name = next(iter(found))
        raise source.problem(
            name, f"is a distribution ({found[name]}); a training run needs a value (a sweep finds one)"
        )
    config = validate(template, source)
    if len(config.densities) != 1:
        raise source.problem(
            "densities", "a training run has one density; give e.g. densities=[0.1]", config.densities
        )
    return config


def sweep_from_document(source: Document) -> tuple[dict[str, Any], Config]:
    """Return (the template of a sweep, a `Config` with one value for each distribution).

    Settings that do not determine results are the same for all trials, so they can be read from that Config.
    Raises ConfigError naming each key for which some value of its distribution breaks a rule.
    """
    template = completed(space.parse(source))
    fixed = {key: value for key, value in template.items() if key not in determining_fields()}
    outside = space.parameters(fixed, is_active)
    if outside:
        name = next(iter(outside))
        raise source.problem(name, "cannot be searched; give a value")
    for name in space.parameters({key: template[key] for key in ("task",) if key in template}, is_active):
        if name in ("task", "task.name"):
            raise source.problem(name, "cannot be searched: trials of two tasks cannot be compared")
    found: dict[str, space.Distribution] = {}
    problems: dict[tuple[str, str], Problem] = {}
    representative: Config | None = None
    for assignment in space.assignments(template, is_active, found):
        try:
            config = validate(space.at(template, assignment, is_active), source)
            representative = representative or config
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault((problem.key, problem.rule), problem)
    if problems or representative is None:
        raise ConfigError(problems.values())
    return template, representative


def absolute(config: Config) -> Config:
    """Make local paths absolute, because workers have other working folders."""
    data = config.data.model_copy(update={"root": str(Path(config.data.root).expanduser().absolute())})
    storage = config.storage
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    return config.model_copy(update={"data": data, "storage": storage})


def completed(template: dict[str, Any]) -> dict[str, Any]:
    """Return a template with the options filled in that follow from the file's densities.

    A component names them in its attribute `from_densities`, which maps an option to a function of the
    densities. A trial has only one density, so the option must be set here, where all of them are known.
    """
    given = template.get("densities")
    numbers = [d for d in given if isinstance(d, int | float)] if isinstance(given, list) else []
    # Of wrong densities the schema says so, and nothing else is to be said.
    densities = [density for density in numbers if 0 < density <= 1] or [1.0]
    found = _completed(template, "", densities)
    assert isinstance(found, dict)
    return found


def _completed(node: Any, path: str, densities: list[float]) -> Any:
    if isinstance(node, space.Choice):
        return dataclasses.replace(
            node, options=tuple(_completed(option, path, densities) for option in node.options)
        )
    if isinstance(node, str):  # a component may be its name alone: it stays so where nothing is added
        full = expanded(path, node)
        filled = full if full == node else _completed(full, path, densities)
        return node if filled == full else filled
    if not isinstance(node, dict):
        return node
    found = {key: _completed(child, join(path, str(key)), densities) for key, child in node.items()}
    section = section_at(path)
    if section is None or not issubclass(section, Component):
        return found
    named = node.get(section.key, section.model_fields["name"].default)
    for name in named.labels if isinstance(named, space.Choice) else [named]:
        for option, value in _from_densities(section, name).items():
            found.setdefault(option, value(densities))
    return found


def _from_densities(section: type[Component], name: Any) -> Mapping[str, Callable[[list[float]], float]]:
    try:
        component = section.kind.find(name) if isinstance(name, str) else None
    except UnknownComponentError:  # the schema says so
        component = None
    options: Mapping[str, Callable[[list[float]], float]] = getattr(component, "from_densities", {})
    return options


def validate(tree: dict[str, Any], source: Document) -> Config:
    """Make a Config from plain values. Raises ConfigError with place, key, value and rule of each problem."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_problem(item, tree, source) for item in error.errors()) from None
    problems = [Problem(source.where(key), key, rule, value) for key, value, rule in _contradictions(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _contradictions(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, rule) of values that are valid alone, but contradict others."""
    pre, pruning, post = config.pre_pruning, config.pruning, config.post_pruning
    schedule = pruning.schedule
    if isinstance(pruning.rewind, int) and (pre is None or pruning.rewind > pre.epochs):
        epochs = 0 if pre is None else pre.epochs
        yield "pruning.rewind", pruning.rewind, f"must be at most the {epochs} epochs of pre_pruning"
    if schedule.name == "gradual":
        if schedule.start >= schedule.end:
            yield "pruning.schedule.start", schedule.start, f"must be less than end = {schedule.end:g}"
        if pruning.criterion.name != "magnitude":
            yield "pruning.criterion", pruning.criterion.name, "gradual pruning ranks by magnitude"
        if pruning.sanity_check in ("shuffle", "invert"):
            yield "pruning.sanity_check", pruning.sanity_check, "has no effect on gradual pruning"
        if post.dynamic is not None:
            yield "post_pruning.dynamic", post.dynamic.name, "cannot be combined with gradual pruning"
    smoothing = post.label_smoothing
    if smoothing is not None and not smoothing.is_zero and not config.task.component.gives_logits:
        rule = f"does not apply: {config.task.name} has no labels to smooth"
        yield "post_pruning.label_smoothing", smoothing.alpha0, rule
    if pruning.structure != "unstructured" and (schedule.name == "gradual" or post.dynamic is not None):
        yield "pruning.structure", pruning.structure, "gradual and dynamic masks are unstructured"
    if ":" in pruning.structure:
        n, m = pattern(pruning.structure)
        for index, density in enumerate(config.densities):
            if density != n / m:
                yield f"densities.{index}", density, f"structure {pruning.structure} has density {n / m:g}"


def _problem(item: Any, tree: dict[str, Any], source: Document) -> Problem:
    path = item["loc"]
    key = ".".join(str(part) for part in path)
    rule = item["msg"].removeprefix("Value error, ")
    rule = rule.replace("Input should be", "must be")
    kind = item["type"]
    if kind == "extra_forbidden" and not rule.startswith("unknown key"):
        section = section_at(".".join(str(part) for part in path[:-1]))
        known = list(section.model_fields) if section is not None else []
        rule = "unknown key" + (did_you_mean(str(path[-1]), known) or f"; known here: {', '.join(known)}")
    if kind == "extra_forbidden":
        return Problem(source.where(key), key, rule, has_value=False)
    if kind == "missing":
        return Problem(source.where(key), key, "is required", has_value=False)
    if kind == "literal_error" and isinstance(item["input"], str) and "did you mean" not in rule:
        options = item["ctx"]["expected"].replace(" or ", ",").split(",")
        rule += did_you_mean(item["input"], [option.strip(" '") for option in options])
    if kind == "string_pattern_mismatch":
        rule = "must be letters, digits, '.', '_' or '-', and start with a letter or digit"
    if kind == "model_type" or kind == "dict_type":
        rule = "must be a mapping of keys"
    return Problem(source.where(key), key, rule, item["input"])
