"""Stage 2: choose the weights that stay, and the values with which they go on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunetune import models
from prunetune.config.reading import digest, kept
from prunetune.config.schema import OptimizerConfig, PrePruningConfig, PruningConfig, pattern
from prunetune.data import Dataset
from prunetune.engine.loop import Learner, make_optimizer, make_schedule, seed_of, seeded
from prunetune.methods.pruned import Pruned
from prunetune.sparsity import allocation
from prunetune.sparsity.criteria import CRITERIA, SCORING_ROUNDS, Scene
from prunetune.sparsity.masks import FixedMask, pack, prunable, unpack
from prunetune.stages import pre_pruning
from prunetune.stages.stage import Context, Step, load_state, state_of, train_stage

State = dict[str, Tensor]


@dataclass(frozen=True)
class Pruning:
    """Boolean masks by weight name, and the state (parameters and buffers) that post-pruning starts from.

    A state of None is the network as its constructor made it.
    """

    masks: dict[str, Tensor]
    state: State | None


def run(
    config: PruningConfig,
    density: float,
    key: str,
    context: Context,
    trained: State | None,
    pre: PrePruningConfig | None,
    pre_key: str,
    optimizer: OptimizerConfig,
) -> Generator[Step, None, Pruning]:
    """Prune to floor(d·n) weights; yields reports where rounds are trained, else nothing.

    `trained` is the network to prune, None the one at its initialization. `optimizer` trains the rounds.
    With gradual pruning all weights stay for now: the third stage prunes while it trains.
    """
    rewound = yield from _rewound(config, density, context, pre, pre_key)
    if config.schedule.name == "iterative":
        masks, state = yield from _rounds(config, density, key, context, trained, rewound, optimizer)
    else:
        target = 1.0 if config.schedule.name == "gradual" else density
        masks, state = _masks(config, target, key, context, trained), trained
    if config.sanity_check == "redraw":
        return Pruning(masks, _initial(context, pre, seed=seed_of(context.seed, "redraw")))
    return Pruning(masks, rewound if rewound is not None else state)


def inner_keys(config: PruningConfig, key: str, pre_key: str) -> dict[str, str]:
    """The store's keys, by name, of what pruning trains on its way: the early network that it rewinds to,
    and the masks and networks of its rounds."""
    keys = {}
    if isinstance(config.rewind, int):
        keys[f"pre_pruning to epoch {config.rewind}"] = pre_pruning.stopped_key(pre_key, config.rewind)
    if config.schedule.name == "iterative":
        for number in range(1, config.schedule.rounds):
            keys[f"pruning round {number}, mask"] = _mask_key(key, number)
            keys[f"pruning round {number}"] = _trained_key(key, number)
    return keys


def prune(
    model: nn.Module,
    config: PruningConfig,
    density: float,
    *,
    data: Dataset | None = None,
    alive: dict[str, Tensor] | None = None,
    seed: int,
) -> dict[str, Tensor]:
    """Masks for a network at a density: scores by the criterion, masks by structure and allocation.

    `data` gives the sample that snip, grasp and taylor look at; `alive` what an earlier round left. The
    model's weights come back as they were, but for what the masks of scoring rounds zero.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights.values())
    start = density_of(alive) if alive is not None else 1.0
    rounds = config.scoring_rounds or SCORING_ROUNDS.get(config.criterion, 1)
    images, labels = _sample(data, config.samples_per_class, seed) if data is not None else _no_sample()
    masks = alive
    for number in range(1, rounds + 1):
        if masks is not None:
            FixedMask(weights, masks).apply()
        with seeded(seed_of(seed, "scoring", number), images.device):
            scores = CRITERIA[config.criterion](Scene(model, images, labels, generator))
        if config.sanity_check == "invert":
            scores = {name: -score for name, score in scores.items()}
        # The last round asks for the exact count; the ones before fall geometrically towards it.
        count = kept(density, total) if number == rounds else _between(start, density, number / rounds, total)
        masks = _choose(config, scores, count, masks, generator)
    assert masks is not None
    if config.sanity_check == "shuffle":
        masks = allocation.shuffled_within_layers(masks, generator=generator)
    return {name: mask.cpu() for name, mask in masks.items()}


def density_of(masks: dict[str, Tensor]) -> float:
    """The share of ones."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def _between(start: float, end: float, share: float, total: int) -> int:
    """The count at a share of the way, geometrically; never below the end's."""
    return max(kept(end, total), int(total * start ** (1 - share) * end**share))


def _choose(
    config: PruningConfig,
    scores: dict[str, Tensor],
    count: int,
    alive: dict[str, Tensor] | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    if config.structure == "channel":
        return allocation.channels(scores, count, generator=generator)
    if config.structure != "unstructured":
        n, m = pattern(config.structure)
        return allocation.n_of_m(scores, n, m, generator=generator)
    return allocation.unstructured(
        scores,
        count,
        allocation=config.allocation,
        dense=allocation.dense_layer_names(list(scores), config.dense_layers),
        alive=alive,
        generator=generator,
    )


def _masks(
    config: PruningConfig,
    density: float,
    key: str,
    context: Context,
    state: State | None,
    alive: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of a network in a state, from the store or computed."""
    saved = context.store.load("stages", key)
    if saved is not None:
        return {name: unpack(bits, saved.meta["shapes"][name]) for name, bits in saved.tensors.items()}
    model = context.build(None)
    if state is not None:
        load_state(model, state)
    seed = seed_of(context.seed, "pruning")
    with context.precision.backends(context.data.device):
        # Once for all replicas: gradients on a GPU are not the same bits twice, and scores may be close.
        masks = context.replicas.once(
            lambda: prune(model, config, density, data=context.data, alive=alive, seed=seed)
        )
    context.replicas.check_same("the masks", masks)
    context.store.save(
        "stages",
        key,
        {name: pack(mask) for name, mask in masks.items()},
        {"shapes": {name: list(mask.shape) for name, mask in masks.items()}},
    )
    return masks


def _rounds(
    config: PruningConfig,
    density: float,
    key: str,
    context: Context,
    state: State | None,
    rewound: State | None,
    optimizer: OptimizerConfig,
) -> Generator[Step, None, tuple[dict[str, Tensor], State | None]]:
    """Iterative pruning: prune, (rewind,) retrain, prune further; the last round is not retrained here."""
    masks: dict[str, Tensor] | None = None
    rounds = config.schedule.rounds
    for number in range(1, rounds):
        target = density ** (number / rounds)
        masks = _masks(config, target, _mask_key(key, number), context, state, masks)
        trained = yield from train_stage(
            f"pruning round {number}",
            _trained_key(key, number),
            config.schedule.epochs,
            context,
            lambda masks=masks, start=rewound if rewound is not None else state: _retrain(  # type: ignore[misc]
                context, start, masks, optimizer
            ),
            lambda learner: (state_of(learner.model), {"status": "complete"}),
        )
        if trained.meta["status"] != "complete":
            break  # diverged: prune what there was
        state = trained.tensors
    return _masks(config, density, key, context, state, masks), state


def _mask_key(key: str, number: int) -> str:
    return digest(key, "round", number)


def _trained_key(key: str, number: int) -> str:
    return digest(key, "trained", number)


def _retrain(
    context: Context, start: State | None, masks: dict[str, Tensor], optimizer: OptimizerConfig
) -> Learner:
    model = context.build(None)
    if start is not None:
        load_state(model, start)
    pruned = Pruned(FixedMask(prunable(model), masks))
    pruned.after_step()
    return Learner(
        model,
        [make_optimizer(optimizer, list(model.parameters()))],
        state_of(model),
        make_schedule(optimizer.schedule),
        pruned,
    )


def _rewound(
    config: PruningConfig, density: float, context: Context, pre: PrePruningConfig | None, pre_key: str
) -> Generator[Step, None, State | None]:
    """The state to go back to, or None for the weights as they are."""
    if config.rewind == "init":
        return _initial(context, pre, seed=None)
    if isinstance(config.rewind, int) and pre is not None:
        early = yield from pre_pruning.run(pre, pre_key, context, density=density, stop=config.rewind)
        return early.tensors
    return None


def _initial(context: Context, pre: PrePruningConfig | None, *, seed: int | None) -> State:
    """The network before any training: the same one for a seed of None, else another draw."""
    model = context.build(seed)
    initializer = pre.initializer if pre is not None else "default"
    models.initialize(model, initializer, seed=seed_of(context.seed if seed is None else seed, "initializer"))
    return state_of(model)


def _sample(data: Dataset, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same number of training images of each class (fewer where there are not so many), normalized."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).to(data.device)
    labels = data.train.labels[order]
    chosen = torch.cat([order[labels == c][:per_class] for c in range(data.classes)])
    return data.normalize(data.train.images[chosen]), data.train.labels[chosen]


def _no_sample() -> tuple[Tensor, Tensor]:
    return torch.empty(0), torch.empty(0, dtype=torch.int64)
