"""Plans the stages of a configuration; the only module that knows both configurations and stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

from prunetune.config import space
from prunetune.config.canonical import is_active
from prunetune.config.document import Document
from prunetune.config.reading import validate
from prunetune.config.schema import Config
from prunetune.stages.branch import Branch, OneShotScore
from prunetune.stages.initial import Initial
from prunetune.stages.post_pruning import Closing, PostPruning
from prunetune.stages.pre_pruning import PrePruning
from prunetune.stages.pruning import Masks, Retraining, Selection
from prunetune.stages.stage import Origin, Stage, lineage


@final
@dataclass(frozen=True)
class Plan:
    """All stages of a configuration; `final` is the last one, from which the others follow."""

    final: PostPruning

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages in an order in which they can run, each once."""
        return lineage(self.final)

    @property
    def keys(self) -> dict[str, str]:
        """Stage's name -> its key in the store, for all stages that are stored."""
        return {stage.name: stage.key for stage in self.stages if stage.is_stored}

    @property
    def shared(self) -> list[str]:
        """The keys of the trained stages from which other configurations may also start."""
        return [stage.key for stage in self.stages if stage.is_shared]

    def ends_with(self, stage: Stage) -> bool:
        """Whether nothing can come after a stage that has collapsed or diverged."""

        def follows(after: Stage) -> bool:
            return any(parent.key == stage.key for parent in after.parents)

        return any(follows(after) and not after.runs_after_failure for after in self.stages)

    @property
    def network(self) -> PrePruning | None:
        """The stage that trains the pre-pruned network, or None where none is trained."""
        whole = [s for s in self.stages if isinstance(s, PrePruning) and s.until is None]
        return whole[0] if whole else None


def watched(config: Config, data_digest: str, densities: Iterable[float]) -> list[Branch | OneShotScore]:
    """Return what is to be found at these densities while the configuration's network is pre-trained.

    These are branch points, or the one-shot scores of the last epoch where pruning starts from it.
    """
    found: list[Branch | OneShotScore] = []
    if config.pre_pruning is None:
        return found
    for density in densities:
        stages = plan(config.at(density), data_digest)
        branches = [stage for stage in stages.stages if isinstance(stage, Branch)]
        if stages.network is not None and not branches:
            origin, selection = stages.final.origin, stages.final.masks.selection
            found.append(OneShotScore(origin, stages.network, selection, density))
        found += branches
    return found


def plan(config: Config, data_digest: str) -> Plan:
    """Plan the stages of a configuration with one density; `data_digest` is `Dataset.digest` of its data."""
    pre, pruning, post = config.pre_pruning, config.pruning, config.post_pruning
    origin = Origin(
        data=data_digest,
        batch_size=config.data.batch_size,
        augmentation=config.data.augmentation,
        model=config.model,
        seed=config.seed,
        precision=config.precision,
        task=config.task,
    )
    initializer = None if pre is None else pre.initializer
    network: Stage = Initial(origin, initializer)
    rewound: Stage | None = network if pruning.rewind == "init" else None
    if pre is not None:
        aims = pre.mask is not None and getattr(pre.mask.component, "aims_at_density", False)
        density = config.density if aims else None
        network = PrePruning(origin, pre, density)
        if isinstance(pruning.rewind, int):
            rewound = PrePruning(origin, pre, density, until=pruning.rewind)
    disturbance = pruning.sanity_check if pruning.sanity_check in ("shuffle", "invert") else None
    is_unstructured = pruning.structure == "unstructured"
    selection = Selection(
        criterion=pruning.criterion,
        scoring_rounds=pruning.scoring_rounds,
        samples_per_class=pruning.samples_per_class,
        allocation=pruning.allocation if is_unstructured else "global",
        dense_layers=pruning.dense_layers if is_unstructured else "none",
        structure=pruning.structure,
        disturbance=disturbance,
    )
    if pruning.from_epoch == "best" and isinstance(network, PrePruning):
        network = Branch(origin, network, selection, config.density)
    schedule = pruning.schedule
    closing: Closing | None = None
    earlier: Masks | None = None
    density_now = config.density
    if schedule.name == "iterative":
        for number in range(1, schedule.rounds):
            target = config.density ** (number / schedule.rounds)
            earlier = Masks(origin, network, selection, target, earlier, number)
            network = Retraining(
                origin,
                rewound if rewound is not None else network,
                earlier,
                # Without pre-pruning, retraining uses the optimizer of the last stage.
                (pre or post).optimizer,
                schedule.epochs,
                number,
            )
    elif schedule.name == "gradual":  # keep all weights for now: the last stage prunes
        density_now = 1.0
        closing = Closing(
            config.density,
            schedule.start,
            schedule.end,
            schedule.every,
            selection.allocation,
            selection.dense_layers,
        )
    masks = Masks(origin, network, selection, density_now, earlier)
    start = rewound if rewound is not None else network
    if pruning.sanity_check == "redraw":
        start = Initial(origin, initializer, redrawn=True)
    return Plan(PostPruning(origin, masks, start, post, closing))


class Budget(NamedTuple):
    """Epochs of a trial: of pre-pruning, of retraining rounds (and up to the rewind), of post-pruning."""

    pre_pruning: int
    rounds: int
    post_pruning: int


def most_epochs(template: Mapping[str, Any]) -> Budget:
    """The largest number of epochs that each part of a trial can have in a space."""
    most = Budget(0, 0, 0)
    for assignment in space.assignments(template, is_active):
        config = validate(space.at(template, assignment, is_active), Document("sweep", {}))
        stages = plan(config.at(config.densities[0]), "")
        before = [stage for stage in stages.stages if stage.is_shared and not stage.runs_after_failure]
        whole = sum(stage.epochs for stage in before if stage is stages.network)
        here = Budget(whole, sum(stage.epochs for stage in before) - whole, stages.final.epochs)
        most = Budget(*map(max, most, here))
    return most
