"""From scores and a count to masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Boolean mask of exactly k of the highest of `scores` (n,).

    Exactly k also under ties, which are the normal case after a learnable mask (most weights are exactly
    0, so a bare `scores >= threshold` keeps them all). Which of the tied ones stay is drawn from
    `generator`: by index they would all lie in the first layers.

    Raises ValueError unless 0 ≤ k ≤ n and no score is NaN.
    """
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k = {k}: must be between 0 and the number of scores, {n}")
    if torch.isnan(scores).any():
        raise ValueError("scores: must not be NaN")
    mask = torch.zeros(n, dtype=torch.bool, device=scores.device)
    if k == 0:
        return mask
    threshold = torch.kthvalue(scores, n - k + 1).values  # the k-th highest
    above = scores > threshold
    tied = (scores == threshold).nonzero().squeeze(1)
    missing = k - int(above.sum())
    drawn = torch.randperm(tied.numel(), generator=generator)[:missing].to(tied.device)
    mask |= above
    mask[tied[drawn]] = True
    return mask


def global_allocation(
    scores: Mapping[str, Tensor], k: int, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks by layer with exactly k weights kept over all layers, ranked together."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = top_k(flat, k, generator=generator)
    pieces = kept.split([score.numel() for score in scores.values()])
    return {
        name: piece.view(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)
    }


ALLOCATIONS = {"global": global_allocation}
"""By the name in `pruning.allocation`."""
