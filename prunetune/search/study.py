"""The search at one density: an Optuna study, rebuilt from the ledger.

Ray's own OptunaSearch leaves NaN trials running, reports stopped trials as complete, and cannot extend a
finished sweep. The study here lives in memory and learns the true state of every trial, and every proposal
is a function of the results so far, the seed and the trial's number.
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
    """Proposes trials at one density. The study optimises the metric's own values, in its own direction."""

    def __init__(self, problem: Problem, density: float, *, sampler: SamplerConfig, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # else Optuna logs a line per trial
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
        """How many points the space has; None if they are infinitely many, or too many to list."""
        finite = self._points_with({})
        return None if finite is None else len(finite)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return self._study

    def remember(self, record: TrialRecord, params: dict[str, Any]) -> None:
        """Add a finished trial of an earlier run to the study; `params` are its values in today's space."""
        self._study.add_trial(_frozen(record, params, self._distributions(params), self._metric))
        self._tried.add(_point(params))

    def reissue(self, record: TrialRecord) -> None:
        """Add a trial that was proposed earlier and is run now (again) to the study, as running."""
        self._study.enqueue_trial(record.params)
        self._asked[record.uid] = self._ask({})
        self._tried.add(_point(record.params))

    def propose(
        self, number: int, fixed: Mapping[str, Any] | None = None, attempt: int = 0
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Propose (parameters, configuration tree) of the trial with this number; None if no point is left.

        Parameters in `fixed` keep their values; Optuna proposes the others. The study counts the proposal as
        running once `started` is called. Another value of `attempt` gives another proposal.
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
            # A repeated point teaches nothing: take an untried one instead.
            self._study.tell(trial, state=TrialState.FAIL)
            params = random.Random(seed_of(self._seed, self._density, number)).choice(untried)
            self._study.enqueue_trial(params)
            trial = self._ask({})
        self._proposed = trial
        self._tried.add(_point(params))
        return params, self.tree(params)

    def draw(self, number: int, count: int, attempt: int = 0) -> list[dict[str, Any]]:
        """Draw `count` random points for the trial with this number, without telling the study."""
        seed = seed_of(self._seed, "draw", self._density, number, attempt) % 2**32
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        drawn: list[dict[str, Any]] = [{} for _ in range(count)]
        for params in drawn:
            self._suggest(study.ask(), params)
        return drawn

    def refused(self) -> None:
        """Discard the latest proposal, because it is not a valid configuration."""
        assert self._proposed is not None
        self._study.tell(self._proposed, state=TrialState.FAIL)
        self._proposed = None

    def started(self, record: TrialRecord) -> None:
        """Note that the latest proposal runs as the trial with this record."""
        assert self._proposed is not None
        self._asked[record.uid], self._proposed = self._proposed, None

    def tree(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration tree for these parameters."""
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
        """List the points of the space with the values in `fixed`; None if they are too many to list."""
        key = _point(fixed)
        if key not in self._finite:
            self._finite[key] = space.enumerate_finite(self._problem.template, is_active, fixed=fixed)
        return self._finite[key]

    def _ask(self, params: dict[str, Any]) -> optuna.Trial:
        """Ask the study for a trial, and write the values that it proposes into `params`."""
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
        # A new sampler per trial: its draws depend on the trial's number and not on earlier draws.
        again = [attempt] if attempt else []
        seed = seed_of(self._seed, "search", self._density, number, *again) % 2**32
        sampler: optuna.samplers.BaseSampler = self._sampler.make(seed=seed)
        return sampler


def suggest_value(trial: optuna.Trial, name: str, distribution: space.Distribution) -> Any:
    """Let an Optuna trial propose a value from a distribution."""
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
    """Return the value that the study learns; for a diverged trial, the metric's worst value.

    TPE ignores trials in the state FAIL, so it would go on proposing learning rates that diverge.
    """
    return metric.worst if record.score is None else metric.value(record.score)


def _intermediate(record: TrialRecord, metric: Metric) -> dict[int, float]:
    """The metric on the validation split after each post-pruning epoch."""
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
