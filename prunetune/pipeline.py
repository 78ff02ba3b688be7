"""Runs the stages of a configuration in order; stages whose results are in the store are not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
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
from prunetune.stages.plan import Plan, plan, watched
from prunetune.stages.stage import Place, Step
from prunetune.store import Artefacts, Store
from prunetune.tasks import Metric, accuracy, metric_of

Yielded = TypeVar("Yielded")
Returned = TypeVar("Returned")


@final
class Outcome(Generic[Yielded, Returned]):
    """Iterates over a generator; afterwards `value` is the generator's return value.

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
    """The result of running a configuration.

    `status` is complete, collapsed (no weight is left, or the network is no better than chance) or diverged.
    `val` and `test` are the values of the task's `metric` on the validation and test splits, such as the
    accuracy in [0, 1]; they are None where training ended before post-pruning was finished. `epochs_run`
    counts the epochs trained in this run, `epochs_reused` those found in the store. `keys` maps the stages'
    names to their keys in the store. `state` holds the final parameters and buffers by name, `masks` the
    boolean masks by weight name. `cut_layers` are the layers with no weight on a path from input to output.
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
        """`val`, if the metric is accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric.name, self.val)

    @property
    def test_accuracy(self) -> float | None:
        """`test`, if the metric is accuracy. Raises AttributeError for another metric."""
        return accuracy(self.metric.name, self.test)

    def metrics(self) -> dict[str, Any]:
        """Return the plain values by name, without tensors and keys."""
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
    """The pipeline that a sweep's trials run: `steps`, or a replacement in a benchmark."""

    def __call__(
        self, config: Config, *, store: Store, device: str, owner: str, also: Iterable[float]
    ) -> Generator[Step, None, PipelineResult]:
        """Yield reports of epochs as `steps` does; a replacement need not yield epochs to be trained."""


def run_pipeline(
    config: Config | str | Path | Mapping[str, Any],
    *,
    report: Callable[..., None] | None = None,
    store: Store | None = None,
    device: str | None = None,
    owner: str = "run_pipeline",
    checkpoint_interval: float = 5.0,
) -> PipelineResult:
    """Run one configuration in this process; `config` is a `Config`, a YAML file's path, or a mapping.

    `report(**metrics)` is called after every epoch. By default the device is the first GPU if there is one,
    else the CPU, and the store is that of `config.storage`, where the run writes a record of its stages' keys
    under `<name>/trained`, so that a sweep's garbage collection keeps them. `owner` names the run in records
    of epochs; `checkpoint_interval` is in seconds. Raises UserError for a wrong configuration or wrong data.
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
    """Return the store for a training's stages; write the record that keeps them from being deleted."""
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
    also: Iterable[float] = (),
) -> Generator[Epoch, None, PipelineResult]:
    """Run the pipeline as a generator, which yields a report after each epoch and may be closed at any time.

    Finished stages and the newest checkpoint of an epoch stay in the store when the generator is closed.
    """
    trial = Outcome(
        steps(
            config,
            store=store,
            device=device,
            owner=owner,
            checkpoint_interval=checkpoint_interval,
            replicas=replicas,
            also=also,
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
    also: Iterable[float] = (),
) -> Generator[Step, None, PipelineResult]:
    """Run the pipeline as `run` does, but also yield each epoch that must be trained, before its report.

    The caller may run a yielded epoch, for example together with those of other trials; otherwise it is
    trained when the generator is resumed. `replicas` are processes that all run this configuration, each on
    its slice of every batch; only the first uses the store. While the network is pre-trained, its values
    right after pruning to the densities in `also` are measured as well, and with `pruning.from_epoch: best`
    the best epochs for them are found, so that trials at those densities need not train it again.

    Raises WorkError where replicas differ in data, code, PyTorch or device, and UserError where there are
    more replicas than a batch has examples.
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
        watched=watched(config, data.digest, {config.density, *also}),
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
        if ended.meta["status"] != "complete" and stages.ends_with(stage):
            break
    is_whole = stage is stages.final
    meta, metric = ended.meta, metric_of(config)
    if not is_whole:
        # A collapsed network has a metric, that of its last epoch; a diverged one has none.
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
        # The random numbers of a seed depend on the GPU's model.
        "device": torch.cuda.get_device_name(data.device) if on_gpu else "cpu",
    }
    replicas.check_same("what a training needs the same everywhere", here)
