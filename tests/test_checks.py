"""What is checked of models and data before a sweep runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from prunetune import models
from prunetune.checks import Checks
from prunetune.config import document
from prunetune.config.reading import sweep_from_document
from prunetune.data import Form
from prunetune.errors import UserError
from prunetune.sweeping.opening import configurations, open_sweep

TEXT = """
name: small
data: {name: digits, batch_size: {choice: [32, 64]}}
model: {name: mlp, hidden: {choice: [[8], [16, 8]]}}
densities: [0.3]
pruning: {criterion: {choice: [magnitude, snip, random]}}
post_pruning:
  epochs: 1
  optimizer: {name: adam, lr: {loguniform: [1.0e-4, 1.0e-1]}}
  soft_skip: {choice: [null, {gamma0: {uniform: [0.1, 0.5]}}]}
"""


def test_each_network_of_a_space_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = document.parse(TEXT, "small.yaml")
    template, _ = sweep_from_document(source)
    built: list[Any] = []
    build = models.build

    def counted(*given: Any, **named: Any) -> Any:
        built.append(given)
        return build(*given, **named)

    monkeypatch.setattr(models, "build", counted)
    fits = Checks(source)
    weights = [fits.model(config, Form.unseen((1, 8, 8), 10)) for config in configurations(template, source)]
    assert len(weights) > 8
    assert set(weights) == {64 * 8 + 8 * 10, 64 * 16 + 16 * 8 + 8 * 10}
    assert len(built) == 2
    fits.model(
        next(configurations(template, source)), Form.unseen((3, 8, 8), 10)
    )  # other data: another network
    assert len(built) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Whatever the choice that is wrong, and wherever it stands among the others.
        (
            "pruning={dense_layers: {choice: [none, both]}}",
            "= 0.3: keeps 177 weights, but dense_layers",
        ),
        (
            "pruning={structure: {choice: [unstructured, channel]}}",
            "but the last layer, whose units",
        ),
        ("data={name: {choice: [digits, parquet]}, root: nowhere}", "data.root"),
        ("model={choice: [{name: mlp, hidden: [8]}, {name: vgg16}]}", "needs 32×32 or more; got 8×8"),
    ],
)
def test_what_any_choice_of_a_space_gets_wrong_is_found(tmp_path: Path, override: str, message: str) -> None:
    more = [override, f"storage={tmp_path}", "densities=[0.03]"] if "channel" in override else [override]
    source = document.override(document.parse(TEXT, "small.yaml"), [*more, f"storage={tmp_path}"])
    with pytest.raises(UserError) as error:
        open_sweep(source)
    assert message in str(error.value)


def test_a_users_criterion_is_part_of_what_results_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "def score(scene):\n    return {}\n"
    (tmp_path / "my_criterion.py").write_text(code)
    overrides = [f"storage={tmp_path}", "pruning.criterion=my_criterion:score"]
    source = document.override(document.parse(TEXT, "small.yaml"), overrides)
    before = open_sweep(source).problem
    assert open_sweep(source).problem.hash == before.hash
    (tmp_path / "my_criterion.py").write_text(code + "# other\n")
    importlib.reload(sys.modules["my_criterion"])
    after = open_sweep(source).problem
    assert after.hash != before.hash
    assert after.changes(before.described)[0].startswith("(content of the data, and code): was ")
