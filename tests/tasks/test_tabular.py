"""Tables as data: columns, splits, classes and numbers, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from prunetune import data as datasets
from prunetune.config.document import Document
from prunetune.config.reading import validate
from prunetune.config.schema import Config, DataConfig
from prunetune.data import Source
from prunetune.data.sources.tabular import tabular
from prunetune.errors import UserError

ROWS = [f"{i},{i * i},{'yes' if i % 2 else 'no'},{i % 3}" for i in range(10)]
TEXT = "\n".join(["size,price,sold,kind", *ROWS]) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "houses.csv").write_text(TEXT)
    return tmp_path / "houses.csv"


def both(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.cat([source.train.inputs, source.test.inputs])
    order = inputs[:, 0].argsort()
    return inputs[order], torch.cat([source.train.targets, source.test.targets])[order]


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_numbers_are_learnt_from_columns(file: Path, kind: str) -> None:
    root = file
    if kind == "parquet":
        root = file.with_suffix(".parquet")
        pd.read_csv(file).to_parquet(root)
    elif kind == "folder":
        root = file.parent
    found = tabular(str(root), target="price", features=["size", "kind"])
    assert (len(found.train), len(found.test), found.classes) == (8, 2, None)
    inputs, targets = both(found)
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs.tolist() == [[i, i % 3] for i in range(10)]
    assert targets.tolist() == [[i * i] for i in range(10)]


def test_several_targets_and_all_other_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c\n1,2,3\n4,5,6\n7,8,9\n")
    found = tabular(str(tmp_path / "t.csv"), target=["c", "a"], test_fraction=0.4)
    inputs, targets = both(found)
    assert inputs.tolist() == [[2], [5], [8]]
    assert targets.tolist() == [[3, 1], [6, 4], [9, 7]]


def test_the_test_split_follows_its_seed_alone(file: Path) -> None:
    def rows(seed: int) -> list[float]:
        found = tabular(str(file), target="price", features=["size"], test_seed=seed)
        return sorted(found.test.inputs[:, 0].tolist())

    assert rows(0) == rows(0)
    assert len({tuple(rows(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("how", ["option", "folder"])
def test_test_examples_from_a_file_of_their_own(file: Path, how: str) -> None:
    file.rename(file.with_name("train.csv"))
    (file.parent / "test.csv").write_text("price,size,sold,kind\n-1,-2,no,0\n")
    root, test = (file.parent, None) if how == "folder" else (file.with_name("train.csv"), "test.csv")
    found = tabular(str(root), target="price", features=["size"], test=test)
    assert len(found.train) == 10
    assert (found.test.inputs.tolist(), found.test.targets.tolist()) == ([[-2.0]], [[-1.0]])


@pytest.mark.parametrize(
    ("target", "classes", "expected"),
    [("sold", 2, [i % 2 for i in range(10)]), ("kind", 3, [i % 3 for i in range(10)])],
)
def test_classes_are_text_or_whole_numbers_in_sorted_order(
    file: Path, target: str, classes: int, expected: list[int]
) -> None:
    found = tabular(str(file), target=target, features=["size"], targets="classes")
    assert found.classes == classes
    assert both(found)[1].tolist() == expected  # no is 0, yes is 1


def test_whole_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n1,10\n2,9\n3,10\n")
    assert both(tabular(str(tmp_path / "t.csv"), target="y", targets="classes"))[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize(("task", "wanted"), [("classification", "classes"), ("regression", "numbers")])
def test_the_task_says_whether_targets_are_classes_or_numbers(file: Path, task: str, wanted: str) -> None:
    section = {"name": "tabular", "root": str(file), "target": "kind", "features": ["size"]}
    tree = {
        "name": "t",
        "task": task,
        "data": section,
        "model": {"name": "mlp", "hidden": [4]},
        "densities": [0.5],
        "post_pruning": {"epochs": 1, "optimizer": {"name": "adam", "lr": 0.01}},
    }
    config = Config.model_validate(tree)
    assert config.data.options["targets"] == wanted
    assert datasets.load(config.data).classes == (3 if task == "classification" else None)
    assert Config.model_validate(config.tree()) == config


def changed(old: str, new: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(TEXT.replace(old, new, 1)) and None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            None,
            {"target": "prize"},
            r"data\.target: .*houses\.csv has no column 'prize'; did you mean 'price'",
        ),
        (
            None,
            {"target": "price", "features": ["sise"]},
            r"data\.features: .*no column 'sise'; did you mean 'size'",
        ),
        (
            None,
            {"target": "price"},
            r"houses\.csv: column 'sold', row 1: 'no' is no finite number; .*data\.features",
        ),
        (
            changed("4,16", "4,"),
            {"target": "price", "features": ["size"]},
            r"column 'price', row 5: is empty",
        ),
        (changed("3,9", "nan,9"), {"target": "price", "features": ["size"]}, r"column 'size', row 4: 'nan'"),
        (changed("3,9", "inf,9"), {"target": "price", "features": ["size"]}, r"column 'size', row 4: 'inf'"),
        (
            changed("3,9", "1e39,9"),
            {"target": "price", "features": ["size"]},
            r"column 'size', row 4: '1e39'",
        ),
        (
            changed("3,9", "3,9.5"),
            {"target": "price", "features": ["size"], "targets": "classes"},
            r"column 'price', row 4: '9.5' is neither text nor a whole number; .*task: regression",
        ),
        (None, {"target": "price", "features": ["price"]}, r"data\.features: 'price' is the target, too"),
        (None, {"target": ["size", "price"], "targets": "classes"}, "classes are in one column"),
        (None, {"target": "price", "test": "gone.csv"}, r"no such file: .*gone\.csv"),
        (None, {"target": "price", "test": "houses.txt"}, r"data\.test = 'houses\.txt': must be a \.csv"),
        (lambda file: file.write_text(""), {"target": "price"}, r"houses\.csv is no readable table"),
        (lambda file: file.write_text("size,price\n"), {"target": "price"}, r"houses\.csv: no rows"),
        (
            lambda file: file.write_text("size,price\n1,a\n2,a\n3,a\n"),
            {"target": "price", "targets": "classes"},
            r"column 'price' of .*houses\.csv has one class only: 'a'",
        ),
        (lambda file: file.write_text("price\n1\n"), {"target": "price"}, "no column beside the target"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(
    file: Path, spoil: Any, options: dict[str, Any], message: str
) -> None:
    if spoil is not None:
        spoil(file)
    with pytest.raises(UserError, match=message):
        tabular(str(file), **options)


def test_a_missing_value_in_a_parquet_file_is_named(tmp_path: Path) -> None:
    pd.DataFrame({"x": [1.0, None, 3.0], "y": [1, 2, 3]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: column 'x', row 2: is empty"):
        tabular(str(tmp_path / "t.parquet"), target="y")


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "found none"), (("a.csv", "b.csv"), r"found \['a.csv', 'b.csv'\]")],
)
def test_a_folder_must_say_which_file_it_is(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text(TEXT)
    with pytest.raises(UserError, match=message):
        tabular(str(tmp_path), target="price")


def test_a_path_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be a \.csv or \.parquet file, or a folder"):
        tabular(str(tmp_path / "gone"), target="y")


def test_augmentation_is_for_images(file: Path) -> None:
    section = {"name": "tabular", "root": str(file), "target": "price", "features": ["size"]}
    config = DataConfig.model_validate({**section, "augmentation": {}})
    with pytest.raises(UserError, match=r"data\.augmentation: is for images .* have shape \(1,\)"):
        datasets.load(config)


def test_a_column_must_be_named(tmp_path: Path) -> None:
    tree = {"data": {"name": "tabular", "root": "x.csv"}}
    with pytest.raises(UserError, match=r"data\.target: is required"):
        validate(tree, Document("file.yaml", tree))


def test_diabetes_is_there_without_a_download() -> None:
    data = datasets.load(DataConfig(name="diabetes"))
    assert (len(data.train) + len(data.validation), len(data.test)) == (354, 88)
    assert (data.shape, data.classes) == ((10,), None)
    targets = torch.cat([split.targets for split in (data.train, data.validation, data.test)])
    assert (targets.shape, targets.min().item(), targets.max().item()) == ((442, 1), 25, 346)
