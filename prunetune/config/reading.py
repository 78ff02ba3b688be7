"""Configurations: read, checked, made canonical, and hashed. What they may say is in `schema.py`.

A `Config` holds plain values. A sweep is the same tree with distributions in it (`space.py`), and is
checked by putting their ends and options in and validating the result, so every rule is written once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ValidationError

from prunetune.config import document, space
from prunetune.config.document import Document
from prunetune.config.schema import Config, ConvConfig, MlpConfig, UserModelConfig, VitConfig, pattern
from prunetune.errors import ConfigError, Problem, did_you_mean

SEARCHABLE = ("seed", "data", "model", "pre_pruning", "pruning", "post_pruning")
"""Top-level keys in which a distribution may stand."""

# (parent, field) -> (sibling, its default, when its value makes the field count). A field that does not count
# is not sampled, and is reset to its default before hashing, so that what computes the same is equal.
_COUNTS_WHEN: dict[tuple[str, str], tuple[str, Any, Callable[[Any], bool]]] = {
    ("optimizer", "momentum"): ("name", None, lambda name: name == "sgd"),
    ("optimizer", "nesterov"): ("name", None, lambda name: name == "sgd"),
    ("schedule", "milestones"): ("name", "constant", lambda name: name == "step"),
    ("schedule", "factor"): ("name", "constant", lambda name: name == "step"),
    ("schedule", "rounds"): ("name", "one_shot", lambda name: name == "iterative"),
    ("schedule", "epochs"): ("name", "one_shot", lambda name: name == "iterative"),
    ("schedule", "start"): ("name", "one_shot", lambda name: name == "gradual"),
    ("schedule", "end"): ("name", "one_shot", lambda name: name == "gradual"),
    ("schedule", "every"): ("name", "one_shot", lambda name: name == "gradual"),
    ("mask", "lambda2"): ("method", "penalty", lambda method: method == "penalty"),
    ("mask", "lambda2_warmup"): ("lambda2", 0.0, lambda value: value > 0),
    ("mask", "target_warmup"): ("method", "penalty", lambda method: method == "target"),
    ("pruning", "allocation"): ("structure", "unstructured", lambda name: name == "unstructured"),
    ("pruning", "dense_layers"): ("structure", "unstructured", lambda name: name == "unstructured"),
    ("label_smoothing", "horizon"): ("alpha0", 0.0, lambda value: value > 0),
    ("soft_skip", "horizon"): ("gamma0", 0.0, lambda value: value > 0),
}


def is_active(key: str, siblings: Mapping[str, Any]) -> bool:
    """Whether the field with this dotted key counts, given its siblings' values (`space.Active`)."""
    path, _, field = key.rpartition(".")
    rule = _COUNTS_WHEN.get((path.rpartition(".")[2], field))
    if rule is None:
        return True
    sibling, default, counts = rule
    value = siblings.get(sibling, default)
    if value is space.PENDING:
        return False
    try:
        return counts(value)
    except TypeError:  # a value of the wrong type; the schema says so
        return True


_OFF_WHEN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "label_smoothing": lambda section: section["alpha0"] == 0,
    "soft_skip": lambda section: section["gamma0"] == 0,
}
"""Sections that compute the same as null."""


def canonical(section: BaseModel | None) -> Any:
    """A section as plain data in which what does not count has its default."""
    if section is None:
        return None
    data = section.model_dump(mode="json")
    return _canonical(data, section)


def _canonical(data: dict[str, Any], section: BaseModel, key: str = "") -> dict[str, Any]:
    for field, value in list(data.items()):
        dotted = f"{key}.{field}" if key else field
        child = getattr(section, field)
        if isinstance(child, BaseModel):
            off = field in _OFF_WHEN and _OFF_WHEN[field](value)
            data[field] = None if off else _canonical(value, child, dotted)
        elif not is_active(dotted, data):
            data[field] = type(section).model_fields[field].default
    return data


def digest(*parts: Any) -> str:
    """SHA-256 (hex, 32 characters) of plain data, independent of the order of mapping keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def kept(density: float, weights: int) -> int:
    """floor(d·n), exactly, for the density as it was written.

    >>> kept(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return int(Fraction(repr(density)) * weights)


def load(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A training configuration from a file. Raises UserError for all that is wrong with it."""
    return from_document(document.override(document.read(path), overrides))


def from_document(source: Document) -> Config:
    """A training configuration: no distributions, one density."""
    template = space.parse(source)
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
    """The template of a sweep, and a `Config` with one value for each distribution.

    Everything outside `SEARCHABLE` is the same for all trials, so that Config is where to read it.
    Raises ConfigError naming each key for which some value of its distribution breaks a rule.
    """
    template = space.parse(source)
    fixed = {key: value for key, value in template.items() if key not in SEARCHABLE}
    outside = space.parameters(fixed, is_active)
    if outside:
        name = next(iter(outside))
        raise source.problem(name, "cannot be searched; give a value")
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


def most_epochs(template: Mapping[str, Any], stage: str) -> int:
    """The most epochs that a stage can have over the space; 0 where it never runs."""
    most = 0
    for assignment in space.assignments(template, is_active):
        section = space.at(template, assignment, is_active).get(stage)
        most = max(most, section["epochs"] if section else 0)
    return most


def most_round_epochs(template: Mapping[str, Any]) -> int:
    """The most epochs that a trial's pruning stage can train: of iterative rounds, and to rewind."""
    most = 0
    for assignment in space.assignments(template, is_active):
        pruning = Config.model_validate(space.at(template, assignment, is_active)).pruning
        rounds = pruning.schedule.rounds - 1 if pruning.schedule.name == "iterative" else 0
        rewind = pruning.rewind if isinstance(pruning.rewind, int) else 0
        most = max(most, rounds * pruning.schedule.epochs + rewind)
    return most


def validate(tree: dict[str, Any], source: Document) -> Config:
    """A Config from plain values. Raises ConfigError with file, line, key, value and rule of each problem."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_problem(item, tree, source) for item in error.errors()) from None
    problems = [Problem(source.where(key), key, rule, value) for key, value, rule in _contradictions(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _contradictions(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(key, value, rule) of what is right by itself and wrong beside the rest."""
    pre, pruning, post = config.pre_pruning, config.pruning, config.post_pruning
    schedule = pruning.schedule
    if isinstance(pruning.rewind, int) and (pre is None or pruning.rewind > pre.epochs):
        epochs = 0 if pre is None else pre.epochs
        yield "pruning.rewind", pruning.rewind, f"must be at most the {epochs} epochs of pre_pruning"
    if schedule.name == "gradual":
        if schedule.start >= schedule.end:
            yield "pruning.schedule.start", schedule.start, f"must be less than end = {schedule.end:g}"
        if pruning.criterion != "magnitude":
            yield "pruning.criterion", pruning.criterion, "gradual pruning ranks by magnitude"
        if pruning.sanity_check in ("shuffle", "invert"):
            yield "pruning.sanity_check", pruning.sanity_check, "has no effect on gradual pruning"
        if post.dynamic is not None:
            yield "post_pruning.dynamic", post.dynamic.name, "cannot be combined with gradual pruning"
    if pruning.structure != "unstructured" and (schedule.name == "gradual" or post.dynamic is not None):
        yield "pruning.structure", pruning.structure, "gradual and dynamic masks are unstructured"
    if ":" in pruning.structure:
        n, m = pattern(pruning.structure)
        for index, density in enumerate(config.densities):
            if density != n / m:
                yield f"densities.{index}", density, f"structure {pruning.structure} has density {n / m:g}"


def _problem(item: Any, tree: dict[str, Any], source: Document) -> Problem:
    # The tag of the model's kind is no key of the file.
    path = [part for i, part in enumerate(item["loc"]) if not (i == 1 and item["loc"][0] == "model")]
    key = ".".join(str(part) for part in path)
    rule = item["msg"].removeprefix("Value error, ")
    rule = rule.replace("Input should be", "must be")
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        rule = "unknown key" + (did_you_mean(str(path[-1]), known) or f"; known here: {', '.join(known)}")
        return Problem(source.where(key), key, rule, has_value=False)
    if kind == "missing":
        return Problem(source.where(key), key, "is required", has_value=False)
    if kind == "literal_error" and isinstance(item["input"], str):
        options = item["ctx"]["expected"].replace(" or ", ",").split(",")
        rule += did_you_mean(item["input"], [option.strip(" '") for option in options])
    if kind == "string_pattern_mismatch":
        rule = "must be letters, digits, '.', '_' or '-', and start with a letter or digit"
    if kind == "model_type" or kind == "dict_type":
        rule = "must be a mapping of keys"
    return Problem(source.where(key), key, rule, item["input"])


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    """Field names of the section at a pydantic location."""
    by_tag = {"mlp": MlpConfig, "conv": ConvConfig, "vit_tiny": VitConfig, "user": UserModelConfig}
    section: Any = Config
    for part in loc:
        if part in by_tag:
            section = by_tag[part]
        elif isinstance(part, str) and part in getattr(section, "model_fields", {}):
            section = _section_in(section.model_fields[part].annotation)
    return list(getattr(section, "model_fields", {}))


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None
