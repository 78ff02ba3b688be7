"""Dynamic sparse training: masks that move during training, at constant density per layer (SET, RigL)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prunetune.sparsity.allocation import top_k


def drop_fraction(time: float, end: float, alpha: float) -> float:
    """f = α/2 · (1 + cos(π t/T_end)), and 0 from T_end on (Evci et al., arXiv 1911.11134).

    >>> [round(drop_fraction(t, 1.0, 0.3), 6) for t in (0.0, 0.5, 1.0)]
    [0.3, 0.15, 0.0]
    """
    return alpha / 2 * (1 + math.cos(math.pi * time / end)) if time < end else 0.0


def move(
    weight: Tensor, mask: Tensor, growth: Tensor, fraction: float, *, generator: torch.Generator
) -> Tensor:
    """A layer's new boolean mask: n = ⌊fraction · nonzero⌋ of the smallest |w| dropped, n grown.

    Grown are the highest of `growth` among all that is inactive after the drop (so a dropped weight may
    come back, as in RigL's published code). The count is conserved.
    """
    active = int(mask.sum())
    n = math.floor(fraction * active)
    flat = mask.flatten()
    magnitude = weight.detach().abs().flatten().masked_fill(~flat, -math.inf)
    staying = top_k(magnitude, active - n, generator=generator)
    grown = top_k(growth.flatten().masked_fill(staying, -math.inf), n, generator=generator)
    return (staying | grown).view(mask.shape)


def rigl_growth(gradient: Tensor, *, generator: torch.Generator) -> Tensor:
    """RigL grows where the dense gradient is largest."""
    return gradient.detach().abs()


def set_growth(gradient: Tensor, *, generator: torch.Generator) -> Tensor:
    """SET grows at random (Mocanu et al., arXiv 1707.04780)."""
    return torch.rand(gradient.shape, generator=generator).to(gradient.device)


GROWTH = {"rigl": rigl_growth, "set": set_growth}
"""By the name in `post_pruning.dynamic`."""


def cubic_density(time: float, start: float, end: float, initial: float, final: float) -> float:
    """final + (initial − final) · (1 − (t − start)/(end − start))³ between start and end.

    Gradual pruning (Zhu and Gupta, arXiv 1710.01878): fast at first, while much is redundant.

    >>> [round(cubic_density(t, 0.0, 1.0, 1.0, 0.1), 4) for t in (0.0, 0.5, 1.0)]
    [1.0, 0.2125, 0.1]
    """
    if time <= start:
        return initial
    if time >= end:
        return final
    return final + (initial - final) * (1 - (time - start) / (end - start)) ** 3


def project_to_count(mask: Tensor, count: float | Tensor, *, steps: int = 4) -> Tensor:
    """The nearest point of {M ∈ [0, 1]ⁿ, Σ M = count} to `mask` (n,): clip(M − τ, 0, 1).

    `count` is in [0, n]. Euclidean projection on a capped simplex; τ and `steps` as in `shift_to_count`.

    >>> project_to_count(torch.tensor([0.2, 0.5, 0.9, 1.0]), 2.0)
    tensor([0.0500, 0.3500, 0.7500, 0.8500])
    """
    return (mask - shift_to_count(mask, count, steps=steps)).clamp(0, 1)


def shift_to_count(
    mask: Tensor,
    count: float | Tensor,
    *,
    steps: int = 4,
    scratch: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> Tensor:
    """τ (a scalar) with Σ clip(M − τ, 0, 1) = `count`, for M = `mask` (n,).

    The sum falls piecewise linearly in τ, so τ is found by Newton's method, each step within the bracket
    known so far. It starts at 0: a mask that an optimizer moved by one step is near its count already, and
    4 steps meet it up to n·10⁻⁶. Any mask may take more steps, and n·10⁻⁷, the rounding of a float32 sum,
    counts as met. Nothing waits for the device. `scratch`, twice (n,), is overwritten where it is given, so
    no memory is taken.
    """
    first, second = scratch
    ends = mask.aminmax()
    low, high = ends.min - 2, ends.max + 1  # everything is clipped to 1, to 0
    shift = torch.zeros_like(low)
    for _ in range(steps):
        clipped = torch.clamp(torch.sub(mask, shift, out=first), 0, 1, out=first)
        excess = F.hardshrink(clipped.sum() - count, mask.numel() * 1e-7)
        # The derivative: how many are not clipped.
        between = torch.ceil(clipped, out=second).sum() - torch.floor(clipped, out=first).sum()
        rises = excess > 0
        low, high = torch.where(rises, shift, low), torch.where(rises, high, shift)
        # Nothing left to do is 0/0; a flat piece gives an infinite step, and so the bracket's middle.
        newton = shift + (excess / between).nan_to_num(0)
        shift = torch.where(torch.where(rises, newton < high, newton > low), newton, (low + high) / 2)
    return shift
