"""SGD, Adam and AdamW for K trials at once: the steps of torch.optim, with hyperparameters per trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

Parameters = Sequence[nn.Parameter]
"""The parameters of one trial, in their order in the trial's row."""


class BatchedOptimizer(Protocol):
    """An optimizer that updates the weights of K trials, the rows of a tensor (K, n), in place."""

    def step(self, gradient: Tensor, factor: Tensor) -> None:
        """Take one step with `gradient` (K, n); `factor` (K, 1) are the factors of the learning rates."""

    def write_back(self) -> None:
        """Copy the optimizer's state into the trials' own optimizers."""


def batched(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Parameters], values: Tensor
) -> BatchedOptimizer:
    """Make one optimizer for the rows of `values` (K, n), starting from the states of K optimizers.

    The K optimizers must be of the same class, have one parameter group each, with `base_lr` in it, and have
    the same options except for learning rate, weight decay and momentum.
    """
    form: BatchedOptimizer = _FORMS[type(optimizers[0])](optimizers, parameters, values)
    return form


def is_batchable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `batched` supports this optimizer with its options."""
    if type(optimizer) not in _FORMS or len(optimizer.param_groups) != 1:
        return False
    unusual = ("amsgrad", "maximize", "differentiable", "dampening")
    return not any(optimizer.param_groups[0].get(name) for name in unusual)


@final
class _Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980), or AdamW (arXiv 1711.05101) if the optimizers are AdamW's."""

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
    """SGD with momentum, or with Nesterov's momentum if the optimizers use it."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Parameters], values: Tensor
    ) -> None:
        self._rows = _Rows(optimizers, parameters, values)
        self._is_nesterov = optimizers[0].param_groups[0]["nesterov"]
        self._momentum = self._rows.hyper("momentum")
        self._has_momentum = bool(self._momentum.any())
        # The buffer starts at zero, so after the first step it is the gradient, as in torch.optim.
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
    """The parameters, hyperparameters and optimizer states of K trials, one row per trial."""

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
        """Return a hyperparameter of each trial (K, 1)."""
        values = [optimizer.param_groups[0][name] for optimizer in self._optimizers]
        return torch.tensor(values, device=self.values.device, dtype=self.values.dtype)[:, None]

    def gather(self, name: str) -> Tensor:
        """Collect a state, such as `exp_avg`, of all trials (K, n); zeros where an optimizer has none yet."""
        gathered = torch.zeros_like(self.values)
        for row, states in zip(gathered, self._states(), strict=True):
            offset = 0
            for parameter, state in states:
                if state.get(name) is not None:
                    row[offset : offset + parameter.numel()] = state[name].flatten()
                offset += parameter.numel()
        return gathered

    def scatter(self, name: str, values: Tensor) -> None:
        """Copy a state (K, n) into the trials' optimizers."""
        for row, states in zip(values, self._states(), strict=True):
            offset = 0
            for parameter, state in states:
                piece = row[offset : offset + parameter.numel()].view(parameter.shape)
                state[name] = piece.clone()
                offset += parameter.numel()

    def counts(self) -> Tensor:
        """The number of steps of each trial (K, 1) in float64, because β near 1 is raised to that power."""
        steps = [float(states[0][1].get("step", 0.0)) for states in self._states()]
        return torch.tensor(steps, device=self.values.device, dtype=torch.float64)[:, None]

    def set_counts(self, counts: Tensor) -> None:
        """Copy the numbers of steps into the trials' optimizers, on the device where torch.optim has them."""
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
