"""One driver per sweep."""

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
    """One driver per sweep: two would number and record each other's trials.

    Raises UserError where another process on this machine holds the sweep; for remote storage the lock is in
    the machine's folder for temporary files. Where the system has no such locks, nothing is held.
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
