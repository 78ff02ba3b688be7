"""The three stages in order, each skipped when the store already has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor

from prunetune import data as datasets
from prunetune.config import reading
from prunetune.config.document import Document
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.data.batches import batch_length
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork
from prunetune.engine.replicas import ALONE, Replicas, SharedStore
from prunetune.errors import UserError
from prunetune.stages import post_pruning
from prunetune.stages.plan import Plan, plan
from prunetune.stages.stage import Place, Step
from prunetune.store import Artefacts, Store
from prunetune.tasks import Metric, accuracy, metric_of

Yielded = TypeVar("Yielded")
Returned = TypeVar("Returned")


@final
class Outcome(Generic[Yielded, Returned]):
    """Iterates over a generator; then `value` is what it returned.

    >>> def count():
    ...     yield 1
    ...     return "done"
    >>> outcome = Outcome(count())
    >>> list(outcome), outcome.value
    ([1], 'done')
    """

    value: Returned

    def __init__(self, generator: Generator[Yielded, None, Returned]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[Yielded]:
        self.value = yield from self._generator


@dataclass(frozen=True)
class PipelineResult:
    """What a configuration gave.

    `status` is complete, collapsed (nothing left to prune, or no better than chance) or diverged. `val` and
    `test` are the task's `metric` on the validation and test splits, such as the accuracy in [0, 1]; None
    where training ended before post-pruning did. `epochs_run` were trained now, `epochs_reused` were in the
    store. `keys` are the store's keys of the stages by name. `state` holds the final parameters and buffers
    by name, `masks` the boolean masks by weight name.
    """

    status: str
    density: float
    metric: Metric
    val: float | None
    test: float | None
    nonzero: int
    effective_density: float
    cut_layers: list[str]
    epochs_run: int
    epochs_reused: int
    seconds: float
    keys: dict[str, str]
    state: dict[str, Tensor]
    masks: dict[str, Tensor]

    @property
    def val_accuracy(self) -> float | None:
        """`val`, where that is an accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric.name, self.val)

    @property
    def test_accuracy(self) -> float | None:
        """`test`, where that is an accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric.name, self.test)

    def metrics(self) -> dict[str, Any]:
        """The plain values, without tensors and keys."""
        return {
            "status": self.status,
            "density": self.density,
            self.metric.val: self.val,
            self.metric.test: self.test,
            "nonzero": self.nonzero,
            "effective_density": self.effective_density,
            "cut_layers": self.cut_layers,
            "epochs_run": self.epochs_run,
            "epochs_reused": self.epochs_reused,
            "seconds": self.seconds,
        }


class Steps(Protocol):
    """What a sweep's trials run: `steps`, or what a benchmark puts in its place."""

    def __call__(
        self, config: Config, *, store: Store, device: str, owner: str
    ) -> Generator[Step, None, PipelineResult]:
        """Yields what `steps` yields (the epochs to be trained may be left out)."""


def run_pipeline(
    config: Config | str | Path | Mapping[str, Any],
    *,
    report: Callable[..., None] | None = None,
    store: Store | None = None,
    device: str | None = None,
    owner: str = "run_pipeline",
    checkpoint_interval: float = 5.0,
) -> PipelineResult:
    """Run one configuration in this process: a `Config`, a YAML file's path, or a mapping.

    `report(**metrics)` is called after every epoch. The device is the first GPU if there is one, else the
    CPU; the store is the one of `config.storage`, where the run leaves a record of its stages' keys under
    `<name>/trained`, so that they are kept. Raises UserError for a wrong configuration or data.
    """
    if isinstance(config, str | Path):
        config = reading.load(str(config))
    elif isinstance(config, Mapping):
        config = reading.from_document(Document("configuration", dict(config)))
    if store is None:
        store = training_store(config)
    trial = Outcome(
        run(
            config,
            store=store,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            owner=owner,
            checkpoint_interval=checkpoint_interval,
        )
    )
    for epoch in trial:
        if report is not None:
            report(**epoch.report())
    return trial.value


def training_store(config: Config) -> Store:
    """The store of a training's stages, with a record left of their keys, so that they are kept."""
    storage = Store(config.storage)
    stages = plan(config, datasets.load(config.data).digest)
    storage.sub(config.name).write_record(f"trained/{stages.final.key}", {"keys": stages.keys})
    return storage.sub("store")


def run(
    config: Config,
    *,
    store: Artefacts,
    device: str = "cpu",
    owner: str = "run",
    checkpoint_interval: float = 5.0,
    replicas: Replicas = ALONE,
) -> Generator[Epoch, None, PipelineResult]:
    """The pipeline as a generator: whoever drives it gets a report per epoch and may stop at any of them.

    Closing the generator leaves finished stages and the newest epoch checkpoint in the store.
    """
    trial = Outcome(
        steps(
            config,
            store=store,
            device=device,
            owner=owner,
            checkpoint_interval=checkpoint_interval,
            replicas=replicas,
        )
    )
    for step in trial:
        if isinstance(step, EpochWork):
            step.run()
        else:
            yield step
    return trial.value


def steps(
    config: Config,
    *,
    store: Artefacts,
    device: str = "cpu",
    owner: str = "run",
    checkpoint_interval: float = 5.0,
    replicas: Replicas = ALONE,
) -> Generator[Step, None, PipelineResult]:
    """As `run`, but each epoch that must be trained is yielded too, before its report, to be run.

    Whoever drives several trials can so run their epochs together. `replicas` are processes that all run
    this same configuration, each a slice of every batch; the first of them uses the store.

    Raises WorkError where they differ in what must be equal, UserError where there are more than a batch
    has examples.
    """
    started = time.monotonic()
    data = datasets.load(config.data, device)
    stages = plan(config, data.digest)
    _check_replicas(replicas, config, data, stages)
    place = Place(
        data=data,
        store=SharedStore(store, replicas) if replicas.size > 1 else store,
        owner=owner,
        checkpoint_interval=checkpoint_interval,
        replicas=replicas,
        graphs=config.cuda_graphs,
        compact=config.compact_layers,
    )
    epochs = {False: 0, True: 0}  # by whether they were reused
    for stage in stages.stages:
        running = Outcome(stage.run(place))
        for step in running:
            if isinstance(step, Epoch):
                epochs[step.reused] += 1
                step = replace(step, epoch=sum(epochs.values()))
            yield step
        ended = place.results[stage.key] = running.value
        if stage is not stages.final and ended.meta["status"] != "complete":
            break
    is_whole = stage is stages.final
    meta, metric = ended.meta, metric_of(config)
    if not is_whole:
        # What an all-zero network gives is known; nothing is known of one that diverged.
        is_known = meta["status"] == "collapsed" and meta["curve"]
        known = {metric.val: meta["curve"][-1][metric.val]} if is_known else {}
        meta = {"status": meta["status"], **known}
    return PipelineResult(
        status=meta["status"],
        density=config.density,
        metric=metric,
        val=meta.get(metric.val),
        test=meta.get(metric.test),
        nonzero=meta.get("nonzero", 0),
        effective_density=meta.get("effective_density", 0.0),
        cut_layers=meta.get("cut_layers", []),
        epochs_run=epochs[False],
        epochs_reused=epochs[True],
        seconds=time.monotonic() - started,
        keys=stages.keys,
        state=post_pruning.final_state(ended) if is_whole else ended.tensors,
        masks=post_pruning.final_masks(ended) if is_whole else {},
    )


def _check_replicas(replicas: Replicas, config: Config, data: Dataset, stages: Plan) -> None:
    examples = batch_length(data, config.data.batch_size)
    if replicas.size > examples:
        raise UserError(f"a batch has {examples} examples: too few for {replicas.size} workers")
    on_gpu = data.device.type == "cuda"
    here = {
        "data, or the model's code": stages.stages[0].key,
        "PyTorch": torch.__version__,
        # What a seed draws on a GPU depends on its kind.
        "device": torch.cuda.get_device_name(data.device) if on_gpu else "cpu",
    }
    replicas.check_same("what a training needs the same everywhere", here)
