"""Stage 2: choose the weights that stay; between rounds of iterative pruning, retrain the network."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from prunetune.config.canonical import digest, kept
from prunetune.config.schema import CriterionConfig, OptimizerConfig, pattern
from prunetune.data import Dataset
from prunetune.engine.loop import Learner, task_on
from prunetune.engine.optimizers import make_optimizer, make_schedule
from prunetune.engine.seeds import seed_of, seeded
from prunetune.methods.fixed import Pruned
from prunetune.sparsity import allocation
from prunetune.sparsity.criteria import Scene, scoring_rounds
from prunetune.sparsity.masks import FixedMask, pack, prunable, unpack
from prunetune.stages.stage import Origin, Place, Stage, Step, plain, train
from prunetune.stages.state import load_state, state_of
from prunetune.store import Artefact
from prunetune.tasks import Task


@dataclass(frozen=True)
class Selection:
    """The settings of pruning: the criterion scores weights; structure and allocation choose among them.

    `disturbance` breaks the choice on purpose, as a sanity check (arXiv 2009.08576).
    """

    criterion: CriterionConfig
    scoring_rounds: int | None = None
    samples_per_class: int = 10
    allocation: str = "global"
    dense_layers: str = "none"
    structure: str = "unstructured"
    disturbance: Literal["shuffle", "invert"] | None = None

    @property
    def label(self) -> str:
        """A short name for these settings: "" for pruning by magnitude over all layers, else a digest."""
        usual = Selection(CriterionConfig.model_validate("magnitude"))
        return "" if plain(self) == plain(usual) else digest(plain(self))[:8]


@final
@dataclass(frozen=True)
class Masks(Stage):
    """Computes the masks that keep floor(d·n) of the n prunable weights of a network at density d.

    Weights that the masks `earlier`, of the previous round, have pruned stay pruned. `round` is the number of
    the round in iterative pruning.
    """

    origin: Origin
    network: Stage
    selection: Selection
    density: float
    earlier: Masks | None = None
    round: int | None = None

    @property
    def name(self) -> str:
        """The stage's name: `pruning`, or `pruning round N, mask`."""
        return "pruning" if self.round is None else f"pruning round {self.round}, mask"

    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Compute the masks; yields nothing. The tensors are masks as bits, by weight name (`masks_of`)."""
        yield from ()
        saved = place.store.load("stages", self.key)
        if saved is not None:
            return saved
        model = self.origin.build(place)
        load_state(model, place.result(self.network).tensors)
        alive = masks_of(place.result(self.earlier)) if self.earlier is not None else None
        seed, task = seed_of(self.origin.seed, "pruning"), self.origin.learns(place)
        with self.origin.computes_in.backends(place.data.device):
            # One replica computes for all: a GPU's gradients are not reproducible to the bit, and scores
            # may be close.
            masks = place.replicas.once(
                lambda: prune(
                    model, self.selection, self.density, data=place.data, task=task, alive=alive, seed=seed
                )
            )
        place.replicas.check_same("the masks", masks)
        tensors = {name: pack(mask) for name, mask in masks.items()}
        meta = {
            "status": "complete",
            "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        }
        place.store.save("stages", self.key, tensors, meta)
        return Artefact(tensors, meta)


@final
@dataclass(frozen=True)
class Retraining(Stage):
    """Retrains a network under the masks of a round of iterative pruning, from the weights of `start`."""

    origin: Origin
    start: Stage
    masks: Masks
    optimizer: OptimizerConfig
    length: int
    round: int

    is_shared: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The stage's name, `pruning round N`."""
        return f"pruning round {self.round}"

    @property
    def epochs(self) -> int:
        """The number of epochs, `length`."""
        return self.length

    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Train the network; the stored tensors are its parameters and buffers."""

        def make_learner() -> Learner:
            model = self.origin.build(place)
            load_state(model, place.result(self.start).tensors)
            pruned = Pruned(FixedMask(prunable(model), masks_of(place.result(self.masks))))
            pruned.after_step()
            optimizer = make_optimizer(self.optimizer, list(model.parameters()))
            return Learner(
                model, [optimizer], state_of(model), make_schedule(self.optimizer.schedule), pruned
            )

        return (
            yield from train(
                self,
                place,
                report_as=self.name,
                origin=self.origin,
                seed_name=self.name,
                total=self.length,
                make_learner=make_learner,
                finish=lambda learner: (state_of(learner.model), {"status": "complete"}),
            )
        )


def masks_of(artefact: Artefact) -> dict[str, Tensor]:
    """The boolean masks by weight name, from what `Masks` has stored."""
    shapes = artefact.meta["shapes"]
    return {name: unpack(bits, shapes[name]) for name, bits in artefact.tensors.items()}


def prune(
    model: nn.Module,
    selection: Selection,
    density: float,
    *,
    data: Dataset | None = None,
    task: Task | None = None,
    alive: dict[str, Tensor] | None = None,
    seed: int,
) -> dict[str, Tensor]:
    """Compute the boolean masks of a network at a density, by weight name.

    snip, grasp and taylor compute gradients on a sample of `data`, with the loss of `task` (by default
    classification). `alive` are the masks of an earlier round; what they pruned stays pruned. The model keeps
    its weights, except those that scoring rounds have set to zero.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights.values())
    start = density_of(alive) if alive is not None else 1.0
    criterion = selection.criterion.component
    rounds = selection.scoring_rounds or scoring_rounds(criterion)
    scene = Scene(model, torch.empty(0), torch.empty(0, dtype=torch.int64), generator)
    if data is not None:
        task = task_on(data, task)
        scene = Scene(
            model,
            *_sample(data, task, selection.samples_per_class, seed),
            generator,
            task.loss,
            task.probe(1),
            task.gives_logits,
        )
    masks = alive
    for number in range(1, rounds + 1):
        if masks is not None:
            FixedMask(weights, masks).apply()
        with seeded(seed_of(seed, "scoring", number), scene.inputs.device):
            scores = criterion(scene, **selection.criterion.options)
        if selection.disturbance == "invert":
            scores = {name: -score for name, score in scores.items()}
        # The last round keeps the exact count; the counts of earlier rounds fall geometrically towards it.
        count = kept(density, total) if number == rounds else _between(start, density, number / rounds, total)
        masks = _choose(selection, scores, count, masks, generator)
    assert masks is not None
    if selection.disturbance == "shuffle":
        masks = allocation.shuffled_within_layers(masks, generator=generator)
    return {name: mask.cpu() for name, mask in masks.items()}


def density_of(masks: dict[str, Tensor]) -> float:
    """The share of ones in all masks together."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def _between(start: float, end: float, share: float, total: int) -> int:
    """Interpolate geometrically between two densities; return the count of weights, at least the end's."""
    return max(kept(end, total), int(total * start ** (1 - share) * end**share))


def _choose(
    selection: Selection,
    scores: dict[str, Tensor],
    count: int,
    alive: dict[str, Tensor] | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    if selection.structure == "channel":
        return allocation.channels(scores, count, generator=generator)
    if selection.structure != "unstructured":
        n, m = pattern(selection.structure)
        return allocation.n_of_m(scores, n, m, generator=generator)
    return allocation.unstructured(
        scores,
        count,
        allocation=selection.allocation,
        dense=allocation.dense_layer_names(list(scores), selection.dense_layers),
        alive=alive,
        generator=generator,
    )


def _sample(data: Dataset, task: Task, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of the training examples that the task chooses for scoring."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).to(data.device)
    chosen = task.sample(data.train.targets, order, per_class)
    return task.batch(data.train.inputs[chosen], data.train.targets[chosen])
