"""A small problem and records for it, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.config import document
from prunetune.config.reading import sweep_from_document
from prunetune.config.schema import Config
from prunetune.engine.epoch import Epoch
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.store import Store

TEXT = """
name: small
seed: 3
data: {name: digits}
model: {name: mlp, hidden: [8]}
densities: [0.1, 0.01]
pre_pruning:
  epochs: 2
  optimizer: {name: adam, lr: {loguniform: [1e-4, 1e-1]}}
  mask: {choice: [null, {lambda1: 0.0, lambda2: {loguniform: [1e-5, 1e-2]}}]}
post_pruning:
  epochs: 9
  optimizer: {name: adam, lr: 1e-3}
  label_smoothing: {alpha0: {uniform: [0.0, 0.3]}}
search: {trials_per_density: 6}
"""


def make_sweep(folder: Path, *overrides: str, text: str = TEXT) -> tuple[Config, Problem, Ledger]:
    source = document.override(document.parse(text, "small.yaml"), [f"storage={folder}", *overrides])
    template, config = sweep_from_document(source)
    return config, Problem.of(template), Ledger(Store(str(folder)).sub(config.name))


def epoch(number: int, score: float = 0.5, *, post: int | None = None, **fields: Any) -> Epoch:
    """The epoch with this number of a trial, in post-pruning where its number there is given."""
    stage = "pre_pruning" if post is None else "post_pruning"
    metrics = {"val_accuracy": score, **fields.pop("metrics", {})}
    return Epoch(stage, post or number, score, metrics, epoch=number, **{"key": "k", **fields})


def finish(
    record: TrialRecord, value: float | None, status: Any = "complete", epochs: int = 3
) -> TrialRecord:
    """Fill in a result: `epochs` post-pruning epochs that end at `value`."""
    record.status, record.val = status, value
    if value is not None:
        record.curve = [epoch(e, value * e / epochs, post=e) for e in range(1, epochs + 1)]
    record.epochs_run = len(record.curve)
    if status in ("complete", "collapsed"):
        record.test, record.nonzero, record.effective_density = value, 10, record.density
    return record
