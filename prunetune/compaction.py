"""Pruned layers that compute without the inputs and outputs that no weight is left for.

At low densities most rows and columns of a layer's mask are empty. The product over what is left of both is
small and dense, and its result is that of the whole layer but for the order of the sums; the optimizer steps
what is left too. Between epochs the network, its masks and the optimizer's state are whole, so checkpoints,
stages and results know nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.sparsity.masks import FixedMask

logger = logging.getLogger(__name__)

_PAYS = 2**18
"""Products per batch that must be saved: what one core does while it picks the inputs and outputs."""
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class Compaction:
    """The layers of a model that compute with what their mask left of them; none where it does not pay.

    A layer takes part if at most half of its weights are in a row and a column that are not empty, and if it
    is a plain Linear or Conv layer whose weight is used by its own `forward` alone: found out by a forward
    pass over two images of `shape` (C, H, W). The masks must rest.
    """

    def __init__(self, model: nn.Module, mask: FixedMask, shape: tuple[int, ...], *, batch_size: int) -> None:
        self._mask = mask
        self._layers = _layers(model, mask, batch_size)
        if self._layers and not self._is_faithful(model, shape):
            logger.info("pruned layers are not made smaller: a weight is used outside of its layer")
            self._layers = []

    @property
    def names(self) -> list[str]:
        """The weights that take part."""
        return [layer.name for layer in self._layers]

    @contextmanager
    def around(self, optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
        """Within, the layers are small ones, also for the optimizers and the mask."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.in_place())
                stack.enter_context(layer.masked(self._mask))
                for optimizer in optimizers:
                    stack.enter_context(layer.stepped(optimizer))
            yield

    def _is_faithful(self, model: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether the logits depend on every small weight and on none of the whole ones."""
        images = torch.zeros(2, *shape, dtype=self._layers[0].whole.dtype)
        was_training = model.training
        model.eval()
        try:
            with torch.enable_grad(), self.around([]):
                logits = model(images)
                whole = [layer.whole for layer in self._layers]
                small = [layer.small for layer in self._layers]
                gradients = torch.autograd.grad(logits.sum(), [*whole, *small], allow_unused=True)
        finally:
            model.train(was_training)
        return [gradient is None for gradient in gradients] == [True] * len(whole) + [False] * len(small)


class _Layer:
    """A layer (out, in, …) with the rows and columns of its weight that are not empty."""

    def __init__(self, name: str, module: nn.Module, mask: Tensor) -> None:
        self.name = name
        self.whole: nn.Parameter = module.weight  # type: ignore[assignment]
        self._module = module
        filters = mask.flatten(2).any(2) if mask.dim() > 2 else mask.bool()
        self._rows, self._columns = _occupied(filters.any(1)), _occupied(filters.any(0))
        self.size = len(self._rows) * len(self._columns) * mask[0, 0].numel()
        self._features = 1 - mask.dim()  # the dimension of inputs and outputs that the layer mixes
        self.small = nn.Parameter(self._of(self.whole.detach()))

    def _of(self, whole: Tensor) -> Tensor:
        return whole.index_select(0, self._rows).index_select(1, self._columns)

    def _into(self, whole: Tensor, small: Tensor) -> None:
        whole[self._rows[:, None], self._columns] = small

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module computes with the small weight; after, the whole one has its values."""
        module: Any = self._module
        with torch.no_grad():
            self.small.copy_(self._of(self.whole))
        self.small.grad = None
        module.forward = self._forward
        try:
            yield
        finally:
            del module.forward
            with torch.no_grad():
                self._into(self.whole, self.small)

    @contextmanager
    def masked(self, mask: FixedMask) -> Iterator[None]:
        """Within, the mask is applied to the small weight."""
        whole = mask.masks[self.name]
        mask.weights[self.name], mask.masks[self.name] = self.small, self._of(whole)
        try:
            yield
        finally:
            mask.weights[self.name], mask.masks[self.name] = self.whole, whole

    @contextmanager
    def stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within, the optimizer steps the small weight; after, its state of the whole one is up to date.

        Where a weight was pruned, that state is of no consequence: optimizers go weight by weight.
        """
        _replace(optimizer, self.whole, self.small)
        state = optimizer.state.pop(self.whole, {})
        if state:
            optimizer.state[self.small] = {
                name: self._of(value) if _is_like(value, self.whole) else value
                for name, value in state.items()
            }
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
            whole = layer.whole.numel()
            if 2 * layer.size <= whole and (whole - layer.size) * batch_size >= _PAYS:
                found.append(layer)
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes what its class says, with all inputs for every output."""
    if "forward" in vars(module):
        return False
    if type(module) is nn.Linear:
        return True
    return type(module) in _CONVOLUTIONS and bool(module.groups == 1 and module.padding_mode == "zeros")


def _occupied(lines: Tensor) -> Tensor:
    """The indices of the rows or columns that hold a weight; of an empty layer the first."""
    found = lines.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def _is_like(value: object, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape
