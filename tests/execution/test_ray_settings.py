"""What Ray reads from the environment: there within, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prunetune.execution.ray_settings import SETTINGS, ray_settings


def test_they_hold_within_and_what_the_caller_sets_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "5")
    before = dict(os.environ)
    with ray_settings():
        within = {name: os.environ[name] for name in SETTINGS}
    assert within == {**SETTINGS, "TUNE_GLOBAL_CHECKPOINT_S": "5"}
    assert dict(os.environ) == before


def test_importing_the_executors_changes_no_setting_of_tune() -> None:
    """A program's own Tuner, after `run_sweep`, has the loggers that Tune gives it by default."""
    code = (
        "import os; before = dict(os.environ)\n"
        "import prunetune.execution.ray_tune, prunetune.execution.data_parallel\n"
        "changed = [name for name in os.environ if name.startswith('TUNE_') and name not in before]\n"
        "assert not changed, changed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
