"""The digest of a user's own code follows what runs: what is loaded, and what that imports."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from prunetune.config.schema import CriterionConfig, SamplerConfig
from prunetune.kind import UnknownComponentError
from prunetune.registry import CRITERIA


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that can be imported; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file written twice in a moment is another one
    before = set(sys.modules)
    yield tmp_path
    forget(set(sys.modules) - before)


def forget(names: set[str]) -> None:
    for name in names:
        if name.startswith("own_"):
            del sys.modules[name]


def code(name: str) -> str:
    found = CRITERIA.code(name)
    assert found is not None
    return found


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    importlib.invalidate_caches()


PACKAGE = {
    "own_pkg/__init__.py": "",
    "own_pkg/deep/__init__.py": "",
    "own_pkg/deep/nets.py": "from . import layers\n\ndef net(): ...\n",
    "own_pkg/deep/layers.py": "def layer():\n    from ..maths import one\n",
    "own_pkg/maths.py": "one = 1\n",
    "own_pkg/plots.py": "import own_pkg.deep.nets\n",
}


def test_an_edited_file_counts_when_it_is_loaded_again(folder: Path) -> None:
    write(folder, {"own_one.py": "def f():\n    return 'old'\n"})
    assert CRITERIA.find("own_one:f")() == "old"
    write(folder, {"own_one.py": "def f():\n    return 'new'\n"})
    before = code("own_one:f")
    assert CRITERIA.find("own_one:f")() == "old"
    importlib.reload(sys.modules["own_one"])
    assert CRITERIA.find("own_one:f")() == "new"
    assert code("own_one:f") != before
    write(folder, {"own_one.py": "def f():\n    return 'old'\n"})
    forget({"own_one"})
    assert code("own_one:f") == before


def test_what_else_is_loaded_makes_no_difference(folder: Path) -> None:
    write(folder, PACKAGE)
    before = code("own_pkg.deep.nets:net")
    importlib.import_module("own_pkg.plots")
    importlib.import_module("own_pkg.maths")
    assert code("own_pkg.deep.nets:net") == before


@pytest.mark.parametrize("name", PACKAGE)
def test_what_is_imported_from_the_package_counts_loaded_or_not(folder: Path, name: str) -> None:
    write(folder, PACKAGE)
    before = code("own_pkg.deep.nets:net")
    forget(set(sys.modules))
    write(folder, {name: PACKAGE[name] + "# changed\n"})
    assert (code("own_pkg.deep.nets:net") != before) == (name != "own_pkg/plots.py")


def test_what_lies_beside_a_module_counts_where_it_imports_it(folder: Path) -> None:
    files = {
        "own_nets.py": "import json, numpy, own_layers\nfrom own_more.part import x\ndef net(): ...\n",
        "own_layers.py": "",
        "own_more/__init__.py": "",
        "own_more/part.py": "x = 1\n",
        "own_other.py": "",
    }
    write(folder, files)
    before = code("own_nets:net")
    for name in files:
        forget(set(sys.modules))
        write(folder, {**files, name: files[name] + "# changed\n"})
        assert (code("own_nets:net") != before) == (name != "own_other.py"), name


def run_cell(number: int, text: str) -> None:
    """As a notebook does: without a file, and with the text where tracebacks look for it."""
    name = f"<cell {number}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), sys.modules["own_notebook"].__dict__)


def test_a_class_that_is_defined_again_in_a_notebook_is_another_one(folder: Path) -> None:
    sys.modules["own_notebook"] = ModuleType("own_notebook")
    run_cell(1, "class Base:\n    def f(self): ...\n")
    run_cell(2, "class Net(Base):\n    width = 3\n")
    before = code("own_notebook:Net")
    run_cell(3, "class Net(Base):\n    width = 3\n    def f(self): return 1\n")
    assert code("own_notebook:Net") != before
    run_cell(4, "class Base:\n    def f(self): ...\n")
    run_cell(5, "class Net(Base):\n    width = 3\n")
    assert code("own_notebook:Net") == before


def test_what_has_no_source_is_refused() -> None:
    sys.modules["own_typed"] = ModuleType("own_typed")
    exec("def f(scene, seed=0): ...", sys.modules["own_typed"].__dict__)
    with pytest.raises(UnknownComponentError, match="its source cannot be read, so a change would not be"):
        CRITERIA.code("own_typed:f")
    with pytest.raises(ValidationError, match="its source cannot be read"):
        CriterionConfig.model_validate("own_typed:f")
    SamplerConfig.model_validate({"name": "own_typed:f", "scene": 1})  # determines no result
    del sys.modules["own_typed"]
