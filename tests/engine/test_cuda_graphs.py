"""Steps as CUDA graphs, on a CPU: what a graph does is imitated by an interpreter of PyTorch's operations.

As a graph does, it repeats the operations that were recorded, over the memory and with the numbers of then,
and runs no Python. Steps that a GPU would get wrong, as a number in them changes, are wrong here too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vectorized import CASES, Report, alone, changed, mask, together
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunetune import pipeline
from prunetune.config.schema import Config
from prunetune.engine import cuda_graphs
from prunetune.engine.cuda_graphs import AS_IT_IS, Replayed
from prunetune.engine.loop import EpochWork
from prunetune.engine.replicas import Replicas
from prunetune.pipeline import PipelineResult
from prunetune.store import Store


class Interpreter(TorchDispatchMode):
    """Records operations while they run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def repeat(self) -> None:
        """Run the recorded operations; what each gives goes where it went before."""
        for func, args, kwargs, out in self._operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CPUs have graphs; the replays of each recorded step."""
    replays: list[int] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        with Interpreter() as interpreter:
            step()
        number = len(replays)
        replays.append(0)

        def replay() -> None:
            replays[number] += 1
            if replays[number] > 1:  # recording on a GPU runs nothing; here it ran the step
                interpreter.repeat()

        return replay

    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(cuda_graphs, "_stream", lambda device: Stream())
    return replays


class Stream:
    """A CPU has none."""

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, *error: object) -> None:
        """Nothing."""


def test_the_two_streams_wait_for_each_other_and_only_where_graphs_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[str] = []

    class Waiting(Stream):
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append(f"{self.name} for {getattr(other, 'name', '')}")

    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Waiting("usual"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(cuda_graphs, "_stream", lambda device: Waiting("own"))
    with cuda_graphs.recordable(torch.device("cpu"), wanted=False):
        pass
    assert waits == []
    with (
        pytest.raises(KeyError, match="own for usual"),
        cuda_graphs.recordable(torch.device("cpu"), wanted=True),
    ):
        raise KeyError(*waits)
    assert waits == ["own for usual", "usual for own"]


def test_a_step_is_replayed_over_the_inputs_of_each_call(recorded: list[int]) -> None:
    total = torch.zeros(())
    pythons: list[int] = []

    def step(x: Tensor, y: Tensor | None) -> None:
        pythons.append(len(pythons))
        assert y is None
        total.add_(x * 2)

    replayed = Replayed(step)
    for value in range(10):
        replayed(torch.tensor(float(value)), None)
    assert total.item() == 2 * sum(range(10))
    assert len(pythons) == AS_IT_IS + 1  # the last one to record it
    assert recorded == [10 - AS_IT_IS]


def test_a_number_of_the_host_is_that_of_the_recording(recorded: list[int]) -> None:
    """Which is why a step must not take one that changes. (And the imitation would notice.)"""
    total, numbers = torch.zeros(()), iter(range(1, 11))
    replayed = Replayed(lambda: total.add_(next(numbers)))  # type: ignore[arg-type]
    for _ in range(10):
        replayed()
    assert total.item() == 1 + 2 + 3 + 7 * 4


def test_a_step_that_waits_for_the_device_goes_on_as_it_is(
    recorded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    total = torch.zeros(())

    def step(x: Tensor) -> None:
        if x.item() > 0:
            total.add_(x)

    replayed = Replayed(step)
    with caplog.at_level(logging.WARNING, logger="prunetune.engine.cuda_graphs"):
        for value in range(10):
            replayed(torch.tensor(float(value)))
    assert total.item() == sum(range(10))
    assert recorded == []
    assert caplog.text.count("runs as it is: operation not permitted") == 1


def test_without_a_gpu_or_unasked_a_step_is_itself() -> None:
    def step() -> None:
        """Nothing."""

    assert cuda_graphs.replayed(step, torch.device("cpu"), wanted=True) is step
    assert cuda_graphs.replayed(step, torch.device("cuda"), wanted=False) is step
    with cuda_graphs.recordable(torch.device("cpu"), wanted=True):
        pass


def small_batches(config: Config) -> Config:
    """So small that an epoch has steps to replay."""
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 6})})


def with_graphs(config: Config) -> Config:
    return config.model_copy(update={"cuda_graphs": True})


TOGETHER = {name: [small_batches(config) for config in configs] for name, configs in CASES.items()}
_PADDED = changed(data__augmentation={"crop_padding": 1}).data
ALONE = {
    name: small_batches(config)
    for name, config in {
        "dense": changed(),
        "mask": changed(pre_pruning__mask=mask(lambda2_warmup=0.5)),
        "mask with a target": changed(pre_pruning__mask=mask(method="target")),
        "mask on a path": changed(
            pre_pruning__mask={"method": "path", "lowest": 0.1}, pruning__from_epoch="best"
        ),
        "soft pieces": CASES["soft pieces"][1].model_copy(update={"data": _PADDED}),
        "batch norm": CASES["batch norm"][0],
        "bf16": changed(precision="bf16"),
        "rigl": changed(post_pruning__dynamic={"name": "rigl", "every": 5}, densities=[0.5]),
        "gradual": changed(pruning__schedule="gradual"),
    }.items()
}


def assert_same(
    found: tuple[list[Report], PipelineResult], expected: tuple[list[Report], PipelineResult]
) -> None:
    assert found[0] == expected[0]
    assert found[1].metrics() | {"seconds": 0} == expected[1].metrics() | {"seconds": 0}
    for name, state in expected[1].state.items():
        assert torch.equal(found[1].state[name], state), name


@pytest.mark.parametrize("name", ALONE)
def test_a_trial_gives_with_graphs_what_it_gives_without(
    name: str, tmp_path: Path, recorded: list[int]
) -> None:
    config = ALONE[name]
    (expected,) = alone([config], tmp_path / "without")
    assert recorded == []
    (found,) = alone([with_graphs(config)], tmp_path / "with")
    assert_same(found, expected)
    assert len(recorded) == found[1].epochs_run
    assert min(recorded) > 2
    assert found[1].keys == expected[1].keys


@pytest.mark.parametrize("name", TOGETHER)
def test_trials_give_together_with_graphs_what_they_give_without(
    name: str, tmp_path: Path, recorded: list[int]
) -> None:
    configs = TOGETHER[name]
    expected = together(configs, tmp_path / "without")
    assert recorded == []
    found = together([with_graphs(config) for config in configs], tmp_path / "with")
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert min(recorded) > 2


@pytest.mark.parametrize("size", [1, 2])
def test_what_replicas_sum_between_them_is_in_no_graph(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replicas, "check_same", lambda self, what, value: None)
    monkeypatch.setattr(Replicas, "copy_first", lambda self, tensors: None)
    monkeypatch.setattr(Replicas, "once", lambda self, compute: compute())
    trial = pipeline.steps(
        with_graphs(ALONE["dense"]), store=Store(str(tmp_path)), replicas=Replicas(0, size)
    )
    step = next(trial)
    assert isinstance(step, EpochWork)
    assert step.learner.graphs == (size == 1)


class Counting(nn.Module):
    """Waits for the device in each step, as code that looks at its numbers does."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits / max(1.0, float(logits.detach().abs().max()))


def test_a_model_that_waits_for_the_device_trains_all_the_same(
    tmp_path: Path, recorded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(data__batch_size=6, model={"name": "test_cuda_graphs:Counting"})
    (expected,) = alone([config], tmp_path / "without")
    with caplog.at_level(logging.WARNING, logger="prunetune.engine.cuda_graphs"):
        (found,) = alone([with_graphs(config)], tmp_path / "with")
    assert_same(found, expected)
    assert recorded == []
    assert "cannot be a CUDA graph" in caplog.text


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("trials", [1, 2])
def test_epochs_are_run_on_the_stream_of_graphs_where_these_are_wanted(
    trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, graphs: bool
) -> None:
    asked: list[bool] = []

    def noted(device: torch.device, *, wanted: bool) -> nullcontext[None]:
        asked.append(wanted)
        return nullcontext()

    monkeypatch.setattr(cuda_graphs, "recordable", noted)
    configs = [each.model_copy(update={"cuda_graphs": graphs}) for each in CASES["learning rates"][:trials]]
    together(configs, tmp_path)
    assert asked
    assert set(asked) == {graphs}
