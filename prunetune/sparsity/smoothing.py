"""ToST's smoother network for the first epochs after pruning: PSwish activations and decaying skips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.sparsity.masks import prunable


def pswish(t: Tensor, beta: float | Tensor) -> Tensor:
    """t · σ(βt): β = 0 gives t/2, and β → ∞ gives ReLU (paper, section 3.2).

    β may be a tensor () that differs between the trials of a batched program; then β = ∞ gives exactly ReLU.
    """
    if isinstance(beta, Tensor):
        hard = torch.isinf(beta)
        soft = t * torch.sigmoid(beta.masked_fill(hard, 0.0) * t)
        return torch.where(hard, F.relu(t), soft)
    return t * torch.sigmoid(beta * t)


class PSwish(nn.Module):
    """The activation `pswish` with a fixed β, as a module that replaces a ReLU."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, t: Tensor) -> Tensor:
        """Apply `pswish` to a tensor of any shape, element by element."""
        return pswish(t, self.beta)


def resized(z: Tensor, shape: torch.Size) -> Tensor:
    """Resize `z` (B, …) to `shape` (B, …) by linear interpolation along every dimension that differs.

    Channels are interpolated like height and width. Where the numbers of dimensions differ, both shapes are
    flattened first.
    """
    if z.shape == shape:
        return z
    dims = len(shape) - 1
    if z.dim() != len(shape) or dims > 3:
        flat = F.interpolate(z.flatten(1).unsqueeze(1), size=shape[1:].numel(), mode="linear")
        return flat.view(shape)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    return F.interpolate(z.unsqueeze(1), size=tuple(shape[1:]), mode=mode).squeeze(1)


def relus(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """List every `nn.ReLU` in the model, as (parent module, attribute name)."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children() lists a module used twice once
        if isinstance(child, nn.ReLU)
    ]


def skip_blocks(model: nn.Module) -> list[nn.Module]:
    """List the blocks that get a skip connection: those that the model's `blocks` holds or returns.

    A model without `blocks` gets skips around its children with prunable weights, except the last child,
    which computes the outputs.
    """
    declared = getattr(model, "blocks", None)
    if isinstance(declared, nn.ModuleList):
        return list(declared)
    if callable(declared):
        return list(declared())
    return [child for child in model.children() if prunable(child)][:-1]


@contextmanager
def softened(model: nn.Module, *, beta: float | Tensor | None, gamma: float | Tensor) -> Iterator[None]:
    """Within the context, every ReLU is PSwish(β) (unless β is None), and every block g computes g(z) + γ·z.

    Afterwards the model is the original one again, with the same modules and without hooks.
    """
    swapped = (
        [(parent, name, getattr(parent, name)) for parent, name in relus(model)] if beta is not None else []
    )
    hooks = []
    try:
        for parent, name, _ in swapped:
            assert beta is not None
            setattr(parent, name, PSwish(beta))
        if isinstance(gamma, Tensor) or gamma != 0:

            def add_skip(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + gamma * resized(inputs[0], output.shape)

            hooks = [block.register_forward_hook(add_skip) for block in skip_blocks(model)]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parent, name, original in swapped:
            setattr(parent, name, original)
