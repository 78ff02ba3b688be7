"""Which code a component of a user's own is: the digest of the source that is loaded.

It covers the file of the component's module and the files that this imports, by whatever `import` statement
and wherever in the file it stands, and so on: found in the text, so that it does not matter what else a
process happens to have loaded. Only the user's own files count: those of the same top-level package, or those
in the same folder for a module that is in no package; and of what is installed the component's module alone.
What a cell of a notebook defines has that cell's text, and no more.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import linecache
import sys
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any, NamedTuple

_THIS_PACKAGE = __name__.partition(".")[0]
_SHARED_NAMES = ("<string>", "<stdin>")
"""File names that many texts have, so that what is found under them may be another one."""


class _Source(NamedTuple):
    """A file's digest, and the names that it imports."""

    digest: str
    imports: tuple[str, ...]


_loaded: dict[str, tuple[Any, Any, _Source]] = {}
"""By module name: the module, its spec and its source when it was first seen. A reload gives a new spec."""


def remember(module_name: str) -> None:
    """Note what a loaded module's files hold, before they are edited: what is loaded is what runs."""
    module = sys.modules.get(module_name)
    seen = _loaded.get(module_name)
    if seen is None or not _is_same(seen, module):
        _closure(module_name)


def digest(module_name: str, component: Any) -> str | None:
    """SHA-256 of the source of a component of a loaded module; None where there is no source to be read."""
    sha = hashlib.sha256()
    if module_name in sys.builtin_module_names:  # part of Python itself
        return hashlib.sha256(module_name.encode()).hexdigest()
    found = _closure(module_name)
    if module_name in found:
        for name in sorted(found):
            sha.update(f"{name}\0{found[name]}\0".encode())
        return sha.hexdigest()
    text = _typed(component)
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def _closure(root: str) -> dict[str, str]:
    """The digests of a loaded module's file and of the user's files that it imports, by module name."""
    file, folders = _locate(root, None)
    package = getattr(sys.modules[root], "__package__", None) or root
    top = package.partition(".")[0]
    # Beside a module that is in no package, and is none, others may lie.
    is_alone = package == root and "." not in root and not folders
    folder = file.parent if file is not None and is_alone else None
    found: dict[str, str] = {}
    waiting, seen = [root], {root}
    while waiting:
        name = waiting.pop()
        file = _locate(name, folder)[0]
        if file is None or not (name == root or _is_own(name, file, top, folder)):
            continue
        source = _source(name, file)
        found[name] = source.digest
        for imported in source.imports:
            parts = imported.split(".")
            names = {".".join(parts[: count + 1]) for count in range(len(parts))} - seen
            seen |= names
            waiting += names
    return found


def _is_own(name: str, file: Path, top: str, folder: Path | None) -> bool:
    if {"site-packages", "dist-packages"} & set(file.parts):
        return False
    first = name.partition(".")[0]
    if first in (top, _THIS_PACKAGE) or folder is None:
        return first == top
    there, folders = _locate(first, folder)
    entry = folders[0] if folders else there
    return entry is not None and entry.parent.resolve() == folder.resolve()


def _locate(name: str, folder: Path | None) -> tuple[Path | None, list[Path]]:
    """A module's file, and the folders of its submodules: as loaded, else as it would be, without importing.

    `folder` is where top-level modules are that are not loaded.
    """
    if (module := sys.modules.get(name)) is not None:
        file = getattr(module, "__file__", None)
        if file is not None and not (name in _loaded or Path(file).is_file()):  # in an archive
            file = None
        return Path(file) if file else None, [Path(place) for place in getattr(module, "__path__", ())]
    parent, _, last = name.rpartition(".")
    places = _locate(parent, folder)[1] if parent else [folder] if folder else []
    for place in places:
        for suffix in all_suffixes():
            if (place / last / f"__init__{suffix}").is_file():
                return place / last / f"__init__{suffix}", [place / last]
            if (place / f"{last}{suffix}").is_file():
                return place / f"{last}{suffix}", []
    return None, [place / last for place in places if (place / last).is_dir()]


def _source(name: str, file: Path) -> _Source:
    module = sys.modules.get(name)
    seen = _loaded.get(name)
    if seen is not None and _is_same(seen, module):
        return seen[2]
    content = file.read_bytes()
    package = getattr(module, "__package__", None)
    if package is None:
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
    source = _Source(hashlib.sha256(content).hexdigest(), _imports(content, package))
    if module is not None:
        _loaded[name] = module, getattr(module, "__spec__", None), source
    return source


def _is_same(seen: tuple[Any, Any, _Source], module: Any) -> bool:
    return seen[0] is module and seen[1] is getattr(module, "__spec__", None)


@functools.lru_cache(maxsize=512)
def _imports(content: bytes, package: str) -> tuple[str, ...]:
    """The absolute names that a text imports; of `from a import b` also `a.b`, which may be a module."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # compiled
        return ()
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # more dots than packages
                continue
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return tuple(sorted(found))


def _typed(component: Any) -> str:
    """The cells of a notebook that define a function, or the methods of a class and of its bases there."""
    members = [component]
    if inspect.isclass(component):
        classes = [base for base in component.__mro__ if base.__module__ == component.__module__]
        members = [member for base in classes for member in vars(base).values()]
    cells: dict[str, None] = {}  # a set that keeps its order
    for member in members:
        member = getattr(member, "fget", None) or getattr(member, "__func__", member)
        function = inspect.unwrap(member)
        code = getattr(function, "__code__", None)
        if code is not None and code.co_filename not in _SHARED_NAMES:
            lines = linecache.getlines(code.co_filename, getattr(function, "__globals__", None))
            cells["".join(lines)] = None
    return "\0".join(cells)
