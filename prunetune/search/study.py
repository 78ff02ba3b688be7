"""What to try next at one density: an Optuna study, rebuilt from the ledger.

Ray's own OptunaSearch leaves NaN trials running, calls stopped trials complete, and cannot extend a
finished sweep. Here the study lives in memory, is told every outcome as what it is, and every proposal
is a function of the results so far, the seed, and the trial's number.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from prunetune.config import space
from prunetune.config.canonical import is_active
from prunetune.config.schema import SamplerConfig
from prunetune.engine.seeds import seed_of
from prunetune.records.problem import Problem
from prunetune.records.trial import TrialRecord
from prunetune.tasks import Metric

Study = optuna.Study


class DensitySearch:
    """Proposals at one density. The study's values are the metric's, as they are, with its direction."""

    def __init__(self, problem: Problem, density: float, *, sampler: SamplerConfig, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # else a line per trial
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._problem = problem
        self._density = density
        self._sampler = sampler
        self._seed = seed
        self._metric = problem.metric
        self._study = optuna.create_study(
            direction="maximize" if self._metric.maximize else "minimize",
            study_name=f"density-{density:.12g}",
        )
        self._asked: dict[str, optuna.Trial] = {}
        self._proposed: optuna.Trial | None = None
        self._tried: set[tuple[tuple[str, Any], ...]] = set()
        self._finite: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]] | None] = {}

    @property
    def points(self) -> int | None:
        """How many points the space has, or None where it has no end (or very many)."""
        finite = self._points_with({})
        return None if finite is None else len(finite)

    @property
    def study(self) -> optuna.Study:
        """The study, for those who want to look."""
        return self._study

    def remember(self, record: TrialRecord, params: dict[str, Any]) -> None:
        """Take a finished trial of the past into the study, at these parameters of today's space."""
        self._study.add_trial(_frozen(record, params, self._distributions(params), self._metric))
        self._tried.add(_point(params))

    def reissue(self, record: TrialRecord) -> None:
        """Take a trial that was proposed before and will run (again) now, as running."""
        self._study.enqueue_trial(record.params)
        self._asked[record.uid] = self._ask({})
        self._tried.add(_point(record.params))

    def propose(
        self, number: int, fixed: Mapping[str, Any] | None = None, attempt: int = 0
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(parameters, configuration tree) of the trial with this number; None when all has been tried.

        Parameters in `fixed` have these values; Optuna proposes the others. The proposal is not counted as
        running until `started`. A further `attempt` gives another one.
        """
        fixed = fixed or {}
        finite = self._points_with(fixed)
        untried = [point for point in finite or [] if _point(point) not in self._tried]
        if finite is not None and not untried:
            return None
        self._study.sampler = self._make_sampler(number, attempt)
        params: dict[str, Any] = {}
        if fixed:
            self._study.enqueue_trial(dict(fixed))
        trial = self._ask(params)
        if _point(params) in self._tried and finite is not None:
            # Nothing is learnt from a repeated point: take one not tried yet instead.
            self._study.tell(trial, state=TrialState.FAIL)
            params = random.Random(seed_of(self._seed, self._density, number)).choice(untried)
            self._study.enqueue_trial(params)
            trial = self._ask({})
        self._proposed = trial
        self._tried.add(_point(params))
        return params, self.tree(params)

    def draw(self, number: int, count: int, attempt: int = 0) -> list[dict[str, Any]]:
        """So many points drawn at random, for the trial with this number; the study knows nothing of them."""
        seed = seed_of(self._seed, "draw", self._density, number, attempt) % 2**32
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        drawn: list[dict[str, Any]] = [{} for _ in range(count)]
        for params in drawn:
            self._suggest(study.ask(), params)
        return drawn

    def refused(self) -> None:
        """The proposal just made is no valid configuration."""
        assert self._proposed is not None
        self._study.tell(self._proposed, state=TrialState.FAIL)
        self._proposed = None

    def started(self, record: TrialRecord) -> None:
        """The proposal just made is this record."""
        assert self._proposed is not None
        self._asked[record.uid], self._proposed = self._proposed, None

    def tree(self, params: dict[str, Any]) -> dict[str, Any]:
        """The configuration at these parameters."""
        return space.at(self._problem.template, params, is_active)

    def tell(self, record: TrialRecord) -> None:
        """Tell the study how a running trial ended."""
        trial = self._asked.pop(record.uid)
        for step, value in _intermediate(record, self._metric).items():
            trial.report(value, step)
        state = _state(record)
        values = _value(record, self._metric) if state is TrialState.COMPLETE else None
        trial.set_user_attr("status", record.status)
        self._study.tell(trial, values, state)

    def _points_with(self, fixed: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The points of the space with these values, or None where they have no end (or are very many)."""
        key = _point(fixed)
        if key not in self._finite:
            self._finite[key] = space.enumerate_finite(self._problem.template, is_active, fixed=fixed)
        return self._finite[key]

    def _ask(self, params: dict[str, Any]) -> optuna.Trial:
        """Ask the study; `params` is filled with what it proposed."""
        trial = self._study.ask()
        self._suggest(trial, params)
        return trial

    def _suggest(self, trial: optuna.Trial, params: dict[str, Any]) -> None:
        def suggest(name: str, distribution: space.Distribution) -> Any:
            params[name] = suggest_value(trial, name, distribution)
            return params[name]

        space.resolve(self._problem.template, suggest, is_active)

    def _distributions(self, params: dict[str, Any]) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {}

        def suggest(name: str, distribution: space.Distribution) -> Any:
            found[name] = _to_optuna(distribution)
            return params[name]

        space.resolve(self._problem.template, suggest, is_active)
        return found

    def _make_sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        # A fresh sampler per trial: what it draws depends on the number, not on earlier draws.
        again = [attempt] if attempt else []
        seed = seed_of(self._seed, "search", self._density, number, *again) % 2**32
        sampler: optuna.samplers.BaseSampler = self._sampler.component(seed=seed, **self._sampler.options)
        return sampler


def suggest_value(trial: optuna.Trial, name: str, distribution: space.Distribution) -> Any:
    """Ask a trial for the value of a distribution."""
    match distribution:
        case space.Uniform(low, high):
            return trial.suggest_float(name, low, high, log=isinstance(distribution, space.LogUniform))
        case space.Int(low, high):
            return trial.suggest_int(name, low, high)
        case space.Choice(labels=labels):
            return trial.suggest_categorical(name, labels)


def _to_optuna(distribution: space.Distribution) -> BaseDistribution:
    match distribution:
        case space.Uniform(low, high):
            return FloatDistribution(low, high, log=isinstance(distribution, space.LogUniform))
        case space.Int(low, high):
            return IntDistribution(low, high)
        case space.Choice(labels=labels):
            return CategoricalDistribution(labels)


def _state(record: TrialRecord) -> TrialState:
    if record.status == "failed":
        return TrialState.FAIL
    if record.status == "stopped":
        return TrialState.PRUNED
    return TrialState.COMPLETE


def _value(record: TrialRecord, metric: Metric) -> float:
    """A diverged trial counts as worse than any network that gives an answer.

    As FAIL it would be invisible to TPE, which would then go on proposing such learning rates.
    """
    return metric.worst if record.score is None else metric.value(record.score)


def _intermediate(record: TrialRecord, metric: Metric) -> dict[int, float]:
    """The metric on the validation split by post-pruning epoch."""
    return {e.post_epoch: metric.value(e.score) for e in record.curve if e.post_epoch is not None}


def _frozen(
    record: TrialRecord,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    metric: Metric,
) -> FrozenTrial:
    state = _state(record)
    intermediate = _intermediate(record, metric)
    return create_trial(
        state=state,
        value=_value(record, metric)
        if state is TrialState.COMPLETE
        else (intermediate[max(intermediate)] if intermediate else None),
        params=params,
        distributions=distributions,
        user_attrs={"status": record.status},
        intermediate_values=intermediate,
    )


def _point(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items(), key=lambda item: item[0]))
