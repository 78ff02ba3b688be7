"""What to try next: one Optuna study per density, rebuilt from the ledger, all densities in one queue.

Ray's own OptunaSearch leaves NaN trials running, calls stopped trials complete, and cannot extend a
finished sweep. Here the studies live in memory, are told every outcome as what it is, and every proposal
is a function of the results so far, the seed, and the trial's number.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher

from prunetune import space
from prunetune.config import is_active
from prunetune.schema import Config
from prunetune.training import seed_of
from prunetune.tuning.driver_only import DriverOnly
from prunetune.tuning.ledger import Ledger, Problem, TrialRecord

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

_DIVERGED_VALUE = 0.0
"""What a diverged trial counts to Optuna: worse than any network that gives an answer. As FAIL it would be
invisible to TPE, which would then go on proposing such learning rates."""


class DensitySearch:
    """Proposals at one density."""

    def __init__(self, problem: Problem, density: float, *, sampler: str, seed: int) -> None:
        self._problem = problem
        self._density = density
        self._sampler = sampler
        self._seed = seed
        self._study = optuna.create_study(direction="maximize", study_name=f"density-{density:.12g}")
        self._asked: dict[str, optuna.Trial] = {}
        self._proposed: optuna.Trial | None = None
        self._tried: set[tuple[tuple[str, Any], ...]] = set()
        self._finite = space.enumerate_finite(problem.template, is_active)

    @property
    def points(self) -> int | None:
        """How many points the space has, or None where it has no end (or very many)."""
        return None if self._finite is None else len(self._finite)

    @property
    def study(self) -> optuna.Study:
        """The study, for those who want to look."""
        return self._study

    def remember(self, record: TrialRecord, params: dict[str, Any]) -> None:
        """Take a finished trial of the past into the study, at these parameters of today's space."""
        self._study.add_trial(_frozen(record, params, self._distributions(params)))
        self._tried.add(_point(params))

    def reissue(self, record: TrialRecord) -> None:
        """Take a trial that was proposed before and will run (again) now, as running."""
        self._study.enqueue_trial(record.params)
        self._asked[record.uid] = self._ask({})
        self._tried.add(_point(record.params))

    def propose(self, number: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(parameters, configuration tree) of the trial with this number; None when the space is exhausted.

        The proposal is not counted as running until `started`.
        """
        self._study.sampler = self._make_sampler(number)
        params: dict[str, Any] = {}
        trial = self._ask(params)
        if _point(params) in self._tried:
            untried = [p for p in self._finite or [] if _point(p) not in self._tried]
            if self._finite is not None:
                # Nothing is learnt from a repeated point: take one not tried yet instead.
                self._study.tell(trial, state=TrialState.FAIL)
                if not untried:
                    return None
                params = random.Random(seed_of(self._seed, self._density, number)).choice(untried)
                self._study.enqueue_trial(params)
                trial = self._ask({})
        self._proposed = trial
        self._tried.add(_point(params))
        return params, self.tree(params)

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
        for step, value in _intermediate(record).items():
            trial.report(value, step)
        state = _state(record)
        values = _value(record) if state is TrialState.COMPLETE else None
        trial.set_user_attr("status", record.status)
        self._study.tell(trial, values, state)

    def _ask(self, params: dict[str, Any]) -> optuna.Trial:
        """Ask the study; `params` is filled with what it proposed."""
        trial = self._study.ask()

        def suggest(name: str, distribution: space.Distribution) -> Any:
            params[name] = _suggest(trial, name, distribution)
            return params[name]

        space.resolve(self._problem.template, suggest, is_active)
        return trial

    def _distributions(self, params: dict[str, Any]) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {}

        def suggest(name: str, distribution: space.Distribution) -> Any:
            found[name] = _to_optuna(distribution)
            return params[name]

        space.resolve(self._problem.template, suggest, is_active)
        return found

    def _make_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        # A fresh sampler per trial: what it draws depends on the number, not on earlier draws.
        seed = seed_of(self._seed, "search", self._density, number) % 2**32
        if self._sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


class SweepSearch:
    """The queue over all densities: what was under way, new proposals (densities in turn), what failed."""

    def __init__(self, config: Config, problem: Problem, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._problem = problem
        self._searches = {
            density: DensitySearch(problem, density, sampler=config.search.sampler, seed=config.seed)
            for density in config.densities
        }
        self._issued = dict.fromkeys(config.densities, 0)
        self._exhausted: set[float] = set()
        self._again: list[TrialRecord] = []  # under way when the driver ended
        self._failed: list[TrialRecord] = []
        self.past: list[TrialRecord] = []
        for record in ledger.records():
            if record.density not in self._searches:
                continue
            search = self._searches[record.density]
            params = record.params if record.space == problem.hash else problem.fit(record)
            if params is None:
                continue
            if record.finished:
                search.remember(record, params)
                self.past.append(record)
            if record.space == problem.hash:
                if not record.finished:
                    (self._failed if record.status == "failed" else self._again).append(record)
                self._issued[record.density] += 1
        # In the order in which they were proposed first.
        self._again.sort(key=lambda r: (r.number, config.densities.index(r.density)))

    def __len__(self) -> int:
        """How many trials are still to be started, if no space is exhausted before."""
        missing = sum(self.total(density) - issued for density, issued in self._issued.items())
        return missing + len(self._again) + len(self._failed)

    @property
    def to_reissue(self) -> set[str]:
        """The uids of recorded trials that will run again."""
        return {record.uid for record in (*self._again, *self._failed)}

    def total(self, density: float) -> int:
        """How many trials this density has, in this space, when the sweep is done."""
        if density in self._exhausted:
            return self._issued[density]
        points = self._searches[density].points
        wanted = self._config.search.trials_per_density
        return max(wanted if points is None else min(wanted, points), self._issued[density])

    def next(self) -> TrialRecord | None:
        """The next trial to run, recorded as running; None when all have been started."""
        if self._again:
            return self._reissue(self._again.pop(0))
        open_densities = [
            density
            for density in self._config.densities
            if density not in self._exhausted
            and self._issued[density] < self._config.search.trials_per_density
        ]
        while open_densities:
            density = min(open_densities, key=lambda d: self._issued[d])
            proposal = self._searches[density].propose(self._ledger.next_number(density))
            if proposal is None:
                self._exhausted.add(density)
                open_densities.remove(density)
                continue
            params, tree = proposal
            record = self._ledger.propose(self._problem, density, params, tree)
            self._searches[density].started(record)
            self._issued[density] += 1
            return record
        # Last: what failed before may well fail again.
        return self._reissue(self._failed.pop(0)) if self._failed else None

    def _reissue(self, record: TrialRecord) -> TrialRecord:
        record.status, record.curve, record.error = "running", [], None
        self._searches[record.density].reissue(record)
        self._ledger.publish(record)
        return record

    def tell(self, record: TrialRecord) -> None:
        """Publish how a trial ended, and tell its study."""
        self._ledger.publish(record)
        self._searches[record.density].tell(record)


class RaySearcher(DriverOnly, Searcher):  # type: ignore[misc]
    """`SweepSearch` as Ray Tune asks for it. Outcomes do not come this way: the recorder tells them."""

    def __init__(self, search: SweepSearch, started: dict[str, TrialRecord]) -> None:
        """`started` is filled: Ray's trial id to the record."""
        super().__init__(metric="val_accuracy", mode="max")
        self._search = search
        self._started = started

    def suggest(self, trial_id: str) -> Any:
        """A trial's configuration, or FINISHED."""
        record = self._search.next()
        if record is None:
            return Searcher.FINISHED
        self._started[trial_id] = record
        # One flat mapping: Ray copies, flattens and formats what it is given here.
        return {"uid": record.uid, "density": record.density, "number": record.number}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the recorder has told the study already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""


def _suggest(trial: optuna.Trial, name: str, distribution: space.Distribution) -> Any:
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


def _value(record: TrialRecord) -> float:
    return _DIVERGED_VALUE if record.val_accuracy is None else record.val_accuracy


def _intermediate(record: TrialRecord) -> dict[int, float]:
    """Post-pruning validation accuracy by post-pruning epoch."""
    return {m["post_epoch"]: m["val_accuracy"] for m in record.curve if "post_epoch" in m}


def _frozen(
    record: TrialRecord, params: dict[str, Any], distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    state = _state(record)
    intermediate = _intermediate(record)
    return create_trial(
        state=state,
        value=_value(record)
        if state is TrialState.COMPLETE
        else (intermediate[max(intermediate)] if intermediate else None),
        params=params,
        distributions=distributions,
        user_attrs={"status": record.status},
        intermediate_values=intermediate,
    )


def _point(params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items(), key=lambda item: item[0]))
