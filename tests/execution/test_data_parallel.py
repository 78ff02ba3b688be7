"""What a training over several workers asks of Ray, and when it gives up."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from small_sweep import epoch

from prunetune.config.schema import Config
from prunetune.errors import UserError, WorkError
from prunetune.execution import data_parallel as distributed
from prunetune.pipeline import training_store

import ray.exceptions  # isort: skip
import ray.train  # isort: skip
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback  # isort: skip


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path) -> Config:
    return Config.model_validate({**tiny, "storage": str(tmp_path)})


def lost(*errors: Exception) -> Exception:
    return ray.train.WorkerGroupError("a worker failed", dict(enumerate(errors)))


def test_a_lost_worker_is_replaced_until_nothing_comes_of_it() -> None:
    error = lost(RuntimeError("Connection closed by peer"))
    distributed._check(error, 1)
    distributed._check(error, 2)
    with pytest.raises(WorkError, match="failed 3 times without an epoch in between"):
        distributed._check(error, 3)


@pytest.mark.parametrize("kind", [UserError, WorkError])
def test_what_would_happen_again_ends_training_with_its_own_message(kind: type[Exception]) -> None:
    failure = UserExceptionWithTraceback(kind("storage: cannot be written"), "Traceback …")
    with pytest.raises(kind, match=r"^storage: cannot be written$"):
        distributed._check(lost(RuntimeError("peer"), failure), 1)


def test_an_error_that_is_not_of_the_workers_is_not_tried_again() -> None:
    with pytest.raises(WorkError, match=r"^training cannot be run: no scheduler"):
        distributed._check(ValueError("no scheduler"), 1)


class Coordinator:
    """One in this process: `remote` calls at once, and `ray.get` of what it gives is that."""

    def __init__(self, *takes: list[int]) -> None:
        self.takes = list(takes)
        self.fit = self.take = self

    def remote(self, *given: Any) -> Any:
        return [epoch(number) for number in self.takes.pop(0)] if not given else "fit"


@pytest.fixture
def progress(monkeypatch) -> tuple[Any, list[int]]:
    """A `_Progress` over a `Coordinator`, and the epochs it has shown."""
    monkeypatch.setattr(distributed.ray, "get", lambda given: given)
    shown: list[int] = []
    progress = distributed._Progress.__new__(distributed._Progress)
    progress.epoch = progress.reused = 0
    progress._report = lambda epoch, **others: shown.append(epoch)
    return progress, shown


def test_epochs_that_a_new_group_repeats_are_shown_once(progress) -> None:
    progress, shown = progress
    progress.coordinator = Coordinator([1, 2, 3], [], [3, 4])  # the checkpoint was of epoch 2
    for _ in range(3):
        progress.show()
    assert shown == [1, 2, 3, 4]


def test_ctrl_c_ends_the_wait_for_a_group(progress, monkeypatch) -> None:
    progress, shown = progress
    progress.coordinator, interrupted = Coordinator([1]), threading.Event()

    def wait(references, timeout):
        if shown:
            interrupted.set()
        return [], references

    monkeypatch.setattr(distributed.ray, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        distributed._fit(object(), progress, interrupted)  # type: ignore[arg-type]
    assert shown == [1]


def test_the_loss_of_the_coordinator_ends_training_with_a_message(progress, monkeypatch) -> None:
    progress, _ = progress
    progress.coordinator = Coordinator()

    def wait(references, timeout):
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(distributed.ray, "wait", wait)
    error = distributed._fit(object(), progress, threading.Event())  # type: ignore[arg-type]
    assert isinstance(error, ray.exceptions.ActorDiedError)
    with pytest.raises(WorkError, match="training cannot be run"):
        distributed._check(error, 1)


@pytest.mark.parametrize(
    ("local", "have", "gpus", "expected"),
    [
        (True, {"CPU": 4}, 0.5, {"CPU": 1}),  # no GPU on this machine
        (True, {"CPU": 4, "GPU": 2}, 0, {"CPU": 1, "GPU": 1}),
        (False, {"CPU": 1}, 0.25, {"CPU": 1, "GPU": 1}),  # the autoscaler will bring them
        (False, {"CPU": 1}, 0, {"CPU": 1}),
        (False, {"CPU": 8, "GPU": 4}, 0, {"CPU": 1, "GPU": 1}),
    ],
)
def test_a_worker_gets_a_whole_gpu_where_there_are_gpus(
    monkeypatch, config: Config, local: bool, have: dict[str, float], gpus: float, expected: dict[str, float]
) -> None:
    monkeypatch.setattr(distributed.ray, "cluster_resources", lambda: have)
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"gpus": gpus})})
    scaling = distributed._scaling(config, 2, local)
    assert (scaling.num_workers, scaling.resources_per_worker) == (2, expected)
    assert scaling.use_gpu == ("GPU" in expected)


def test_a_cluster_that_is_too_small_yet_is_told_and_waited_for(monkeypatch, config: Config, caplog) -> None:
    monkeypatch.setattr(distributed.ray, "cluster_resources", lambda: {"CPU": 2})
    assert distributed._scaling(config, 3, False).num_workers == 3
    (message,) = caplog.messages
    assert message == (
        "--workers 3: they need 3 CPUs (resources.cpus each); the Ray cluster has 2; "
        "waiting for the autoscaler to add nodes"
    )


@pytest.mark.parametrize(
    ("have", "message"),
    [
        ({"CPU": 2}, r"--workers 3: they need 3 CPUs \(resources.cpus each\); this machine has 2"),
        ({"CPU": 8, "GPU": 1}, r"--workers 3: they need 3 GPUs \(one each\); this machine has 1"),
    ],
)
def test_a_machine_that_is_too_small_is_named(monkeypatch, config: Config, have, message: str) -> None:
    monkeypatch.setattr(distributed.ray, "cluster_resources", lambda: have)
    with pytest.raises(UserError, match=message):
        distributed._scaling(config, 3, True)


def test_a_result_that_is_on_another_machine_is_not_trained_again_here(config: Config) -> None:
    with pytest.raises(WorkError, match="what the workers have stored is not there as seen from here"):
        distributed._stored(config, training_store(config), "me")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_the_interface_of_an_address_is_found() -> None:
    assert distributed.interface_of("127.0.0.1") == "lo"
    assert distributed.interface_of("203.0.113.77") is None  # of nobody
