"""Compaction: pruned layers compute without the inputs and outputs that have no weight left.

At low densities most rows and columns of a layer's mask are empty. The product over the other rows and
columns is small and dense, and equals that of the whole layer except for the order of sums; the optimizer
updates only the small weight too. Between epochs the network, its masks and the optimizer's state are whole,
so checkpoints, stages and results are not affected.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.sparsity.masks import FixedMask, prunable

logger = logging.getLogger(__name__)

_PAYS = 2**18
"""Fewest multiplications saved per batch (weights × batch size) that pay for picking rows and columns."""
_ROUNDING = 1e-3
"""Largest change of an output, relative to the largest output, that the order of sums explains."""
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class Compaction:
    """The layers of a model that compute with a small weight, without their mask's empty rows and columns.

    A plain Linear or Conv layer is compacted if at most half of its weights are in a row and a column that
    are not empty, and if that saves enough. No layer is compacted if the network's outputs would change, as
    where other code than the layer reads a weight: this is tested on random inputs of `shape`, or, for a
    network that takes indices, on `inputs` (batch_size, …). The masks must not change while this is in use.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: FixedMask,
        shape: tuple[int, ...],
        *,
        batch_size: int,
        inputs: Tensor | None = None,
    ) -> None:
        self._mask = mask
        self._layers = _layers(model, mask, batch_size)
        if self._layers and not _is_faithful(model, mask, (batch_size, *shape), inputs):
            logger.info("pruned layers stay whole: weights are used outside of %s", ", ".join(self.names))
            self._layers = []

    @property
    def names(self) -> list[str]:
        """The names of the compacted layers' weights."""
        return [layer.name for layer in self._layers]

    @contextmanager
    def around(self, optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
        """Within the context, the layers, the optimizers and the mask use the small weights.

        Code that reads a whole weight meanwhile sees its values from before. Contexts must not be nested.
        """
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.in_place())
                stack.enter_context(layer.masked(self._mask))
                for optimizer in optimizers:
                    stack.enter_context(layer.stepped(optimizer))
            yield


class _Layer:
    """A layer with a weight (out, in, …), and the small weight of its rows and columns that are not empty."""

    def __init__(self, name: str, module: nn.Module, mask: Tensor) -> None:
        self.name = name
        self.whole: nn.Parameter = module.weight  # type: ignore[assignment]
        self._module = module
        pairs = mask.flatten(2).any(2) if mask.dim() > 2 else mask.bool()  # (out, in)
        self._rows, self._columns = _occupied(pairs.any(1)), _occupied(pairs.any(0))
        # The dimension of inputs and outputs, counted from the end so that a batch dimension may be missing.
        self._features = 1 - mask.dim()
        self.small = nn.Parameter(self._of(self.whole.detach()))

    def _of(self, whole: Tensor) -> Tensor:
        return whole.index_select(0, self._rows).index_select(1, self._columns)

    def _into(self, whole: Tensor, small: Tensor) -> None:
        whole[self._rows[:, None], self._columns] = small

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context, the module computes with the small weight; then copy it into the whole one."""
        module: Any = self._module
        with torch.no_grad():
            self.small.copy_(self._of(self.whole))
        self.small.grad = None
        module.forward = self._forward
        try:
            yield
        finally:
            with torch.no_grad():
                self._into(self.whole, self.small)
            del module.forward

    @contextmanager
    def masked(self, mask: FixedMask) -> Iterator[None]:
        """Within the context, the mask object holds the small weight and its mask."""
        whole = mask.masks[self.name]
        mask.weights[self.name], mask.masks[self.name] = self.small, self._of(whole)
        try:
            yield
        finally:
            mask.weights[self.name], mask.masks[self.name] = self.whole, whole

    @contextmanager
    def stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within the context, the optimizer steps the small weight; then copy its state to the whole one.

        Pruned weights keep their old state, which has no effect: optimizers step each weight by itself.
        """
        small = {
            name: self._of(value) if _is_like(value, self.whole) else value
            for name, value in optimizer.state.get(self.whole, {}).items()
        }
        state = optimizer.state.pop(self.whole, {})
        if small:
            optimizer.state[self.small] = small
        _replace(optimizer, self.whole, self.small)
        try:
            yield
        finally:
            _replace(optimizer, self.small, self.whole)
            for name, value in optimizer.state.pop(self.small, {}).items():
                if not _is_like(value, self.small):
                    state[name] = value
                    continue
                if not _is_like(state.get(name), self.whole):
                    state[name] = torch.zeros_like(self.whole)
                self._into(state[name], value)
            if state:
                optimizer.state[self.whole] = state

    def _forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self._module.bias  # type: ignore[assignment]
        if len(self._columns) < self.whole.shape[1]:
            x = x.index_select(self._features, self._columns)
        if len(self._rows) == self.whole.shape[0]:
            return self._product(x, bias)
        z = self._product(x, None)
        shape = list(z.shape)
        shape[self._features] = self.whole.shape[0]
        if bias is None:
            empty = z.new_zeros(shape)
        else:
            empty = bias.to(z.dtype).view(-1, *[1] * (-1 - self._features)).expand(shape)
        return empty.index_add(self._features, self._rows, z)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self._module
        if isinstance(module, nn.Linear):
            return F.linear(x, self.small, bias)
        convolution = _CONVOLUTIONS[type(module)]
        return convolution(x, self.small, bias, module.stride, module.padding, module.dilation)


def _layers(model: nn.Module, mask: FixedMask, batch_size: int) -> list[_Layer]:
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        modules.setdefault(id(getattr(module, "weight", None)), []).append(module)
    found = []
    for name, kept in mask.masks.items():
        users = modules.get(id(mask.weights[name]), [])
        if len(users) == 1 and _is_plain(users[0]):
            layer = _Layer(name, users[0], kept)
            whole, small = layer.whole.numel(), layer.small.numel()
            if 2 * small <= whole and (whole - small) * batch_size >= _PAYS:
                found.append(layer)
    return found


def _is_faithful(model: nn.Module, mask: FixedMask, shape: tuple[int, ...], inputs: Tensor | None) -> bool:
    """Whether a compacted copy of the model, with NaN in its whole weights, has the outputs of the model.

    Tested in training and in evaluation mode, because a model may use a layer differently in the two, as
    PyTorch's encoder layer does with its fast path.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if inputs is None:
            inputs = torch.randn(shape, dtype=next(iter(mask.weights.values())).dtype)
        try:
            whole, small = copy.deepcopy(model), copy.deepcopy(model)
            versions = [weight._version for weight in whole.parameters()]
            wanted = _outputs(whole, inputs)
            if [weight._version for weight in whole.parameters()] != versions:
                return False  # the forward pass writes weights
            with ExitStack() as stack:
                for layer in _layers(small, FixedMask(prunable(small), mask.masks), shape[0]):
                    stack.enter_context(layer.in_place())
                    layer.whole.detach().fill_(math.nan)
                found = _outputs(small, inputs)
        except (RuntimeError, TypeError, ValueError):  # the model cannot be copied, or takes other inputs
            return False
    return all(
        bool((one - other).abs().max() <= _ROUNDING * other.abs().max())
        for one, other in zip(found, wanted, strict=True)
    )


def _outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's outputs in training mode and in evaluation mode."""
    torch.manual_seed(0)
    training = model.train()(inputs).detach()
    with torch.no_grad():
        return training, model.eval()(inputs)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is a plain trainable Linear or Conv layer, without groups, hooks or own forward."""
    weight = module.weight
    if "forward" in vars(module) or not weight.requires_grad:
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return False
    if type(module) is nn.Linear:
        return True
    return type(module) in _CONVOLUTIONS and bool(module.groups == 1 and module.padding_mode == "zeros")


def _occupied(lines: Tensor) -> Tensor:
    """The indices of the rows or columns that hold a weight; for an empty layer, index 0."""
    found = lines.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def _is_like(value: object, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape
