"""Initializers of weights: Kaiming's, and ZerO in both of its published versions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def hadamard(m: int) -> Tensor:
    """The Hadamard matrix H_m (2^m, 2^m), by Sylvester's construction (paper, definition 2).

    >>> hadamard(1).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    h = torch.ones(1, 1)
    for _ in range(m):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def partial_identity(rows: int, columns: int) -> Tensor:
    """The partial identity I* (rows, columns): ones on the diagonal, else zeros (paper, definition 1)."""
    return torch.eye(rows, columns)


def zero_matrix(out_features: int, in_features: int) -> Tensor:
    """ZerO's matrix (out, in) as in its authors' notebook: Hadamard where the output is wider.

    For out ≤ in it is the partial identity. For out > in it is I*(out, 2^m) · H_m · I*(2^m, in) · 2^(−m/2)
    with m = ⌈log2 out⌉.
    Source: Zhao et al., arXiv 2110.12661, algorithm 1 and its published notebook.
    """
    if out_features <= in_features:
        return partial_identity(out_features, in_features)
    m = math.ceil(math.log2(out_features))
    scale: float = 2.0 ** (-m / 2)
    return hadamard(m)[:out_features, :in_features] * scale


def zero_paper_matrix(out_features: int, in_features: int) -> Tensor:
    """ZerO's matrix as printed in algorithm 1 of arXiv 2312.01653, transposed to PyTorch's (out, in).

    For W (n_l, n_{l+1}) with n_l inputs: if n_l ≤ n_{l+1} it is the partial identity; if n_l > n_{l+1} it is
    c · I*(n_l, 2^m) · H_m · I*(2^m, n_{l+1}) with m = ⌈log2 n_l⌉ and c = 2^(−(m−1)/2). So the Hadamard matrix
    is used where the *input* is wider, which is the reverse of the notebook.
    """
    if in_features <= out_features:
        return partial_identity(out_features, in_features)
    m = math.ceil(math.log2(in_features))
    scale: float = 2.0 ** (-(m - 1) / 2)
    return (hadamard(m)[:in_features, :out_features] * scale).T.contiguous()


def _at_centre(matrix: Callable[[int, int], Tensor], shape: torch.Size) -> Tensor:
    """Make a layer's weight from a matrix; for a convolution, put it at the kernel's centre."""
    if len(shape) == 2:
        return matrix(shape[0], shape[1])
    weight = torch.zeros(shape)
    taps = weight.flatten(2)  # (out, in, product of kernel sizes)
    centre = 0
    for size in shape[2:]:
        centre = centre * size + size // 2
    taps[:, :, centre] = matrix(shape[0], shape[1])
    return weight


def zero(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """ZerO's weight (notebook) for a Linear (out, in) or Conv layer (out, in, *kernel); nothing is random."""
    return _at_centre(zero_matrix, shape)


def zero_paper(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """ZerO's weight (algorithm 1 as printed) for a Linear or convolution layer; nothing is random."""
    return _at_centre(zero_paper_matrix, shape)


def kaiming(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """Draw weights by He's normal initialization: N(0, 2/fan_in), where fan_in = in · kernel size."""
    fan_in = math.prod(shape[1:])
    return torch.randn(shape, generator=generator) * math.sqrt(2.0 / fan_in)


def default(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """Stands for keeping the weights that the network's own constructor drew; it is never called."""
    raise NotImplementedError
