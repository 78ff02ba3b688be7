"""Files of MLflow's runs whose storage comes and goes, with a client that remembers what it is asked."""

from __future__ import annotations

from typing import Any

import pytest
from mlflow.entities import Run, RunData, RunInfo, RunTag

from prunetune.trackers.mlflow import artifacts
from prunetune.trackers.mlflow.artifacts import Artifacts

TAG = "prunetune.files"


class Client:
    """A server that is there; the storage of its artifacts is `there` or not."""

    def __init__(self) -> None:
        self.there = True
        self.refuses = ""
        self.files: dict[tuple[str, str], str] = {}
        self.tags: set[str] = set()
        self.tries = 0

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.tries += 1
        if not self.there or name == self.refuses:
            raise OSError("no credentials")
        self.files[run_id, name] = text

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        assert (key, value) == (TAG, "missing")
        self.tags.add(run_id)

    def delete_tag(self, run_id: str, key: str) -> None:
        assert key == TAG
        self.tags.remove(run_id)


@pytest.fixture
def client() -> Any:
    return Client()


def marked(run_id: str) -> Run:
    info = RunInfo(run_id, "0", "me", "FINISHED", 0, 0, "active")
    return Run(info, RunData(tags=[RunTag(TAG, "missing")]))


def test_a_run_is_marked_at_once_for_its_driver_may_die(client: Client, caplog) -> None:
    files = Artifacts("here")
    files.attach(client, "whole", "a", "x")  # type: ignore[arg-type]
    client.there = False
    files.attach(client, "one", "a", "x")  # type: ignore[arg-type]
    files.attach(client, "two", "b", "x")  # type: ignore[arg-type]
    assert client.tags == {"one", "two"}
    assert caplog.messages == ["MLflow at here takes no artifacts: no credentials"]
    assert files.close(client, patience=0) == 2  # type: ignore[arg-type]


def test_a_storage_that_is_away_is_not_tried_for_every_file(client: Client, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    files = Artifacts("here")
    client.there = False
    for run in range(10):
        files.attach(client, str(run), "a", "x")  # type: ignore[arg-type]
    assert client.tries == 1
    now[0], client.there = 61.0, True
    files.attach(client, "later", "a", "x")  # type: ignore[arg-type]
    assert client.files == {("later", "x"): "a"}
    assert files.close(client, patience=0) == 0  # type: ignore[arg-type]
    assert len(client.files) == 11


def test_the_newest_text_of_a_file_counts(client: Client) -> None:
    files = Artifacts("here")
    client.there = False
    files.attach(client, "one", "old", "x")  # type: ignore[arg-type]
    files.attach(client, "one", "new", "x")  # type: ignore[arg-type]
    client.there = True
    assert files.close(client, patience=0) == 0  # type: ignore[arg-type]
    assert client.files == {("one", "x"): "new"}


def test_one_file_that_is_refused_does_not_keep_the_others_out(client: Client) -> None:
    files = Artifacts("here")
    client.there = False
    for name in ("bad", "x", "y"):
        files.attach(client, "one", "a", name)  # type: ignore[arg-type]
    client.there, client.refuses = True, "bad"
    assert files.close(client, patience=60) == 1  # type: ignore[arg-type]
    assert set(client.files) == {("one", "x"), ("one", "y")}
    assert client.tags == {"one"}


def test_the_mark_goes_when_all_files_have_been_written(client: Client) -> None:
    client.tags = {"rewritten", "not asked for", "without its last"}
    files = Artifacts("here")
    for run in client.tags:
        files.found(marked(run))
    assert files.is_lacking("rewritten")
    assert not files.is_lacking("another")
    for run in ("rewritten", "without its last"):
        files.attach(client, run, "a", "x")  # type: ignore[arg-type]
    files.all_given("rewritten")
    assert files.close(client, patience=0) == 0  # type: ignore[arg-type]
    assert client.tags == {"not asked for", "without its last"}
