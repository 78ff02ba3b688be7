"""What is reported of one epoch of one stage, wherever it goes: curves, trackers, early stopping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunetune.engine.constraint import Metrics

LAST_STAGE = "post_pruning"
"""The stage by whose epochs trials are compared."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of a stage.

    `stage_epoch` counts from 1 within the stage, `epoch` over all stages of a trial. `metrics` are its plain
    numbers by name, `score` the validation score among them by which trials are compared. `reused`: it was
    read from the store, not computed now; `owner` says who computed it. `last`: the stage is trained.
    `checkpointed`: the epoch is in the store.
    """

    stage: str
    stage_epoch: int
    score: float
    metrics: Metrics
    key: str = field(default="", compare=False)
    owner: str = ""
    reused: bool = False
    last: bool = field(default=False, compare=False)
    checkpointed: bool = field(default=False, compare=False)
    epoch: int = 0
    time: int | None = field(default=None, compare=False)
    """When it was reported, in milliseconds since 1970."""

    @property
    def post_epoch(self) -> int | None:
        """The number of the post-pruning epoch, from 1; None before that stage."""
        return self.stage_epoch if self.stage == LAST_STAGE else None

    def report(self) -> dict[str, Any]:
        """Everything by name, as `run_pipeline` reports it; `post_epoch` only after pruning."""
        post = {} if self.post_epoch is None else {"post_epoch": self.post_epoch}
        return {
            "epoch": self.epoch,
            **post,
            "stage": self.stage,
            "key": self.key,
            "stage_epoch": self.stage_epoch,
            "last": self.last,
            "reused": self.reused,
            "checkpointed": self.checkpointed,
            **self.metrics,
        }

    def plain(self) -> dict[str, Any]:
        """What a record keeps of it, as plain data."""
        return {
            "epoch": self.epoch,
            "stage": self.stage,
            "stage_epoch": self.stage_epoch,
            "reused": self.reused,
            "owner": self.owner,
            "score": self.score,
            "metrics": self.metrics,
        }

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Epoch:
        """The inverse of `plain`, for what earlier versions have written, too."""
        if "metrics" in data:
            return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data})
        # Earlier versions had the metrics beside the rest, and accuracy was the only score.
        names = ("epoch", "stage", "reused", "post_epoch", "time")
        metrics = {name: value for name, value in data.items() if name not in names}
        return cls(
            stage=data["stage"],
            stage_epoch=data.get("post_epoch", data["epoch"]),
            score=data["val_accuracy"],
            metrics=metrics,
            reused=data["reused"],
            epoch=data["epoch"],
        )
