"""How Ray is to behave, in the environment that it reads when it is imported: import this before Ray."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else a reporter of its own prints tables
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the trackers have the curves
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")  # the store is what is resumed
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # failed trials have no metric
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours also says how to go on
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
