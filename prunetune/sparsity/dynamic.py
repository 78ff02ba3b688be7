"""Updates of masks during training: dynamic sparse training (SET, RigL), cubic schedules, projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prunetune.sparsity.allocation import top_k


def drop_fraction(time: float, end: float, alpha: float) -> float:
    """The share of weights to drop, α/2 · (1 + cos(π t/T_end)), and 0 from T_end on (arXiv 1911.11134).

    >>> [round(drop_fraction(t, 1.0, 0.3), 6) for t in (0.0, 0.5, 1.0)]
    [0.3, 0.15, 0.0]
    """
    return alpha / 2 * (1 + math.cos(math.pi * time / end)) if time < end else 0.0


def move(
    weight: Tensor, mask: Tensor, growth: Tensor, fraction: float, *, generator: torch.Generator
) -> Tensor:
    """Return a layer's new boolean mask, after dropping and growing n = ⌊fraction · active⌋ weights.

    The n active weights with the smallest magnitude are dropped. The n weights with the highest `growth` are
    grown, among all that are inactive after the drop; so a dropped weight may come back, as in RigL's
    published code. The number of active weights does not change.
    """
    active = int(mask.sum())
    n = math.floor(fraction * active)
    flat = mask.flatten()
    magnitude = weight.detach().abs().flatten().masked_fill(~flat, -math.inf)
    staying = top_k(magnitude, active - n, generator=generator)
    grown = top_k(growth.flatten().masked_fill(staying, -math.inf), n, generator=generator)
    return (staying | grown).view(mask.shape)


def rigl_growth(gradient: Tensor, *, generator: torch.Generator) -> Tensor:
    """Rank weights by the magnitude of the dense gradient, as RigL does (Evci et al., arXiv 1911.11134)."""
    return gradient.detach().abs()


def set_growth(gradient: Tensor, *, generator: torch.Generator) -> Tensor:
    """Rank weights at random, as SET does (Mocanu et al., arXiv 1707.04780)."""
    return torch.rand(gradient.shape, generator=generator).to(gradient.device)


GROWTH = {"rigl": rigl_growth, "set": set_growth}
"""The growth functions by the name in `post_pruning.dynamic`."""


def cubic_density(time: float, start: float, end: float, initial: float, final: float) -> float:
    """The density final + (initial − final) · (1 − (t − start)/(end − start))³ between start and end.

    This is the schedule of gradual pruning (Zhu and Gupta, arXiv 1710.01878). The density falls fast at
    first, while many weights are redundant.

    >>> [round(cubic_density(t, 0.0, 1.0, 1.0, 0.1), 4) for t in (0.0, 0.5, 1.0)]
    [1.0, 0.2125, 0.1]
    """
    if time <= start:
        return initial
    if time >= end:
        return final
    return final + (initial - final) * (1 - (time - start) / (end - start)) ** 3


def project_to_count(mask: Tensor, count: float | Tensor, *, steps: int = 4) -> Tensor:
    """Project `mask` (n,) onto the nearest point of {M ∈ [0, 1]ⁿ, Σ M = count}, which is clip(M − τ, 0, 1).

    `count` is in [0, n]. It is a Euclidean projection onto a capped simplex; `shift_to_count` explains τ and
    `steps`.

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
    """Return the shift τ (a scalar) for which Σ clip(M − τ, 0, 1) = `count`, where M is `mask` (n,).

    The sum falls piecewise linearly in τ, so Newton's method finds τ, with each step kept within the bracket
    known so far. It starts at τ = 0: after one step of an optimizer a mask is already close to its count, and
    4 steps reach it up to n·10⁻⁶. An arbitrary mask may need more steps. An error of n·10⁻⁷, the rounding of
    a float32 sum, counts as zero. The host does not wait for the device. `scratch`, two tensors (n,), is
    overwritten if given, so that no memory is allocated.
    """
    first, second = scratch
    ends = mask.aminmax()
    low, high = ends.min - 2, ends.max + 1  # at `low` everything is clipped to 1, at `high` to 0
    shift = torch.zeros_like(low)
    for _ in range(steps):
        clipped = torch.clamp(torch.sub(mask, shift, out=first), 0, 1, out=first)
        excess = F.hardshrink(clipped.sum() - count, mask.numel() * 1e-7)
        # The negative derivative is the number of elements that are not clipped.
        between = torch.ceil(clipped, out=second).sum() - torch.floor(clipped, out=first).sum()
        rises = excess > 0
        low, high = torch.where(rises, shift, low), torch.where(rises, high, shift)
        # 0/0 means that nothing is left to do. On a flat piece the step is infinite, and the middle of the
        # bracket is taken.
        newton = shift + (excess / between).nan_to_num(0)
        shift = torch.where(torch.where(rises, newton < high, newton > low), newton, (low + high) / 2)
    return shift
