"""Tables of numbers in CSV or parquet files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from prunetune.data.dataset import Source, Split
from prunetune.errors import UserError, did_you_mean

_ENDINGS = (".csv", ".parquet")


def tabular(
    root: str,
    *,
    target: str | Annotated[list[str], Field(min_length=1)],
    features: Annotated[list[str], Field(min_length=1)] | None = None,
    test: str | None = None,
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    test_seed: Annotated[int, Field(ge=0)] = 0,
    targets: Literal["classes", "numbers"] | None = None,
) -> Source:
    """Load a table from a .csv or .parquet file, or from a folder with one file, or with `train` and `test`.

    `target` is the column to predict, or a list of columns of numbers; `features` are the columns from which
    it is predicted, by default all others. Inputs are (N, F) float32, and are standardised later by the
    training examples' statistics. `test` is the file of the test examples, relative to the folder of the
    first file; without one, a random `test_fraction` of the rows, drawn from `test_seed`, is the test split.
    `targets` follows the task: numbers become (N, T) float32; classes, which are whole numbers or text,
    become (N,) int64, numbered in sorted order.

    Raises UserError naming file, column and row (data rows count from 1) for a missing column, and for a cell
    that is empty, not a number, or not finite.
    """
    train_file, test_file = _files(root, test)
    named = [target] if isinstance(target, str) else target
    if targets == "classes" and len(named) > 1:
        raise UserError(f"data.target = {named!r}: classes are in one column")
    table = _Table.read(train_file)
    tables = [table] if test_file is None else [table, _Table.read(test_file)]
    for part in tables:
        for name in named:
            part.cells("target", name)  # checked first, because all other columns become features by default
    chosen = [name for name in table.columns if name not in named] if features is None else features
    both = next((name for name in chosen if name in named), None)
    if both is not None:
        raise UserError(f"data.features: {both!r} is the target, too")
    if not chosen:
        raise UserError(f"data.root: {train_file} has no column beside the target {named[0]!r}")
    inputs = [part.numbers("features", chosen) for part in tables]
    if targets == "classes":
        answers, classes = _as_classes(tables, named[0])
    else:
        answers, classes = [part.numbers("target", named) for part in tables], None
    splits = [Split(x, y) for x, y in zip(inputs, answers, strict=True)]
    if test_file is not None:
        return Source(splits[0], splits[1], classes)
    order = torch.randperm(len(splits[0]), generator=torch.Generator().manual_seed(test_seed))
    count = max(1, round(len(order) * test_fraction))
    return Source(splits[0].take(order[count:]), splits[0].take(order[:count]), classes)


@dataclass(frozen=True)
class _Table:
    """The columns of a file by name; cells of a CSV file are text."""

    file: Path
    columns: dict[str, Sequence[Any]]

    @classmethod
    def read(cls, file: Path) -> _Table:
        """Read a file. Raises UserError where there is no such file, or no table in it."""
        import pandas as pd

        try:
            if file.suffix == ".csv":
                frame = pd.read_csv(file, dtype=str, keep_default_na=False, skipinitialspace=True)
            else:
                frame = pd.read_parquet(file)
        except FileNotFoundError:
            raise UserError(f"data.root: no such file: {file.absolute()}") from None
        except Exception as error:  # pandas, pyarrow and codecs raise many kinds
            raise UserError(f"data.root: {file} is no readable table: {error}") from None
        if not len(frame):
            raise UserError(f"data.root: {file}: no rows")
        return cls(file, {str(name): frame[name].tolist() for name in frame.columns})

    def cells(self, key: str, name: str) -> Sequence[Any]:
        """Return a column. Raises UserError, naming the key `data.<key>`, where there is no such column."""
        if name not in self.columns:
            rule = did_you_mean(name, self.columns) or f"; it has {', '.join(self.columns)}"
            raise UserError(f"data.{key}: {self.file} has no column {name!r}{rule}")
        return self.columns[name]

    def numbers(self, key: str, names: Sequence[str]) -> torch.Tensor:
        """Return columns as a tensor (N, C) float32. Raises UserError where a cell is no finite number."""
        columns = [self._numbers(name, self.cells(key, name)) for name in names]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    def _numbers(self, name: str, cells: Sequence[Any]) -> np.ndarray[Any, Any]:
        found = [_number(cell) for cell in cells]
        for row, (number, cell) in enumerate(zip(found, cells, strict=True), start=1):
            if number is None or not abs(number) <= _LARGEST:
                what = "is empty" if _is_empty(cell) else f"{cell!r} is no finite number"
                raise UserError(
                    f"data.root: {self.file}: column {name!r}, row {row}: {what}; "
                    "every cell must be a number (data.features says which columns are read)"
                )
        return np.array(found, dtype=np.float64)


_LARGEST = float(np.finfo(np.float32).max)


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _as_classes(tables: Sequence[_Table], name: str) -> tuple[list[torch.Tensor], int]:
    """Return (the column's classes as indices into its sorted values over all tables, number of classes)."""
    columns = [_labels(table, name, table.cells("target", name)) for table in tables]
    known = _sorted({label for column in columns for label in column})
    if len(known) < 2:
        raise UserError(f"data.target: column {name!r} of {tables[0].file} has one class only: {known[0]!r}")
    index = {label: number for number, label in enumerate(known)}
    return [torch.tensor([index[label] for label in column]) for column in columns], len(known)


def _labels(table: _Table, name: str, cells: Sequence[Any]) -> list[str]:
    labels = []
    for row, cell in enumerate(cells, start=1):
        number = _number(cell)
        if _is_empty(cell) or (number is not None and not number.is_integer()):
            what = "is empty" if _is_empty(cell) else f"{cell!r} is neither text nor a whole number"
            raise UserError(
                f"data.root: {table.file}: column {name!r}, row {row}: {what}; "
                "to learn numbers take task: regression"
            )
        labels.append(str(cell) if number is None else str(int(number)))
    return labels


def _sorted(labels: Iterable[str]) -> list[str]:
    """Sort labels by value if all are whole numbers, otherwise as text."""
    labels = list(labels)
    if all(_number(label) is not None for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _files(root: str, test: str | None) -> tuple[Path, Path | None]:
    """Return (the file of the training examples, or of all; the file of the test examples, or None)."""
    top = Path(root).expanduser()
    if top.is_dir():
        tables = sorted(path for path in top.iterdir() if path.suffix in _ENDINGS)
        by_name = {path.stem: path for path in tables}
        if "train" in by_name:
            train, beside = by_name["train"], by_name.get("test")
        elif len(tables) == 1:
            train, beside = tables[0], None
        else:
            raise UserError(
                f"data.root = {root!r}: needs one .csv or .parquet file, or train.csv (and test.csv); "
                f"found {[path.name for path in tables[:5]] or 'none'}"
            )
    elif top.suffix in _ENDINGS:
        train, beside = top, None
    else:
        raise UserError(
            f"data.root = {root!r}: must be a .csv or .parquet file, or a folder; looked for {top.absolute()}"
        )
    if test is None:
        return train, beside
    given = train.parent / Path(test).expanduser()
    if given.suffix not in _ENDINGS:
        raise UserError(f"data.test = {test!r}: must be a .csv or .parquet file")
    return train, given
