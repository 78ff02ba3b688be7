"""Checkpoints of a running stage: its newest epoch, in the store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from prunetune.engine.loop import Learner
from prunetune.store import Artefacts


class HasTensors(Protocol):
    """Something whose tensors a checkpoint holds."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name."""


W = TypeVar("W", bound=HasTensors)

Curve = list[dict[str, Any]]
"""One mapping per epoch: its metrics by name, and under `owner` the trial that computed it."""

_LONG_EPOCH = 1.0
"""Epochs of at least this many seconds each get a checkpoint."""
_WRITING = 10.0
"""Wait at least ten times as long as the last write took, so that writing stays below 10 %."""


@dataclass
class EpochCheckpoint:
    """Writes the newest epoch of a running stage to the store, and loads it.

    Epochs of a second or more are written at once, so that a lost machine costs no more than the running
    epoch; shorter epochs are written when `interval` seconds have passed since the last write. Writing must
    take no more than a tenth of the time: where it is slow, more epochs pass in between, for at most three
    intervals.
    """

    store: Artefacts
    key: str
    interval: float = 5.0

    def __post_init__(self) -> None:
        self._asked = self._last = time.monotonic()
        self._cost = 0.0  # seconds that the last write took

    def load(self, learner: Learner, beside: Sequence[W] = ()) -> tuple[Curve, list[W]]:
        """Load the checkpoint into the learner and the objects in `beside`.

        Returns the curve so far, [] if there is no checkpoint, and the objects that could be loaded. An
        object whose tensors are not in the checkpoint, because it did not exist when that was written, is
        left out.
        """
        found = self.store.load("checkpoints", self.key)
        if found is None:
            return [], list(beside)
        there = [each for each in beside if each.tensors.keys() <= found.tensors.keys()]
        with torch.no_grad():
            for tensors in (learner.tensors, *(each.tensors for each in there)):
                for name, tensor in tensors.items():
                    tensor.copy_(found.tensors[name])
        for index, optimizer in enumerate(learner.optimizers):
            _restore_optimizer(optimizer, f"optimizer{index}.", found.tensors)
        curve: Curve = found.meta["curve"]
        return curve, there

    def save(self, learner: Learner, curve: Curve) -> bool:
        """Write a checkpoint if it is time for one; return whether it was written."""
        now = time.monotonic()
        epoch, self._asked = now - self._asked, now
        if now - self._last < checkpoint_wait(epoch, self._cost, self.interval):
            return False
        tensors = dict(learner.tensors)
        for index, optimizer in enumerate(learner.optimizers):
            for position, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer{index}.{position}.{name}"] = value
        self.store.save("checkpoints", self.key, tensors, {"curve": curve})
        self._asked = self._last = time.monotonic()
        self._cost = self._last - now
        return True

    def delete(self) -> None:
        """Delete the checkpoint of a finished stage."""
        self.store.delete("checkpoints", self.key)


def checkpoint_wait(epoch: float, cost: float, interval: float) -> float:
    """Seconds from one checkpoint to the next; an epoch takes `epoch` seconds, the last write took `cost`.

    >>> checkpoint_wait(20.0, 0.1, 5.0), checkpoint_wait(1.2, 0.3, 5.0), checkpoint_wait(0.2, 0.01, 5.0)
    (1.0, 3.0, 5.0)
    """
    return interval if epoch < _LONG_EPOCH else min(_WRITING * cost, 3 * interval)


def _restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(prefix):
            position, _, name = full_name.removeprefix(prefix).partition(".")
            state.setdefault(int(position), {})[name] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
