"""From scores and a count to masks: which layers keep how many, and which of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Masks = dict[str, Tensor]


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


def apportion(shares: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Whole numbers close to `shares` that sum to `total`, none above its cap (largest remainder).

    >>> apportion([1.5, 1.25, 0.25], [9, 9, 9], 3)
    [2, 1, 0]

    Raises ValueError where the caps hold less than `total`.
    """
    if sum(caps) < total:
        raise ValueError(f"total = {total}: must be at most the sum of the caps, {sum(caps)}")
    counts = [min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True)]
    # By remainder, the earlier one of equals; round and round until all are placed.
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
    """The same density in every layer; the counts sum to `total` exactly."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    shares = [total * size / sum(sizes) for size in sizes]
    return dict(zip(shapes, apportion(shares, sizes, total), strict=True))


def erk_counts(shapes: Mapping[str, torch.Size], total: int) -> dict[str, int]:
    """Erdős–Rényi-Kernel: density ∝ Σ dims / Π dims; the counts sum to `total` exactly.

    Layers that would exceed density 1 are made dense and the rest is rescaled, until none does
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
"""By the name in `pruning.allocation`."""


def dense_layer_names(names: Sequence[str], which: str) -> set[str]:
    """The layers that stay dense for `none`, `first`, `last` or `both`, in the order of the model."""
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
    """Masks by layer that keep exactly k weights in all.

    Layers in `dense` are kept whole. Where `alive` (boolean masks) is given, what is pruned stays pruned.
    Raises ValueError where the dense layers alone hold more than k.
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
        if alive is not None:  # rounding may ask a layer for one more than an earlier round left it
            caps = [int(alive[name].sum()) for name in rest]
            counts = dict(zip(rest, apportion([counts[n] for n in rest], caps, left), strict=True))
        for name, count in counts.items():
            masks |= ranked([name], count)
    return {name: masks[name] for name in scores}


def channels(scores: Mapping[str, Tensor], k: int, *, generator: torch.Generator) -> Masks:
    """Masks that keep whole output channels or neurons, at most k weights in all.

    Units are ranked over all layers by their mean score and kept from the highest while they fit; the
    last layer's units are the classes and all stay. Raises ValueError where it alone holds more than k.
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
    shuffled = torch.randperm(len(units), generator=generator)  # ties fall by lot
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
    """Masks that keep the n highest of every m consecutive weights along the input dimension.

    The input dimension is the second one; a last group of r < m keeps ⌊n·r/m⌋, so no group is denser
    than the pattern. Source: NVIDIA's 2:4 sparsity, arXiv 2104.08378.
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
    """Each layer's mask permuted: the counts stay, the places do not.

    A sanity check (Frankle et al., arXiv 2009.08576); the permutation acts on the flattened mask, unlike
    a published one that shuffles a copy and changes nothing.
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
