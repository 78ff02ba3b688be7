"""The three stages in order, each skipped when the store already has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from prunetune import data as datasets
from prunetune import models
from prunetune.config import reading as configuration
from prunetune.config.document import Document
from prunetune.config.reading import canonical
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.data.batches import batch_length
from prunetune.engine.loop import EpochWork, seed_of
from prunetune.engine.precision import Precision
from prunetune.engine.replicas import ALONE, Replicas, SharedStore
from prunetune.errors import UserError
from prunetune.keys import StageKeys, stage_keys, stored_keys
from prunetune.stages import post_pruning, pre_pruning, pruning
from prunetune.stages.stage import Context, Report, Step
from prunetune.store import Store

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

    `status` is complete, collapsed (nothing left to prune, or chance accuracy) or diverged. Accuracies are
    in [0, 1]; None where training ended before post-pruning did. `state` holds the final parameters and
    buffers by name, `masks` the boolean masks by weight name.
    """

    status: str
    density: float
    val_accuracy: float | None
    test_accuracy: float | None
    nonzero: int
    effective_density: float
    cut_layers: list[str]
    epochs_run: int
    epochs_reused: int
    seconds: float
    keys: StageKeys
    state: dict[str, Tensor]
    masks: dict[str, Tensor]

    def metrics(self) -> dict[str, Any]:
        """The plain values, without tensors and keys."""
        return {
            "status": self.status,
            "density": self.density,
            "val_accuracy": self.val_accuracy,
            "test_accuracy": self.test_accuracy,
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
        config = configuration.load(str(config))
    elif isinstance(config, Mapping):
        config = configuration.from_document(Document("configuration", dict(config)))
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
    for metrics in trial:
        if report is not None:
            report(**metrics)
    return trial.value


def training_store(config: Config) -> Store:
    """The store of a training's stages, with a record left of their keys, so that they are kept."""
    storage = Store(config.storage)
    keys = stored_keys(config, datasets.load(config.data).digest)
    storage.sub(config.name).write_record(f"trained/{keys['post_pruning']}", {"keys": keys})
    return storage.sub("store")


def run(
    config: Config,
    *,
    store: Store,
    device: str = "cpu",
    owner: str = "run",
    checkpoint_interval: float = 5.0,
    replicas: Replicas = ALONE,
) -> Generator[Report, None, PipelineResult]:
    """The pipeline as a generator: whoever drives it gets a report per epoch and may stop at any of them.

    Each report has `epoch` (over all stages, from 1) and, in the third stage, `post_epoch`. Closing the
    generator leaves finished stages and the newest epoch checkpoint in the store.
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
    store: Store,
    device: str = "cpu",
    owner: str = "run",
    checkpoint_interval: float = 5.0,
    replicas: Replicas = ALONE,
) -> Generator[Step, None, PipelineResult]:
    """As `run`, but each epoch that must be trained is yielded too, before its report, to be run.

    Whoever drives several trials can so run their epochs together. `replicas` are processes that all run
    this same configuration, each a slice of every batch; the first of them uses the store.

    Raises WorkError where they differ in what must be equal, UserError where there are more than a batch
    has images.
    """
    started = time.monotonic()
    data = datasets.load(config.data, device)
    keys = stage_keys(config, data.digest)
    _check_replicas(replicas, config, data, keys)
    context = _context(config, data, store, owner, checkpoint_interval, replicas)
    epochs = {False: 0, True: 0}  # by whether they were reused

    def counted(stage: Generator[Step, None, Any]) -> Generator[Step, None, Any]:
        outcome = Outcome(stage)
        for report in outcome:
            if isinstance(report, EpochWork):
                yield report
                continue
            epochs[report["reused"]] += 1
            post = {"post_epoch": report["stage_epoch"]} if report["stage"] == "post_pruning" else {}
            yield {"epoch": sum(epochs.values()), **post, **report}
        return outcome.value

    def result(
        status: str, meta: dict[str, Any], state: dict[str, Tensor], masks: dict[str, Tensor]
    ) -> PipelineResult:
        return PipelineResult(
            status=status,
            density=config.density,
            val_accuracy=meta.get("val_accuracy"),
            test_accuracy=meta.get("test_accuracy"),
            nonzero=meta.get("nonzero", 0),
            effective_density=meta.get("effective_density", 0.0),
            cut_layers=meta.get("cut_layers", []),
            epochs_run=epochs[False],
            epochs_reused=epochs[True],
            seconds=time.monotonic() - started,
            keys=keys,
            state=state,
            masks=masks,
        )

    trained: dict[str, Tensor] | None = None
    if config.pre_pruning is not None:
        dense = yield from counted(
            pre_pruning.run(config.pre_pruning, keys.pre_pruning, context, density=config.density)
        )
        trained = dense.tensors
        if dense.meta["status"] != "complete":
            # What an all-zero network gives is known; nothing is known of one that diverged.
            collapsed = dense.meta["status"] == "collapsed" and dense.meta["curve"]
            meta = {"val_accuracy": dense.meta["curve"][-1]["val_accuracy"]} if collapsed else {}
            return result(dense.meta["status"], meta, trained or {}, {})
    pruned = yield from counted(
        pruning.run(
            config.pruning,
            config.density,
            keys.pruning,
            context,
            trained,
            config.pre_pruning,
            keys.pre_pruning,
            (config.pre_pruning or config.post_pruning).optimizer,
        )
    )
    final = yield from counted(
        post_pruning.run(
            config.post_pruning,
            keys.post_pruning,
            context,
            pruned.state,
            pruned.masks,
            config.pruning,
            config.density,
        )
    )
    return result(
        final.meta["status"], final.meta, post_pruning.final_state(final), post_pruning.final_masks(final)
    )


def _check_replicas(replicas: Replicas, config: Config, data: Dataset, keys: StageKeys) -> None:
    images = batch_length(data, config.data.batch_size)
    if replicas.size > images:
        raise UserError(f"a batch has {images} images: too few for {replicas.size} workers")
    on_gpu = data.device.type == "cuda"
    here = {
        "data, or the model's code": keys.pre_pruning,
        "PyTorch": torch.__version__,
        # What a seed draws on a GPU depends on its kind.
        "device": torch.cuda.get_device_name(data.device) if on_gpu else "cpu",
    }
    replicas.check_same("what a training needs the same everywhere", here)


def _context(
    config: Config, data: Dataset, store: Store, owner: str, checkpoint_interval: float, replicas: Replicas
) -> Context:
    def build(seed: int | None) -> nn.Module:
        seed = seed_of(config.seed if seed is None else seed, "model")
        model = models.build(config.model, data.shape, data.classes, seed=seed)
        return model.to(data.device)

    return Context(
        data=data,
        store=SharedStore(store, replicas) if replicas.size > 1 else store,
        build=build,
        batch_size=config.data.batch_size,
        augmentation=config.data.augmentation,
        seed=config.seed,
        owner=owner,
        checkpoint_interval=checkpoint_interval,
        precision=Precision(config.precision),
        replicas=replicas,
        architecture=repr(canonical(config.model)),
        graphs=config.cuda_graphs,
        compact=config.compact_layers,
    )
