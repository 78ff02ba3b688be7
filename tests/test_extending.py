"""The examples of docs/extending.md run, and hold to the contracts; what breaks one is noticed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune import registry, testing
from prunetune.config.document import Document
from prunetune.config.reading import from_document
from prunetune.kind import Kind

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"```python\n# (mine_\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
YAML = {
    re.search(r"mine_(\w+):", block).group(1): yaml.safe_load(block)  # type: ignore[union-attr]
    for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
}

Tree = dict[str, Any]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The modules of the page, as a user has them in the working folder."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def named(kind: str) -> Tree:
    """The component of the page's YAML for a kind, as a mapping."""

    def find(node: Any) -> Tree | None:
        if isinstance(node, str) and node.startswith(f"mine_{kind}:"):
            return {"name": node}
        if isinstance(node, dict):
            name = node.get("name") or node.get("method")
            if isinstance(name, str) and name.startswith(f"mine_{kind}:"):
                return {**{k: v for k, v in node.items() if k not in ("name", "method")}, "name": name}
            return next((found for child in node.values() if (found := find(child))), None)
        if isinstance(node, list):
            return next((found for child in node if (found := find(child))), None)
        return None

    found = find(YAML[kind])
    assert found is not None
    return found


def test_every_kind_of_component_has_an_example() -> None:
    kinds = [value for value in vars(registry).values() if isinstance(value, Kind)]
    # Without executors, which no file names, and the rate's schedule, a line in another example.
    assert len(kinds) == len(MODULES) + 2
    assert set(YAML) == {name.removeprefix("mine_") for name in MODULES}


CHECKS = {
    "criterion": testing.check_criterion,
    "initializer": testing.check_initializer,
    "mask": testing.check_mask,
    "dynamic": testing.check_dynamic,
    "optimizer": testing.check_optimizer,
    "model": testing.check_model,
    "data": testing.check_data_source,
    "task": testing.check_task,
    "sampler": testing.check_sampler,
    "stopping": testing.check_early_stopping,
}


@pytest.mark.parametrize("kind", CHECKS)
def test_the_example_holds_to_its_contract(kind: str, mine: Path) -> None:
    options = named(kind)
    options.pop("schedule", None)  # beside the optimizer's own
    CHECKS[kind](**options)


@pytest.mark.parametrize("kind", YAML)
def test_the_example_can_be_written_into_a_sweep_file(kind: str, mine: Path, tiny: Tree) -> None:
    tree = merged(tiny, YAML[kind])
    config = from_document(Document("mine.yaml", tree))
    assert f"mine_{kind}:" in str(config.tree())


def merged(base: Tree, changes: Tree) -> Tree:
    found = dict(base)
    for key, value in changes.items():
        both = (
            isinstance(value, dict)
            and isinstance(found.get(key), dict)
            and not {"name", "method"} & set(value)
        )
        found[key] = merged(found[key], value) if both else value
    return found


BROKEN = {
    "criterion": (
        "scene.weights.items()",
        "list(scene.weights.items())[:1]",
        "the prunable weights are",
    ),
    "initializer": (
        "generator=generator)",
        "generator=None)",
        "from the same generator it gives another weight",
    ),
    "mask": (
        'named = {"theta": self.parameters, "gate": self._gates}',
        'named = {"theta": self.parameters}',
        "interrupted after epoch 1",
    ),
    "dynamic": (
        "mask.bool(), momentum",
        "torch.ones_like(mask).bool(), momentum",
        "weights are kept; density",
    ),
    "optimizer": (
        'state["mean"] = torch.zeros_like(parameter)',
        'state["mean"] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(torch.seed()))',
        "gives other weights",
    ),
    "data": (
        "manual_seed(0)",
        "manual_seed(torch.seed() % 2**31)",
        "others when it is read a second time",
    ),
    "task": (
        "(members * right).sum(0), members.sum(0)",
        "(members * right).mean(0), members.sum(0)",
        "the sums over two halves",
    ),
    "stopping": ("return epoch >= self._grace and", "return len(others) and", "a bool is needed"),
}
"""What is changed in an example, and what its contract says then."""


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_promise_is_noticed(kind: str, mine: Path) -> None:
    path, (right, wrong, words) = mine / f"mine_{kind}.py", BROKEN[kind]
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    options = named(kind)
    options.pop("schedule", None)
    with pytest.raises(AssertionError, match=words):
        CHECKS[kind](**options)


@pytest.mark.parametrize(
    ("kind", "names", "options"),
    [
        ("criterion", registry.CRITERIA.names, {}),
        ("initializer", registry.INITIALIZERS.names[1:], {}),
        ("mask", registry.MASKS.names, {"initial": 0.9}),
        ("dynamic", registry.DYNAMICS.names, {"every": 3}),
        ("optimizer", registry.OPTIMIZERS.names, {"lr": 0.01}),
        ("sampler", registry.SAMPLERS.names, {}),
        ("stopping", registry.EARLY_STOPPING.names, {}),
    ],
)
def test_the_built_in_components_hold_to_their_contracts(kind: str, names: Any, options: Tree) -> None:
    for name in names:
        CHECKS[kind](name, **options)


def test_an_option_that_breaks_its_rule_is_named(mine: Path, tiny: Tree) -> None:
    tree = merged(tiny, {"pruning": {"criterion": {"name": "mine_criterion:weighted", "power": 0}}})
    with pytest.raises(Exception, match=r"pruning\.criterion\.power = 0: must be greater than 0"):
        from_document(Document("mine.yaml", tree))
    tree = merged(tiny, {"pruning": {"criterion": {"name": "mine_criterion:weighted", "powr": 2.0}}})
    with pytest.raises(Exception, match=r"pruning\.criterion\.powr: unknown key; did you mean 'power'\?"):
        from_document(Document("mine.yaml", tree))


def test_changed_code_is_another_key(mine: Path, tiny: Tree) -> None:
    from prunetune import data as datasets
    from prunetune.stages.plan import plan

    def keys() -> dict[str, str]:
        config = from_document(Document("mine.yaml", merged(tiny, YAML["criterion"])))
        return plan(config, datasets.load(config.data).digest).keys

    before = keys()
    path = mine / "mine_criterion.py"
    path.write_text(path.read_text() + "\n# another version\n")
    assert keys() == before  # what is loaded is what runs
    importlib.reload(sys.modules["mine_criterion"])
    after = keys()
    assert before["pre_pruning"] == after["pre_pruning"]
    assert before["pruning"] != after["pruning"]
    assert before["post_pruning"] != after["post_pruning"]
