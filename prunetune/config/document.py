"""Reads YAML files with the place of every key, and applies `dotted.key=value` overrides.

By YAML 1.1, PyYAML reads `1e-3` as a string and keeps the last of two equal keys. Both are easy to overlook,
so here `1e-3` is a number, and a key that is written twice is an error.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prunetune.config.sections import expanded
from prunetune.errors import ConfigError, Problem, UserError


@dataclass(frozen=True)
class Document:
    """A tree of mappings, lists and scalars, with the place where each of its keys was written.

    `source` names the file. `places` maps dotted keys (list items by index: `densities.1`) to `file:line` or
    `command line`.
    """

    source: str
    tree: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return the place of `key`, or of its nearest parent that was written."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.source)

    def problem(self, key: str, rule: str, *value: Any) -> ConfigError:
        """Make an error about `key`; without `value` the message shows none."""
        return ConfigError(
            [Problem(self.where(key), key, rule, value[0] if value else None, has_value=bool(value))]
        )


class _Loader(yaml.SafeLoader):
    """A SafeLoader that also reads floats as YAML 1.2 writes them (`1e-3`)."""


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"))
_Loader.add_implicit_resolver(*_FLOAT, list("-+0123456789"))


def parse(text: str, source: str) -> Document:
    """Parse YAML text; `source` is its name in messages.

    Raises UserError for text that is not YAML or not a mapping, and ConfigError for a key written twice.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{source}: not valid YAML: {error}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{source}:1: the file is empty; a mapping of keys is expected")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{source}:1: a mapping of keys is expected at the top")
        places = dict(_places(node, "", source))
        tree = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: an alias (*name) stands inside its own anchor (&name)") from None
    finally:
        loader.dispose()
    return Document(source, tree, places)


def read(path: str | Path) -> Document:
    """Read a YAML file, merged over the file (or files, in order) that its key `extends` names, if any.

    `path` is a path, or a URI on any pyarrow filesystem (`s3://…`); paths in `extends` are relative to it.
    Mappings are merged key by key; everything else is replaced, a distribution as a whole. Raises UserError
    where a file is missing, unreadable, or extends itself.
    """
    return _read(str(path), ())


def _read(path: str, above: tuple[str, ...]) -> Document:
    own = parse(_text(path), path)
    if "extends" not in own.tree:
        return own
    given = own.tree["extends"]
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) for name in names):
        raise own.problem("extends", "must be the path of a YAML file, or a list of them", given)
    chain = (*above, _resolved(path))
    merged = Document(own.source, {})
    for name in names:
        base_path = _beside(path, name)
        if _resolved(base_path) in chain:
            raise own.problem("extends", "a file cannot extend itself, directly or through others", name)
        try:
            merged = _over(merged, _read(base_path, chain))
        except _NoFileError as error:
            if error.path != base_path:  # the missing file is one that the base extends
                raise
            raise own.problem("extends", f"no such file ({error})", name) from None
    del own.tree["extends"]
    return _over(merged, Document(own.source, own.tree, own.places))


def _beside(path: str, name: str) -> str:
    """Resolve `name` relative to the file at `path`; a URI keeps its query (`?region=…`)."""
    if "://" in name:
        return name
    if "://" not in path:
        return str(Path(path).parent / name)
    scheme, _, rest = path.partition("://")
    place, mark, query = rest.partition("?")
    return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(place), name))}{mark}{query}"


def _resolved(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _over(base: Document, own: Document) -> Document:
    """Merge `own` over `base`, and keep for each key the place where its value was written."""
    merged, replaced = _merge(base.tree, own.tree)
    kept = {
        key: place
        for key, place in base.places.items()
        if not any(key == gone or key.startswith(gone + ".") for gone in replaced)
    }
    places = {key: place for key, place in own.places.items() if not key.startswith("extends")}
    return Document(own.source, merged, kept | places)


_DISTRIBUTIONS = ("uniform", "loguniform", "int", "choice")


def _merge(base: Any, own: Any, key: str = "") -> tuple[Any, list[str]]:
    """Return (`own` merged over `base`, the keys of `base` that were replaced)."""
    mappings = isinstance(base, dict) and isinstance(own, dict)
    if not mappings or any(len(m) == 1 and next(iter(m)) in _DISTRIBUTIONS for m in (base, own)):
        return own, [key]
    merged, replaced = dict(base), []
    for name, value in own.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name in base:
            merged[name], gone = _merge(base[name], value, dotted)
            replaced += gone
        else:
            merged[name] = value
    return merged, replaced


class _NoFileError(UserError):
    """Raised where there is no file at `path`."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path}: no such file")


def _text(path: str) -> str:
    try:
        content = _remote_content(path) if "://" in path else Path(path).read_bytes()
        return content.decode("utf-8")
    except FileNotFoundError:
        raise _NoFileError(path) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; a YAML file is expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; a YAML file is expected") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _remote_content(uri: str) -> bytes:
    from pyarrow import fs  # takes a moment to import, and few files are at a URI

    try:
        filesystem, place = fs.FileSystem.from_uri(uri)
    except ValueError as error:
        raise UserError(f"{uri}: not a usable location: {error}") from None
    info = filesystem.get_file_info(place)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError
    if info.type == fs.FileType.Directory:
        raise IsADirectoryError
    with filesystem.open_input_file(place) as stream:
        return bytes(stream.read())


def override(document: Document, assignments: Iterable[str], place: str = "command line") -> Document:
    """Apply `dotted.key=value` assignments, with values in YAML; messages call their place `place`.

    Missing or null parents become mappings: `pre_pruning.mask.lambda2=1e-4` switches a mask on. A component's
    name alone becomes one as well, so that options can be set below `criterion: grasp`. Raises
    UserError for text that is no assignment, and ConfigError where a parent is not a mapping.
    """
    return assign(document, [_parsed(assignment, place) for assignment in assignments], place)


def assign(document: Document, values: Iterable[tuple[str, Any]], place: str) -> Document:
    """Set values by dotted key, as `override` does; the values are plain data, or NumPy's, and no YAML."""
    tree = plain(document.tree)
    places = dict(document.places)
    for key, value in values:
        parts = key.strip().split(".")
        if not all(parts):
            raise UserError(f"{place}: {key!r}: expected a dotted key")
        parent = tree
        for depth, part in enumerate(parts[:-1], start=1):
            parent_key, child = ".".join(parts[:depth]), parent.get(part)
            child = parent[part] = {} if child is None else expanded(parent_key, child)
            if not isinstance(child, dict):
                so_far = Document(document.source, tree, places)
                raise so_far.problem(parent_key, f"is not a mapping, so {key} cannot be set", child)
            parent = child
        parent[parts[-1]] = plain(value)
        dotted = ".".join(parts)
        places = {k: v for k, v in places.items() if k != dotted and not k.startswith(dotted + ".")}
        places[dotted] = place
    return Document(document.source, tree, places)


def _parsed(assignment: str, place: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"{place}: {assignment!r}: expected dotted.key=value")
    try:
        return key, _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{place}: {assignment!r}: the value is not valid YAML") from None


def dump(tree: dict[str, Any]) -> str:
    """Write a tree as YAML text, with keys in their order and short lists on one line."""
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that writes floats so that every YAML reader reads floats (`1.0e-05`, not `1e-05`)."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not math.isfinite(value):
        return yaml.SafeDumper.represent_float(dumper, value)  # .inf, -.inf, .nan
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e", 1)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
_Dumper.add_implicit_resolver(*_FLOAT, list("-+0123456789"))  # so that the text "1e3" is quoted


def _places(node: yaml.Node, prefix: str, source: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            name = str(key_node.value)
            line = key_node.start_mark.line + 1
            if name in seen:
                raise ConfigError(
                    [Problem(f"{source}:{line}", prefix + name, "this key is written twice", has_value=False)]
                )
            seen.add(name)
            yield prefix + name, f"{source}:{line}"
            yield from _places(value_node, f"{prefix}{name}.", source)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield f"{prefix}{index}", f"{source}:{child.start_mark.line + 1}"
            yield from _places(child, f"{prefix}{index}.", source)


def plain(value: Any) -> Any:
    """A copy as a file would have it: mappings, lists and scalars, none of them NumPy's; tuples are lists."""
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    # By its method, so that a message about a typo does not wait for NumPy.
    return value.tolist() if hasattr(value, "tolist") else value
