"""Chooses which network to pre-train next: of many random points, the most promising one at a density.

At one density, too few trials pre-train a network of their own to learn from them. But every trial is
evidence about the network that it started from, and what suits a density suits neighbouring densities. So
one Gaussian process models the results at all densities, as a function of the density and the parameters
that determine the pre-pruned network.
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
"""The number of random points that are compared."""

_FEWEST = 5
"""The number of results that the model needs at least."""
_MOST = 256
"""The model is fitted to this many newest results, because a fit takes the third power of their number."""
_NORMAL = NormalDist()


class _Result(NamedTuple):
    number: int
    density: float
    params: Mapping[str, Any]
    value: float = math.nan  # NaN while the trial is running


class Experience:
    """The results of a sweep's networks, and a model that predicts those of others."""

    def __init__(self, distributions: Mapping[str, space.Distribution], densities: Sequence[float]) -> None:
        """`distributions` are the space's, by parameter name; `densities` are the sweep's."""
        self._distributions = {name: d for name, d in distributions.items() if is_determining(name)}
        self._ends = math.log(min(densities)), math.log(max(densities))
        self._results: dict[str, _Result] = {}
        self._running: dict[str, _Result] = {}

    @property
    def running(self) -> list[dict[str, Any]]:
        """The parameters of the networks that running trials pre-train."""
        return [determining(result.params) for result in self._running.values()]

    def begun(self, record: TrialRecord) -> None:
        """Note a trial that has started, if it pre-trains a network of its own."""
        if not record.branched:
            self._running[record.uid] = _Result(record.number, record.density, record.params)

    def ended(self, record: TrialRecord, params: Mapping[str, Any]) -> None:
        """Add the result of a trial that has ended without failing; `params` are its values in today's space.

        The result of a stopped trial is its last score; a diverged trial ranks below all others.
        """
        self._running.pop(record.uid, None)
        if record.finished:
            value = -math.inf if record.score is None else record.score
            self._results[record.uid] = _Result(record.number, record.density, params, value)

    def most_promising(self, networks: Sequence[Mapping[str, Any]], density: float) -> int | None:
        """Return the index of the most promising of the networks, which are given by their parameters.

        It has the greatest expected improvement over the density's best result (Jones et al. 1998). Results
        enter the model as normal scores within their density, because scores have other scales at other
        densities and drop steeply where networks collapse. Networks that are being trained enter with their
        predicted score, so that several workers do not choose the same one. None where results are too few.
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
    """Coordinates of a value in [0, 1], for the Gaussian process.

    Numbers are scaled to [0, 1], on the distribution's linear or logarithmic scale; a choice is one-hot
    without its first option. A number that does not apply (None) has the coordinate 0.5.

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
    """E[max(0, X)] for a normal X with mean `ahead` and standard deviation `deviation`.

    >>> round(expected_improvement(0.0, 1.0), 4), expected_improvement(2.0, 0.0)
    (0.3989, 2.0)
    """
    if deviation == 0:
        return max(0.0, ahead)
    z = ahead / deviation
    return ahead * _NORMAL.cdf(z) + deviation * _NORMAL.pdf(z)


def _in_order(results: Mapping[str, _Result]) -> list[_Result]:
    """Sort results by trial and density, not by time, so that a restarted sweep computes the same."""
    return sorted(results.values(), key=lambda result: (result.number, result.density))


def _scores(results: Sequence[_Result]) -> Array:
    """The normal score of each result among the results at its density."""
    scores = np.zeros(len(results))
    for density in {result.density for result in results}:
        values = {str(i): result.value for i, result in enumerate(results) if result.density == density}
        for i, quantile in quantiles(values).items():
            scores[int(i)] = _NORMAL.inv_cdf(quantile)
    return scores


def _process(points: Array, scores: Array) -> Any:
    """Fit a Gaussian process with a length scale per coordinate, by maximum likelihood (scikit-learn)."""
    # Imported here because it takes a second, and a small sweep does not need it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # for a length scale at its bound
    kernel = ConstantKernel(1.0) * Matern([0.5] * points.shape[1], (0.1, 10.0), nu=2.5)
    kernel += WhiteKernel(0.1, (0.01, 1.0))
    return GaussianProcessRegressor(kernel, random_state=0).fit(points, scores)


def _with(process: Any, points: Array, scores: Array) -> Any:
    """Return a process with the same kernel parameters, conditioned on additional points."""
    again = type(process)(process.kernel_, optimizer=None)
    return again.fit(np.vstack([process.X_train_, points]), np.concatenate([process.y_train_, scores]))
