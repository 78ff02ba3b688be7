"""The documentation: what the tutorial says runs, what is generated is up to date, the site can be built."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cards = script("cards")


def test_the_cards_are_what_the_code_says() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "methods").glob("*")}
    assert there == cards.pages(), "run `python docs/cards.py`"


def test_every_method_has_a_sentence_when_to_use_it_and_every_note_a_method() -> None:
    found = [(kind, name) for kind, name, _ in cards.methods()]
    assert len(found) == len(set(found))
    assert set(found) == set(cards.NOTES)
    assert all(note.what and note.when for note in cards.NOTES.values())


def test_every_paper_that_a_card_cites_has_a_title() -> None:
    cited = set(re.findall(r"arxiv.org/abs/([\d.]+)", "".join(cards.pages().values())))
    assert cited == set(cards.PAPERS)


def test_a_cards_hyperparameters_are_those_of_the_schema() -> None:
    rows = {key: rest for key, *rest in cards.options("schedule", "gradual", None)}
    assert rows["pruning.schedule.end"] == ["`0.75`", "> 0, ≤ 1", ""]
    assert [key.rpartition(".")[2] for key in rows] == ["start", "end", "every"]


def test_a_registered_methods_options_are_those_of_its_signature() -> None:
    rows = {key: rest for key, *rest in cards.options("mask", "target", None)}
    assert rows["pre_pruning.mask.target_warmup"] == [
        "`0.7`",
        "> 0, ≤ 1",
        "share of the stage until the target count",
    ]
    assert "pre_pruning.mask.lambda2" not in rows


def test_a_changed_card_is_told_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cards, "FOLDER", tmp_path / "methods")
    assert cards.main([]) == 0
    assert cards.main(["--check"]) == 0
    capsys.readouterr()
    (tmp_path / "methods" / "criterion-snip.md").write_text("another")
    (tmp_path / "methods" / "criterion-gone.md").write_text("of a method that was")
    assert cards.main(["--check"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in told] == ["criterion-gone.md", "criterion-snip.md"]
    assert cards.main([]) == 0
    assert cards.main(["--check"]) == 0


def texts() -> list[str]:
    """Every string in the package's code, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "prunetune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdg]", "…", node.value))
    return found


def test_every_message_in_troubleshooting_is_one_that_the_code_prints() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) > 15
    code = texts()
    unknown = [
        message
        for message in messages
        if not all(any(piece in text for text in code) for piece in re.split("…", message) if piece.strip())
    ]
    assert unknown == []


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks, in order. Each must be in one of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} <= set(languages)
    return found


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    clone(tmp_path)
    lines = ["set -eux"]
    for language, text in blocks(DOCS / "tutorial.md", "sh", "python"):
        lines.append(text if language == "sh" else f"python - <<'END OF PYTHON'\n{text}END OF PYTHON\n")
    ran = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "MAKEFLAGS"},
    )
    assert ran.returncode == 0, ran.stdout
    assert "Traceback" not in ran.stdout
    # As the page says:
    assert "8 finished before" in ran.stdout
    assert "0 epochs trained" in ran.stdout
    assert (tmp_path / "runs/longer/trained/density-0.1/model.safetensors").exists()


def clone(folder: Path) -> None:
    """What of a clone the tutorial uses, with this environment in the place of the one that make installs."""
    for name in ("Makefile", "README.md", "LICENSE", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("prunetune", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = folder / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name not in (".installed", "bin"):
            (environment / path.name).symlink_to(path)
    # Not a link: `activate` and the scripts name the place of the environment.
    (environment / "bin").mkdir()
    (environment / "bin" / "python").symlink_to(Path(sys.prefix, "bin", "python"))
    (environment / "bin" / "activate").write_text(f'export PATH="{environment}/bin:$PATH"\n')
    (environment / ".installed").touch()  # after pyproject.toml and constraints.txt: `make` has nothing to do


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    loaded = (
        r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+rel=["']?(?:stylesheet|preload|icon)["']?"""
    )
    loaded += r"""[^>]+href=["']?https?:"""
    assert [page.name for page in pages if re.search(loaded, page.read_text(encoding="utf-8"))] == []
