"""The interface of tasks: everything that the pipeline must know about what a network learns.

Your own task is a subclass of `Task`, named by its import path (`task: package.module:MyTask`). Often it is a
subclass of `Classification` or `Regression` that replaces one or two methods, such as the score. Its options
are the keyword-only parameters of its constructor.

The interface is not limited to images or to a single answer per example. For a language model, for example,
inputs are sequences (N, L) int64 of indices into a vocabulary, which `batch` returns unchanged; `outputs` is
the size of the vocabulary, and `output_shape` is (L, vocabulary), because the network returns logits at each
position; targets are (N, L) int64, the sequences shifted by one position; `probe` returns indices that exist;
and the metric is the perplexity, of which lower is better, computed from the sums of losses and positions.
`Classification` already supports such targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunetune.data import Form
from prunetune.tasks.metric import Metric

SAMPLE_CLASSES = 10
"""Without classes, criteria score on as many examples as they would with this many classes."""


class Task(ABC):
    """What a network learns from data of a given form. The tensors of `form` are on the batches' device.

    Batched programs call `loss` and `sums` under `torch.func.vmap`. So both should use PyTorch's functions
    only, read no value (`.item()`), and return shapes that depend on shapes only; otherwise trials run one by
    one.
    """

    metric: ClassVar[Metric]
    """The metric by which trials are compared."""
    targets: ClassVar[str] = "classes"
    """The kind of targets, "classes" or "numbers", to ask of a data source that can give both."""
    what: ClassVar[str] = "classes"
    """What the network's outputs stand for, as messages call it."""
    gives_logits: ClassVar[bool] = False
    """Whether outputs are logits over classes, for which label smoothing and a temperature make sense."""

    def __init__(self, form: Form) -> None:
        """Make the task for data of this form; a subclass raises UserError if their targets do not fit."""
        self.form = form

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of outputs of the network's last layer."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the network's output for one example."""
        return (self.outputs,)

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a batch as stored (`Split`) into the inputs and targets that the network and `loss` take."""
        return self.form.normalize(inputs), targets

    def probe(self, count: int) -> Tensor:
        """Return inputs (count, …) of ones, on the CPU, of the type that the network takes.

        They are used to test whether a network fits the task, and which weights are on a path in it. Where
        inputs are indices, they must exist in the vocabulary, as 1 does.
        """
        kind = torch.float32 if len(self.form.mean) else torch.int64
        return torch.ones(count, *self.form.shape, dtype=kind)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        """Return the mean loss () of outputs (B, …) for targets as `batch` returns them.

        `smoothing` is the α of label smoothing; it is a tensor () where it differs between the trials of a
        batched program, and always 0.0 for a task whose outputs are not logits.
        """

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what `score` needs of a batch, (S,) float64; it is summed over batches and replicas."""

    @abstractmethod
    def score(self, sums: Tensor) -> float:
        """Return the metric's value, from the `sums` of a whole split, on the CPU."""

    @abstractmethod
    def chance(self, targets: Tensor) -> float:
        """Return the metric's value of the best constant answer to a split with these stored targets.

        A network that is no better than that has learnt nothing.
        """

    def sample(self, targets: Tensor, order: Tensor, per_class: int) -> Tensor:
        """Choose the training examples on which criteria score weights; return their indices.

        `targets` are those of the training split, as stored; `order` (N,) are all indices in random order.
        Without classes, it returns as many examples as for ten classes.
        """
        return order[: SAMPLE_CLASSES * per_class]

    def before(self) -> nn.Module:
        """The module put before an exported network: it turns inputs as stored into the network's inputs."""
        if not len(self.form.mean):
            return nn.Identity()
        dims = len(self.form.shape)
        return Affine(1 / self.form.std, -self.form.mean / self.form.std, dims)

    def after(self) -> nn.Module:
        """The module put after an exported network: it turns outputs into answers, such as probabilities."""
        return nn.Identity()


class Affine(nn.Module):
    """Computes scale · x + shift per channel or column of inputs (B, C, …) of any number type.

    `dims` is the number of dimensions of an input without B.
    """

    def __init__(self, scale: Tensor, shift: Tensor, dims: int = 1) -> None:
        super().__init__()
        view = 1, -1, *[1] * (dims - 1)
        self.register_buffer("scale", scale.detach().clone().view(view))
        self.register_buffer("shift", shift.detach().clone().view(view))

    def forward(self, x: Tensor) -> Tensor:
        """Return scale · x + shift in float32."""
        return x.float() * self.get_buffer("scale") + self.get_buffer("shift")
