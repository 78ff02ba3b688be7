"""How Ray is to behave while it works for the project: settings that it reads from the environment.

They hold within `ray_settings()` alone. A process may use Ray for other things before and after, such as a
`tune.Tuner` in the same notebook, which wants Ray's own defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # else a reporter of its own prints tables
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trackers have the curves
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # the store is what is resumed
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # failed trials have no metric
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also says how to go on
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""By variable; what the caller's environment says itself is left as it is."""


@contextmanager
def ray_settings() -> Iterator[None]:
    """The settings within, also of the processes that Ray starts there; afterwards all is as before."""
    added = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
