"""Steps recorded as CUDA graphs: a GPU then need not wait for Python to launch their kernels one by one.

A step of a small network is some hundred kernels of a few microseconds each, and Python takes longer than
that to launch one. A graph is launched as a whole. It repeats what was recorded: the same kernels over the
same memory, with the values that the host gave them then.
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
"""So many calls of a step run as they are: cuDNN tries its algorithms, and libraries take their memory."""

Step = Callable[..., None]


@final
class Replayed:
    """A step that runs as it is `AS_IT_IS` times, is then recorded, and from then on replayed.

    `step(*inputs)` takes tensors of the same shapes each time, or None, and writes its results to tensors
    that stay. What it takes from the host must be the same each time, and nothing in it may wait for the
    device. One that cannot be recorded goes on as it is, with a warning. Must be called within `recordable`.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: tuple[Tensor | None, ...] = ()

    def __call__(self, *inputs: Tensor | None) -> None:
        """One step."""
        self._calls += 1
        if self._calls == AS_IT_IS + 1:
            self._inputs = tuple(None if given is None else given.clone() for given in inputs)
            try:
                self._replay = record(lambda: self._step(*self._inputs))
            except RuntimeError as error:  # it waits for the device, or memory is too small for a copy of it
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
    """The step as a CUDA graph where that is wanted and `device` can; else the step itself."""
    return Replayed(step) if wanted and can_record(device) else step


@contextmanager
def recordable(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Within, `device` computes on a stream that steps can be recorded from: its usual one cannot be."""
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
    """Whether there are graphs on `device`."""
    return device.type == "cuda"


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What repeats the kernels that `step` launches; they are not run now. RuntimeError: it cannot be."""
    graph = torch.cuda.CUDAGraph()
    # Other threads of a worker may use the GPU meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: PyTorch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)
