"""The training loop of all stages, by epoch.

All random numbers of an epoch (order, augmentation, masks, dropout) follow from the stage's seed and the
epoch's number alone. So a checkpoint holds no random state, and an interrupted run gives the same bits as an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunetune.config.schema import AugmentationConfig
from prunetune.data import Dataset, Split, batches, evaluation_batches
from prunetune.data.batches import batch_length, steps_per_epoch
from prunetune.engine import cuda_graphs
from prunetune.engine.compaction import Compaction
from prunetune.engine.constraint import Constraint, DivergedError, Metrics, Unconstrained
from prunetune.engine.precision import AUTO, Precision
from prunetune.engine.replicas import ALONE, Replicas
from prunetune.engine.seeds import seed_of, seeded
from prunetune.sparsity import schedules
from prunetune.sparsity.smoothing import softened
from prunetune.tasks import Classification, Task


@dataclass(frozen=True)
class Smoothing:
    """The smoothing of an epoch: label smoothing's α, PSwish's β (None: plain ReLU), the skips' weight γ."""

    label_smoothing: float = 0.0
    beta: float | None = None
    gamma: float = 0.0

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context, the model has the softer activations and the skip connections."""
        return softened(model, beta=self.beta, gamma=self.gamma)


@dataclass
class Learner:
    """Everything with which one stage trains: the model, its optimizers, its constraint and the schedules.

    `tensors` are what an epoch checkpoint must hold besides the optimizers' state. `architecture` describes
    the configuration and the task for which the model was built, because different networks may have the same
    modules and shapes.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    tensors: dict[str, Tensor]
    lr_factor: schedules.Schedule
    constraint: Constraint = field(default_factory=Unconstrained)
    smoothing: Callable[[int], Smoothing] = lambda epoch: Smoothing()
    precision: Precision = AUTO
    replicas: Replicas = ALONE
    architecture: str = ""
    graphs: bool = False
    """Whether training steps are recorded as CUDA graphs, on a GPU."""
    compaction: Compaction | None = None
    """The pruned layers that compute without their empty rows and columns, if any."""
    task: Task | None = None
    """The task; None means classification."""

    def __post_init__(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def learns(self, data: Dataset) -> Task:
        """Return the task; without one, classification of these data."""
        return task_on(data, self.task)

    def compacted(self) -> AbstractContextManager[None]:
        """Within the context, compacted layers compute small products, both in training and evaluation."""
        return self.compaction.around(self.optimizers) if self.compaction is not None else nullcontext()


@dataclass
class EpochWork:
    """One epoch that a stage wants to have trained and validated.

    A stage yields it and continues when it is resumed. So the caller, which may drive several trials, can
    compute their epochs as one batched program, and the stages need not know of that.
    """

    learner: Learner
    data: Dataset
    epoch: int
    """The epoch's number within the stage, from 0."""
    total: int
    batch_size: int
    augmentation: AugmentationConfig | None
    seed: int
    metrics: Metrics | None = None
    """The metrics of the finished epoch; a loss that is not finite means that training diverged."""

    def run(self) -> None:
        """Train the epoch, and validate the network with the next epoch's smoothing.

        Smoothing has ended by then for the last epoch, so the last validation sees the original network.
        """
        device, learner = self.data.device, self.learner
        with (
            learner.precision.backends(device),
            cuda_graphs.recordable(device, wanted=learner.graphs),
            learner.compacted(),
        ):
            self._run()

    def _run(self) -> None:
        learner, data = self.learner, self.data
        self.metrics = {"train_loss": math.nan}
        # Each replica has other images, so it draws other dropout masks.
        rank = learner.replicas.rank
        seed = seed_of(self.seed, "modules", self.epoch, *([rank] if rank else []))
        with seeded(seed, data.device), suppress(DivergedError):
            self.metrics["train_loss"] = train_epoch(
                learner,
                data,
                self.epoch,
                total=self.total,
                batch_size=self.batch_size,
                augmentation=self.augmentation,
                seed=self.seed,
            )
        if not math.isfinite(self.metrics["train_loss"]):
            return
        learner.constraint.before_evaluation()
        with learner.smoothing(self.epoch + 1).around(learner.model):
            value, validation_loss = evaluate(
                learner.model, data, data.validation, learner.precision, learner.replicas, learner.task
            )
        learner.replicas.check_same(f"after epoch {self.epoch + 1} the weights or masks", learner.tensors)
        name = learner.learns(data).metric.val
        self.metrics.update({"val_loss": validation_loss, name: value, **learner.constraint.measure()})

    def result(self) -> Metrics:
        """Return the epoch's metrics; run the epoch first, alone, if it was not run. Raises DivergedError."""
        if self.metrics is None:
            self.run()
        assert self.metrics is not None
        if not all(math.isfinite(self.metrics.get(name, math.nan)) for name in ("train_loss", "val_loss")):
            raise DivergedError
        return self.metrics


def epochs(
    learner: Learner,
    data: Dataset,
    *,
    total: int,
    batch_size: int,
    augmentation: AugmentationConfig | None,
    seed: int,
    first: int = 0,
    stop: int | None = None,
) -> Iterator[EpochWork]:
    """Yield the epochs from `first` (counted from 0) up to, but not including, `stop` or else `total`."""
    for epoch in range(first, total if stop is None else stop):
        yield EpochWork(learner, data, epoch, total, batch_size, augmentation, seed)


def train_epoch(
    learner: Learner,
    data: Dataset,
    epoch: int,
    *,
    total: int,
    batch_size: int,
    augmentation: AugmentationConfig | None,
    seed: int,
) -> float:
    """Train for one pass over the training data; return the mean loss.

    The host waits for the device only once, to read the loss. Each of the learner's replicas computes its
    slice of every batch; gradients are summed over them, so that all replicas update their weights alike.
    """
    steps = steps_per_epoch(data, batch_size)
    order = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    drawn = torch.Generator(data.device).manual_seed(seed_of(seed, "drawn", epoch))
    smoothing = learner.smoothing(epoch)
    constraint = learner.constraint
    task = learner.learns(data)
    outputs = learner.precision.forward(learner.model.train(), data.device)
    loss_sum = torch.zeros((), device=data.device)
    replicas, whole = learner.replicas, batch_length(data, batch_size)
    part, share = replicas.part(whole), replicas.share(whole)
    pieces = batches(data, batch_size, augmentation, order=order, drawn=drawn, part=part, prepare=task.batch)

    def forward_backward(x: Tensor, y: Tensor) -> None:
        for optimizer in learner.optimizers:
            optimizer.zero_grad()
        loss = task.loss(outputs(x), y, smoothing.label_smoothing)
        if share != 1:  # then the sum over the replicas is the mean of the whole batch
            loss = loss * share
        loss.backward()
        loss_sum.add_(loss.detach())

    compute = cuda_graphs.replayed(forward_backward, data.device, wanted=learner.graphs)
    with smoothing.around(learner.model), replicas.around(learner.model):
        for index, (x, y) in enumerate(pieces):
            time = (epoch + index / steps) / total
            factor = learner.lr_factor(time)
            for optimizer in learner.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
            constraint.before_forward(drawn)
            compute(x, y)
            replicas.sum_gradients(learner.model.parameters())
            if constraint.before_step(time, epoch * steps + index):
                for optimizer in learner.optimizers:
                    optimizer.step()
            constraint.after_step()
    replicas.sum(loss_sum)
    return float(loss_sum) / steps


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    split: Split,
    precision: Precision = AUTO,
    replicas: Replicas = ALONE,
    task: Task | None = None,
) -> tuple[float, float]:
    """Return (the task's metric, the mean loss) of the model on a split, in evaluation mode.

    Each replica evaluates its part of the split. Without a task, the metric is accuracy in [0, 1] and the
    loss cross-entropy.
    """
    task = task_on(data, task)
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=data.device)
    outputs = precision.forward(model, data.device)
    sums = no_sums(task, split)
    for x, y in evaluation_batches(data, split, part=replicas.part(len(split)), prepare=task.batch):
        z = outputs(x)
        sums += task.sums(z, y)
        loss += task.loss(z, y) * len(y)
    replicas.sum(sums, loss)
    model.train(was_training)
    return task.score(sums.cpu()), float(loss) / len(split)


def no_sums(task: Task, split: Split) -> Tensor:
    """Return `Task.sums` of zero examples, to start from: a replica's part of a small split may be empty."""
    _, targets = task.batch(split.inputs[:0], split.targets[:0])
    return task.sums(torch.zeros(0, *task.output_shape, device=targets.device), targets)


def task_on(data: Dataset, task: Task | None) -> Task:
    """Return the task; without one, classification of these data, the default of configurations."""
    return task if task is not None else Classification(data.form)
