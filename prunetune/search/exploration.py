"""Which network to pre-train next: of points that Optuna draws, the one that promises most at a density.

At one density few trials pre-train a network of their own, too few to learn from. But every trial says
something of the network that it started from, and what suits a density suits its neighbours. So the results
at all densities are one Gaussian process, over what determines a network and the density.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunetune.config import space
from prunetune.records.trial import TrialRecord
from prunetune.search.branching import determining, is_determining, quantiles

Array = NDArray[np.float64]

DRAWN = 200
"""So many points are compared."""

_FEWEST = 5
"""With fewer results nothing is said."""
_MOST = 256
"""The newest results that count: a fit takes the third power of their number."""
_NORMAL = NormalDist()


class _Result(NamedTuple):
    number: int
    density: float
    params: Mapping[str, Any]
    value: float = math.nan  # of a trial that is running


class Experience:
    """What the networks of a sweep gave, and what that says of others."""

    def __init__(self, distributions: Mapping[str, space.Distribution], densities: Sequence[float]) -> None:
        """`distributions` are those of the space by name, `densities` all of the sweep's."""
        self._distributions = {name: d for name, d in distributions.items() if is_determining(name)}
        self._ends = math.log(min(densities)), math.log(max(densities))
        self._results: dict[str, _Result] = {}
        self._running: dict[str, _Result] = {}

    @property
    def running(self) -> list[dict[str, Any]]:
        """What determines the networks that are being trained."""
        return [determining(result.params) for result in self._running.values()]

    def begun(self, record: TrialRecord) -> None:
        """A trial is running; what matters is whether it pre-trains a network."""
        if not record.branched:
            self._running[record.uid] = _Result(record.number, record.density, record.params)

    def ended(self, record: TrialRecord, params: Mapping[str, Any]) -> None:
        """A trial has a result, if it has not failed; `params` are its parameters in today's space.

        Of a stopped one the last score counts, a diverged one is worse than all others.
        """
        self._running.pop(record.uid, None)
        if record.finished:
            value = -math.inf if record.score is None else record.score
            self._results[record.uid] = _Result(record.number, record.density, params, value)

    def most_promising(self, networks: Sequence[Mapping[str, Any]], density: float) -> int | None:
        """The index of the network, by its parameters, that promises most; None: nothing can be said yet.

        That with the greatest expected improvement over the density's best result (Jones et al. 1998).
        Results count as normal scores within their density: densities differ in scale, and chance is a
        cliff. Networks that are being trained count with what is expected of them: so several workers do
        not train the same one.
        """
        results = _in_order(self._results)[-_MOST:]
        if not networks or len(results) < _FEWEST or not self._distributions:
            return None
        scores = _scores(results)
        process = _process(self._points(results), scores)
        if self._running:
            running = self._points(_in_order(self._running))
            process = _with(process, running, process.predict(running))
        asked = np.array([self._point(params, density) for params in networks])
        mean, deviation = process.predict(asked, return_std=True)
        here = [score for score, result in zip(scores, results, strict=True) if result.density == density]
        best = max(here, default=float(scores.max()))
        gains = [expected_improvement(m - best, s) for m, s in zip(mean, deviation, strict=True)]
        return int(np.argmax(gains))

    def _points(self, results: Sequence[_Result]) -> Array:
        return np.array([self._point(result.params, result.density) for result in results])

    def _point(self, params: Mapping[str, Any], density: float) -> list[float]:
        low, high = self._ends
        place = (math.log(density) - low) / (high - low) if high > low else 0.5
        columns = [coordinates(d, params.get(name)) for name, d in self._distributions.items()]
        return [place, *(x for column in columns for x in column)]


def coordinates(distribution: space.Distribution, value: Any) -> list[float]:
    """A value in [0, 1]: a number on its scale, an option as one of the corners of a simplex.

    None for a number: it does not apply, and is in the middle.

    >>> coordinates(space.LogUniform(0.001, 0.1), 0.01), coordinates(space.Int(2, 6), None)
    ([0.5], [0.5])
    >>> coordinates(space.Choice(("a", "b", "c"), ("a", "b", "c")), "c")
    [0.0, 1.0]
    """
    if isinstance(distribution, space.Choice):
        return [float(value == label) for label in distribution.labels[1:]]
    if value is None or distribution.low == distribution.high:
        return [0.5]
    if isinstance(distribution, space.LogUniform):
        return [math.log(value / distribution.low) / math.log(distribution.high / distribution.low)]
    return [(value - distribution.low) / (distribution.high - distribution.low)]


def expected_improvement(ahead: float, deviation: float) -> float:
    """E max(0, X) for X normal with mean `ahead` and this standard deviation.

    >>> round(expected_improvement(0.0, 1.0), 4), expected_improvement(2.0, 0.0)
    (0.3989, 2.0)
    """
    if deviation == 0:
        return max(0.0, ahead)
    z = ahead / deviation
    return ahead * _NORMAL.cdf(z) + deviation * _NORMAL.pdf(z)


def _in_order(results: Mapping[str, _Result]) -> list[_Result]:
    """In one that does not depend on when they came: so a restarted sweep computes the same."""
    return sorted(results.values(), key=lambda result: (result.number, result.density))


def _scores(results: Sequence[_Result]) -> Array:
    """Each result's normal score among those of its density."""
    scores = np.zeros(len(results))
    for density in {result.density for result in results}:
        values = {str(i): result.value for i, result in enumerate(results) if result.density == density}
        for i, quantile in quantiles(values).items():
            scores[int(i)] = _NORMAL.inv_cdf(quantile)
    return scores


def _process(points: Array, scores: Array) -> Any:
    """A Gaussian process with a length for each coordinate, by maximum likelihood (scikit-learn)."""
    # Not at the top: a second of imports, of which a small sweep needs none.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # a length at its bound is no news
    kernel = ConstantKernel(1.0) * Matern([0.5] * points.shape[1], (0.1, 10.0), nu=2.5)
    kernel += WhiteKernel(0.1, (0.01, 1.0))
    return GaussianProcessRegressor(kernel, random_state=0).fit(points, scores)


def _with(process: Any, points: Array, scores: Array) -> Any:
    """The same process, given more points."""
    again = type(process)(process.kernel_, optimizer=None)
    return again.fit(np.vstack([process.X_train_, points]), np.concatenate([process.y_train_, scores]))
