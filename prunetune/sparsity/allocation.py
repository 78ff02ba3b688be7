"""Turns scores and a count into masks: how many weights each layer keeps, and which ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Masks = dict[str, Tensor]


def top_k(scores: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Return a boolean mask of exactly k of the highest of `scores` (n,).

    It is exactly k even under ties, which are the normal case after a learnable mask: most weights are
    exactly 0, so that `scores >= threshold` alone would keep them all. `generator` draws which of the tied
    weights stay; taken by index, they would all be in the first layers.

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


def apportion(shares: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Round `shares` to whole numbers with the sum `total`, none above its cap (largest remainder method).

    >>> apportion([1.5, 1.25, 0.25], [9, 9, 9], 3)
    [2, 1, 0]

    Raises ValueError where the caps hold less than `total`.
    """
    if sum(caps) < total:
        raise ValueError(f"total = {total}: must be at most the sum of the caps, {sum(caps)}")
    counts = [min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True)]
    # Add by largest remainder, of equal ones the earlier first, repeatedly until the sum is reached.
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    missing = total - sum(counts)
    while missing > 0:
        for i in order:
            if missing and counts[i] < caps[i]:
                counts[i] += 1
                missing -= 1
    for i in reversed(order):  # shares may sum to a little more than the total
        surplus = min(max(0, -missing), counts[i])
        counts[i] -= surplus
        missing += surplus
    return counts


def uniform_counts(shapes: Mapping[str, torch.Size], total: int) -> dict[str, int]:
    """Give every layer the same density; the counts sum to `total` exactly."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    shares = [total * size / sum(sizes) for size in sizes]
    return dict(zip(shapes, apportion(shares, sizes, total), strict=True))


def erk_counts(shapes: Mapping[str, torch.Size], total: int) -> dict[str, int]:
    """Erdős–Rényi-Kernel: a layer's density is ∝ Σ dims / Π dims; the counts sum to `total` exactly.

    Layers that would exceed density 1 are made dense and the others rescaled, until no layer exceeds it
    (Evci et al., arXiv 1911.11134; Mocanu et al. for Linear layers).
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = total - sum(sizes[name] for name in dense)
        weighted = sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        scale = left / weighted if weighted else 0.0
        over = {name for name in shapes if name not in dense and raw[name] * scale > 1}
        if not over:
            break
        dense |= over
    shares = [sizes[n] if n in dense else raw[n] * scale * sizes[n] for n in shapes]
    return dict(zip(shapes, apportion(shares, list(sizes.values()), total), strict=True))


LAYER_COUNTS: dict[str, Callable[[Mapping[str, torch.Size], int], dict[str, int]] | None] = {
    "global": None,  # all layers ranked together
    "uniform": uniform_counts,
    "erk": erk_counts,
}
"""The functions that allocate counts to layers, by the name in `pruning.allocation`."""


def dense_layer_names(names: Sequence[str], which: str) -> set[str]:
    """Return the layers that stay dense for `none`, `first`, `last` or `both`; `names` is in model order."""
    chosen = {"none": (), "first": names[:1], "last": names[-1:], "both": (*names[:1], *names[-1:])}[which]
    return set(chosen)


def unstructured(
    scores: Mapping[str, Tensor],
    k: int,
    *,
    allocation: str = "global",
    dense: frozenset[str] | set[str] = frozenset(),
    alive: Mapping[str, Tensor] | None = None,
    generator: torch.Generator,
) -> Masks:
    """Return masks by layer that keep exactly k weights in total.

    Layers in `dense` are kept whole. Weights that the boolean masks `alive` have pruned stay pruned. Raises
    ValueError where the dense layers alone hold more than k weights.
    """
    shapes = {name: score.shape for name, score in scores.items()}
    masks = {name: torch.ones_like(scores[name], dtype=torch.bool) for name in scores if name in dense}
    rest = [name for name in scores if name not in dense]
    left = k - sum(shapes[name].numel() for name in masks)
    if left < 0:
        raise ValueError(f"k = {k}: must be at least the {k - left} weights of the dense layers")

    def ranked(names: list[str], count: int) -> Masks:
        flat = torch.cat([_alive(scores[n], None if alive is None else alive[n]).flatten() for n in names])
        pieces = top_k(flat, count, generator=generator).split([shapes[n].numel() for n in names])
        return {n: piece.view(shapes[n]) for n, piece in zip(names, pieces, strict=True)}

    per_layer = LAYER_COUNTS[allocation]
    if not rest:
        return masks
    if per_layer is None:
        masks |= ranked(rest, left)
    else:
        counts = per_layer({name: shapes[name] for name in rest}, left)
        if alive is not None:  # rounding may ask a layer for one weight more than is alive
            caps = [int(alive[name].sum()) for name in rest]
            counts = dict(zip(rest, apportion([counts[n] for n in rest], caps, left), strict=True))
        for name, count in counts.items():
            masks |= ranked([name], count)
    return {name: masks[name] for name in scores}


def channels(scores: Mapping[str, Tensor], k: int, *, generator: torch.Generator) -> Masks:
    """Return masks that keep whole output channels or neurons, at most k weights in total.

    Units are ranked over all layers by their mean score, and kept from the highest on while they fit. The
    units of the last layer are the classes, and all stay. Raises ValueError where the last layer alone holds
    more than k weights.
    """
    *hidden, last = scores
    masks = {name: torch.zeros_like(scores[name], dtype=torch.bool) for name in hidden}
    masks[last] = torch.ones_like(scores[last], dtype=torch.bool)
    left = k - scores[last].numel()
    if left < 0:
        raise ValueError(f"k = {k}: must be at least the {scores[last].numel()} weights of the last layer")
    if not hidden:
        return masks
    units = [(name, unit) for name in hidden for unit in range(scores[name].shape[0])]
    means = torch.cat([scores[name].flatten(1).mean(1) for name in hidden])
    shuffled = torch.randperm(len(units), generator=generator)  # ties are broken at random
    order = shuffled[torch.argsort(means.cpu()[shuffled], descending=True, stable=True)]
    for index in order.tolist():
        name, unit = units[index]
        size = scores[name][unit].numel()
        if size > left:
            break
        masks[name][unit] = True
        left -= size
    return masks


def n_of_m(scores: Mapping[str, Tensor], n: int, m: int, *, generator: torch.Generator) -> Masks:
    """Return masks that keep the n highest of every m consecutive weights along the input dimension.

    The input dimension is the second one. A last group of r < m weights keeps ⌊n·r/m⌋, so that no group is
    denser than the pattern. Source: NVIDIA's 2:4 sparsity, arXiv 2104.08378.
    """
    masks = {}
    for name, score in scores.items():
        rows = score.movedim(1, -1).reshape(-1, score.shape[1])  # (everything else, inputs)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        lots = torch.rand(rows.shape, generator=generator).to(rows.device)
        for start in range(0, rows.shape[1], m):
            group, lot = rows[:, start : start + m], lots[:, start : start + m]
            keep = n * group.shape[1] // m
            by_lot = lot.argsort(1)
            order = group.gather(1, by_lot).argsort(dim=1, descending=True, stable=True)
            kept = by_lot.gather(1, order)[:, :keep]
            mask[:, start : start + m].scatter_(1, kept, True)
        moved = score.movedim(1, -1).shape
        masks[name] = mask.view(moved).movedim(-1, 1).contiguous()
    return masks


def shuffled_within_layers(masks: Mapping[str, Tensor], *, generator: torch.Generator) -> Masks:
    """Permute each layer's mask at random; each layer keeps its number of weights, but at other places.

    This is a sanity check (Frankle et al., arXiv 2009.08576). The flattened mask is permuted; a published
    implementation shuffles a copy and so changes nothing.
    """
    out = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        out[name] = mask.flatten()[order].view(mask.shape)
    return out


def _alive(scores: Tensor, alive: Tensor | None) -> Tensor:
    if alive is None:
        return scores
    return scores.masked_fill(~alive.to(scores.device), -math.inf)
