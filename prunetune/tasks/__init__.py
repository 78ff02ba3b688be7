"""What is learnt: from stored examples to what a network takes and gives, the loss, and the score."""

from __future__ import annotations

from torch import nn

from prunetune import models
from prunetune.config.schema import Config, ModelConfig, TaskConfig
from prunetune.data import Form
from prunetune.tasks.classification import Classification
from prunetune.tasks.metric import ACCURACY, Metric, accuracy
from prunetune.tasks.task import Task

__all__ = ["ACCURACY", "Classification", "Metric", "Task", "accuracy", "make", "metric_of", "network"]


def make(config: TaskConfig, form: Form) -> Task:
    """The task that a configuration names, for data of this form.

    Raises UserError where the data have not the targets that it needs.
    """
    made: Task = config.component(form, **config.options)
    return made


def metric_of(config: Config) -> Metric:
    """What trials of a configuration are compared by."""
    metric: Metric = config.task.component.metric
    return metric


def network(config: ModelConfig, task: Task, *, seed: int) -> nn.Module:
    """A network on the CPU with the inputs and outputs of a task, drawn from `seed` (`models.build`)."""
    return models.build(
        config,
        task.form.shape,
        task.outputs,
        seed=seed,
        example=task.probe(2),
        output_shape=task.output_shape,
        what=task.what,
    )
