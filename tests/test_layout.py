"""Imports point downward only; ray, optuna and mlflow stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import prunetune

PACKAGE = Path(prunetune.__file__).parent

LAYERS = (
    ("errors", "version", "source_code"),
    ("kind",),
    ("registry",),
    ("config", "sparsity"),
    ("store", "models", "data"),
    ("tasks",),
    ("export", "checks"),
    ("deploy",),  # where `export` was
    ("engine",),
    ("methods",),
    ("stages",),
    ("pipeline", "vectorized"),
    ("__init__",),  # the package itself: `from prunetune import run_pipeline`
    ("records",),
    ("search",),
    ("trackers",),
    ("execution",),
    ("tune",),  # for a `tune.Tuner` of one's own
    ("sweeping", "testing"),
    ("cli",),
    ("sweep", "train", "report", "schema"),
    ("__main__",),
)
"""Top-level modules and packages, low to high; a module imports from lower layers and its own package."""

COMMANDS = {"sweep", "train", "report", "schema", "__main__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level(module: str) -> int:
    top = module.partition(".")[0]
    found = [index for index, layer in enumerate(LAYERS) if top in layer]
    assert found, f"prunetune.{module} has no place in LAYERS"
    return found[0]


def imports(module: str) -> list[tuple[str, int]]:
    """(absolute dotted name, line) of everything a module imports, in functions and under `if` too.

    Of the package itself without what only type checkers see: it looks its names up when they are asked for.
    """
    path = SOURCES[module]
    package = ["prunetune", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(), str(path))
    if module == "__init__":
        tree.body = [node for node in tree.body if not _is_for_type_checkers(node)]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{source}.{alias.name}", node.lineno) for alias in node.names]
    return found


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def own_imports(module: str) -> list[tuple[str, int]]:
    """Modules of this package (without the `prunetune.`) that a module imports, with lines."""
    found = []
    for name, line in imports(module):
        if name != "prunetune" and not name.startswith("prunetune."):
            continue
        target = name.removeprefix("prunetune").removeprefix(".")
        while target and target not in SOURCES:
            target = target.rpartition(".")[0]  # a name in a module
        found.append((target or "__init__", line))
    return found


def test_the_sources_are_found_and_every_module_has_a_layer() -> None:
    assert {
        "errors",
        "store",
        "sparsity.masks",
        "sweeping.running",
        "stages",
        "stages.stage",
        "__init__",
    } <= set(SOURCES)
    assert own_imports("stages.pre_pruning")
    for module in SOURCES:
        level(module)


def test_imports_point_downward_only() -> None:
    upward = [
        f"{SOURCES[module]}:{line}: {module} imports {target}"
        for module in SOURCES
        if module != "__init__"
        for target, line in own_imports(module)
        if level(target) >= level(module) and target.partition(".")[0] != module.partition(".")[0]
    ]
    assert upward == []


def test_the_package_itself_imports_nothing_above_the_pipeline() -> None:
    assert all(level(target) <= level("pipeline") for target, _ in own_imports("__init__"))


def test_the_commands_parse_wire_and_print() -> None:
    lengths = {name: len(SOURCES[name].read_text().splitlines()) for name in COMMANDS & set(SOURCES)}
    assert {name: length for name, length in lengths.items() if length > 100} == {}


def test_there_are_no_import_cycles() -> None:
    graph = {module: {target for target, _ in own_imports(module)} - {module} for module in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


HOMES = {"ray": {"execution", "tune"}, "optuna": {"search", "testing"}, "mlflow": {"trackers"}}
"""Frameworks, and the rooms that import them, beside the commands."""


def test_ray_optuna_and_mlflow_are_imported_in_their_rooms_alone() -> None:
    elsewhere = [
        f"{SOURCES[module]}:{line}: {module} imports {name}"
        for module in SOURCES
        for name, line in imports(module)
        if (home := HOMES.get(name.partition(".")[0])) is not None
        and module.partition(".")[0] not in COMMANDS | home
    ]
    assert elsewhere == []


def test_the_maths_of_sparsity_knows_only_tensors() -> None:
    for module in SOURCES:
        if module.partition(".")[0] == "sparsity":
            assert {target.partition(".")[0] for target, _ in own_imports(module)} <= {"sparsity"}
    io = {"os", "pathlib", "io", "pyarrow", "json", "yaml", "logging", "safetensors"}
    found = [
        (module, name)
        for module in SOURCES
        if module.partition(".")[0] == "sparsity"
        for name, _ in imports(module)
        if name.partition(".")[0] in io
    ]
    assert found == []


PROGRAM = """
import sys
from prunetune import run_pipeline
result = run_pipeline({
    "name": "bare", "storage": sys.argv[1], "densities": [0.5],
    "data": {"name": "digits", "limit": 100}, "model": {"name": "mlp", "hidden": [4]},
    "post_pruning": {"epochs": 1, "optimizer": {"name": "adam", "lr": 0.01}},
})
assert result.val_accuracy is not None
found = sorted(name for name in sys.modules if name.partition(".")[0] in ("ray", "optuna", "mlflow"))
print("loaded:", found)
"""


def test_run_pipeline_loads_neither_ray_nor_optuna_nor_mlflow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded: []\n"


def test_the_actor_between_driver_and_workers_does_not_wait_for_pytorch() -> None:
    program = "import sys; import prunetune.execution.roster; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout == "False\n", done.stderr
