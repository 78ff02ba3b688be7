"""A softer network for the first epochs after pruning: PSwish activations and decaying skips (ToST)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetune.sparsity.masks import prunable


def pswish(t: Tensor, beta: float | Tensor) -> Tensor:
    """t · σ(βt): β = 0 is t/2, β → ∞ is ReLU (paper, section 3.2).

    β may be a tensor () that differs between the trials of a batched program; in it ∞ is ReLU exactly.
    """
    if isinstance(beta, Tensor):
        hard = torch.isinf(beta)
        soft = t * torch.sigmoid(beta.masked_fill(hard, 0.0) * t)
        return torch.where(hard, F.relu(t), soft)
    return t * torch.sigmoid(beta * t)


class PSwish(nn.Module):
    """`pswish` with a fixed β, in the place of a ReLU."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, t: Tensor) -> Tensor:
        """Any shape in, the same shape out."""
        return pswish(t, self.beta)


def resized(z: Tensor, shape: torch.Size) -> Tensor:
    """`z` (B, …) in another shape (B, …), by linear interpolation along every dimension that differs.

    Channels count as a dimension like height and width. Where the number of dimensions differs, both
    are taken as flat.
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
    """Every `nn.ReLU` in the model, as (parent, attribute)."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children() lists a module used twice once
        if isinstance(child, nn.ReLU)
    ]


def skip_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks that get a skip: what the model's `blocks` holds or returns; else its children with weights.

    Without the last: that layer gives the logits and is no block.
    """
    declared = getattr(model, "blocks", None)
    if isinstance(declared, nn.ModuleList):
        return list(declared)
    if callable(declared):
        return list(declared())
    return [child for child in model.children() if prunable(child)][:-1]


@contextmanager
def softened(model: nn.Module, *, beta: float | Tensor | None, gamma: float | Tensor) -> Iterator[None]:
    """Within: PSwish(β) for every ReLU (unless β is None), and g(z) + γ·z around every block.

    On leaving, the model is the original one again: same modules, no hooks.
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
