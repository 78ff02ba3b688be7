"""Sparse networks, tuned per density.

`run_pipeline` runs one configuration in this process; the commands are `python -m prunetune.sweep`,
`python -m prunetune.train` and `python -m prunetune.report`.
"""

from prunetune.errors import ConfigError, UserError
from prunetune.pipeline import PipelineResult, run_pipeline
from prunetune.schema import Config

__version__ = "0.1.0"

__all__ = ["Config", "ConfigError", "PipelineResult", "UserError", "run_pipeline"]
