"""Settings that Ray reads from the environment, for as long as Ray works for the project.

They hold within `ray_settings()` alone. A process may use Ray for other things before and after, such as a
`tune.Tuner` in the same notebook, which needs Ray's own defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints tables of its own
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trackers record the curves
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # sweeps are resumed from the store
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # failed trials have no metric
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our handler also says how to resume
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Values by variable. A variable that the caller has set keeps the value of the caller."""


@contextmanager
def ray_settings() -> Iterator[None]:
    """Set the variables inside the context; processes that Ray starts there inherit them."""
    added = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
