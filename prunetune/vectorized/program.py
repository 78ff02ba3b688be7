"""The batched program that trains one epoch of K trials of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from prunetune.data import batches, evaluation_batches
from prunetune.data.batches import steps_per_epoch
from prunetune.engine import cuda_graphs
from prunetune.engine.batched_optimizers import batched
from prunetune.engine.constraint import Batched, Metrics, Rows
from prunetune.engine.loop import EpochWork, Learner, Smoothing, no_sums
from prunetune.engine.seeds import seed_of
from prunetune.sparsity.masks import fill_uniform, prunable
from prunetune.sparsity.smoothing import softened


@final
class Program:
    """One epoch of K trials as a batched program; the trials' own tensors change only when it is done."""

    def __init__(self, works: list[EpochWork]) -> None:
        self._works = works
        self._learners = [work.learner for work in works]
        self._data = works[0].data
        self._device = self._data.device
        self._task = works[0].learner.learns(self._data)
        self._model = works[0].learner.model  # only its structure is used
        self._steps = steps_per_epoch(self._data, works[0].batch_size)
        weights = prunable(self._model)
        every = dict(self._model.named_parameters())
        self._names = [*weights, *(name for name in every if name not in weights)]
        self._prunable = sum(weight.numel() for weight in weights.values())
        # The tensors that the optimizers update (K, n), prunable weights first.
        parameters = [self._optimized_parameters(learner) for learner in self._learners]
        self._optimized = torch.stack([torch.cat([p.detach().flatten() for p in row]) for row in parameters])
        self._optimizer = batched(
            [learner.optimizers[0] for learner in self._learners], parameters, self._optimized
        )
        constraints = [learner.constraint for learner in self._learners]
        form: Any = type(constraints[0])
        rows = Rows(self._optimized, self._prunable)
        self._constraint: Batched = form.batched(constraints, rows)
        self._views = dict(self._cut(self._constraint.used))
        buffers = [dict(learner.model.named_buffers()) for learner in self._learners]
        self._buffers = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}

    def run(self) -> list[Metrics]:
        """Train and validate all trials; return the metrics of each, as it would have them alone."""
        learner, device = self._learners[0], self._device
        with learner.precision.backends(device), cuda_graphs.recordable(device, wanted=learner.graphs):
            return self._run()

    def _run(self) -> list[Metrics]:
        training = self._model.training
        try:
            losses = self._train().tolist()
            with torch.no_grad():
                self._constraint.before_evaluation()
            values, validation_loss = self._evaluate()
        finally:
            self._model.train(training)
        measured = self._constraint.measure()
        self._write_back()
        found = []
        for k, loss in enumerate(losses):
            metrics = {"train_loss": loss}
            if math.isfinite(loss):
                value = {self._task.metric.val: values[k]}
                metrics.update({"val_loss": validation_loss[k], **value, **measured[k]})
            found.append(metrics)
        return found

    def _train(self) -> Tensor:
        """Run all steps of the epoch; return the mean loss of each trial (K,)."""
        smoothing = [work.learner.smoothing(work.epoch) for work in self._works]
        alpha = self._vector([s.label_smoothing for s in smoothing])
        is_smoothed = any(s.label_smoothing for s in smoothing)
        forward, shared = self._forward(smoothing), len(self._streams) == 1
        times = self._times()
        parameters = {name: view.requires_grad_() for name, view in self._views.items()}
        self._model.train()
        total = torch.zeros(len(self._works), device=self._device)

        def step(x: Tensor, y: Tensor, uniform: Tensor | None, now: Tensor) -> None:
            factor, changing = now[0][:, None], now[1:]
            with torch.no_grad():
                self._constraint.before_forward(uniform, changing)
            losses = self._losses(forward(parameters, x, shared), y, alpha if is_smoothed else 0.0, shared)
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
            with torch.no_grad():
                gradient = torch.cat([g.reshape(len(self._works), -1) for g in gradients], 1)
                self._constraint.before_step(gradient, factor, changing)
                self._optimizer.step(gradient, factor)
                self._constraint.after_step(changing)
                total.add_(losses.detach())

        compute = cuda_graphs.replayed(step, self._device, wanted=self._learners[0].graphs)
        for batch, now in zip(self._batches(), times, strict=True):
            compute(*batch, now)
        return total / self._steps

    def _forward(self, smoothing: Sequence[Smoothing]) -> Any:
        """Return a function from (parameters, inputs, shared) to outputs (K, B, …).

        `shared` says whether all trials have the same inputs, which then lack the leading K.
        """
        is_bf16 = self._works[0].learner.precision.is_bf16(self._device)
        betas = [math.inf if s.beta is None else s.beta for s in smoothing]
        beta = None if all(map(math.isinf, betas)) else self._vector(betas)
        gamma = self._vector([s.gamma for s in smoothing]) if any(s.gamma for s in smoothing) else None

        def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, beta: Any, gamma: Any) -> Tensor:
            with softened(self._model, beta=beta, gamma=0.0 if gamma is None else gamma):
                outputs: Tensor = functional_call(self._model, (p, b), (x,))
                return outputs

        def forward(parameters: dict[str, Tensor], x: Tensor, shared: bool) -> Tensor:
            dims = (0, 0, None if shared else 0, None if beta is None else 0, None if gamma is None else 0)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16):
                outputs: Tensor = vmap(one, in_dims=dims)(parameters, self._buffers, x, beta, gamma)
            return outputs.float()

        return forward

    @property
    def _streams(self) -> list[tuple[int, int]]:
        """The distinct pairs (seed, epoch) of the trials; with one pair, all trials see the same batches."""
        return list(dict.fromkeys((work.seed, work.epoch) for work in self._works))

    def _losses(self, outputs: Tensor, y: Tensor, smoothing: Tensor | float, shared: bool) -> Tensor:
        """Return each trial's mean loss (K,) of outputs (K, B, …), with each trial's label smoothing α.

        `shared` says whether all trials have the same targets, which then lack the leading K.
        """
        by_trial = 0 if isinstance(smoothing, Tensor) else None
        losses: Tensor = vmap(self._task.loss, in_dims=(0, None if shared else 0, by_trial))(
            outputs, y, smoothing
        )
        return losses

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield inputs (B, …), targets (B, …) and, for masks, uniform random numbers (n,).

        All have a leading K where trials see different batches.
        """
        streams = self._streams
        index = torch.tensor([streams.index((w.seed, w.epoch)) for w in self._works], device=self._device)
        drawn = [torch.Generator(self._device).manual_seed(seed_of(s, "drawn", e)) for s, e in streams]
        work = self._works[0]
        sources = [
            batches(
                self._data,
                work.batch_size,
                work.augmentation,
                order=torch.Generator().manual_seed(seed_of(seed, "order", epoch)),
                drawn=generator,
                prepare=self._task.batch,
            )
            for (seed, epoch), generator in zip(streams, drawn, strict=True)
        ]
        shared = len(streams) == 1

        def together(pieces: Sequence[Tensor]) -> Tensor:
            return pieces[0] if shared else torch.stack(list(pieces))[index]

        for parts in zip(*sources, strict=True):
            uniform = None
            if self._constraint.draws:
                uniform = together(
                    [
                        fill_uniform(torch.empty(self._prunable, device=self._device), generator=g)
                        for g in drawn
                    ]
                )
            yield together([x for x, _ in parts]), together([y for _, y in parts]), uniform

    def _times(self) -> Tensor:
        """Return the numbers that change from step to step, for all steps at once, on the device.

        Their shape is (steps, 1 + V, K): the factors of the learning rates, then the V lists of
        `Batched.schedule`. So nothing is copied to the device between steps.
        """
        now = []
        for step in range(self._steps):
            times = [(work.epoch + step / self._steps) / work.total for work in self._works]
            factor = [work.learner.lr_factor(t) for work, t in zip(self._works, times, strict=True)]
            now.append([factor, *self._constraint.schedule(times)])
        return torch.tensor(now, device=self._device)

    @torch.no_grad()
    def _evaluate(self) -> tuple[list[float], list[float]]:
        """Return (validation metric, validation loss) of each trial, with the next epoch's smoothing."""
        smoothing = [work.learner.smoothing(work.epoch + 1) for work in self._works]
        forward = self._forward(smoothing)
        split, count = self._data.validation, len(self._works)
        self._model.eval()
        sums = no_sums(self._task, split).expand(count, -1).clone()
        loss = torch.zeros(count, device=self._device)
        for x, y in evaluation_batches(self._data, split, prepare=self._task.batch):
            outputs = forward(self._views, x, True)
            sums += vmap(self._task.sums, in_dims=(0, None))(outputs, y)
            loss += self._losses(outputs, y, 0.0, True) * len(y)
        return [self._task.score(s) for s in sums.cpu()], (loss / len(split)).tolist()

    @torch.no_grad()
    def _write_back(self) -> None:
        """Copy all results into the trials' own models, masks and optimizers."""
        self._optimizer.write_back()
        self._constraint.write_back()
        for k, learner in enumerate(self._learners):
            offset = 0
            for parameter in self._optimized_parameters(learner):
                row = self._optimized[k, offset : offset + parameter.numel()]
                parameter.copy_(row.view(parameter.shape))
                offset += parameter.numel()
            for name, buffer in learner.model.named_buffers():
                buffer.copy_(self._buffers[name][k])
            learner.constraint.before_evaluation()

    def _optimized_parameters(self, learner: Learner) -> list[nn.Parameter]:
        """The parameters that a trial's first optimizer updates, in the order of `_names`.

        A constraint with an attribute `parameters`, such as a learnable mask, puts its own in the place of
        the prunable weights.
        """
        parameters = dict(learner.model.named_parameters())
        instead = getattr(learner.constraint, "parameters", None)
        if instead is None:
            return [parameters[name] for name in self._names]
        weights = prunable(learner.model)
        return [*instead, *(parameters[name] for name in self._names if name not in weights)]

    def _cut(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its view (K, …) of a flat tensor (K, n)."""
        offset, parameters = 0, dict(self._model.named_parameters())
        for name in self._names:
            shape = parameters[name].shape
            yield name, flat[:, offset : offset + shape.numel()].view(-1, *shape).detach()
            offset += shape.numel()

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)
