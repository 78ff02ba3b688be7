"""The store: artefacts and records on any pyarrow filesystem, from which everything else can be rebuilt.

An artefact is two files: a blob of tensors (safetensors, named by its key and the SHA-256 of its bytes) and
a manifest (JSON, named by the key of what was computed), which is written last and deleted first. So one
atomic step publishes or removes an artefact: a rename on a local disk, a PUT on an object store. A crash can
leave only a blob without a manifest. Everything that is read is checked against its checksum, and moved aside
if it does not match. A blob belongs to one key, so deleting it affects no other artefact.

    <root>/stages/<key>.json              finished stages
    <root>/stages/<key>.<sha256>          their blobs
    <root>/checkpoints/<key>.json         the newest epoch of a running stage
    <root>/checkpoints/<key>.<sha256>     its blob, deleted after the next one is written
    <root>/damaged/                       entries whose checksum failed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from pyarrow import fs as pafs

from prunetune.errors import UserError

logger = logging.getLogger(__name__)

Kind = Literal["stages", "checkpoints"]


@dataclass(frozen=True)
class Artefact:
    """The content stored under a key: tensors by name, and plain data."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class File:
    """A file of the store: its name in its folder, its bytes, and when it was written (None if unknown)."""

    name: str
    size: int
    modified: datetime | None


class Artefacts(Protocol):
    """The part of a store's interface that stages use; `Store` documents each method."""

    def load(self, kind: Kind, key: str) -> Artefact | None:
        """Return the artefact under `key`, or None."""

    def save(self, kind: Kind, key: str, tensors: Mapping[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Publish an artefact under `key`."""

    def delete(self, kind: Kind, key: str) -> None:
        """Remove an artefact, if it is there."""


class Store:
    """Artefacts and records below one root folder.

    Any number of processes may read, write and delete at once: equal keys hold equal content, and each
    manifest appears and disappears in one step.
    """

    def __init__(self, root: str, filesystem: pafs.FileSystem | None = None) -> None:
        """Open `root`: a folder, or a URI (`s3://…?region=…`, `gs://…`) unless `filesystem` is given.

        Raises UserError where the root is not a usable location.
        """
        self.location = root
        self._query = ""
        try:
            if filesystem is not None:
                self._fs, self._root = filesystem, root.rstrip("/")
            elif "://" in root:
                self._fs, path = pafs.FileSystem.from_uri(root)
                self._root = path.rstrip("/")
                self._query = "".join(root.partition("?")[1:])
            else:
                self._fs, self._root = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(root))
        except (ValueError, OSError) as error:
            raise UserError(f"storage = {root!r}: not a usable location: {error}") from None
        self._local = isinstance(self._fs, pafs.LocalFileSystem)

    def sub(self, name: str) -> Store:
        """Return a store whose root is the folder `name` below this one's."""
        below = Store(f"{self._root}/{name}", self._fs)
        below._query = self._query
        return below

    def save(self, kind: Kind, key: str, tensors: Mapping[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Publish an artefact under `key`, replacing an older one.

        `meta` must be plain data (JSON). Raises UserError where the storage cannot be written.
        """
        blob = safetensors.torch.save(  # needs copies: the format allows no views of one buffer
            {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        )
        sha = hashlib.sha256(blob).hexdigest()
        name = _blob_name(kind, key, sha)
        replaced = self._manifest(kind, key)
        self._write(name, blob)
        self.write_record(f"{kind}/{key}", {"blob": sha, "bytes": len(blob), "meta": meta})
        if self._size(name) is None:  # another process has deleted this key meanwhile
            self._write(name, blob)
        if replaced is not None and replaced["blob"] != sha:
            self._delete(_blob_name(kind, key, replaced["blob"]))

    def load(self, kind: Kind, key: str) -> Artefact | None:
        """Return the artefact under `key`, or None where there is none or it is damaged.

        A damaged artefact is reported and moved to `damaged/`, so that it is computed again. An artefact that
        is deleted while it is read does not count as damaged.
        """
        manifest, again = self._manifest(kind, key), False
        while manifest is not None:
            name = _blob_name(kind, key, manifest["blob"])
            blob = self._read(name)
            if blob is not None and hashlib.sha256(blob).hexdigest() == manifest["blob"]:
                return Artefact(safetensors.torch.load(blob), manifest["meta"])
            newer = self._manifest(kind, key)
            if newer == manifest and again:
                self._set_aside(f"{kind}/{key}.json", f"its blob {name} is missing or damaged")
                if blob is not None:
                    self._set_aside(name, "its checksum does not match")
                return None
            # Another process has replaced the manifest and its blob meanwhile, or has deleted and saved them
            # again: then a second try finds them.
            manifest, again = newer, newer == manifest
        return None

    def has(self, kind: Kind, key: str) -> bool:
        """Whether there is a manifest for the key; `load` may still find its blob damaged."""
        return self._size(f"{kind}/{key}.json") is not None

    def delete(self, kind: Kind, key: str) -> None:
        """Delete an artefact, if it exists, manifest first: a reader meanwhile finds all of it or nothing."""
        manifest = self._manifest(kind, key)
        if manifest is not None:
            self._delete(f"{kind}/{key}.json")
            self._delete(_blob_name(kind, key, manifest["blob"]))

    def keys(self, kind: Kind) -> list[str]:
        """List the keys of the artefacts of a kind, sorted."""
        return [name.removeprefix(f"{kind}/") for name in self.records(kind)]

    def blob(self, kind: Kind, key: str) -> str | None:
        """Return the name of an artefact's blob in the folder of its kind; None if there is no manifest."""
        manifest = self._manifest(kind, key)
        return None if manifest is None else _blob_name(kind, key, manifest["blob"]).rpartition("/")[2]

    def write_record(self, name: str, body: Any) -> None:
        """Write plain data as `<name>.json`, atomically and with its checksum."""
        text = json.dumps(body, sort_keys=True)
        record = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
        self._write(f"{name}.json", json.dumps(record, sort_keys=True, indent=1).encode())

    def read_record(self, name: str) -> Any | None:
        """Return the data of a record; None if it is missing, or damaged and therefore moved aside."""
        raw = self._read(f"{name}.json")
        if raw is None:
            return None
        try:
            record = json.loads(raw)
            text = json.dumps(record["body"], sort_keys=True)
            if hashlib.sha256(text.encode()).hexdigest() == record["sha256"]:
                return record["body"]
        except (ValueError, KeyError, TypeError):
            pass
        self._set_aside(f"{name}.json", "its checksum does not match")
        return None

    def records(self, folder: str) -> list[str]:
        """List the names (without `.json`) of the records directly in `folder`, sorted."""
        selector = pafs.FileSelector(self._folder(folder), allow_not_found=True)
        return sorted(
            f"{folder}/{info.base_name.removesuffix('.json')}"
            for info in self._fs.get_file_info(selector)
            if info.is_file and info.base_name.endswith(".json")
        )

    def names(self, folder: str) -> list[str]:
        """List the names of the files directly in `folder`, sorted."""
        return [file.name for file in self.files(folder)]

    def files(self, folder: str, *, recursive: bool = False) -> list[File]:
        """List the files directly in `folder`, sorted by name.

        With `recursive`, list all files below it, named by their path relative to `folder`.
        """
        path = self._folder(folder)
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
        found = [
            File(_below(path, info.path), info.size or 0, info.mtime)
            for info in self._fs.get_file_info(selector)
            if info.is_file
        ]
        return sorted(found, key=lambda file: file.name)

    def folders(self, folder: str) -> list[str]:
        """List the names of the folders directly in `folder`, sorted."""
        selector = pafs.FileSelector(self._folder(folder), allow_not_found=True)
        found = self._fs.get_file_info(selector)
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file for people, such as a table or a configuration, atomically."""
        self._write(name, content)

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""
        return self._read(name)

    def delete_file(self, name: str) -> None:
        """Delete a file, if it exists."""
        self._delete(name)

    def path(self, name: str) -> str:
        """Return the path or URI of `name` for people; a URI keeps the root's options (`?region=…`)."""
        if self._local:
            return os.path.join(self._root, name)
        return f"{self._fs.type_name}://{self._root}/{name}{self._query}"

    def local_path(self, name: str) -> str | None:
        """Return the path of `name` on this machine's disk; None if the store is not on this machine."""
        return os.path.join(self._root, name) if self._local else None

    def _manifest(self, kind: Kind, key: str) -> dict[str, Any] | None:
        manifest = self.read_record(f"{kind}/{key}")
        return manifest if isinstance(manifest, dict) else None

    def _folder(self, name: str) -> str:
        """Return the full path of a folder; "" is the root itself."""
        return f"{self._root}/{name}" if name else self._root

    def _size(self, name: str) -> int | None:
        info = self._fs.get_file_info(f"{self._root}/{name}")
        return info.size if info.is_file else None

    def _read(self, name: str) -> bytes | None:
        try:
            with self._fs.open_input_file(f"{self._root}/{name}") as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, name: str, content: bytes) -> None:
        target = f"{self._root}/{name}"
        try:
            self._fs.create_dir(os.path.dirname(target), recursive=True)
            if not self._local:  # an object appears when its upload is complete
                with self._fs.open_output_stream(target) as stream:
                    stream.write(content)
                return
            temporary = f"{target}.{uuid.uuid4().hex}.tmp"
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"storage: {self.path(name)} cannot be written: {error}") from error

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._root}/{name}")

    def _set_aside(self, name: str, why: str) -> None:
        logger.warning("damaged: %s: %s; set aside, to be computed again", self.path(name), why)
        aside = f"{self._root}/damaged/{os.path.basename(name)}.{uuid.uuid4().hex[:8]}"
        self._fs.create_dir(f"{self._root}/damaged", recursive=True)
        with contextlib.suppress(FileNotFoundError):  # another reader was faster
            self._fs.move(f"{self._root}/{name}", aside)


def _blob_name(kind: Kind, key: str, sha: str) -> str:
    return f"{kind}/{key}.{sha}"


def _below(folder: str, path: str) -> str:
    """Make `path` relative to `folder`; filesystems differ in leading and trailing slashes."""
    return path.strip("/").removeprefix(folder.strip("/")).removeprefix("/")
