"""What nodes must have, how it is told, and where Ray is looked for, without Ray."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from small_sweep import TEXT, make_sweep

from prunetune.config import document
from prunetune.config.reading import absolute
from prunetune.errors import ConfigError, UserError
from prunetune.execution import ray_tune as runner
from prunetune.execution.cluster import connection, node_check, preflight
from prunetune.execution.cluster.node_check import Probe, examine

SOURCE = document.parse("name: s\nstorage: runs\nmodel: {name: mlp}\n", "s.yaml")


@pytest.fixture
def expectation(tmp_path: Path) -> dict[str, Any]:
    config, problem, _ = make_sweep(tmp_path)
    return node_check.expected(absolute(config), problem)


@pytest.fixture
def probe(expectation: dict[str, Any]) -> Probe:
    made = Probe(expectation)
    made.write()
    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_the_drivers_own_node_has_what_is_expected(
    expectation: dict[str, Any], probe: Probe, tmp_path: Path
) -> None:
    assert examine(expectation) == []
    assert names(tmp_path) == {"probe.json"}
    assert not probe.answered("n1")
    assert examine(expectation, "n1") == []
    assert probe.answered("n1")
    probe.remove_answers(["n1", "n2"])
    probe.remove()
    assert names(tmp_path) == set()


def test_a_folder_that_is_not_shared_is_noticed_and_nothing_is_left_in_it(
    expectation: dict[str, Any], probe: Probe, tmp_path: Path
) -> None:
    other = tmp_path / "of this node"
    ((key, text),) = examine({**expectation, "storage": str(other)}, "n1")
    assert key == "storage"
    assert text.startswith(f"storage = {str(other)!r}: what the driver has written is not there")
    assert not other.exists()
    # One in which an earlier sweep has left its own probe is no better.
    Probe({**expectation, "storage": str(other), "nonce": "earlier"}).write()
    assert len(examine({**expectation, "storage": str(other)})) == 1


def test_a_storage_that_cannot_be_written_or_opened(
    expectation: dict[str, Any], probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, name: str, content: bytes) -> None:
        raise UserError("storage: /x/probe cannot be written: no space left")

    monkeypatch.setattr("prunetune.store.Store._write", refuse)
    ((_, text),) = examine(expectation)
    assert text.endswith(
        "/x/probe cannot be written: no space left; every node needs to read and write there"
    )
    ((_, text),) = examine({**expectation, "storage": "nosuch://bucket"})
    assert text.startswith("storage = 'nosuch://bucket': not a usable location: ")


def test_other_versions_are_findings_of_their_own(expectation: dict[str, Any], probe: Probe) -> None:
    wanted = {**expectation["versions"], "torch": "1.0", "ray": "0.1"}
    found = [text for _, text in examine({**expectation, "versions": wanted})]
    assert [text.split(" is ")[0] for text in found] == ["torch", "ray"]
    assert all(text.endswith("install the same one (`ray up` without --no-restart does)") for text in found)
    assert set(wanted) == {"python", "torch", "ray", "optuna", "prunetune"}
    assert "+" not in expectation["versions"]["torch"]


def test_a_users_model_must_be_there_and_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "preflight_nets.py").write_text("class Net: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config, problem, _ = make_sweep(tmp_path / "runs", "model={name: 'preflight_nets:Net'}")
    expectation = node_check.expected(absolute(config), problem)
    Probe(expectation).write()
    assert examine(expectation) == []
    (tmp_path / "preflight_nets.py").write_text("class Net: changed = True\n")
    del sys.modules["preflight_nets"]  # a node is another process
    assert examine(expectation) == [
        ("model.name", "model.name = 'preflight_nets:Net': the file that defines it is another one there")
    ]
    ((_, text),) = examine({**expectation, "models": {"nowhere_at_all:Net": "x"}})
    assert "cannot be imported" in text
    assert "ray job submit --working-dir ." in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.batch_size={choice: [32, 64]}", False),
        ("data.augmentation={choice: [null, {flip: true}]}", False),
        ("data.split_seed={choice: [0, 1]}", True),
    ],
)
def test_the_files_are_looked_for_only_where_data_are_searched(
    tmp_path: Path, override: str, expected: bool
) -> None:
    config, problem, _ = make_sweep(tmp_path, override)
    expectation = node_check.expected(absolute(config), problem)
    assert (expectation["data"] is not None) == expected
    Probe(expectation).write()
    assert examine(expectation) == []
    if expected:
        data = {**expectation["data"], "digest": "other"}
        ((key, text),) = examine({**expectation, "data": data})
        assert (key, text.endswith("holds other data there")) == ("data.root", True)
        data["config"] = {**data["config"], "name": "parquet", "root": str(tmp_path / "none")}
        ((_, text),) = examine({**expectation, "data": data})
        assert "no such folder" in text


def test_one_message_has_all_troubles_of_all_nodes() -> None:
    wrong = {f"10.0.0.{i}": [("", "torch is 2.11.0 there and 2.15.0 here")] for i in range(2, 10)}
    wrong["10.0.0.3"] = [*wrong["10.0.0.3"], ("storage", "storage = '/runs': not shared")]
    assert preflight.message(wrong, 12, SOURCE) == (
        "8 of the 12 nodes of the Ray cluster cannot run this sweep:\n"
        "  torch is 2.11.0 there and 2.15.0 here\n"
        "    on 10.0.0.2, 10.0.0.3, 10.0.0.4, 10.0.0.5, 10.0.0.6, 10.0.0.7 and 2 more\n"
        "  s.yaml:2: storage = '/runs': not shared\n"
        "    on 10.0.0.3"
    )


def test_nodes_and_reasons_as_people_know_them() -> None:
    node = {"NodeManagerAddress": "10.0.0.2", "NodeManagerHostname": "worker-a"}
    assert preflight.name_of(node) == "10.0.0.2 (worker-a)"
    assert preflight.name_of({**node, "NodeManagerHostname": "10.0.0.2"}) == "10.0.0.2"
    text = "RaySystemError: x\n  File y\nModuleNotFoundError: No module named 'z'\n"
    assert preflight.reason(text) == "ModuleNotFoundError: No module named 'z'"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Any:
    def given(value: str) -> dict[str, str]:
        monkeypatch.setenv("RAY_ADDRESS", value)
        return {"RAY_ADDRESS": value}

    return given


def test_an_address_where_nobody_answers_is_told_at_once(address: Any) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert connection.check_address(address(f"127.0.0.1:{port}"))
    with pytest.raises(UserError, match=rf"^Ray at .*:{port}, the address in RAY_ADDRESS, does not answer: "):
        assert connection.check_address(address(f"127.0.0.1:{port}"))
    with pytest.raises(UserError, match=r"RAY_ADDRESS = 'nonsense': is not the address"):
        connection.check_address(address("nonsense"))


def test_a_stale_address_of_ray_start_is_forgotten_by_ray_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(connection.services, "canonicalize_bootstrap_address", lambda given: gone)
    with pytest.raises(UserError, match=r"that `ray start` has left on this machine.*\(`ray stop`\)"):
        connection.check_address({})
    monkeypatch.setattr(connection.services, "canonicalize_bootstrap_address", lambda given: None)
    assert not connection.check_address({})  # a Ray of our own


@pytest.mark.parametrize(
    ("given", "what", "jobs"),
    [
        ("ray://10.0.0.1:10001", "is for Ray Client", "http://10.0.0.1:8265"),
        ("http://127.0.0.1:8265", "is where jobs are submitted", "http://127.0.0.1:8265"),
    ],
)
def test_addresses_of_other_protocols_say_what_to_do(address: Any, given: str, what: str, jobs: str) -> None:
    with pytest.raises(UserError) as caught:
        connection.check_address(address(given))
    assert str(caught.value).startswith(f"RAY_ADDRESS = {given!r}: {what}; ")
    assert f"ray job submit --address {jobs} --working-dir . -- python -m prunetune.sweep" in str(
        caught.value
    )


def test_a_missing_token_is_one_message() -> None:
    said = "Failed to connect\n[W 1 1] gcs_client.cc: Unauthenticated: RPC error: InvalidAuthToken: missing\n"
    told = connection.refusal(said, "the address in RAY_ADDRESS")
    assert told.startswith("Ray, the address in RAY_ADDRESS, wants its token: set RAY_AUTH_MODE=token")
    assert "\n" not in told
    assert connection.refusal("Version mismatch\n", "x") == "Ray, x, cannot be joined: Version mismatch"


def test_what_ray_says_outside_python_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    with connection._native_errors() as said:
        os.write(2, b"refused\n")
        said.seek(0)
        assert said.read() == "refused\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_too_much_asked_of_this_machine_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.ray, "cluster_resources", lambda: {"CPU": 2.0})
    text = TEXT + "resources:\n  cpus: 64\n"
    config, _, _ = make_sweep(tmp_path, text=text)
    with pytest.raises(ConfigError) as caught:
        runner._resources(config, True, document.parse(text, "small.yaml"))
    line = text.splitlines().index("  cpus: 64") + 1
    assert str(caught.value) == (
        f"small.yaml:{line}: resources.cpus = 64.0: this machine has 2; a worker must fit on it"
    )
