"""The files of MLflow's runs. Their storage may be another than the server's, and be away on its own."""

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
"""Seconds for which a storage that is away is left alone: a try may take as long as its time-out."""


@final
class Artifacts:
    """Writes files; a run that lacks some is marked in MLflow, so that the next sweep writes them."""

    def __init__(self, uri: str) -> None:
        """`uri` is for the warning."""
        self._uri = uri
        self._missing: dict[tuple[str, str], str] = {}  # (run, name) -> text
        self._marked: set[str] = set()
        self._whole: set[str] = set()
        self._next_try = -math.inf

    def found(self, run: Any) -> None:
        """A run of an earlier driver; it may be marked."""
        if _TAG in run.data.tags:
            self._marked.add(run.info.run_id)

    def is_lacking(self, run_id: str) -> bool:
        """Whether the run is marked."""
        return run_id in self._marked

    def attach(self, client: MlflowClient, run_id: str, text: str, name: str) -> None:
        """Write a file, now or, where the storage is away, at the end. Raises nothing: metrics go on."""
        self._missing[run_id, name] = text
        if time.monotonic() >= self._next_try:
            self._write(client, run_id, name)
        if (run_id, name) in self._missing:
            self._mark(client, run_id)

    def all_given(self, run_id: str) -> None:
        """Everything that belongs to the run has been attached."""
        self._whole.add(run_id)

    def close(self, client: MlflowClient, patience: float) -> int:
        """Write what is missing, for about `patience` seconds; how many files stay so."""
        end = time.monotonic() + patience
        for run_id, name in list(self._missing):
            if not self._write(client, run_id, name) and time.monotonic() > end:
                break
        lacking = {run_id for run_id, _ in self._missing}
        for run_id in lacking:
            self._mark(client, run_id)
        for run_id in (self._marked & self._whole) - lacking:
            with suppress(Exception):  # at worst the next sweep writes them once more
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
            with suppress(Exception):  # the server is away, too: tried again at the end
                client.set_tag(run_id, _TAG, "missing")
                self._marked.add(run_id)
