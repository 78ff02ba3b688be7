"""Chooses the pre-pruned network from which the next trial branches, with a multi-armed bandit.

Pre-pruning depends neither on the density nor on the later stages, so many trials, at every density, can
prune and post-train a network that one trial has pre-trained. The bandit chooses the network by its scores
right after pruning, and by the results of its branches so far; Optuna proposes all other parameters.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunetune.records.trial import TrialRecord, is_at_density

NETWORKS_FIRST = 8
"""The number of pre-pruned networks, over all densities, that are explored before any trial branches."""

_CONFIDENCE = 0.5
"""Weight of UCB's bonus, in quantiles: with it, the best of four networks gets about half of the branches."""
_NEAR = 4.0
"""Results at another density are weighted down by this factor for each half decade between densities."""
_COLLAPSES = 2
"""After this many branches of a network collapsed at a density or above, it gets no more branches there."""
_DOUBT = 0.25
"""Weight of a prior at the average quantile, so that one lucky result cannot dominate."""
_ONE_SHOT = 2.0
"""Weight of the quantile of a network's one-shot score; a result at the same density has weight 1."""


@dataclass
class PrePruned:
    """A network after pre-pruning, and the results of the trials that branched from it.

    `key` is its key in the store; `params` are the parameters that determine it, by Optuna's names; `only` is
    the density for which it was trained, if its mask aims at one density. `best` is the best post-pruning
    validation score of its branches by density; `branches` is their number by density, running ones included.
    `one_shot` is the validation score right after pruning, by density. `collapses` are the densities at which
    branches collapsed; `worked` is the lowest density at which one did not.
    """

    key: str
    params: dict[str, Any]
    only: float | None = None
    one_shot: dict[float, float] = field(default_factory=dict)
    best: dict[float, float] = field(default_factory=dict)
    branches: Counter[float] = field(default_factory=Counter)
    collapses: list[float] = field(default_factory=list)
    worked: float = math.inf

    def fits(self, density: float) -> bool:
        """Whether a trial at this density can branch from the network."""
        return self.only in (None, density)

    def is_usable(self, density: float) -> bool:
        """Whether a branch at this density is worth a trial.

        A network that collapses at a density also collapses below it; a single collapse may be due to a bad
        learning rate.
        """
        collapses = sum(higher >= density for higher in self.collapses)
        return self.fits(density) and (collapses < _COLLAPSES or density >= self.worked)


class Pool:
    """The pre-pruned networks of a sweep."""

    def __init__(self, densities: Sequence[float] = ()) -> None:
        """`densities` are the sweep's."""
        self._all_densities = densities
        self._networks: dict[str, PrePruned] = {}

    def __len__(self) -> int:
        return len(self._networks)

    def __contains__(self, key: str) -> bool:
        return key in self._networks

    @property
    def points(self) -> list[dict[str, Any]]:
        """The parameters that determine each network."""
        return [network.params for network in self._networks.values()]

    def add(self, record: TrialRecord, params: Mapping[str, Any]) -> None:
        """Add the pre-pruned network of a trial; `params` are the trial's parameters in today's space.

        Of a network that is known already, one-shot scores at further densities are added.
        """
        if record.network is None:
            return
        measured = {density: record.one_shot(density) for density in self._all_densities}
        one_shot = {density: score for density, score in measured.items() if score is not None}
        made = PrePruned(record.network, determining(params), record.network_density)
        network = self._networks.setdefault(made.key, made)
        network.one_shot = {**one_shot, **network.one_shot}

    def remove(self, key: str) -> None:
        """Remove a network that is no longer in the store."""
        self._networks.pop(key, None)

    def started(self, record: TrialRecord) -> None:
        """Count a trial that has started as a branch of its network."""
        if record.network in self._networks:
            self._networks[record.network].branches[record.density] += 1

    def ended(self, record: TrialRecord) -> None:
        """Note the scores of a trial that has ended, and whether it collapsed, for its network."""
        network = self._networks.get(record.network or "")
        scores = [epoch.score for epoch in record.curve if is_at_density(epoch, record.density)]
        if network is None or not scores:
            return
        network.best[record.density] = max([network.best.get(record.density, -math.inf), *scores])
        if record.status == "collapsed":
            network.collapses.append(record.density)
        else:
            network.worked = min(network.worked, record.density)

    def ranked(self, density: float) -> list[PrePruned]:
        """The networks from which a trial at this density can branch, the most promising one first.

        If branches of all networks have collapsed, the density is too low for any of them, and more networks
        would not help: all are returned then.
        """
        fitting = [network for network in self._networks.values() if network.fits(density)]
        usable = [network for network in fitting if network.is_usable(density)] or fitting
        standing = {
            e: quantiles({n.key: n.best[e] for n in usable if e in n.best}) for e in _densities(usable)
        }
        one_shot = quantiles({n.key: n.one_shot[density] for n in usable if density in n.one_shot})
        trials = sum(network.branches[density] for network in usable)
        scores = {
            n.key: upper_bound(
                {e: ranks[n.key] for e, ranks in standing.items() if n.key in ranks},
                density,
                one_shot=one_shot.get(n.key),
                branches=n.branches[density],
                trials=trials,
            )
            for n in usable
        }
        return sorted(usable, key=lambda network: -scores[network.key])  # stable: the oldest first


def upper_bound(
    quantiles: Mapping[float, float],
    density: float,
    *,
    one_shot: float | None = None,
    branches: int,
    trials: int,
) -> float:
    """Upper confidence bound of a network at a density: a weighted mean of its quantiles plus a bonus.

    `quantiles` are those of the network's results by density; nearer densities weigh more. `one_shot` is the
    quantile of its score right after pruning to this density, which weighs more than any result, because
    networks without a result here have it too. The bonus is
    ½·√(ln(1 + N)/(1 + n)) if n (`branches`) of the density's N branches (`trials`) are from this network
    (Auer et al. 2002).
    """
    weights = {e: math.pow(_NEAR, -2 * abs(math.log10(e / density))) for e in quantiles}
    known = sum(weights[e] * quantile for e, quantile in quantiles.items())
    total = sum(weights.values()) + _DOUBT
    if one_shot is not None:
        known, total = known + _ONE_SHOT * one_shot, total + _ONE_SHOT
    mean = (known + _DOUBT * 0.5) / total
    return mean + _CONFIDENCE * math.sqrt(math.log(1 + trials) / (1 + branches))


def quantiles(values: Mapping[str, float]) -> dict[str, float]:
    """The quantile of each value among all, in (0, 1): its mid-rank over their number; ½ for a single value.

    >>> quantiles({"a": 0.3, "b": 0.9, "c": 0.3})
    {'a': 0.3333333333333333, 'b': 0.8333333333333334, 'c': 0.3333333333333333}
    """
    ordered = sorted(values.values())
    return {
        key: (bisect_left(ordered, value) + bisect_right(ordered, value)) / 2 / len(ordered)
        for key, value in values.items()
    }


def determining(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parameters of a point of the space that determine the pre-pruned network."""
    return {name: value for name, value in params.items() if is_determining(name)}


def is_determining(name: str) -> bool:
    """Whether the parameter with this name affects the pre-pruned network."""
    return name.split(".")[0].split("[")[0] not in ("pruning", "post_pruning")


def _densities(networks: list[PrePruned]) -> list[float]:
    return sorted({density for network in networks for density in network.best})
