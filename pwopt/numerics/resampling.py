"""Interpolation by a constant rational factor, as the taps of a convolution per phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = ["Float64", "Resampling", "cubic", "linear", "resampling"]

Float64 = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Resampling:
    """Outputs ``up q + r`` of an interpolation that reads inputs near ``down q``, along one axis.

    Attributes:
        up: number of phases.
        down: the stride.
        taps: per phase r weights by offset: of the input at ``down q + offset``.
    """

    up: int
    down: int
    taps: tuple[Mapping[int, float], ...]

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last offset of all phases, such that no input is cropped by it.

        A convolution over it with these many elements of padding at the begin and
        ``last + 1 - down`` at the end has one position per *down* inputs.
        """
        offsets = [offset for taps in self.taps for offset in taps]
        return min(0, *offsets), max(self.down - 1, *offsets)

    def kernels(self, window: tuple[int, int]) -> Float64:
        """``[up, size of the window]``."""
        first, last = window
        out = np.zeros((self.up, last - first + 1))
        for row, taps in zip(out, self.taps, strict=True):
            for offset, weight in taps.items():
                row[offset - first] = weight
        return out


def linear(position: Fraction) -> dict[int, float]:
    """Weights of the neighbours of *position*."""
    left = math.floor(position)
    ratio = position - left
    return _nonzero({left: 1 - ratio, left + 1: ratio})


def cubic(position: Fraction, a: Fraction) -> dict[int, float]:
    """Weights of the four neighbours of *position* (Keys 1981, with coefficient *a*)."""
    left = math.floor(position)
    weights: dict[int, Fraction] = {}
    for index in range(left - 1, left + 3):
        x = abs(position - index)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        weights[index] = near if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return _nonzero(weights)


def resampling(up: int, down: int, *, centred: bool, a: Fraction | None = None) -> Resampling:
    """The phases of an interpolation by the factor ``up / down``.

    Args:
        up: the factor's numerator.
        down: its denominator.
        centred: whether pixels are squares (``half_pixel``: output o lies at
            ``(o + 1/2) down / up - 1/2``), not points (``asymmetric``: at ``o down / up``).
        a: the coefficient of cubic interpolation; linear without.
    """
    half = Fraction(1, 2) if centred else Fraction(0)
    positions: Sequence[Fraction] = [(r + half) * Fraction(down, up) - half for r in range(up)]
    taps = [linear(x) if a is None else cubic(x, a) for x in positions]
    return Resampling(up, down, tuple(taps))


def _nonzero(weights: Mapping[int, Fraction]) -> dict[int, float]:
    return {index: float(weight) for index, weight in weights.items() if weight}
