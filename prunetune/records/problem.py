"""The problem that a sweep searches, and which trials of earlier runs still belong to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunetune.config import space
from prunetune.config.canonical import configuration_hash, determining_fields, digest, is_active
from prunetune.config.reading import validate
from prunetune.config.schema import DOES_NOT_DETERMINE, DataConfig, TaskConfig
from prunetune.errors import ConfigError
from prunetune.records.trial import RECORDED, TrialRecord
from prunetune.stages.branch import Branch
from prunetune.stages.plan import Plan, plan, watched
from prunetune.tasks import Metric


def _no_digest(data: DataConfig) -> str:
    return ""


@dataclass(frozen=True)
class Problem:
    """The problem that a sweep searches: the template, its hash, and a readable description of each part.

    `code` is a digest of what determines results besides the configuration: the code of the user's own
    components, the data's content, and this project's version of the computation. `data_digest` returns
    `Dataset.digest` for a trial's data, because the space may contain several data sets.
    """

    template: dict[str, Any]
    hash: str
    described: dict[str, str]
    code: str = ""
    data_digest: Callable[[DataConfig], str] = _no_digest

    @classmethod
    def of(
        cls, template: dict[str, Any], code: str = "", data_digest: Callable[[DataConfig], str] = _no_digest
    ) -> Problem:
        """Make the problem of a template, from those parts of it that determine results."""
        described = {
            key: str(value) if isinstance(value, space.Distribution) else repr(value)
            for key, value in space.leaves(_determining(template)).items()
            if value is not None
        }
        if code:
            described["(content of the data, and code)"] = code[:12]
        return cls(template, digest(_plain(_determining(template)), code), described, code, data_digest)

    @cached_property
    def metric(self) -> Metric:
        """The metric by which trials are compared; it is the same for the whole space."""
        named = self.template.get("task", "classification")
        if isinstance(named, dict):  # a task's options may be searched, its name may not
            named = named["name"]
        metric: Metric = TaskConfig.kind.find(named).metric
        return metric

    def stages(self, tree: dict[str, Any], density: float) -> Plan:
        """Plan the stages of a trial from its configuration tree and density."""
        config = validate({**tree, "densities": [density]}, RECORDED)
        return plan(config, self.data_digest(config.data))

    def branch_points(self, tree: dict[str, Any], densities: Iterable[float]) -> list[str]:
        """The keys of the branch points inside a trial's pre-training, one for each of the densities."""
        asked = list(densities)
        if not asked:
            return []
        config = validate({**tree, "densities": asked}, RECORDED)
        if config.pruning.from_epoch != "best":
            return []
        found = watched(config, self.data_digest(config.data), asked)
        return [stage.key for stage in found if isinstance(stage, Branch)]

    def fit(self, record: TrialRecord) -> dict[str, Any] | None:
        """Return the record's parameters in this space, or None where it is not a point of the space."""
        if record.code != self.code:
            return None
        try:
            config = record.config
        except ConfigError:  # recorded under an older schema
            return None
        wanted = configuration_hash(config)
        for params in space.recover(self.template, config.tree(), is_active):
            tree = space.at(self.template, params, is_active)
            found = validate({**tree, "densities": [record.density]}, RECORDED)
            if configuration_hash(found) == wanted:
                return params
        return None

    def changes(self, old: dict[str, str]) -> list[str]:
        """Compare with an earlier `described`; return a line of text for each difference."""
        lines = []
        for key in sorted({*old, *self.described}):
            before, now = old.get(key), self.described.get(key)
            if before != now:
                lines.append(f"{key}: was {before or 'not set'}, is now {now or 'not set'}")
        return lines


def _determining(template: dict[str, Any]) -> dict[str, Any]:
    """The parts of a template that determine results."""
    found = {key: template[key] for key in determining_fields() if key in template}
    for key in DOES_NOT_DETERMINE:
        parent, _, field = key.rpartition(".")
        if isinstance(found.get(parent), dict):
            found[parent] = {name: value for name, value in found[parent].items() if name != field}
    return found


def _plain(node: Any) -> Any:
    """Convert a template to plain data that can be hashed."""
    if isinstance(node, space.Choice):
        return {"choice": [_plain(option) for option in node.options]}
    if isinstance(node, space.Uniform | space.Int):
        return {type(node).__name__: [node.low, node.high]}
    if isinstance(node, dict):
        return {key: _plain(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_plain(child) for child in node]
    return node
