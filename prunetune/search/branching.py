"""Which pre-pruned network the next trial branches from: a bandit over those that the sweep has trained.

Pre-pruning depends neither on the density nor on what comes after it, so a network that one trial has
trained can be pruned and post-trained by many others, at every density. Here is chosen which, by what the
branches so far gave. Optuna goes on proposing everything else.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunetune.records.trial import TrialRecord, is_at_density

NETWORKS_FIRST = 8
"""So many pre-pruned networks are explored, over all densities, before any is branched from."""

_CONFIDENCE = 0.5
"""Weight of UCB's bonus, in quantiles: of four networks the best gets about half of the branches."""
_NEAR = 4.0
"""What another density says counts this many times less per half decade of distance in density."""
_COLLAPSES = 2
"""So many branches of a network have collapsed at a density or above it before it is left there."""
_DOUBT = 0.25
"""Weight of the opinion that a network is an average one, so that one lucky result is not everything."""


@dataclass
class PrePruned:
    """A network after pre-pruning, and what was made of it.

    `params` are the parameters by Optuna's names that determine it; `only` the density it belongs to where
    the mask aims at one. `best` is the best post-pruning validation score of its branches by density,
    `branches` their number, those under way included. `collapses` are the densities of those that collapsed,
    `worked` is the lowest one of a branch that did not.
    """

    key: str
    params: dict[str, Any]
    only: float | None = None
    best: dict[float, float] = field(default_factory=dict)
    branches: Counter[float] = field(default_factory=Counter)
    collapses: list[float] = field(default_factory=list)
    worked: float = math.inf

    def fits(self, density: float) -> bool:
        """Whether there can be a branch at this density."""
        return self.only in (None, density)

    def is_usable(self, density: float) -> bool:
        """Whether one is worth a trial: what collapsed will at lower densities. Once may be a bad rate."""
        collapses = sum(higher >= density for higher in self.collapses)
        return self.fits(density) and (collapses < _COLLAPSES or density >= self.worked)


class Pool:
    """The pre-pruned networks of a sweep."""

    def __init__(self) -> None:
        self._networks: dict[str, PrePruned] = {}

    def __len__(self) -> int:
        return len(self._networks)

    def __contains__(self, key: str) -> bool:
        return key in self._networks

    @property
    def points(self) -> list[dict[str, Any]]:
        """What determines each network."""
        return [network.params for network in self._networks.values()]

    def add(self, record: TrialRecord, params: Mapping[str, Any]) -> None:
        """The network of a record that has come beyond pre-pruning; its parameters in today's space."""
        if record.network is None:
            return
        network = PrePruned(record.network, determining(params), record.network_density)
        self._networks.setdefault(network.key, network)

    def remove(self, key: str) -> None:
        """The network is not in the store any more."""
        self._networks.pop(key, None)

    def started(self, record: TrialRecord) -> None:
        """A branch is under way."""
        if record.network in self._networks:
            self._networks[record.network].branches[record.density] += 1

    def ended(self, record: TrialRecord) -> None:
        """A branch has given what it gives."""
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
        """The networks that a trial at this density can branch from, the one to take first.

        Where branches of all of them have collapsed, the density asks too much, and more networks would not
        help: then these are all.
        """
        fitting = [network for network in self._networks.values() if network.fits(density)]
        usable = [network for network in fitting if network.is_usable(density)] or fitting
        standing = {
            e: quantiles({n.key: n.best[e] for n in usable if e in n.best}) for e in _densities(usable)
        }
        trials = sum(network.branches[density] for network in usable)
        scores = {
            n.key: upper_bound(
                {e: ranks[n.key] for e, ranks in standing.items() if n.key in ranks},
                density,
                branches=n.branches[density],
                trials=trials,
            )
            for n in usable
        }
        return sorted(usable, key=lambda network: -scores[network.key])  # stable: the oldest first


def upper_bound(quantiles: Mapping[float, float], density: float, *, branches: int, trials: int) -> float:
    """UCB of a network at a density: mean of its quantiles, nearer densities counting more, and a bonus.

    The bonus is ½·√(ln(1 + N)/(1 + n)), with n of the density's N branches its own (Auer et al. 2002).
    """
    weights = {e: math.pow(_NEAR, -2 * abs(math.log10(e / density))) for e in quantiles}
    known = sum(weights[e] * quantile for e, quantile in quantiles.items())
    mean = (known + _DOUBT * 0.5) / (sum(weights.values()) + _DOUBT)
    return mean + _CONFIDENCE * math.sqrt(math.log(1 + trials) / (1 + branches))


def quantiles(values: Mapping[str, float]) -> dict[str, float]:
    """The share of the values that each is better than or equal to, in (0, 1); ½ for a single one.

    >>> quantiles({"a": 0.3, "b": 0.9, "c": 0.3})
    {'a': 0.3333333333333333, 'b': 0.8333333333333334, 'c': 0.3333333333333333}
    """
    ordered = sorted(values.values())
    return {
        key: (bisect_left(ordered, value) + bisect_right(ordered, value)) / 2 / len(ordered)
        for key, value in values.items()
    }


def determining(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a point of the space, what determines the pre-pruned network."""
    return {name: value for name, value in params.items() if is_determining(name)}


def is_determining(name: str) -> bool:
    """Whether the parameter with this name has a part in the pre-pruned network."""
    return name.split(".")[0].split("[")[0] not in ("pruning", "post_pruning")


def _densities(networks: list[PrePruned]) -> list[float]:
    return sorted({density for network in networks for density in network.best})
