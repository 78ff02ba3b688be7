"""What a stage is: a frozen value of exactly its inputs, stored under the digest of itself."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

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

FORMAT = 6
"""Part of every key: raise it when what a stage computes changes, so that old results are not taken."""

Step = Epoch | EpochWork
"""What a stage yields: an epoch to be trained, then what is to be reported of it."""


@dataclass(frozen=True)
class Origin:
    """What all stages of a run have in common.

    `data` is `Dataset.digest`: it stands for the data's content. `precision` is as the configuration has it.
    """

    data: str
    batch_size: int
    augmentation: AugmentationConfig | None
    model: ModelConfig
    seed: int
    precision: str
    task: TaskConfig

    def build(self, place: Place, seed: int | None = None) -> nn.Module:
        """A fresh network on the data's device, drawn from the run's seed or another one."""
        drawn = seed_of(self.seed if seed is None else seed, "model")
        return tasks.network(self.model, self.learns(place), seed=drawn).to(place.data.device)

    def learns(self, place: Place) -> Task:
        """The task, on the place's data."""
        return tasks.make(self.task, place.data.form)

    @property
    def computes_in(self) -> Precision:
        """The floating-point format."""
        return Precision(self.precision)  # type: ignore[arg-type]


@dataclass
class Place:
    """Where stages run. Nothing of it changes what they compute, but for the order in which floats are added.

    `owner` names the trial. `graphs`: steps are CUDA graphs, on a GPU; `compact`: pruned layers are small, on
    a CPU. `checkpoint_interval` is in seconds.
    """

    data: Dataset
    store: Artefacts
    owner: str
    checkpoint_interval: float = 5.0
    replicas: Replicas = ALONE
    graphs: bool = False
    compact: bool = False
    results: dict[str, Artefact] = field(default_factory=dict)
    """Of the stages that have run here, by key, so that none is read twice."""

    def result(self, stage: Stage) -> Artefact:
        """What a stage that has run gave."""
        return self.results[stage.key]


class Stage(ABC):
    """A step of the pipeline. Subclasses are frozen dataclasses whose fields are all that `run` reads.

    So the key covers what is computed: it is the digest of the fields, with the keys of the stages among
    them.
    """

    is_shared: ClassVar[bool] = False
    """Whether it takes training that trials which differ in what follows can share."""
    is_stored: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """For people, and for what they may keep or remove: `pre_pruning`, `pruning round 2`."""

    @property
    def epochs(self) -> int:
        """The most epochs that it trains."""
        return 0

    @abstractmethod
    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Compute it, or take it from the store; the stages before it have run at the same place.

        Yields epochs that are to be trained and what is to be reported; returns what is stored.
        """

    @cached_property
    def key(self) -> str:
        """Under which the store has its result."""
        return digest(FORMAT, type(self).__name__, _plain(self))

    @property
    def parents(self) -> tuple[Stage, ...]:
        """The stages that this one starts from."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple(value for value in values if isinstance(value, Stage))


def lineage(stage: Stage) -> list[Stage]:
    """A stage and all that it builds on, each once, in an order in which they can run."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key in found:  # of rounds that build on each other every one has several children
            return
        for parent in stage.parents:
            visit(parent)
        found[stage.key] = stage

    visit(stage)
    return list(found.values())


def _plain(value: Any) -> Any:
    """A stage's fields as data that can be hashed."""
    if isinstance(value, BaseModel):
        return canonical(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: item.key if isinstance(item, Stage) else _plain(item) for name, item in fields.items()}
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
) -> Generator[Step, None, Artefact]:
    """Train a stage for `total` epochs: from the store, from its newest checkpoint, or from nothing.

    With `stop` it ends after that many of them, and as soon as `is_hopeless` says so of the curve. Epochs are
    reported under the stage's name `report_as`; `seed_name` is where their seeds come from. `finish` gives
    the tensors and the data to store of a network that did not diverge. The artefact's meta has `status`
    (complete, collapsed or diverged) and `curve` (metrics and owner by epoch).
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
    # What replicas do around a step, and within batch norm, is no work of one device.
    learner.graphs = place.graphs and place.replicas.size == 1
    place.replicas.copy_first(learner.tensors)  # a rescaling on a GPU is not the same bits twice
    checkpoint = EpochCheckpoint(place.store, key, place.checkpoint_interval)
    curve = checkpoint.load(learner)
    learner.compaction = _compaction(learner, origin, place)  # of the masks that were loaded
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
            curve.append({**work.result(), "owner": place.owner})
            # The last epoch needs no checkpoint: the stage's result follows.
            last = len(curve) == (stop or total) or is_hopeless(curve)
            written = not last and checkpoint.save(learner, curve)
            yield epoch(len(curve), curve[-1], last=last, checkpointed=written)
            if last:
                break
        with precision.backends(place.data.device):
            tensors, meta = finish(learner)
    except DivergedError:
        tensors, meta = {}, {"status": "diverged"}
    meta = {**meta, "curve": curve}
    place.store.save("stages", key, tensors, meta)
    checkpoint.delete()
    return Artefact(tensors, meta)


def _compaction(learner: Learner, origin: Origin, place: Place) -> Compaction | None:
    """Where masks rest, on a CPU: on a GPU it has not been shown to pay, and replicas sum whole gradients."""
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
