"""Dynamic sparse training: masks that move during training, at constant density per layer (SET, RigL)."""

from __future__ import annotations

import math

import torch
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


def project_to_count(mask: Tensor, count: float, *, steps: int = 30) -> Tensor:
    """The nearest point of {M ∈ [0, 1]ⁿ, Σ M = count} to `mask` (n,): clip(M − τ, 0, 1), τ by bisection.

    `count` is in [0, n]. Euclidean projection on a capped simplex; Σ is met up to n·2^(1−steps).
    """
    low = mask.min() - 1  # here everything is clipped to 1
    high = mask.max()  # and here to 0
    for _ in range(steps):
        middle = (low + high) / 2
        above = (mask - middle).clamp(0, 1).sum() > count
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (mask - (low + high) / 2).clamp(0, 1)
