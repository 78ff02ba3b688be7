"""The base class of stages: frozen values of exactly their inputs, stored under the digest of these."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel
from torch import Tensor, nn

from prunetune import tasks
from prunetune.config.canonical import canonical, digest
from prunetune.config.schema import AugmentationConfig, ModelConfig, TaskConfig
from prunetune.data import Dataset
from prunetune.engine import loop
from prunetune.engine.checkpoint import Curve, EpochCheckpoint
from prunetune.engine.compaction import Compaction
from prunetune.engine.constraint import DivergedError
from prunetune.engine.epoch import Epoch
from prunetune.engine.loop import EpochWork, Learner
from prunetune.engine.precision import Precision
from prunetune.engine.replicas import ALONE, Replicas
from prunetune.engine.seeds import seed_of
from prunetune.methods.fixed import Pruned
from prunetune.store import Artefact, Artefacts
from prunetune.tasks import Task

FORMAT = 7
"""Part of every key; raise it when a stage computes something else, so that old results are not reused."""

Step = Epoch | EpochWork
"""A stage yields an `EpochWork` for each epoch to train, and an `Epoch` to report after it."""


@dataclass(frozen=True)
class Origin:
    """The inputs that all stages of a run have in common.

    `data` is `Dataset.digest`, which stands for the data's content. `precision` is that of the configuration.
    """

    data: str
    batch_size: int
    augmentation: AugmentationConfig | None
    model: ModelConfig
    seed: int
    precision: str
    task: TaskConfig

    def build(self, place: Place, seed: int | None = None) -> nn.Module:
        """Make a new network on the data's device, drawn from the run's seed or from another one."""
        drawn = seed_of(self.seed if seed is None else seed, "model")
        return tasks.network(self.model, self.learns(place), seed=drawn).to(place.data.device)

    def learns(self, place: Place) -> Task:
        """Make the task for the place's data."""
        return tasks.make(self.task, place.data.form)

    @property
    def computes_in(self) -> Precision:
        """The floating-point format in which the stages compute."""
        return Precision(self.precision)  # type: ignore[arg-type]


@dataclass
class Place:
    """The surroundings in which stages run; they change results only by the order in which floats are added.

    `owner` names the trial. `graphs` asks for CUDA graphs on a GPU, `compact` for compacted pruned layers on
    a CPU. `checkpoint_interval` is in seconds.
    """

    data: Dataset
    store: Artefacts
    owner: str
    checkpoint_interval: float = 5.0
    replicas: Replicas = ALONE
    graphs: bool = False
    compact: bool = False
    watched: Sequence[Watched] = ()
    """What is to be found while networks are trained."""
    results: dict[str, Artefact] = field(default_factory=dict)
    """The results of the stages that have run here, by key, so that none is read twice."""

    def result(self, stage: Stage) -> Artefact:
        """Return the result of a stage that has run here."""
        return self.results[stage.key]


class Watcher(Protocol):
    """Evaluates a network after each epoch of its training; it may find the result of another stage."""

    @property
    def key(self) -> str | None:
        """The key of that stage, or None if nothing is to be stored."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint must hold; they are changed in place."""

    def see(self, learner: Learner, epoch: int) -> dict[str, float]:
        """Evaluate the network after an epoch (from 1), with its weights for evaluation; return metrics."""

    def result(self, learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what to store: tensors, and metadata with the `status`. Called only if there is a key."""


class Watched(Protocol):
    """Something that is found while the stage `network` is trained (see `stages.branch`)."""

    @property
    def network(self) -> Stage:
        """The stage that trains the network."""

    def watcher(self, place: Place) -> Watcher:
        """Make the watcher that finds it."""


class Stage(ABC):
    """A step of the pipeline; a frozen dataclass whose `run` reads nothing but its own fields.

    So its key determines its result: the key is the digest of the fields, in which other stages are
    represented by their keys.
    """

    is_shared: ClassVar[bool] = False
    """Whether the stage trains, and trials that differ only in later stages can share its result."""
    is_stored: ClassVar[bool] = True
    """Whether the result is written to the store."""
    runs_after_failure: ClassVar[bool] = False
    """Whether the stage can run after a stage that has collapsed or diverged."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The stage's readable name, such as `pre_pruning` or `pruning round 2`."""

    @property
    def epochs(self) -> int:
        """The largest number of epochs that the stage trains."""
        return 0

    @abstractmethod
    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Compute the result, or read it from the store; all `parents` have run at the same place.

        Yields epochs to train and epochs to report; returns the result.
        """

    @cached_property
    def key(self) -> str:
        """The key under which the store has the stage's result."""
        return digest(FORMAT, type(self).__name__, plain(self))

    @property
    def parents(self) -> tuple[Stage, ...]:
        """The stages whose results this one reads."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple(value for value in values if isinstance(value, Stage))


def lineage(stage: Stage) -> list[Stage]:
    """Return a stage and all stages that it depends on, each once, in an order in which they can run."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key in found:  # of rounds that build on each other every one has several children
            return
        for parent in stage.parents:
            visit(parent)
        found[stage.key] = stage

    visit(stage)
    return list(found.values())


def plain(value: Any) -> Any:
    """Convert a stage's fields to plain data that can be hashed."""
    if isinstance(value, BaseModel):
        return canonical(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: item.key if isinstance(item, Stage) else plain(item) for name, item in fields.items()}
    return value


def train(
    stage: Stage,
    place: Place,
    *,
    report_as: str,
    origin: Origin,
    seed_name: str,
    total: int,
    make_learner: Callable[[], Learner],
    finish: Callable[[Learner], tuple[dict[str, Tensor], dict[str, Any]]],
    stop: int | None = None,
    is_hopeless: Callable[[Curve], bool] = lambda curve: False,
    make_watchers: Callable[[], Sequence[Watcher]] = lambda: (),
) -> Generator[Step, None, Artefact]:
    """Train a stage for `total` epochs, or resume its newest checkpoint, or return its result from the store.

    Training ends after `stop` epochs, if given, or as soon as `is_hopeless(curve)` is true. Epochs are
    reported under the name `report_as`; their seeds are derived from `seed_name`. `finish` returns the
    tensors and the metadata to store for a network that did not diverge. The artefact's meta has `status`
    (complete, collapsed or diverged) and `curve` (metrics and owner of each epoch).

    Each of the watchers sees every epoch and adds metrics to its entry in `curve`; its result is stored as
    well, also if the network collapses or diverges. A watcher whose tensors are not in the checkpoint,
    because it did not exist when that was written, has missed epochs and is left out.
    """

    task = origin.learns(place)

    def epoch(number: int, entry: dict[str, Any], *, last: bool, **how: Any) -> Epoch:
        metrics = {name: value for name, value in entry.items() if name != "owner"}
        score = task.metric.score(metrics[task.metric.val])
        return Epoch(report_as, number, score, metrics, stage.key, entry["owner"], last=last, **how)

    def replay(curve: Curve, end: int) -> Iterator[Epoch]:
        for number, entry in enumerate(curve, start=1):
            yield epoch(number, entry, last=number == end, reused=True)

    key = stage.key
    saved = place.store.load("stages", key)
    if saved is not None:
        curve = saved.meta["curve"]
        yield from replay(curve, len(curve))
        return saved

    precision = origin.computes_in
    with precision.backends(place.data.device):
        learner = make_learner()
    learner.task, learner.precision, learner.replicas = task, precision, place.replicas
    learner.architecture = repr((canonical(origin.model), canonical(origin.task)))
    # Replicas communicate around a step and within batch norm, which a graph of one device cannot record.
    learner.graphs = place.graphs and place.replicas.size == 1
    place.replicas.copy_first(learner.tensors)  # a GPU's rescaling is not reproducible to the bit
    checkpoint = EpochCheckpoint(place.store, key, place.checkpoint_interval)
    curve, watching = checkpoint.load(learner, make_watchers())
    for watcher in watching:
        learner.tensors.update(watcher.tensors)
    learner.compaction = _compaction(learner, origin, place)  # only now are the masks loaded
    first = len(curve)
    yield from replay(curve, stop or total)
    try:
        for work in loop.epochs(
            learner,
            place.data,
            total=total,
            batch_size=origin.batch_size,
            augmentation=origin.augmentation,
            seed=seed_of(origin.seed, seed_name),
            first=first,
            stop=stop,
        ):
            yield work
            entry = {**work.result(), "owner": place.owner}
            with precision.backends(place.data.device):
                for watcher in watching:
                    entry |= watcher.see(learner, len(curve) + 1)
            curve.append(entry)
            # The last epoch needs no checkpoint: the stage's result follows.
            last = len(curve) == (stop or total) or is_hopeless(curve)
            written = not last and checkpoint.save(learner, curve)
            yield epoch(len(curve), entry, last=last, checkpointed=written)
            if last:
                break
        with precision.backends(place.data.device):
            tensors, meta = finish(learner)
    except DivergedError:
        tensors, meta = {}, {"status": "diverged"}
    meta = {**meta, "curve": curve}
    for watcher in watching:
        if watcher.key is not None and watcher.key != key:
            found, of_it = watcher.result(learner)
            place.store.save("stages", watcher.key, found, {**of_it, "curve": []})
    place.store.save("stages", key, tensors, meta)
    checkpoint.delete()
    return Artefact(tensors, meta)


def _compaction(learner: Learner, origin: Origin, place: Place) -> Compaction | None:
    """Make the compaction for fixed masks on a CPU, else None.

    On a GPU it has not been shown to pay, and replicas sum the gradients of whole weights.
    """
    device, constraint = place.data.device, learner.constraint
    if not (place.compact and device.type == "cpu" and place.replicas.size == 1):
        return None
    if not isinstance(constraint, Pruned):
        return None
    probe = None if learner.task is None else learner.task.probe(origin.batch_size)
    return Compaction(
        learner.model,
        constraint.mask,
        place.data.shape,
        batch_size=origin.batch_size,
        inputs=None if probe is None or probe.is_floating_point() else probe,
    )
