"""What to try next: all densities in one queue, planned so that no stage is computed twice."""

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
"""So many invalid points in a row are drawn before a space is taken for exhausted."""


class SweepSearch:
    """The queue over all densities: what was under way, new proposals (densities in turn), what failed.

    A new proposal either explores, with a pre-pruning stage of its own, or branches from a pre-pruned
    network that is in the store (`search.exploration` is the share of the former at each density, after a
    few to choose from). What would compute a stage that a running trial is computing waits until that is
    in the store.
    """

    def __init__(
        self,
        config: Config,
        problem: Problem,
        ledger: Ledger,
        stored: Callable[[str], bool] = lambda key: False,
    ) -> None:
        """`stored` says whether the stage with a key is in the store."""
        self._config = config
        self._ledger = ledger
        self._problem = problem
        self._stored = stored
        self._pool = Pool()
        self._experience = Experience(space.parameters(problem.template, is_active), config.densities)
        self._computing: dict[str, str] = {}  # stages' keys, to the uids of the trials that compute them
        self._searches = {
            density: DensitySearch(problem, density, sampler=config.search.sampler, seed=config.seed)
            for density in config.densities
        }
        self._issued = dict.fromkeys(config.densities, 0)
        self._explored = dict.fromkeys(config.densities, 0)
        self._exhausted: set[float] = set()
        self._again: list[TrialRecord] = []  # under way when the driver ended
        self._lost: list[TrialRecord] = []  # given back by workers that were lost
        self._held: list[TrialRecord] = []  # proposed, but a running trial computes a stage of theirs
        self._failed: list[TrialRecord] = []
        self._refusals: set[str] = set()
        self.past: list[TrialRecord] = []
        for record in ledger.records():
            if record.density not in self._searches:
                continue
            params = record.params if record.space == problem.hash else problem.fit(record)
            if params is not None:
                self._remember(record, params)
        # In the order in which they were proposed first.
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
        """How many trials are still to be started, if no space is exhausted before."""
        missing = sum(self.total(density) - issued for density, issued in self._issued.items())
        return missing + len(self._again) + len(self._lost) + len(self._held) + len(self._failed)

    def total(self, density: float) -> int:
        """How many trials this density has, in this space, when the sweep is done."""
        if density in self._exhausted:
            return self._issued[density]
        points = self._searches[density].points
        wanted = self._config.search.trials_per_density
        return max(wanted if points is None else min(wanted, points), self._issued[density])

    @property
    def studies(self) -> dict[float, Study]:
        """Each density's study, for those who want to look."""
        return {density: search.study for density, search in self._searches.items()}

    @property
    def waiting(self) -> bool:
        """Whether `next` gave None although trials are left: they wait for stages under way."""
        return bool(self._lost or self._held or self._again or self._failed)

    def next(self) -> TrialRecord | None:
        """The next trial to run, recorded as running; None when there is none, or none yet (`waiting`)."""
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
        # Last: what failed before may well fail again.
        if not self._held:
            for record in self._failed:
                if self._free(record):
                    self._failed.remove(record)
                    return self._issue(self._reissued(record))
        return None

    def give_back(self, record: TrialRecord) -> None:
        """A running trial has lost its worker: it is the next to go on, from its epochs in the store."""
        self._release(record)
        self._lost.append(record)

    def progressed(self, record: TrialRecord) -> None:
        """A running trial has new epochs in its curve: perhaps a stage of it is now in the store."""
        network = record.network or ""
        if _beyond_pre_pruning(record) and network not in self._pool:
            self._pool.add(record, record.params)
            self._pool.started(record)
        if record.curve[-1].post_epoch is not None:
            self._release(record)
        elif record.curve[-1].key != network and self._computing.get(network) == record.uid:
            del self._computing[network]

    def tell(self, record: TrialRecord) -> None:
        """Publish how a trial ended, and tell its study."""
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
        """A new record at a density; None when its space is exhausted."""
        search = self._searches[density]
        for attempt in range(_ATTEMPTS):
            proposed = self._proposal(density, attempt)
            if proposed is None:
                return None
            params, tree, branched = proposed
            try:
                record = self._ledger.propose(self._problem, density, params, tree, branched=branched)
            except ConfigError as error:  # two values that are valid, but not together
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
        """(parameters, tree, whether it branches) of the next trial at a density."""
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
        """What determines the network that a trial is to pre-train; None: that is the study's to propose.

        It is where nothing is shared: each density is searched by itself, or no networks are pre-trained.
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
        """Whether no running trial computes a stage of this one."""
        return not any(key in self._computing for key in _stages_before_the_last(record))

    def _release(self, record: TrialRecord) -> None:
        self._computing = {key: uid for key, uid in self._computing.items() if uid != record.uid}


def _stages_before_the_last(record: TrialRecord) -> list[str]:
    """The keys of what another trial may also need."""
    return [key for name, key in record.keys.items() if name != LAST_STAGE]


def _beyond_pre_pruning(record: TrialRecord) -> bool:
    """Whether the network that pre-pruning gave is there, and was pruned."""
    return record.network is not None and any(epoch.stage != "pre_pruning" for epoch in record.curve)
