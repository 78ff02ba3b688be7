"""The JSON Schema of a sweep's file: it takes what the commands take, and finds what is mistyped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunetune import registry, schema
from prunetune.config import document
from prunetune.config.json_schema import sweep_schema
from prunetune.config.schema import Config

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "sweeps").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    made = sweep_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def tree(*overrides: str) -> dict[str, Any]:
    return document.override(document.read(str(ROOT / "sweeps" / "digits.yaml")), overrides).tree


@pytest.mark.parametrize("name", FILES)
def test_every_sweep_of_ours_is_valid(validator: Any, name: str) -> None:
    path = ROOT / name
    validator.validate(document.parse(path.read_text(), name).tree)
    validator.validate(document.read(str(path)).tree)


@pytest.mark.parametrize(
    "override",
    [
        "pre_pruning.optimizer={name: {choice: [sgd, adam]}, lr: {loguniform: [1e-4, 1e-1]}, momentum: 0.9}",
        "pre_pruning.optimizer={name: adam, lr: 1e-3, momentum: 0.9}",  # sgd's: ignored
        "pre_pruning.optimizer={name: 'mine:Optimizer', lr: 1, anything: [1, 2]}",
        "pre_pruning.mask={choice: [null, {lambda1: 0, lambda2: 1e-3}]}",
        "pruning={schedule: gradual, criterion: {choice: [magnitude, 'mine:criterion']}}",
        "model={name: mlp, hidden: {choice: [[8], [16, 8]]}}",
        "seed={int: [0, 3]}",
        "post_pruning.epochs={int: [2, 5]}",
        "search.early_stopping=null",
        "search.sampler=random",
        "resources.trials_per_worker=auto",
        "tracking={trackers: [mlflow, {name: 'mine:Lines', path: x}]}",
    ],
)
def test_what_a_file_may_say(validator: Any, override: str) -> None:
    validator.validate(tree(override))


@pytest.mark.parametrize(
    "override",
    [
        "post_pruning.epoch=3",
        "post_pruning.epochs=many",
        "postpruning={}",
        "pre_pruning.optimizer.lrr=1",
        "pre_pruning.optimizer={name: adamm, lr: 1e-3}",
        "pre_pruning.mask={lambda_1: 0.1}",
        "pruning.schedule=one_shott",
        "pruning.allocation={choice: [global, globall]}",
        "post_pruning.label_smoothing={alpha0: {unifrom: [0, 0.3]}}",
        "post_pruning.label_smoothing={alpha0: {uniform: [0, 0.1, 0.3]}}",
        "post_pruning.label_smoothing={alpha0: 1.5}",
        "search.sampler=tpee",
        "search.trials_per_density={int: [1, 9]}",  # cannot be searched
        "keep.post_pruning=bests",
        "densities=[2]",
        "tracking={trackers: [mlfow]}",
    ],
)
def test_what_is_mistyped_is_found(validator: Any, override: str) -> None:
    assert list(validator.iter_errors(tree(override)))


def test_keys_are_explained_and_all_components_are_there() -> None:
    made = sweep_schema()
    assert set(made["properties"]) == {*Config.model_fields, "extends"}
    assert made["properties"]["precision"]["description"].startswith("bf16: autocast")
    optimizers = made["$defs"]["Optimizer"]["anyOf"]
    assert optimizers[0] == {"enum": list(registry.OPTIMIZERS.names)}
    names = [option["properties"]["name"].get("const") for option in optimizers if "properties" in option]
    assert set(registry.OPTIMIZERS.names) <= set(names)
    assert len(json.dumps(made)) < 200_000


def test_the_command_prints_or_writes_it(capsys: Any, tmp_path: Path) -> None:
    assert schema.main([]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == sweep_schema()
    assert schema.main(["--output", str(tmp_path / "x.json")]) == 0
    assert (tmp_path / "x.json").read_text() == printed
