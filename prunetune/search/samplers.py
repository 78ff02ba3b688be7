"""Optuna samplers that propose parameters, by their names in `search.sampler`.

Your own sampler is a function or class of the same form: it takes `seed` and its options as keywords and
returns an `optuna.samplers.BaseSampler`. A new one is made for every trial, so that its draws depend on the
trial's number and the results so far, and not on earlier draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna


def tpe(*, seed: int) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimator over all parameters together (Bergstra et al. 2011; Optuna's)."""
    import optuna  # importing it takes a second, and reading a file does not need it

    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def random(*, seed: int) -> optuna.samplers.BaseSampler:
    """Draw every parameter independently at random; results at other densities do not guide it."""
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)
