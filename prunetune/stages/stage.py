"""What the stages share: where they run, how they report, and training with the store."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.config.schema import AugmentationConfig
from prunetune.data import Dataset
from prunetune.engine import loop as training
from prunetune.engine.checkpoint import Curve, EpochCheckpoint
from prunetune.engine.compaction import Compaction
from prunetune.engine.loop import DivergedError, EpochWork, Learner
from prunetune.engine.precision import AUTO, Precision
from prunetune.engine.replicas import ALONE, Replicas
from prunetune.methods.pruned import Pruned
from prunetune.store import Artefact, Artefacts

Report = dict[str, Any]
"""Of one epoch: `stage`, its `key`, `stage_epoch` (from 1), `last` (the stage is trained), `reused`, and the
metrics. `checkpointed` says that the epoch is in the store. A reused epoch was not computed by this trial but
is reported all the same, so that curves are whole wherever they go."""

Step = Report | EpochWork
"""What a stage yields: an epoch to be trained, then its report."""


@dataclass(frozen=True)
class Context:
    """Where a stage runs and what it starts from.

    `owner` names the trial, so that what an interrupted run of it left in the store counts as its own.
    """

    data: Dataset
    store: Artefacts
    build: Callable[[int | None], nn.Module]  # a fresh network on the data's device; None: the run's seed
    batch_size: int
    augmentation: AugmentationConfig | None
    seed: int
    owner: str
    checkpoint_interval: float
    precision: Precision = AUTO
    replicas: Replicas = ALONE
    architecture: str = ""  # what `build` builds
    graphs: bool = False
    compact: bool = False


def train_stage(
    name: str,
    key: str,
    total: int,
    context: Context,
    make_learner: Callable[[], Learner],
    finish: Callable[[Learner], tuple[dict[str, Tensor], dict[str, Any]]],
    stop: int | None = None,
    is_hopeless: Callable[[Curve], bool] = lambda curve: False,
) -> Generator[Step, None, Artefact]:
    """A stage that trains for `total` epochs: from the store, from its newest checkpoint, or from nothing.

    With `stop` it ends after that many of them, and as soon as `is_hopeless` says so of the curve. `finish`
    gives the tensors and the data to store of a network that did not diverge. The artefact's
    meta has `status` (complete, collapsed or diverged) and `curve` (metrics and owner by epoch).
    """
    saved = context.store.load("stages", key)
    if saved is not None:
        curve = saved.meta["curve"]
        yield from _replay(name, key, curve, context.owner, len(curve))
        return saved

    with context.precision.backends(context.data.device):
        learner = make_learner()
    learner.precision, learner.replicas = context.precision, context.replicas
    learner.architecture = context.architecture
    # What replicas do around a step, and within batch norm, is no work of one device.
    learner.graphs = context.graphs and context.replicas.size == 1
    context.replicas.copy_first(learner.tensors)  # a rescaling on a GPU is not the same bits twice
    checkpoint = EpochCheckpoint(context.store, key, context.checkpoint_interval)
    curve = checkpoint.load(learner)
    learner.compaction = _compaction(learner, context)  # of the masks that were loaded
    first = len(curve)
    yield from _replay(name, key, curve, context.owner, stop or total)
    try:
        for work in training.epochs(
            learner,
            context.data,
            total=total,
            batch_size=context.batch_size,
            augmentation=context.augmentation,
            seed=training.seed_of(context.seed, name),
            first=first,
            stop=stop,
        ):
            yield work
            metrics = work.result()
            curve.append({**metrics, "owner": context.owner})
            # The last epoch needs no checkpoint: the stage's result follows.
            last = len(curve) == (stop or total) or is_hopeless(curve)
            written = not last and checkpoint.save(learner, curve)
            yield {
                "stage": name,
                "key": key,
                "stage_epoch": len(curve),
                "last": last,
                "reused": False,
                "checkpointed": written,
                **metrics,
            }
            if last:
                break
        with context.precision.backends(context.data.device):
            tensors, meta = finish(learner)
    except DivergedError:
        tensors, meta = {}, {"status": "diverged"}
    meta = {**meta, "curve": curve}
    context.store.save("stages", key, tensors, meta)
    checkpoint.delete()
    return Artefact(tensors, meta)


def _compaction(learner: Learner, context: Context) -> Compaction | None:
    """Where masks rest, on a CPU: on a GPU it has not been shown to pay, and replicas sum whole gradients."""
    device, constraint = context.data.device, learner.constraint
    if not (context.compact and device.type == "cpu" and context.replicas.size == 1):
        return None
    if not isinstance(constraint, Pruned):
        return None
    return Compaction(learner.model, constraint.mask, context.data.shape, batch_size=context.batch_size)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as views of the model's own."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put stored parameters and buffers into a model, in place."""
    with torch.no_grad():
        for name, tensor in state_of(model).items():
            tensor.copy_(tensors[name])


def _replay(name: str, key: str, curve: Curve, me: str, total: int) -> Iterator[Report]:
    for epoch, entry in enumerate(curve, start=1):
        yield {
            "stage": name,
            "key": key,
            "stage_epoch": epoch,
            "last": epoch == total,
            "reused": entry["owner"] != me,
            "checkpointed": False,
            **{metric: value for metric, value in entry.items() if metric != "owner"},
        }
