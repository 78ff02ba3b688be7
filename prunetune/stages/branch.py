"""One-shot scores: how good a network is right after pruning to a density, without further training.

They are known before any trial at that density, and rank networks and the epochs of a pre-training.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from prunetune.engine.loop import Learner, evaluate
from prunetune.engine.seeds import seed_of
from prunetune.engine.statistics import renew_statistics
from prunetune.sparsity.masks import FixedMask, prunable
from prunetune.stages.pre_pruning import PrePruning
from prunetune.stages.pruning import Selection, prune
from prunetune.stages.stage import Origin, Place, Stage, Step, Watcher, train
from prunetune.stages.state import State, load_state, state_of
from prunetune.store import Artefact


@final
@dataclass(frozen=True)
class OneShotScore:
    """Reports the one-shot value of a network as a metric of the last epoch of its pre-training.

    `selection` says how the network is pruned to the `density`.
    """

    origin: Origin
    network: PrePruning
    selection: Selection
    density: float

    def watcher(self, place: Place) -> Watcher:
        """Make the watcher that evaluates the network."""
        return _LastEpoch(self, place)


@final
@dataclass(frozen=True)
class Branch(Stage):
    """Selects the state of a pre-training after the epoch with the best one-shot score at a density.

    The one-shot score of an epoch is the validation score of the network after pruning to the density,
    without further training, except that batch norm's statistics are computed anew. A learnable mask passes
    through all densities while it closes, so each density has its own best epoch; every epoch is a candidate,
    also the last one. The artefact's meta has `epoch` (from 1) and `scores` (one per epoch).

    Branches in `Place.watched` are found while the network is trained. Any other branch is found by
    training the network again, which repeats the same epochs.
    """

    origin: Origin
    network: PrePruning
    selection: Selection
    density: float

    is_shared: ClassVar[bool] = True
    runs_after_failure: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`branch`."""
        return "branch"

    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Return the result from the store, or train the network again to find it."""
        saved = place.store.load("stages", self.key)
        if saved is not None:
            yield from ()
            return saved
        watcher = self.watcher(place)
        return (
            yield from train(
                self,
                place,
                report_as="pre_pruning",
                origin=self.origin,
                seed_name="pre_pruning",
                total=self.network.config.epochs,
                make_learner=partial(self.network.learner, place),
                finish=watcher.result,
                is_hopeless=partial(self.network.is_hopeless, place),
                make_watchers=lambda: [watcher],
            )
        )

    def watcher(self, place: Place) -> BestEpoch:
        """Make the watcher that finds the best epoch while the network is trained."""
        return BestEpoch(self, place)


class _Probe:
    """A copy of a network that is pruned to a density and evaluated."""

    def __init__(self, asked: OneShotScore | Branch, place: Place) -> None:
        self._asked = asked
        self._place = place
        self.model = asked.origin.build(place)
        self.metric = asked.origin.learns(place).metric

    @property
    def name(self) -> str:
        """The name of the one-shot value as a metric."""
        return self.metric.one_shot(self._asked.density, self._asked.selection.label)

    def value(self, state: State) -> float:
        """Return the validation value of a network in this state after pruning to the density."""
        asked, place, model = self._asked, self._place, self.model
        load_state(model, state)
        seed, data = seed_of(asked.origin.seed, "pruning"), place.data
        task = asked.origin.learns(place)
        masks = place.replicas.once(
            lambda: prune(model, asked.selection, asked.density, task=task, data=data, seed=seed)
        )
        load_state(model, state)
        FixedMask(prunable(model), masks).apply()
        precision = asked.origin.computes_in
        renew_statistics(model, data, seed=seed, precision=precision, task=task)
        value, _ = evaluate(model, data, data.validation, precision, place.replicas, task=task)
        return value


@final
class _LastEpoch:
    """Evaluates a network at a density after the last epoch of its training."""

    key = None

    def __init__(self, asked: OneShotScore, place: Place) -> None:
        self._asked = asked
        self._place = place
        self.tensors: dict[str, Tensor] = {}

    def see(self, learner: Learner, epoch: int) -> dict[str, float]:
        """Return the one-shot value as a metric, after the last epoch."""
        if epoch < self._asked.network.config.epochs:
            return {}
        probe = _Probe(self._asked, self._place)
        return {probe.name: probe.value(state_of(learner.model))}

    def result(self, learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return nothing to store."""
        return {}, {"status": "complete"}


@final
class BestEpoch:
    """Keeps the state after the epoch with the best one-shot score so far; checkpoints include it."""

    def __init__(self, branch: Branch, place: Place) -> None:
        self.key = branch.key
        self._probe = _Probe(branch, place)
        self._state: State = {name: t.clone() for name, t in state_of(self._probe.model).items()}
        # Scores by epoch; NaN for epochs to come.
        epochs = max(1, branch.network.config.epochs)
        self._scores = torch.full((epochs,), torch.nan, device=place.data.device)
        prefix = f"prunetune:branch:{self.key}:"
        self.tensors = {f"{prefix}{name}": tensor for name, tensor in self._state.items()}
        self.tensors[f"{prefix}scores"] = self._scores

    def see(self, learner: Learner, epoch: int) -> dict[str, float]:
        """Evaluate the network after an epoch (from 1); return its one-shot value as a metric."""
        current = state_of(learner.model)
        value = self._probe.value(current)
        earlier = self._scores[: epoch - 1]
        score = self._probe.metric.score(value)
        if not bool((earlier >= score).any()):
            for name, tensor in self._state.items():
                tensor.copy_(current[name])
        self._scores[epoch - 1] = score
        return {self._probe.name: value}

    def result(self, learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the best state and its metadata; the learner's state if no epoch was seen."""
        learner.constraint.before_evaluation()
        seen = self._scores[~self._scores.isnan()]
        state = self._state if len(seen) else state_of(learner.model)
        epoch = int(seen.argmax()) + 1 if len(seen) else 0
        names = prunable(self._probe.model)
        alive = any(bool(state[name].any()) for name in names)
        status = "complete" if alive else "collapsed"
        return state, {"status": status, "epoch": epoch, "scores": seen.tolist()}
