"""What proposes values: Optuna's samplers, by the name in `search.sampler`.

A sampler of one's own is a function or class of the same form: it takes `seed` and its options as keywords,
and gives an `optuna.samplers.BaseSampler`. A fresh one is made for every trial, so that what it draws depends
on the trial's number and on the results so far, not on earlier draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna


def tpe(*, seed: int) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimator over all parameters together (Bergstra et al. 2011; Optuna's)."""
    import optuna  # takes a second, and a file is read without it

    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def random(*, seed: int) -> optuna.samplers.BaseSampler:
    """Independent draws; each density is searched by itself."""
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)
