"""A lock that lets only one process run a sweep."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prunetune.config.canonical import digest
from prunetune.errors import UserError
from prunetune.store import Store

_locks: Any
try:
    import fcntl

    _locks = fcntl
except ImportError:  # Windows
    _locks = None


@contextmanager
def exclusive(store: Store) -> Iterator[None]:
    """Hold the lock of a sweep within the context, because two drivers would overwrite each other's records.

    Raises UserError where another process on this machine holds it. For remote storage the lock file is in
    this machine's folder for temporary files. On systems without such locks (Windows) nothing is locked.
    """
    path = store.local_path(".lock")
    if path is None:
        name = f"prunetune-{getpass.getuser()}-{digest(store.path(''))}.lock"
        path = os.path.join(tempfile.gettempdir(), name)
    if _locks is None:
        yield
        return
    with open(path, "a+") as file:
        try:
            _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{store.path('')}: another process ({file.read().strip() or 'unknown'}) runs this sweep; "
                "wait for it, or give another name (name=…)"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield
