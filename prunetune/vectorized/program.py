"""One epoch of K trials of a model as one batched program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from prunetune.data import batches, evaluation_batches
from prunetune.data.batches import steps_per_epoch
from prunetune.engine import cuda_graphs
from prunetune.engine.loop import EpochWork, Learner, Metrics, Smoothing, seed_of
from prunetune.methods.pruned import Pruned
from prunetune.sparsity.dynamic import shift_to_count
from prunetune.sparsity.masks import fill_uniform, prunable
from prunetune.sparsity.smoothing import softened
from prunetune.stages.pre_pruning import MaskLearning
from prunetune.vectorized.optimizers import batched

_SHIFTS = vmap(shift_to_count)


class _Times(NamedTuple):
    """Per step, on the device: (learning rates' factors, λ2) by trial (2, K); masks' targets (K,) or None."""

    now: Tensor
    targets: Sequence[Tensor | None]


@final
class Program:
    """One epoch of K trials. Nothing of the trials changes before the epoch is done."""

    def __init__(self, works: list[EpochWork]) -> None:
        self._works = works
        self._learners = [work.learner for work in works]
        self._data = works[0].data
        self._device = self._data.device
        self._model = works[0].learner.model  # for its structure
        self._steps = steps_per_epoch(self._data, works[0].batch_size)
        weights = prunable(self._model)
        every = dict(self._model.named_parameters())
        self._names = [*weights, *(name for name in every if name not in weights)]
        self._prunable = sum(weight.numel() for weight in weights.values())
        # What the optimizers step (K, n), prunable weights first; `used` is what the model computes with.
        parameters = [self._optimized_parameters(learner) for learner in self._learners]
        self._optimized = torch.stack([torch.cat([p.detach().flatten() for p in row]) for row in parameters])
        self._mask_learning = [
            learner.constraint for learner in self._learners if isinstance(learner.constraint, MaskLearning)
        ]
        self._fixed: Tensor | None = None
        if self._mask_learning:
            self._used = self._optimized.clone()
            self._masks = torch.stack([c.mask.mask.detach() for c in self._mask_learning])
            self._mask_optimizer = batched(
                [learner.optimizers[1] for learner in self._learners],
                [[c.mask.mask] for c in self._mask_learning],
                self._masks,
            )
            self._lambda1 = self._column([c.lambda1 for c in self._mask_learning])
        else:
            self._used = self._optimized
            if isinstance(self._learners[0].constraint, Pruned):
                self._fixed = torch.stack([self._fixed_mask(learner) for learner in self._learners])
        self._optimizer = batched(
            [learner.optimizers[0] for learner in self._learners], parameters, self._optimized
        )
        self._views = dict(self._cut(self._used))
        buffers = [dict(learner.model.named_buffers()) for learner in self._learners]
        self._buffers = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}

    def run(self) -> list[Metrics]:
        """Train and validate; each trial's metrics, as it would have them alone."""
        learner, device = self._learners[0], self._device
        with learner.precision.backends(device), cuda_graphs.recordable(device, wanted=learner.graphs):
            return self._run()

    def _run(self) -> list[Metrics]:
        training = self._model.training
        try:
            losses = self._train().tolist()
            self._evaluation_weights()
            accuracy, validation_loss = self._evaluate()
        finally:
            self._model.train(training)
        measured = self._measure()
        self._write_back()
        found = []
        for k, loss in enumerate(losses):
            metrics = {"train_loss": loss}
            if math.isfinite(loss):
                metrics.update(val_loss=validation_loss[k], val_accuracy=accuracy[k], **measured[k])
            found.append(metrics)
        return found

    def _train(self) -> Tensor:
        """Every step; the mean loss of each trial (K,)."""
        smoothing = [work.learner.smoothing(work.epoch) for work in self._works]
        alpha = self._vector([s.label_smoothing for s in smoothing])
        is_smoothed = any(s.label_smoothing for s in smoothing)
        forward = self._forward(smoothing)
        times = self._times()
        parameters = {name: view.requires_grad_() for name, view in self._views.items()}
        self._model.train()
        total = torch.zeros(len(self._works), device=self._device)

        def step(x: Tensor, y: Tensor, uniform: Tensor | None, now: Tensor, target: Tensor | None) -> None:
            if uniform is not None:
                with torch.no_grad():
                    drawn = (uniform < self._masks).to(self._used.dtype)
                    torch.mul(
                        self._optimized[:, : self._prunable], drawn, out=self._used[:, : self._prunable]
                    )
                    self._used[:, self._prunable :] = self._optimized[:, self._prunable :]
            losses = _cross_entropy(forward(parameters, x), y, alpha if is_smoothed else None)
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
            with torch.no_grad():
                gradient = torch.cat([g.reshape(len(self._works), -1) for g in gradients], 1)
                factor, lambda2 = now[..., None]
                if uniform is not None:
                    theta = self._optimized[:, : self._prunable]
                    # As `mask_gradients`, with λ by row.
                    push = self._lambda1 * (1 - 2 * self._masks) + lambda2
                    of_mask = push.addcmul_(gradient[:, : self._prunable], theta)
                    gradient[:, : self._prunable].mul_(drawn)
                    self._mask_optimizer.step(of_mask, factor)
                    if target is not None:
                        self._masks.sub_(_SHIFTS(self._masks, target)[:, None])
                    self._masks.clamp_(0, 1)
                self._optimizer.step(gradient, factor)
                if self._fixed is not None:
                    self._optimized[:, : self._prunable].mul_(self._fixed)
                total.add_(losses.detach())

        compute = cuda_graphs.replayed(step, self._device, wanted=self._learners[0].graphs)
        for batch, now, target in zip(self._batches(), times.now, times.targets, strict=True):
            compute(*batch, now, target)
        return total / self._steps

    def _forward(self, smoothing: Sequence[Smoothing]) -> Any:
        """(parameters, images) to logits (K, B, classes)."""
        is_bf16 = self._works[0].learner.precision.is_bf16(self._device)
        betas = [math.inf if s.beta is None else s.beta for s in smoothing]
        beta = None if all(map(math.isinf, betas)) else self._vector(betas)
        gamma = self._vector([s.gamma for s in smoothing]) if any(s.gamma for s in smoothing) else None

        def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, beta: Any, gamma: Any) -> Tensor:
            with softened(self._model, beta=beta, gamma=0.0 if gamma is None else gamma):
                logits: Tensor = functional_call(self._model, (p, b), (x,))
                return logits

        def forward(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            shared = x.dim() == 4  # the same batch for all
            dims = (0, 0, None if shared else 0, None if beta is None else 0, None if gamma is None else 0)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16):
                logits: Tensor = vmap(one, in_dims=dims)(parameters, self._buffers, x, beta, gamma)
            return logits.float()

        return forward

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Images (B, C, H, W), labels (B,) and for masks uniform draws (n,), or all with a leading K."""
        streams = list(dict.fromkeys((work.seed, work.epoch) for work in self._works))
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
            )
            for (seed, epoch), generator in zip(streams, drawn, strict=True)
        ]
        shared = len(streams) == 1

        def together(pieces: Sequence[Tensor]) -> Tensor:
            return pieces[0] if shared else torch.stack(list(pieces))[index]

        for parts in zip(*sources, strict=True):
            uniform = None
            if self._mask_learning:
                uniform = together(
                    [
                        fill_uniform(torch.empty(self._prunable, device=self._device), generator=g)
                        for g in drawn
                    ]
                )
            yield together([x for x, _ in parts]), together([y for _, y in parts]), uniform

    def _times(self) -> _Times:
        """The schedules of the epoch, for all steps at once: nothing is copied to the device in between."""
        now, targets = [], []
        for step in range(self._steps):
            times = [(work.epoch + step / self._steps) / work.total for work in self._works]
            factor = [work.learner.lr_factor(t) for work, t in zip(self._works, times, strict=True)]
            masks = list(zip(self._mask_learning, times, strict=False))
            now.append([factor, [c.lambda2(t) for c, t in masks] or [0.0] * len(times)])
            targets.append([c.target(t) * self._prunable for c, t in masks if c.target])
        has_target = bool(targets[0])
        return _Times(
            torch.tensor(now, device=self._device),
            list(torch.tensor(targets, device=self._device)) if has_target else [None] * self._steps,
        )

    def _evaluation_weights(self) -> None:
        if self._mask_learning:
            with torch.no_grad():
                self._used.copy_(self._optimized)
                self._used[:, : self._prunable].mul_(self._masks)

    @torch.no_grad()
    def _evaluate(self) -> tuple[list[float], list[float]]:
        """Validation accuracy and loss by trial, of the networks at the start of the next epoch."""
        smoothing = [work.learner.smoothing(work.epoch + 1) for work in self._works]
        forward = self._forward(smoothing)
        split, count = self._data.validation, len(self._works)
        self._model.eval()
        correct = torch.zeros(count, dtype=torch.int64, device=self._device)
        loss = torch.zeros(count, device=self._device)
        for x, y in evaluation_batches(self._data, split):
            logits = forward(self._views, x)
            correct += (logits.argmax(2) == y).sum(1)
            loss += _cross_entropy(logits, y, None) * len(y)
        return [c / len(split) for c in correct.tolist()], (loss / len(split)).tolist()

    def _measure(self) -> list[Metrics]:
        if not self._mask_learning:
            return [{} for _ in self._works]
        density, is_open = self._masks.mean(1).tolist(), (self._masks > 0.5).float().mean(1).tolist()
        return [{"mask_density": d, "mask_open": o} for d, o in zip(density, is_open, strict=True)]

    @torch.no_grad()
    def _write_back(self) -> None:
        """Into the trials' own models, masks and optimizers."""
        self._optimizer.write_back()
        if self._mask_learning:
            self._mask_optimizer.write_back()
        for k, learner in enumerate(self._learners):
            offset = 0
            for parameter in self._optimized_parameters(learner):
                row = self._optimized[k, offset : offset + parameter.numel()]
                parameter.copy_(row.view(parameter.shape))
                offset += parameter.numel()
            if isinstance(learner.constraint, MaskLearning):
                learner.constraint.mask.mask.copy_(self._masks[k])
            for name, buffer in learner.model.named_buffers():
                buffer.copy_(self._buffers[name][k])
            learner.constraint.before_evaluation()

    def _optimized_parameters(self, learner: Learner) -> list[nn.Parameter]:
        """What the first optimizer steps, prunable weights first, in the order of `_names`."""
        parameters = dict(learner.model.named_parameters())
        if not isinstance(learner.constraint, MaskLearning):
            return [parameters[name] for name in self._names]
        weights = prunable(learner.model)
        dense = [parameters[name] for name in self._names if name not in weights]
        return [learner.constraint.mask.theta, *dense]

    def _fixed_mask(self, learner: Learner) -> Tensor:
        """The mask over all prunable weights (n,) as floats."""
        assert isinstance(learner.constraint, Pruned)
        masks = learner.constraint.mask.masks
        weights = prunable(learner.model)
        return torch.cat([masks.get(name, torch.ones_like(w)).flatten() for name, w in weights.items()])

    def _cut(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views (K, …) of a flat tensor (K, n), by parameter."""
        offset, parameters = 0, dict(self._model.named_parameters())
        for name in self._names:
            shape = parameters[name].shape
            yield name, flat[:, offset : offset + shape.numel()].view(-1, *shape).detach()
            offset += shape.numel()

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return self._vector(values)[:, None]


def _cross_entropy(logits: Tensor, y: Tensor, alpha: Tensor | None) -> Tensor:
    """Mean loss by trial (K,) of logits (K, B, C) for labels (B,) or (K, B), with label smoothing α (K,)."""
    log_p = F.log_softmax(logits, 2)
    labels = y.expand(logits.shape[:2])
    loss = -log_p.gather(2, labels[..., None]).squeeze(2).mean(1)
    if alpha is not None:
        loss = (1 - alpha) * loss - alpha * log_p.mean((1, 2))
    return loss
