"""Minimal filtering: the transform matrices of Winograd convolution, and how they amplify errors.

``F(m, r)`` computes m neighbouring outputs of a correlation with r taps by m + r - 1
multiplications instead of m * r: ``y = A^T [(G g) * (B^T d)]`` with ``m + r - 1`` inputs d
(Winograd, *Arithmetic Complexity of Computations*, 1980; for convolutional networks Lavin and
Gray, *Fast Algorithms for Convolutional Neural Networks*, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np

__all__ = ["Filtering", "minimal_filtering", "recommended_points"]

Matrix = tuple[tuple[Fraction, ...], ...]
Array = np.ndarray[Any, Any]

_POINTS: Final = MappingProxyType(
    {
        size: tuple(Fraction(p) for p in points.split())
        for size, points in {
            1: "",
            2: "0",
            3: "0 1",
            4: "0 1 -1",
            5: "0 1 -1/2 -2",
            6: "0 5/8 -5/8 3/2 -3/2",
            7: "0 1 -1 1/2 -1/2 4",
            8: "0 1 -1 1/2 -1/2 2 -2",
        }.items()
    }
)
"""Finite points by m + r - 1."""


@dataclass(frozen=True)
class Filtering:
    """The bilinear algorithm F(m, r) in exact arithmetic.

    The point at infinity comes last, behind *points*. The rows of ``input`` are scaled so that
    those of finite points hold the coefficients of monic polynomials; the denominators stand in
    ``weight``, so that a row of ``weight`` depends on m by a factor only.

    Attributes:
        m: outputs of a tile.
        r: taps of the filter.
        points: the m + r - 2 finite interpolation points.
        output: A^T, ``[m, m + r - 1]``.
        weight: G, ``[m + r - 1, r]``.
        input: B^T, ``[m + r - 1, m + r - 1]``.
    """

    m: int
    r: int
    points: tuple[Fraction, ...]
    output: Matrix
    weight: Matrix
    input: Matrix

    @property
    def size(self) -> int:
        """Inputs and multiplications of a tile: m + r - 1."""
        return self.m + self.r - 1

    @cached_property
    def output_array(self) -> Array:
        """A^T, float64."""
        return _array(self.output, (self.m, self.size))

    @cached_property
    def weight_array(self) -> Array:
        """G, float64."""
        return _array(self.weight, (self.size, self.r))

    @cached_property
    def input_array(self) -> Array:
        """B^T, float64."""
        return _array(self.input, (self.size, self.size))

    @cached_property
    def constant(self) -> Array:
        """What the products must be for every output to be 1, float64, ``[m + r - 1]``.

        Outputs are ``sum_p w_p p^i``, so w are Lagrange's polynomials of the finite points, taken
        at 1: the unit vector of point 1 where that is among them. Infinity adds what the last
        output lacks, which is nothing from two taps on.
        """
        weights = [
            math.prod(((1 - q) / (p - q) for q in self.points if q != p), start=Fraction(1))
            for p in self.points
        ]
        last = (p ** (self.m - 1) * w for p, w in zip(self.points, weights, strict=True))
        return np.array([float(w) for w in (*weights, 1 - sum(last))])

    @cached_property
    def amplification(self) -> float:
        """Typical error relative to the direct sum's, in one dimension; its square in two.

        For independent inputs and weights of unit variance every product has some variance, and
        rounds in proportion to its root. The result is the root mean square of what the products'
        roundings add up to, over that of the direct sum: ``sqrt(mean_i sum_p A_ip^2 |G_p|^2
        |B_p|^2 / r)``, with rows ``G_p`` and ``B_p`` in the Euclidean norm.
        """
        gains = (self.weight_array**2).sum(1) * (self.input_array**2).sum(1)
        return math.sqrt(float((self.output_array**2 @ gains).mean()) / self.r)

    @cached_property
    def worst_amplification(self) -> float:
        """Bound of the error relative to the direct sum's for operands of one size.

        ``max_i sum_p |A_ip| |G_p|_1 |B_p|_1 / r``, after Barabasz, Anderson, Soodhalter and
        Gregg, *Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
        Networks*, 2020.
        """
        gains = np.abs(self.weight_array).sum(1) * np.abs(self.input_array).sum(1)
        return float((np.abs(self.output_array) @ gains).max()) / self.r


def recommended_points(size: int) -> tuple[Fraction, ...]:
    """Finite points for ``m + r - 1 = size`` that amplify errors least.

    They are the best for r = 3 of all sets of 0 and signed eighths up to 5/2 that are symmetric
    about 0 (of signed powers of two where that is impossible). Such points and their powers are
    floating-point numbers of few digits, so that B^T and A^T are exact.

    Raises:
        ValueError: *size* is not within 1..8.
    """
    if size not in _POINTS:
        raise ValueError(f"no points for a size of {size}; known: 1..{max(_POINTS)}")
    return _POINTS[size]


def minimal_filtering(m: int, r: int, points: Sequence[Fraction | int] | None = None) -> Filtering:
    """F(m, r) by the method of Cook and Toom, transposed.

    The product of polynomials of r and m coefficients is evaluated at the points, multiplied
    there, and interpolated. By Tellegen's principle the transposed algorithm correlates: with
    the Vandermonde matrix V of all m + r - 1 points (infinity takes the leading coefficient),
    ``G = V[:, :r]``, ``A = V[:, :m]`` and ``B = V^-1``.

    Args:
        m: outputs of a tile, at least 1.
        r: taps, at least 1.
        points: m + r - 2 distinct finite points; :func:`recommended_points` by default.

    Raises:
        ValueError: m or r is below 1, or the points are not as many or not distinct.
    """
    if m < 1 or r < 1:
        raise ValueError(f"F({m}, {r}) does not exist")
    size = m + r - 1
    finite = recommended_points(size) if points is None else tuple(Fraction(p) for p in points)
    if len(finite) != size - 1:
        raise ValueError(f"F({m}, {r}) takes {size - 1} finite points, not {len(finite)}")
    if len(set(finite)) != len(finite):
        raise ValueError("the points are not distinct")
    scales = [math.prod((p - q for q in finite if q != p), start=Fraction(1)) for p in finite] + [
        Fraction(1)
    ]
    rows = [_monic([q for q in finite if q != p], size) for p in finite] + [_monic(finite, size)]
    weight = [
        tuple(value / scale for value in row)
        for row, scale in zip(_vandermonde(finite, r), scales, strict=True)
    ]
    output = zip(*_vandermonde(finite, m), strict=True)
    return Filtering(m, r, finite, tuple(output), tuple(weight), tuple(rows))


def _vandermonde(points: Sequence[Fraction], columns: int) -> Matrix:
    """Powers of the points; the last row is that of infinity."""
    infinity = tuple(Fraction(int(k == columns - 1)) for k in range(columns))
    return (*(tuple(p**k for k in range(columns)) for p in points), infinity)


def _monic(roots: Sequence[Fraction], size: int) -> tuple[Fraction, ...]:
    """Coefficients of the monic polynomial with *roots*, constant first, padded to *size*."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [*(root * c for c in coefficients), Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return (*coefficients, *[Fraction(0)] * (size - len(coefficients)))


def _array(matrix: Matrix, shape: tuple[int, int]) -> Array:
    return np.array([[float(v) for v in row] for row in matrix], np.float64).reshape(shape)
