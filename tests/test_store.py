"""Invariant 6: what is in the store is whole or is not there; damage is reported, set aside, replaceable."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.errors import UserError
from prunetune.store import Artefact, Store

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "bits": torch.tensor([True, False]),
    "steps": torch.tensor(7),
    "bytes": torch.tensor([255, 0], dtype=torch.uint8),
}
META = {"status": "complete", "curve": [{"loss": 0.1 + 0.2}, {"loss": 1e-300}], "nested": {"none": None}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def assert_same(artefact: Artefact | None, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    assert artefact is not None
    assert artefact.meta == meta
    assert set(artefact.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert artefact.tensors[name].dtype == tensor.dtype
        assert torch.equal(artefact.tensors[name], tensor)


def blob_of(root: Path, kind: str, key: str) -> Path:
    return root / kind / f"{key}.{json.loads((root / kind / f'{key}.json').read_text())['body']['blob']}"


def test_what_is_saved_is_loaded(store: Store) -> None:
    assert store.load("stages", "k") is None
    assert not store.has("stages", "k")
    store.save("stages", "k", TENSORS, META)
    assert store.has("stages", "k")
    assert_same(store.load("stages", "k"), TENSORS, META)
    assert store.load("checkpoints", "k") is None


def test_another_process_or_view_of_the_root_sees_it(store: Store, root: Path) -> None:
    store.sub("inner").save("stages", "k", TENSORS, META)
    assert_same(Store(str(root / "inner")).load("stages", "k"), TENSORS, META)
    assert_same(Store(f"file://{root}/inner").load("stages", "k"), TENSORS, META)
    assert store.load("stages", "k") is None


def test_views_of_one_buffer_and_non_contiguous_tensors_are_saved(store: Store) -> None:
    flat = torch.arange(12.0)
    tensors = {"a": flat[:6].view(2, 3), "b": flat[6:], "t": flat.view(3, 4).T}
    store.save("stages", "k", tensors, {})
    assert_same(store.load("stages", "k"), tensors, {})


def test_nothing_but_meta_is_an_artefact_too(store: Store) -> None:
    store.save("stages", "k", {}, {"status": "diverged"})
    assert_same(store.load("stages", "k"), {}, {"status": "diverged"})


def test_saving_again_replaces(store: Store) -> None:
    store.save("stages", "k", TENSORS, META)
    store.save("stages", "k", {"x": torch.ones(1)}, {"v": 2})
    assert_same(store.load("stages", "k"), {"x": torch.ones(1)}, {"v": 2})


def test_a_replaced_blob_goes(store: Store, root: Path) -> None:
    store.save("stages", "k", TENSORS, {})
    store.save("stages", "k", TENSORS, {"other": 1})
    store.save("stages", "k", {"x": torch.ones(1)}, {})
    assert blobs(root) == [blob_of(root, "stages", "k")]


def test_a_writer_killed_before_the_manifest_leaves_nothing_loadable(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store._write

    def dies_at_the_manifest(self: Store, name: str, content: bytes) -> None:
        if name.startswith("stages/") and name.endswith(".json"):
            raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_write", dies_at_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            store.save("stages", "k", TENSORS, META)
    assert len(blobs(root)) == 1  # it was there first
    assert not store.has("stages", "k")
    assert store.load("stages", "k") is None
    store.save("stages", "k", TENSORS, META)
    assert_same(store.load("stages", "k"), TENSORS, META)


@pytest.mark.parametrize("part", ["blob", "manifest"])
def test_a_writer_killed_while_writing_a_file_leaves_the_older_version(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    store.save("stages", "k", TENSORS, META)
    replace = os.replace

    def dies(temporary: str, final: str) -> None:
        assert Path(temporary).stat().st_size > 0
        if final.endswith(".json") == (part == "manifest"):
            raise KeyboardInterrupt
        replace(temporary, final)

    with monkeypatch.context() as patched:
        patched.setattr("prunetune.store.os.replace", dies)
        with pytest.raises(KeyboardInterrupt):
            store.save("stages", "k", {"x": torch.ones(3)}, {"v": 2})
    assert_same(store.load("stages", "k"), TENSORS, META)
    assert store.records("stages") == ["stages/k"]  # the leftover is no record


def blobs(root: Path) -> list[Path]:
    """Files of tensors, wherever the store keeps them."""
    return [path for path in root.rglob("*") if path.is_file() and path.suffix != ".json"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_mapping(path: Path) -> None:
    path.write_text("[1, 2]")


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("complete", "diverged"))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty, remove])
def test_a_damaged_blob_is_reported_set_aside_and_can_be_saved_again(
    store: Store, root: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    store.save("stages", "k", TENSORS, META)
    blob = blob_of(root, "stages", "k")
    damage(blob)
    with caplog.at_level(logging.WARNING, logger="prunetune.store"):
        assert store.load("stages", "k") is None
    assert "damaged" in caplog.text
    assert str(root / "stages" / "k.json") in caplog.text
    assert not store.has("stages", "k")
    assert not blob.exists()
    aside = sorted(path.name.rpartition(".")[0] for path in (root / "damaged").iterdir())
    assert aside == (["k.json"] if damage is remove else sorted(["k.json", blob.name]))
    caplog.clear()
    assert store.load("stages", "k") is None  # from now on as if it had never been
    assert caplog.text == ""
    store.save("stages", "k", TENSORS, META)
    assert_same(store.load("stages", "k"), TENSORS, META)


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty, no_mapping, not_text, edited])
def test_a_damaged_manifest_is_reported_set_aside_and_can_be_saved_again(
    store: Store, root: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    store.save("stages", "k", TENSORS, META)
    damage(root / "stages" / "k.json")
    with caplog.at_level(logging.WARNING, logger="prunetune.store"):
        assert store.load("stages", "k") is None
    assert "damaged" in caplog.text
    assert not store.has("stages", "k")
    assert [path.name.split(".")[0] for path in (root / "damaged").iterdir()] == ["k"]
    store.save("stages", "k", TENSORS, META)
    assert_same(store.load("stages", "k"), TENSORS, META)


def test_a_damaged_blob_harms_no_other_key_of_the_same_content(store: Store, root: Path) -> None:
    store.save("stages", "a", TENSORS, {})
    store.save("stages", "b", TENSORS, {})
    flip_a_byte(blob_of(root, "stages", "a"))
    assert store.load("stages", "a") is None
    assert_same(store.load("stages", "b"), TENSORS, {})
    store.save("stages", "a", TENSORS, {})
    assert_same(store.load("stages", "a"), TENSORS, {})


def test_saving_over_a_damaged_blob_publishes_a_whole_one(store: Store, root: Path) -> None:
    store.save("stages", "a", TENSORS, {})
    flip_a_byte(blob_of(root, "stages", "a"))
    store.save("stages", "a", TENSORS, {})
    assert_same(store.load("stages", "a"), TENSORS, {})


def test_a_newer_checkpoint_replaces_the_older_and_its_blob(store: Store, root: Path) -> None:
    for epoch in range(3):
        store.save("checkpoints", "k", {"w": torch.full((4,), float(epoch))}, {"epoch": epoch})
    assert_same(store.load("checkpoints", "k"), {"w": torch.full((4,), 2.0)}, {"epoch": 2})
    assert len(blobs(root)) == 1
    store.save("checkpoints", "k", {"w": torch.full((4,), 2.0)}, {"epoch": 3})  # the same weights
    assert_same(store.load("checkpoints", "k"), {"w": torch.full((4,), 2.0)}, {"epoch": 3})


@pytest.mark.parametrize("kind", ["stages", "checkpoints"])
def test_what_is_deleted_leaves_nothing_behind(store: Store, root: Path, kind: Any) -> None:
    store.save(kind, "k", TENSORS, META)
    assert store.keys(kind) == ["k"]
    assert store.blob(kind, "k") == blob_of(root, kind, "k").name
    store.delete(kind, "k")
    store.delete(kind, "k")
    assert store.load(kind, "k") is None
    assert (store.keys(kind), store.blob(kind, "k")) == ([], None)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def before(monkeypatch: pytest.MonkeyPatch, method: str, part: str, act: Callable[[], None]) -> None:
    """Somebody else acts just before the first reading or writing of a blob or a manifest."""
    operation = getattr(Store, method)

    def interrupted(self: Store, name: str, *rest: Any) -> Any:
        if name.endswith(".json") == (part == "manifest"):
            monkeypatch.setattr(Store, method, operation)
            act()
        return operation(self, name, *rest)

    monkeypatch.setattr(Store, method, interrupted)


def test_an_artefact_deleted_while_it_is_read_is_not_taken_for_damaged(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("stages", "k", TENSORS, META)
    before(monkeypatch, "_read", "blob", lambda: store.delete("stages", "k"))
    assert store.load("stages", "k") is None
    assert caplog.text == ""
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_an_artefact_deleted_and_saved_again_while_it_is_read_is_not_taken_for_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("stages", "k", TENSORS, META)

    def gone_for_a_moment() -> None:
        store.delete("stages", "k")
        before(monkeypatch, "_read", "manifest", lambda: store.save("stages", "k", TENSORS, META))

    before(monkeypatch, "_read", "blob", gone_for_a_moment)
    assert_same(store.load("stages", "k"), TENSORS, META)
    assert caplog.text == ""


def test_an_artefact_deleted_while_it_is_saved_again_is_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Two trials computed one stage; the first has ended, and its result goes as the second one publishes.
    store.save("stages", "k", TENSORS, META)
    before(monkeypatch, "_write", "manifest", lambda: store.delete("stages", "k"))
    store.save("stages", "k", TENSORS, META)
    assert_same(store.load("stages", "k"), TENSORS, META)
    assert caplog.text == ""


def test_concurrent_deleters_leave_a_whole_artefact_or_none(
    store: Store, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[BaseException] = []

    def work(reader: bool) -> None:
        try:
            for _ in range(30):
                found = store.load("stages", "k")
                assert found is None or torch.equal(found.tensors["weight"], TENSORS["weight"])
                if reader:
                    store.delete("stages", "k")
        except BaseException as error:
            failures.append(error)

    store.save("stages", "k", TENSORS, META)
    threads = [threading.Thread(target=work, args=(reader,)) for reader in (True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert caplog.text == ""
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_files_have_their_size_and_age(store: Store, root: Path) -> None:
    store.write_file("a/b/c.txt", b"123")
    store.write_file("a/d.txt", b"")
    os.utime(root / "a" / "d.txt", (0, 0))
    assert [(f.name, f.size) for f in store.files("a")] == [("d.txt", 0)]
    assert [(f.name, f.size) for f in store.files("a", recursive=True)] == [("b/c.txt", 3), ("d.txt", 0)]
    assert [f.name for f in store.files("", recursive=True)] == ["a/b/c.txt", "a/d.txt"]
    assert store.files("a")[0].modified == datetime(1970, 1, 1, tzinfo=UTC)
    assert store.files("nowhere") == []


def test_a_deleted_stage_does_not_take_what_another_key_holds(store: Store) -> None:
    store.save("stages", "a", TENSORS, {})
    store.save("stages", "b", TENSORS, {})
    store.delete("stages", "a")
    assert_same(store.load("stages", "b"), TENSORS, {})


def test_deleting_a_checkpoint_does_not_take_the_content_of_a_finished_stage(store: Store) -> None:
    # SGD without momentum: after two epochs a stage of four holds what a stage of two ends with.
    store.save("stages", "short", TENSORS, META)
    store.save("checkpoints", "long", TENSORS, META)
    store.delete("checkpoints", "long")
    assert_same(store.load("stages", "short"), TENSORS, META)


def test_replacing_a_checkpoint_does_not_take_the_content_of_another(store: Store) -> None:
    # Two trials that differ in a horizon have equal weights after their first epoch.
    store.save("checkpoints", "a", TENSORS, META)
    store.save("checkpoints", "b", TENSORS, META)
    store.save("checkpoints", "a", {"x": torch.ones(1)}, META)
    assert_same(store.load("checkpoints", "b"), TENSORS, META)


def test_a_checkpoint_replaced_while_it_is_read_is_not_taken_for_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("checkpoints", "k", {"w": torch.zeros(2)}, {"epoch": 1})
    read = Store._read
    newer = iter([{"w": torch.ones(2)}])

    def read_after_another_trial_went_on(self: Store, name: str) -> bytes | None:
        if not name.endswith(".json") and (tensors := next(newer, None)) is not None:
            store.save("checkpoints", "k", tensors, {"epoch": 2})
        return read(self, name)

    monkeypatch.setattr(Store, "_read", read_after_another_trial_went_on)
    store.load("checkpoints", "k")  # whichever of the two, or none
    assert "damaged" not in caplog.text
    assert_same(store.load("checkpoints", "k"), {"w": torch.ones(2)}, {"epoch": 2})


@pytest.mark.parametrize("same", [True, False])
def test_concurrent_writers_and_readers_of_one_key_see_only_whole_artefacts(
    store: Store, caplog: pytest.LogCaptureFixture, same: bool
) -> None:
    seen: list[Artefact] = []
    failures: list[BaseException] = []

    def work(writer: int) -> None:
        try:
            for round_ in range(10):
                value = 0 if same else writer * 100 + round_
                store.save("stages", "k", {"w": torch.full((50,), float(value))}, {"value": value})
                found = store.load("stages", "k")
                assert found is not None
                seen.append(found)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(seen) == 40
    assert all(torch.equal(a.tensors["w"], torch.full((50,), float(a.meta["value"]))) for a in seen)
    assert "damaged" not in caplog.text
    assert store.records("stages") == ["stages/k"]


def test_records_are_whole_or_not_there(store: Store, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = {"density": 0.1, "list": [1, None, "ä"]}
    assert store.read_record("trials/t1") is None
    assert store.records("trials") == []
    store.write_record("trials/t1", body)
    store.write_record("trials/t0", [1])
    assert store.read_record("trials/t1") == body
    assert store.records("trials") == ["trials/t0", "trials/t1"]
    truncate(root / "trials" / "t1.json")
    assert store.read_record("trials/t1") is None
    assert "damaged" in caplog.text
    assert store.records("trials") == ["trials/t0"]


def test_files_for_people_and_their_paths(store: Store, root: Path) -> None:
    store.write_file("best/density-0.1.yaml", b"a: 1\n")
    assert store.read_file("best/density-0.1.yaml") == b"a: 1\n"
    assert store.read_file("best/none.yaml") is None
    assert store.path("best/x.yaml") == str(root / "best" / "x.yaml")
    assert store.local_path("best/x.yaml") == str(root / "best" / "x.yaml")
    assert [path.name for path in (root / "best").iterdir()] == ["density-0.1.yaml"]  # no temporary left
    store.write_file("other/x/y.txt", b"")
    assert store.folders(".") == ["best", "other"]
    assert store.folders("other") == ["x"]
    assert store.folders("nowhere") == []
    store.delete_file("best/density-0.1.yaml")
    store.delete_file("best/density-0.1.yaml")
    assert store.read_file("best/density-0.1.yaml") is None


def test_an_unwritable_location_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"storage: .*file/store.* cannot be written"):
        store.write_record("trials/t", {})
    with pytest.raises(UserError, match=r"storage: .*file/store.* cannot be"):
        store.save("stages", "k", TENSORS, META)


def test_reading_below_a_file_is_a_users_error_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(str(tmp_path / "file"))
    try:
        assert store.load("stages", "k") is None
    except UserError as error:
        assert str(tmp_path / "file") in str(error)  # noqa: PT017


def test_an_unknown_scheme_is_a_users_error() -> None:
    with pytest.raises(UserError, match="storage = 'nothing://bucket/x': not a usable location"):
        Store("nothing://bucket/x")


def test_on_a_remote_filesystem_artefacts_and_records_work_the_same(remote: Store) -> None:
    assert remote.load("stages", "k") is None
    assert remote.records("stages") == []
    remote.save("stages", "k", TENSORS, META)
    assert_same(remote.load("stages", "k"), TENSORS, META)
    assert_same(remote.sub(".").load("stages", "none") or Artefact({}, {}), {}, {})
    assert remote.records("stages") == ["stages/k"]
    for epoch in range(3):
        remote.save("checkpoints", "c", {"w": torch.full((4,), float(epoch))}, {"epoch": epoch})
    assert_same(remote.load("checkpoints", "c"), {"w": torch.full((4,), 2.0)}, {"epoch": 2})
    remote.delete("checkpoints", "c")
    assert remote.load("checkpoints", "c") is None
    remote.delete("stages", "k")
    assert (remote.keys("stages"), remote.files("stages")) == ([], [])
    remote.save("stages", "k", TENSORS, META)
    names = {file.name for file in remote.files("", recursive=True)}
    assert names == {"stages/k.json", f"stages/{remote.blob('stages', 'k')}"}
    inner = remote.sub("inner")
    inner.write_file("a/b.txt", b"x")
    assert inner.read_file("a/b.txt") == b"x"
    assert remote.read_file("inner/a/b.txt") == b"x"
    assert remote.local_path("inner/a/b.txt") is None
    assert remote.path("x").endswith("://bucket/runs/x")
    options = Store("s3://bucket/runs?region=eu-west-1&endpoint_override=localhost:9")
    assert options.sub("a").path("x") == "s3://bucket/runs/a/x?region=eu-west-1&endpoint_override=localhost:9"


def test_on_a_remote_filesystem_damage_is_set_aside_too(
    remote: Store, caplog: pytest.LogCaptureFixture
) -> None:
    remote.save("stages", "k", TENSORS, META)
    remote.write_file("stages/k.json", (remote.read_file("stages/k.json") or b"")[:-20])
    assert remote.load("stages", "k") is None
    assert "damaged" in caplog.text
    assert not remote.has("stages", "k")
    remote.save("stages", "k", TENSORS, META)
    assert_same(remote.load("stages", "k"), TENSORS, META)


def test_a_uris_options_stay_with_what_is_below_it() -> None:
    store = Store("s3://bucket/runs/?region=eu-west-1&scheme=http")
    assert store.sub("cifar").path("best/d.yaml") == (
        "s3://bucket/runs/cifar/best/d.yaml?region=eu-west-1&scheme=http"
    )
    assert Store("s3://bucket/runs?region=eu-west-1").path("x") == "s3://bucket/runs/x?region=eu-west-1"
