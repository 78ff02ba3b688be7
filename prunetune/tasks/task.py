"""The form of a task: all that the pipeline must know of what is learnt, and nothing else knows.

A task of one's own is a class like these, named by its import path (`task: package.module:MyTask`); it is
often `Classification` or `Regression` with one or two methods of its own, such as another score. Its options
are the keyword-only parameters of its constructor.

Nothing in the interface is about images or single answers. For a language model, say: inputs are sequences
(N, L) int64 of indices into a vocabulary and stay as they are (`batch`); `outputs` is the size of the
vocabulary, `output_shape` (L, vocabulary), for the network gives logits at each position; targets are
(N, L) int64, the sequence one step on; `probe` gives indices that exist; and the score is the perplexity,
lower being better, from the sums of losses and positions. `Classification` takes further dimensions already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunetune.data import Form
from prunetune.tasks.metric import Metric

SAMPLE_CLASSES = 10
"""Where there are no classes, criteria look at as many examples as of so many classes."""


class Task(ABC):
    """What is learnt from data of a form. Tensors of `form` are where batches will be.

    `loss` and `sums` are also called under `torch.func.vmap`, which batched programs use: they are made of
    PyTorch's functions, read no value (`.item()`) and give shapes that depend on shapes only. Where they
    cannot, trials run one by one.
    """

    metric: ClassVar[Metric]
    """What trials are compared by."""
    targets: ClassVar[str] = "classes"
    """What a data source that can give either is asked for: "classes" or "numbers"."""
    what: ClassVar[str] = "classes"
    """What the network's outputs stand for, in messages."""
    gives_logits: ClassVar[bool] = False
    """Whether outputs are logits over classes: then labels can be smoothed, and logits have a temperature."""

    def __init__(self, form: Form) -> None:
        """Raises UserError where the data have not the targets that the task needs."""
        self.form = form

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many numbers the network's last layer gives."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of what the network gives for one example."""
        return (self.outputs,)

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A batch as the network and `loss` take it, from one as it is stored (`Split`)."""
        return self.form.normalize(inputs), targets

    def probe(self, count: int) -> Tensor:
        """Inputs (count, …) of ones, on the CPU, of the type that the network takes.

        They find out whether a network fits, and what reaches what in it. Where inputs are indices they must
        exist in the vocabulary; 1 does.
        """
        kind = torch.float32 if len(self.form.mean) else torch.int64
        return torch.ones(count, *self.form.shape, dtype=kind)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
        """The mean loss () of outputs (B, …) for targets as `batch` gives them.

        `smoothing` is the α of label smoothing, a tensor () where it differs between the trials of a batched
        program; 0.0 always for a task whose outputs are no logits.
        """

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What `score` needs of a batch: (S,) float64, to be added up over batches and over replicas."""

    @abstractmethod
    def score(self, sums: Tensor) -> float:
        """The metric's value, from sums over a whole split, on the CPU."""

    @abstractmethod
    def chance(self, targets: Tensor) -> float:
        """The metric's value of the best constant answer to all of a split, its targets as stored.

        A network that is no better has learnt nothing.
        """

    def sample(self, targets: Tensor, order: Tensor, per_class: int) -> Tensor:
        """Which examples criteria look at: indices, from all of them in a random `order` (N,).

        `targets` are the training split's, as stored. Without classes: as many as of ten classes.
        """
        return order[: SAMPLE_CLASSES * per_class]

    def before(self) -> nn.Module:
        """What is put before an exported network: from inputs as stored to those that it takes."""
        if not len(self.form.mean):
            return nn.Identity()
        dims = len(self.form.shape)
        return Affine(1 / self.form.std, -self.form.mean / self.form.std, dims)

    def after(self) -> nn.Module:
        """What is put after an exported network: from its outputs to answers that people can use."""
        return nn.Identity()


class Affine(nn.Module):
    """x ↦ scale · x + shift, per channel or column: inputs (B, C, …) of any number type, `dims` without B."""

    def __init__(self, scale: Tensor, shift: Tensor, dims: int = 1) -> None:
        super().__init__()
        view = 1, -1, *[1] * (dims - 1)
        self.register_buffer("scale", scale.detach().clone().view(view))
        self.register_buffer("shift", shift.detach().clone().view(view))

    def forward(self, x: Tensor) -> Tensor:
        """In float32."""
        return x.float() * self.get_buffer("scale") + self.get_buffer("shift")
