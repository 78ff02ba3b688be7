"""The queue of trials over all densities, ordered so that no stage is computed twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prunetune.config import space
from prunetune.config.canonical import is_active
from prunetune.config.schema import Config
from prunetune.engine.epoch import LAST_STAGE
from prunetune.errors import ConfigError
from prunetune.records.ledger import Ledger
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.search import branching, exploration
from prunetune.search.branching import Pool, determining
from prunetune.search.exploration import Experience
from prunetune.search.study import DensitySearch, Study

logger = logging.getLogger(__name__)

_ATTEMPTS = 100
"""After this many invalid proposals in a row, a density gets no more trials."""


class SweepSearch:
    """The queue of trials: first interrupted ones, then new proposals (densities in turn), then failed ones.

    A new trial either explores, which means that it trains its own pre-pruning stage, or branches from a
    pre-pruned network in the store. `search.exploration` is the share of exploring trials at each density;
    the sweep's first trials all explore (`branching.NETWORKS_FIRST`). A trial that needs a stage which a
    running trial is computing waits until the stage is in the store.
    """

    def __init__(
        self,
        config: Config,
        problem: Problem,
        ledger: Ledger,
        stored: Callable[[str], bool] = lambda key: False,
    ) -> None:
        """`stored(key)` says whether the stage with this key is in the store."""
        self._config = config
        self._ledger = ledger
        self._problem = problem
        self._stored = stored
        self._pool = Pool(config.densities)
        self._experience = Experience(space.parameters(problem.template, is_active), config.densities)
        self._computing: dict[str, str] = {}  # stage key -> uid of the trial that computes it
        self._searches = {
            density: DensitySearch(problem, density, sampler=config.search.sampler, seed=config.seed)
            for density in config.densities
        }
        self._issued = dict.fromkeys(config.densities, 0)
        self._explored = dict.fromkeys(config.densities, 0)
        self._exhausted: set[float] = set()
        self._again: list[TrialRecord] = []  # were running when an earlier driver ended
        self._lost: list[TrialRecord] = []  # their workers were lost
        self._held: list[TrialRecord] = []  # proposed; wait for a stage of a running trial
        self._failed: list[TrialRecord] = []
        self._refusals: set[str] = set()
        self.past: list[TrialRecord] = []
        for record in ledger.records():
            if record.density not in self._searches:
                continue
            params = record.params if record.space == problem.hash else problem.fit(record)
            if params is not None:
                self._remember(record, params)
        # In the order in which they were first proposed.
        self._again.sort(key=lambda r: (r.number, config.densities.index(r.density)))

    def _remember(self, record: TrialRecord, params: dict[str, Any]) -> None:
        if record.finished:
            self._searches[record.density].remember(record, params)
            self._experience.ended(record, params)
            self.past.append(record)
            if _beyond_pre_pruning(record):
                self._pool.add(record, params)
                self._pool.started(record)
                self._pool.ended(record)
        if record.space == self._problem.hash:
            if not record.finished:
                (self._failed if record.status == "failed" else self._again).append(record)
            self._issued[record.density] += 1
            self._explored[record.density] += not record.branched

    def __len__(self) -> int:
        """How many trials are still to be started, unless a density runs out of points before that."""
        missing = sum(self.total(density) - issued for density, issued in self._issued.items())
        return missing + len(self._again) + len(self._lost) + len(self._held) + len(self._failed)

    def total(self, density: float) -> int:
        """How many trials of this space the density will have when the sweep is done."""
        if density in self._exhausted:
            return self._issued[density]
        points = self._searches[density].points
        wanted = self._config.search.trials_per_density
        return max(wanted if points is None else min(wanted, points), self._issued[density])

    @property
    def studies(self) -> dict[float, Study]:
        """The Optuna study of each density."""
        return {density: search.study for density, search in self._searches.items()}

    @property
    def waiting(self) -> bool:
        """Whether trials are left that `next` does not return yet, because they wait for running stages."""
        return bool(self._lost or self._held or self._again or self._failed)

    def next(self) -> TrialRecord | None:
        """Return the next trial, recorded as running; None if no trial is left, or none yet (`waiting`)."""
        for record in self._lost:
            if self._free(record):
                self._lost.remove(record)
                self._claim(record)
                return record
        for record in self._held:
            if self._free(record):
                self._held.remove(record)
                return self._issue(record)
        for record in self._again:
            if self._free(record):
                self._again.remove(record)
                return self._issue(self._reissued(record))
        if self._again:
            return None
        holding = {record.density for record in self._held}
        while (density := self._next_density(holding)) is not None:
            proposed = self._propose(density)
            if proposed is None:
                self._exhausted.add(density)
            elif self._free(proposed):
                return self._issue(proposed)
            else:
                self._held.append(proposed)
                holding.add(density)
        # Failed trials come last, because they may well fail again.
        if not self._held:
            for record in self._failed:
                if self._free(record):
                    self._failed.remove(record)
                    return self._issue(self._reissued(record))
        return None

    def give_back(self, record: TrialRecord) -> None:
        """Queue a trial that lost its worker before all others; it resumes from its epochs in the store."""
        self._release(record)
        self._lost.append(record)

    def progressed(self, record: TrialRecord) -> None:
        """Note a running trial's new epochs: they show which of its stages are now in the store."""
        network = record.network or ""
        if _beyond_pre_pruning(record):
            is_new = network not in self._pool
            self._pool.add(record, record.params)
            if is_new:
                self._pool.started(record)
        if record.curve[-1].post_epoch is not None:
            self._release(record)
        elif record.curve[-1].key != network and self._computing.get(network) == record.uid:
            del self._computing[network]

    def tell(self, record: TrialRecord) -> None:
        """Write an ended trial's record to the ledger, and tell its density's study the result."""
        self._release(record)
        self._pool.ended(record)
        self._ledger.publish(record)
        self._experience.ended(record, record.params)
        self._searches[record.density].tell(record)

    def _next_density(self, holding: set[float]) -> float | None:
        open_densities = [
            density
            for density in self._config.densities
            if density not in self._exhausted
            and density not in holding
            and self._issued[density] < self._config.search.trials_per_density
        ]
        return min(open_densities, key=lambda d: self._issued[d], default=None)

    def _propose(self, density: float) -> TrialRecord | None:
        """Propose and record a new trial at a density; None when the density has no points left."""
        search = self._searches[density]
        for attempt in range(_ATTEMPTS):
            proposed = self._proposal(density, attempt)
            if proposed is None:
                return None
            params, tree, branched = proposed
            try:
                record = self._ledger.propose(
                    self._problem, density, params, tree, branched=branched, also=self._config.densities
                )
            except ConfigError as error:  # its values are valid alone, but not together
                refusal = "; ".join(f"{problem.key}: {problem.rule}" for problem in error.problems)
                if refusal not in self._refusals:
                    self._refusals.add(refusal)
                    logger.warning("the space has points that are no configuration; left out: %s", refusal)
                search.refused()
                continue
            search.started(record)
            self._issued[density] += 1
            self._explored[density] += not branched
            return record
        logger.warning("density %g: no valid point in %d proposals; it gets no more", density, _ATTEMPTS)
        return None

    def _proposal(self, density: float, attempt: int) -> tuple[dict[str, Any], dict[str, Any], bool] | None:
        """Return a density's next trial, (parameters, tree, whether it branches); None if none is left."""
        search, number = self._searches[density], self._ledger.next_number(density)
        share = self._config.search.exploration * (self._issued[density] + 1)
        if self._explored[density] >= share and sum(self._explored.values()) >= branching.NETWORKS_FIRST:
            for network in self._pool.ranked(density):
                if not self._stored(network.key):
                    self._pool.remove(network.key)
                elif found := search.propose(number, network.params, attempt):
                    return *found, True
        proposal = search.propose(number, self._network(density, number, attempt), attempt)
        return None if proposal is None else (*proposal, False)

    def _network(self, density: float, number: int, attempt: int) -> dict[str, Any] | None:
        """Choose the parameters of the network that an exploring trial pre-trains.

        None where densities do not share networks, or too few were trained to choose well; Optuna then
        proposes these values too.
        """
        settings = self._config.search
        shares = settings.sampler.name != "random" and settings.exploration < 1 and len(self._pool) > 0
        if not shares or sum(self._explored.values()) < branching.NETWORKS_FIRST:
            return None
        drawn = self._searches[density].draw(number, exploration.DRAWN, attempt)
        known = [*self._pool.points, *self._experience.running]
        networks = [network for network in map(determining, drawn) if network not in known]
        found = self._experience.most_promising(networks, density)
        return None if found is None else networks[found]

    def _issue(self, record: TrialRecord) -> TrialRecord:
        self._pool.started(record)
        self._experience.begun(record)
        self._claim(record)
        return record

    def _claim(self, record: TrialRecord) -> None:
        for key in _stages_before_the_last(record):
            if not self._stored(key):
                self._computing[key] = record.uid

    def _reissued(self, record: TrialRecord) -> TrialRecord:
        record.status, record.curve, record.error = "running", [], None
        self._searches[record.density].reissue(record)
        self._ledger.publish(record)
        return record

    def _free(self, record: TrialRecord) -> bool:
        """Whether no running trial is computing a stage that this trial needs."""
        return not any(key in self._computing for key in _stages_before_the_last(record))

    def _release(self, record: TrialRecord) -> None:
        self._computing = {key: uid for key, uid in self._computing.items() if uid != record.uid}


def _stages_before_the_last(record: TrialRecord) -> list[str]:
    """The keys of all stages but the last, which other trials may need too."""
    return [key for name, key in record.keys.items() if name != LAST_STAGE]


def _beyond_pre_pruning(record: TrialRecord) -> bool:
    """Whether the trial has a pre-pruned network, and has trained epochs after pre-pruning."""
    return record.network is not None and any(epoch.stage != "pre_pruning" for epoch in record.curve)
