"""SGD, Adam and AdamW for K trials at once: torch.optim's steps, with hyperparameters by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

Parameters = Sequence[nn.Parameter]
"""Of one trial, in the order in which they stand in its row."""


class BatchedOptimizer(Protocol):
    """Steps rows of values (K, n)."""

    def step(self, gradient: Tensor, factor: Tensor) -> None:
        """A step along `gradient` (K, n); `factor` (K, 1) scales the learning rates."""

    def write_back(self) -> None:
        """Put the state into the trials' own optimizers."""


def batched(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Parameters], values: Tensor
) -> BatchedOptimizer:
    """One optimizer for the rows of `values` (K, n), which goes on from the states of K optimizers of a kind.

    They must have one parameter group each, `base_lr` in it, and agree in all but learning rate, weight decay
    and momentum.
    """
    form: BatchedOptimizer = _FORMS[type(optimizers[0])](optimizers, parameters, values)
    return form


def is_batchable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is a batched form that steps as this optimizer does."""
    if type(optimizer) not in _FORMS or len(optimizer.param_groups) != 1:
        return False
    unusual = ("amsgrad", "maximize", "differentiable", "dampening")
    return not any(optimizer.param_groups[0].get(name) for name in unusual)


@final
class _Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980), and AdamW where the optimizers are (arXiv 1711.05101)."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Parameters], values: Tensor
    ) -> None:
        self._rows = _Rows(optimizers, parameters, values)
        group = optimizers[0].param_groups[0]
        self._is_decoupled = isinstance(optimizers[0], torch.optim.AdamW)
        (self._beta1, self._beta2), self._eps = group["betas"], group["eps"]
        self._mean, self._square = self._rows.gather("exp_avg"), self._rows.gather("exp_avg_sq")
        self._count = self._rows.counts()

    def step(self, gradient: Tensor, factor: Tensor) -> None:
        rows, values = self._rows, self._rows.values
        self._count += 1
        lr = rows.lr * factor
        if rows.decays and self._is_decoupled:
            values.mul_(1 - lr * rows.decay)
        elif rows.decays:
            gradient = gradient + rows.decay * values
        self._mean.lerp_(gradient, 1 - self._beta1)
        self._square.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
        size = (lr / (1 - self._beta1**self._count)).to(values.dtype)
        root = (1 - self._beta2**self._count).sqrt().to(values.dtype)
        denominator = self._square.sqrt().div_(root).add_(self._eps)
        values.sub_(torch.div(self._mean, denominator, out=denominator).mul_(size))

    def write_back(self) -> None:
        self._rows.scatter("exp_avg", self._mean)
        self._rows.scatter("exp_avg_sq", self._square)
        self._rows.set_counts(self._count)


@final
class _Sgd:
    """SGD with momentum, Nesterov's where the optimizers have it."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Parameters], values: Tensor
    ) -> None:
        self._rows = _Rows(optimizers, parameters, values)
        self._is_nesterov = optimizers[0].param_groups[0]["nesterov"]
        self._momentum = self._rows.hyper("momentum")
        self._has_momentum = bool(self._momentum.any())
        # From zeros, the first step's buffer is the gradient, as torch.optim has it.
        self._buffer = self._rows.gather("momentum_buffer")

    def step(self, gradient: Tensor, factor: Tensor) -> None:
        rows, values = self._rows, self._rows.values
        if rows.decays:
            gradient = gradient + rows.decay * values
        if self._has_momentum:
            self._buffer.mul_(self._momentum).add_(gradient)
            gradient = gradient + self._momentum * self._buffer if self._is_nesterov else self._buffer
        values.sub_(rows.lr * factor * gradient)

    def write_back(self) -> None:
        if self._has_momentum:
            self._rows.scatter("momentum_buffer", self._buffer)


@final
class _Rows:
    """K trials' parameters, hyperparameters and optimizer states, as rows."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Parameters], values: Tensor
    ) -> None:
        self.values = values
        self._optimizers = optimizers
        self._parameters = parameters
        self.lr = self.hyper("base_lr")
        self.decay = self.hyper("weight_decay")
        self.decays = any(optimizer.param_groups[0]["weight_decay"] for optimizer in optimizers)

    def hyper(self, name: str) -> Tensor:
        """A hyperparameter by trial (K, 1)."""
        values = [optimizer.param_groups[0][name] for optimizer in self._optimizers]
        return torch.tensor(values, device=self.values.device, dtype=self.values.dtype)[:, None]

    def gather(self, name: str) -> Tensor:
        """A state by trial (K, n); zeros where an optimizer has none yet."""
        gathered = torch.zeros_like(self.values)
        for row, states in zip(gathered, self._states(), strict=True):
            offset = 0
            for parameter, state in states:
                if state.get(name) is not None:
                    row[offset : offset + parameter.numel()] = state[name].flatten()
                offset += parameter.numel()
        return gathered

    def scatter(self, name: str, values: Tensor) -> None:
        """Put a state (K, n) into the optimizers."""
        for row, states in zip(values, self._states(), strict=True):
            offset = 0
            for parameter, state in states:
                piece = row[offset : offset + parameter.numel()].view(parameter.shape)
                state[name] = piece.clone()
                offset += parameter.numel()

    def counts(self) -> Tensor:
        """Steps done by trial (K, 1), in double precision: powers of β near 1 follow."""
        steps = [float(states[0][1].get("step", 0.0)) for states in self._states()]
        return torch.tensor(steps, device=self.values.device, dtype=torch.float64)[:, None]

    def set_counts(self, counts: Tensor) -> None:
        """Put the steps done into the optimizers, where torch.optim keeps them."""
        for count, optimizer, states in zip(
            counts[:, 0].tolist(), self._optimizers, self._states(), strict=True
        ):
            on_device = optimizer.param_groups[0].get("fused") or optimizer.param_groups[0].get("capturable")
            for parameter, state in states:
                state["step"] = torch.tensor(count, device=parameter.device if on_device else "cpu")

    def _states(self) -> list[list[tuple[nn.Parameter, dict[str, Any]]]]:
        return [
            [(parameter, optimizer.state[parameter]) for parameter in parameters]
            for optimizer, parameters in zip(self._optimizers, self._parameters, strict=True)
        ]


_FORMS: dict[type[torch.optim.Optimizer], Any] = {
    torch.optim.SGD: _Sgd,
    torch.optim.Adam: _Adam,
    torch.optim.AdamW: _Adam,
}
