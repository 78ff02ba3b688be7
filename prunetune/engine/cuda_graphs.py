"""Record training steps as CUDA graphs, so that the GPU need not wait for Python to launch each kernel.

A step of a small network is some hundred kernels of a few microseconds each, and Python takes longer than
that to launch one. A graph is launched as a whole. It repeats the recorded kernels on the same memory, with
the arguments that the host passed when it was recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import final

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

AS_IT_IS = 3
"""A step is called this often before it is recorded, for cuDNN to choose algorithms and allocate memory."""

Step = Callable[..., None]


@final
class Replayed:
    """A step that is called directly `AS_IT_IS` times, is then recorded, and from then on replayed.

    `step(*inputs)` takes tensors of the same shapes each time, or None, and writes its results to the same
    tensors each time. Numbers that it gets from the host must not change, and it must not wait for the
    device. A step that cannot be recorded is called directly, with a warning. To be called within
    `recordable`.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: tuple[Tensor | None, ...] = ()

    def __call__(self, *inputs: Tensor | None) -> None:
        """Run one step, or replay its graph."""
        self._calls += 1
        if self._calls == AS_IT_IS + 1:
            self._inputs = tuple(None if given is None else given.clone() for given in inputs)
            try:
                self._replay = record(lambda: self._step(*self._inputs))
            except RuntimeError as error:  # the step waits for the device, or memory is short
                self._inputs = ()
                logger.warning("a step cannot be a CUDA graph and runs as it is: %s", error)
        if self._replay is None:
            self._step(*inputs)
            return
        for static, given in zip(self._inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self._replay()


def replayed(step: Step, device: torch.device, *, wanted: bool) -> Step:
    """Return the step as a CUDA graph if that is `wanted` and `device` supports it, else the step itself."""
    return Replayed(step) if wanted and can_record(device) else step


@contextmanager
def recordable(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Within the context, compute on a stream of its own: CUDA cannot record from the default stream."""
    if not (wanted and can_record(device)):
        yield
        return
    usual, own = torch.cuda.current_stream(device), _stream(device)
    own.wait_stream(usual)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        usual.wait_stream(own)


def can_record(device: torch.device) -> bool:
    """Whether `device` supports CUDA graphs."""
    return device.type == "cuda"


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of `step` without running them; return a function that replays them.

    Raises RuntimeError where the step cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads of a worker may use the GPU meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device, the same for all epochs, because PyTorch caches memory for each stream."""
    return torch.cuda.Stream(device)
