"""Writes the files of MLflow's runs, whose storage may be unavailable although the server is up."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from typing import Any, final

from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_TAG = "prunetune.files"
_PAUSE = 60.0
"""Seconds between tries to reach an unavailable storage, because each try may last until its time-out."""


@final
class Artifacts:
    """Writes runs' files; a run that lacks files is marked in MLflow, so that the next sweep writes them."""

    def __init__(self, uri: str) -> None:
        """`uri` is MLflow's tracking URI, for the warning."""
        self._uri = uri
        self._missing: dict[tuple[str, str], str] = {}  # (run, name) -> text
        self._marked: set[str] = set()
        self._whole: set[str] = set()
        self._next_try = -math.inf

    def found(self, run: Any) -> None:
        """Read from a run of an earlier driver whether it is marked as lacking files."""
        if _TAG in run.data.tags:
            self._marked.add(run.info.run_id)

    def is_lacking(self, run_id: str) -> bool:
        """Whether the run is marked as lacking files."""
        return run_id in self._marked

    def attach(self, client: MlflowClient, run_id: str, text: str, name: str) -> None:
        """Write a file now, or at the end if the storage is unavailable. Raises nothing."""
        self._missing[run_id, name] = text
        if time.monotonic() >= self._next_try:
            self._write(client, run_id, name)
        if (run_id, name) in self._missing:
            self._mark(client, run_id)

    def all_given(self, run_id: str) -> None:
        """Note that all files of the run have been passed to `attach`."""
        self._whole.add(run_id)

    def close(self, client: MlflowClient, patience: float) -> int:
        """Write the missing files, for about `patience` seconds; return how many are still missing."""
        end = time.monotonic() + patience
        for run_id, name in list(self._missing):
            if not self._write(client, run_id, name) and time.monotonic() > end:
                break
        lacking = {run_id for run_id, _ in self._missing}
        for run_id in lacking:
            self._mark(client, run_id)
        for run_id in (self._marked & self._whole) - lacking:
            with suppress(Exception):  # if the mark stays, the next sweep writes the files once more
                client.delete_tag(run_id, _TAG)
        return len(self._missing)

    def _write(self, client: MlflowClient, run_id: str, name: str) -> bool:
        try:
            client.log_text(run_id, self._missing[run_id, name], name)
        except Exception as error:
            if self._next_try == -math.inf:
                logger.warning("MLflow at %s takes no artifacts: %s", self._uri, error)
            self._next_try = time.monotonic() + _PAUSE
            return False
        del self._missing[run_id, name]
        return True

    def _mark(self, client: MlflowClient, run_id: str) -> None:
        if run_id not in self._marked:
            with suppress(Exception):  # the server is unavailable too; `close` tries again
                client.set_tag(run_id, _TAG, "missing")
                self._marked.add(run_id)
