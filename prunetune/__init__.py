"""Sparse networks, tuned per density.

`run_pipeline` runs one configuration in this process; the commands are `python -m prunetune.sweep`,
`python -m prunetune.train` and `python -m prunetune.report`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunetune.config.schema import Config
    from prunetune.errors import ConfigError, UserError
    from prunetune.pipeline import PipelineResult, run_pipeline

__version__ = "0.1.0"

__all__ = ["Config", "ConfigError", "PipelineResult", "UserError", "run_pipeline"]

# Looked up when asked for: PyTorch takes seconds to import, and a command imports this package first.
_HOMES = {
    "Config": "config.schema",
    "ConfigError": "errors",
    "PipelineResult": "pipeline",
    "UserError": "errors",
    "run_pipeline": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunetune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
