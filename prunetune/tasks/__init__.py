"""Tasks: what a network takes and returns for stored examples, its loss, and its score."""

from __future__ import annotations

from torch import nn

from prunetune import models
from prunetune.config.schema import Config, ModelConfig, TaskConfig
from prunetune.data import Form
from prunetune.tasks.classification import Classification
from prunetune.tasks.metric import ACCURACY, Metric, accuracy, one_shot_name
from prunetune.tasks.task import Task

__all__ = [
    "ACCURACY",
    "Classification",
    "Metric",
    "Task",
    "accuracy",
    "make",
    "metric_of",
    "network",
    "one_shot_name",
]


def make(config: TaskConfig, form: Form) -> Task:
    """Make the task that a configuration names, for data of this form.

    Raises UserError where the data do not have the targets that the task needs.
    """
    made: Task = config.make(form)
    return made


def metric_of(config: Config) -> Metric:
    """Return the metric by which trials of a configuration are compared."""
    metric: Metric = config.task.component.metric
    return metric


def network(config: ModelConfig, task: Task, *, seed: int) -> nn.Module:
    """Build a network on the CPU, drawn from `seed`, with a task's inputs and outputs (`models.build`)."""
    return models.build(
        config,
        task.form.shape,
        task.outputs,
        seed=seed,
        example=task.probe(2),
        output_shape=task.output_shape,
        what=task.what,
    )
