"""What a node must have to run a sweep's trials: `examine` runs on the node, all else in the driver.

The expectation is sent as plain data, so that another version of this project can read it too.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import uuid
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import prunetune
from prunetune import data as datasets
from prunetune.config import space
from prunetune.config.canonical import is_active
from prunetune.config.schema import Config, DataConfig, ModelConfig
from prunetune.errors import UserError
from prunetune.kind import UnknownComponentError
from prunetune.records.ledger import check_storage
from prunetune.records.problem import Problem
from prunetune.registry import MODELS
from prunetune.store import Store
from prunetune.version import __version__

Finding = tuple[str, str]
"""(the key of the sweep's file that the problem is about, "" for none; what is wrong and how to mend it)."""

_PROBE = "probe"


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes, by package name."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],  # without "+cu128": a head node may have no CUDA build
        "ray": _installed("ray"),
        "optuna": _installed("optuna"),
        "prunetune": f"{__version__} (sources {source_digest()[:8]})",
    }


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def source_digest() -> str:
    """SHA-256 over the relative paths and contents of this package's modules, in hex."""
    sha = hashlib.sha256()
    package = Path(prunetune.__file__).parent
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        sha.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


def expected(config: Config, problem: Problem) -> dict[str, Any]:
    """What all nodes must have, as plain data. `config` has absolute paths.

    The data set is included only where it is searched; otherwise the driver sends the decoded data to the
    nodes.
    """
    data = config.data if is_data_searched(problem) else None
    return {
        "versions": versions(),
        "storage": config.storage,
        "sweep": config.name,
        "nonce": uuid.uuid4().hex,
        "gpus": config.resources.gpus,
        "models": {model.name: model.code for model in _own_models(problem)},
        "data": None
        if data is None
        else {"config": data.model_dump(mode="json"), "digest": datasets.load(data).digest},
    }


def is_data_searched(problem: Problem) -> bool:
    """Whether trials differ in their data set itself, and not only in batch size or augmentation."""
    names = space.parameters(problem.template, is_active)
    return any(
        name.split(".")[0].split("[")[0] == "data"
        and not name.startswith(("data.batch_size", "data.augmentation"))
        for name in names
    )


def _own_models(problem: Problem) -> Iterable[ModelConfig]:
    for assignment in space.assignments(problem.template, is_active):
        model = Config.model_validate(space.at(problem.template, assignment, is_active)).model
        if not model.kind.is_built_in(model.name):
            yield model


class Probe:
    """A record in the sweep's folder that all nodes must see, from `write` to `remove`."""

    def __init__(self, expectation: dict[str, Any]) -> None:
        self._store = Store(expectation["storage"]).sub(expectation["sweep"])
        self._nonce = expectation["nonce"]

    def write(self) -> None:
        """Write the record. Raises UserError where that is impossible."""
        self._store.write_record(_PROBE, self._nonce)

    def answered(self, node: str) -> bool:
        """Whether the answer that the node wrote to the storage can be read here."""
        return bool(self._store.read_record(f"{_PROBE}-{node}") == self._nonce)

    def remove_answers(self, nodes: Iterable[str]) -> None:
        """Delete the answers of these nodes."""
        for node in nodes:
            self._store.delete_file(f"{_PROBE}-{node}.json")

    def remove(self) -> None:
        """Delete the record, at the end of the sweep."""
        self._store.delete_file(f"{_PROBE}.json")


def examine(expectation: dict[str, Any], node: str | None = None) -> list[Finding]:
    """Return what is wrong with this process's node; with `node`, also write an answer of that name."""
    findings = _versions_differ(expectation["versions"])
    if expectation["gpus"] and not torch.backends.cuda.is_built():
        findings.append(("resources.gpus", f"torch {torch.__version__} there is built without CUDA"))
    findings += [("storage", text) for text in _storage(expectation, node)]
    findings += [("model.name", text) for text in _models(expectation["models"])]
    if expectation["data"] is not None:
        findings += [("data.root", text) for text in _data(expectation["data"])]
    return findings


def _versions_differ(wanted: dict[str, str]) -> list[Finding]:
    found = versions()
    same = "install the same one (`ray up` without --no-restart does)"
    return [
        ("", f"{name} is {found.get(name, 'not known')} there and {version} here: {same}")
        for name, version in wanted.items()
        if found.get(name) != version
    ]


def _storage(expectation: dict[str, Any], node: str | None) -> list[str]:
    location = expectation["storage"]
    try:
        store = Store(location).sub(expectation["sweep"])
        if store.read_record(_PROBE) != expectation["nonce"]:
            return [
                f"storage = {location!r}: what the driver has written is not there, so it is another place; "
                "give a folder that every node mounts, or s3://…, gs://…"
            ]
        check_storage(store)
        if node is not None:
            store.write_record(f"{_PROBE}-{node}", expectation["nonce"])
    except (UserError, OSError) as error:
        text = str(error).removeprefix("storage: ").removeprefix(f"storage = {location!r}: ")
        return [f"storage = {location!r}: {text}; every node needs to read and write there"]
    return []


def _models(wanted: dict[str, str | None]) -> list[str]:
    found = []
    for name, digest in wanted.items():
        try:
            there = MODELS.code(name)
        except UnknownComponentError as error:
            found.append(
                f"model.name = {name!r}: {error}; install it on every node, or send its folder along: "
                "ray job submit --working-dir . -- python -m prunetune.sweep …"
            )
        else:
            if there != digest:
                found.append(f"model.name = {name!r}: the file that defines it is another one there")
    return found


def _data(wanted: dict[str, Any]) -> list[str]:
    config = DataConfig.model_validate(wanted["config"])
    try:
        if datasets.load(config).digest != wanted["digest"]:
            return [f"data.root = {config.root!r}: holds other data there"]
    except (UserError, OSError) as error:
        return [f"{error}; a sweep that searches over its data needs the files on every node"]
    return []
