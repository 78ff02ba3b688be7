"""ZerO in both readings against matrices worked out by hand, and Kaiming's spread."""

from __future__ import annotations

import math

import pytest
import torch

from prunetune.sparsity.initializers import (
    hadamard,
    kaiming,
    partial_identity,
    zero,
    zero_matrix,
    zero_paper,
    zero_paper_matrix,
)

ROOT = math.sqrt(0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hadamard_by_hand_and_orthogonal() -> None:
    assert hadamard(0).tolist() == [[1.0]]
    assert hadamard(2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert torch.equal(hadamard(4) @ hadamard(4).T, 16 * torch.eye(16))


def test_partial_identity_by_hand() -> None:
    assert partial_identity(2, 3).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert partial_identity(3, 2).tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("out_features", "in_features", "expected"),
    [
        (2, 3, [[1, 0, 0], [0, 1, 0]]),  # narrower: partial identity
        (2, 2, [[1, 0], [0, 1]]),
        (3, 2, [[0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]),  # wider: H_2 cut to 3×2, times 2^(−2/2)
        (2, 1, [[ROOT], [ROOT]]),  # H_1 cut to 2×1, times 2^(−1/2)
    ],
)
def test_zero_as_the_notebook_has_it(
    out_features: int, in_features: int, expected: list[list[float]]
) -> None:
    torch.testing.assert_close(zero_matrix(out_features, in_features), torch.tensor(expected).float())


@pytest.mark.parametrize(
    ("out_features", "in_features", "expected"),
    [
        (3, 2, [[1, 0], [0, 1], [0, 0]]),  # more outputs: partial identity
        (2, 2, [[1, 0], [0, 1]]),
        # More inputs: W (3, 2) = 2^(−(2−1)/2) · H_2 cut to 3×2; PyTorch's weight is its transpose.
        (2, 3, [[ROOT, ROOT, ROOT], [ROOT, -ROOT, ROOT]]),
        (1, 2, [[1, 1]]),  # m = 1: c = 2^0
    ],
)
def test_zero_as_the_paper_prints_it(
    out_features: int, in_features: int, expected: list[list[float]]
) -> None:
    matrix = zero_paper_matrix(out_features, in_features)
    torch.testing.assert_close(matrix, torch.tensor(expected).float())
    assert matrix.is_contiguous()


def test_the_readings_differ_exactly_where_the_sides_do() -> None:
    assert not torch.equal(zero_matrix(3, 2), zero_paper_matrix(3, 2))
    assert not torch.equal(zero_matrix(2, 3), zero_paper_matrix(2, 3))
    assert torch.equal(zero_matrix(4, 4), zero_paper_matrix(4, 4))


@pytest.mark.parametrize(("initializer", "matrix"), [(zero, zero_matrix), (zero_paper, zero_paper_matrix)])
@pytest.mark.parametrize(
    ("kernel", "centre"),
    [
        ((3, 3), (1, 1)),
        ((1, 1), (0, 0)),
        ((5, 3), (2, 1)),
        ((3,), (1,)),
        ((3, 3, 3), (1, 1, 1)),
        ((2, 2), (1, 1)),
    ],
)
def test_a_convolution_has_the_matrix_at_its_centre_tap_and_zeros_elsewhere(
    initializer: object, matrix: object, kernel: tuple[int, ...], centre: tuple[int, ...]
) -> None:
    weight = initializer(torch.Size((3, 2, *kernel)), generator=generator())  # type: ignore[operator]
    assert weight.shape == (3, 2, *kernel)
    expected = matrix(3, 2)  # type: ignore[operator]
    assert torch.equal(weight[(slice(None), slice(None), *centre)], expected)
    assert weight.count_nonzero() == expected.count_nonzero()


def test_a_zero_initialized_convolution_of_equal_width_is_the_identity() -> None:
    x = torch.randn(2, 4, 5, 5, generator=generator())
    weight = zero(torch.Size((4, 4, 3, 3)), generator=generator())
    assert torch.equal(torch.nn.functional.conv2d(x, weight, padding=1), x)


def test_a_linear_weight_is_the_matrix_itself_and_draws_nothing() -> None:
    drawn = generator()
    before = drawn.get_state()
    assert torch.equal(zero(torch.Size((3, 2)), generator=drawn), zero_matrix(3, 2))
    assert torch.equal(zero_paper(torch.Size((3, 2)), generator=drawn), zero_paper_matrix(3, 2))
    assert torch.equal(drawn.get_state(), before)


def test_kaiming_has_the_deviation_of_its_fan_in_and_follows_its_generator() -> None:
    weight = kaiming(torch.Size((200, 50, 3, 3)), generator=generator())
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / 450), rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    assert torch.equal(weight, kaiming(weight.shape, generator=generator()))
    assert not torch.equal(weight, kaiming(weight.shape, generator=generator(1)))
