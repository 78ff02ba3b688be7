"""Sparse networks, tuned per density.

`run_sweep` searches a configuration per density, `run_pipeline` trains one configuration in this process, and
`load_model` loads the network that a training has saved in a folder. The commands are
`python -m prunetune.sweep`, `python -m prunetune.train` and `python -m prunetune.report`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunetune.version import __version__ as __version__

if TYPE_CHECKING:
    from prunetune.config.schema import Config
    from prunetune.errors import ConfigError, UserError, WorkError
    from prunetune.export import load_model
    from prunetune.pipeline import PipelineResult, run_pipeline
    from prunetune.sweeping.result import SweepResult
    from prunetune.sweeping.running import run_sweep


__all__ = [
    "Config",
    "ConfigError",
    "PipelineResult",
    "SweepResult",
    "UserError",
    "WorkError",
    "load_model",
    "run_pipeline",
    "run_sweep",
]

# Names are imported at first use: PyTorch takes seconds to import, and a command imports this package first.
_HOMES = {
    "Config": "config.schema",
    "ConfigError": "errors",
    "PipelineResult": "pipeline",
    "SweepResult": "sweeping.result",
    "UserError": "errors",
    "WorkError": "errors",
    "load_model": "export",
    "run_pipeline": "pipeline",
    "run_sweep": "sweeping.running",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunetune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
