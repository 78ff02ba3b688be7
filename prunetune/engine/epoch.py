"""The report of one epoch, from which curves, trackers and early stopping read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunetune.engine.constraint import Metrics

LAST_STAGE = "post_pruning"
"""The stage whose epochs are compared between trials."""


@dataclass(frozen=True)
class Epoch:
    """The report of one epoch of a stage.

    `stage_epoch` counts from 1 within the stage, `epoch` from 1 over all stages of a trial. `metrics` are
    numbers by name; `score` is the validation score (higher is better) by which trials are compared. `key` is
    the stage's key in the store. `reused` says that the epoch was read from the store, and `owner` which
    trial computed it. `last` says that the stage's training has ended, `checkpointed` that a checkpoint was
    written.
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
    """The time of the report, in milliseconds since 1970."""

    @property
    def post_epoch(self) -> int | None:
        """The number of the epoch within post-pruning, from 1; None in earlier stages."""
        return self.stage_epoch if self.stage == LAST_STAGE else None

    def report(self) -> dict[str, Any]:
        """All values by name, as `run_pipeline` reports them; `post_epoch` only in post-pruning."""
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
        """The fields that a trial's record keeps, as plain data."""
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
        """Make an epoch from `plain` data, also from that of earlier versions."""
        if "metrics" in data:
            return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data})
        # Earlier versions stored the metrics next to the other fields, and accuracy was the only score.
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
