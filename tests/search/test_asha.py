from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from prunetune.search.asha import Rungs


@pytest.mark.parametrize("grace", [1, 2])
@pytest.mark.parametrize("factor", [2, 3.0, 2.5])
@pytest.mark.parametrize("every", [1, 2])
def test_trials_end_where_rays_scheduler_ends_them(grace: int, factor: float, every: int) -> None:
    """Thirty trials, their epochs interleaved at random; every second epoch alone skips rungs."""
    longest = 20
    ray = AsyncHyperBandScheduler(
        time_attr="t", metric="score", mode="max", max_t=longest, grace_period=grace,
        reduction_factor=factor, stop_last_trials=False,
    )  # fmt: skip
    rungs = Rungs(grace=grace, longest=longest, factor=factor)
    random = np.random.default_rng(0)
    trials = {str(n): SimpleNamespace(trial_id=str(n)) for n in range(30)}
    for trial in trials.values():
        ray.on_trial_add(None, trial)
    done = dict.fromkeys(trials, 0)
    stopped = 0
    while done:
        name = str(random.choice(sorted(done)))
        done[name] += every
        score = float(random.choice([0.1, 0.5, random.random()]))  # with ties
        result = {"t": done[name], "score": score}
        wanted = ray.on_trial_result(None, trials[name], result) == TrialScheduler.STOP
        assert rungs.is_behind(name, done[name], score) == wanted
        stopped += wanted
        if wanted or done[name] >= longest:
            del done[name]
    assert stopped > 5
