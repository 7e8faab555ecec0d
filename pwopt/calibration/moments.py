"""Moments of the patches that a convolution sees, gathered position by position in a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from pwopt.graph import ConvFacts
from pwopt.numerics.lowrank import Kernel, Moments, Rows

__all__ = ["Gatherer", "patches_at", "total_rows", "values_at"]

Array: TypeAlias = npt.NDArray[Any]

_ROWS_BYTES: Final = 256 << 20
"""What the positions that are kept as they are may take, per layer."""
_FEWEST_ROWS: Final = 8000
_ROWS_PER_SIZE: Final = 16
"""Positions to keep for each element of a patch."""


def patches_at(x: Array, conv: ConvFacts, positions: npt.NDArray[np.int64]) -> Array:
    """What the kernel of *conv* sees at some output positions.

    Args:
        x: ``[N, C, *spatial]``, the input.
        conv: its pads are known.
        positions: ``[M]``, indices into the flattened ``[N, *spatial]`` of the output.

    Returns:
        ``[M, C, *kernel]``.
    """
    assert conv.pads is not None
    rank = conv.spatial_rank
    pads = [(0, 0), (0, 0), *zip(conv.pads[:rank], conv.pads[rank:], strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(conv.kernel, conv.dilations, strict=True)]
    windows = sliding_window_view(np.pad(x, pads), reach, axis=tuple(range(2, rank + 2)))
    windows = windows[_every(conv.strides)]
    found = windows[_at(positions, (len(x), *windows.shape[2 : rank + 2]))]
    return np.asarray(found[_every(conv.dilations)])


def _every(steps: Sequence[int]) -> tuple[slice, ...]:
    """Every so many elements of the axes behind the first two."""
    return (slice(None), slice(None), *(slice(None, None, step) for step in steps))


def _at(positions: npt.NDArray[np.int64], sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """An index of all channels at positions of a flattened ``[N, *spatial]``."""
    sample, *places = np.unravel_index(positions, sizes)
    return (sample, slice(None), *places)


def values_at(y: Array, positions: npt.NDArray[np.int64]) -> Array:
    """``[M, O]``: channels of *y* ``[N, O, *spatial]`` at positions of its flattened rest."""
    return np.asarray(y[_at(positions, (len(y), *y.shape[2:]))])


@dataclass(eq=False)
class Gatherer:
    """First and second moments of patches and targets of one convolution, group by group.

    Positions are drawn at random where there are more than are needed, so that time and memory do
    not grow with the number and the size of the samples.

    Attributes:
        conv: whose patches.
        weight: its weight.
        samples: how many will come.
        rows: positions to look at in all.
        rng: draws them.
        keeps_rows: whether some positions are kept as they are.
    """

    conv: ConvFacts
    weight: Array
    samples: int
    rows: int
    rng: np.random.Generator
    keeps_rows: bool = False
    count: int = field(init=False, default=0)
    pixels: float = field(init=False, default=0.0)
    """Output positions of a sample."""
    _sums: list[_Sums] = field(init=False)
    _kept: list[tuple[Array, Array]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        group = self.conv.group
        size = self.conv.cin // group * math.prod(self.conv.kernel)
        self._sums = [_Sums(size, self.conv.cout // group) for _ in range(group)]

    @property
    def size(self) -> int:
        """Elements of a patch of one group."""
        return len(self._sums[0].x)

    def add(self, x: Array, target: Array) -> None:
        """Look at some samples.

        Args:
            x: ``[N, C, *spatial]``, what the convolution reads.
            target: ``[N, O, *spatial]``, what it should compute.
        """
        self.pixels = float(math.prod(target.shape[2:]))
        available = len(target) * math.prod(target.shape[2:])
        wanted = math.ceil(self.rows * len(target) / max(self.samples, 1))
        if wanted < available:
            positions = np.sort(self.rng.choice(available, wanted, replace=False))
        else:
            positions = np.arange(available)
        patches = patches_at(x, self.conv, positions).reshape(len(positions), self.conv.cin, -1)
        targets = values_at(target, positions)
        group = self.conv.group
        parts = zip(np.split(patches, group, axis=1), np.split(targets, group, axis=1), strict=True)
        for sums, (part, wanted_part) in zip(self._sums, parts, strict=True):
            sums.add(part.reshape(len(part), -1), wanted_part)
        self.count += len(positions)
        if self.keeps_rows:
            self._keep(patches, targets)

    def _keep(self, patches: Array, targets: Array) -> None:
        size = patches[0].size // self.conv.group
        most = max(_FEWEST_ROWS, _ROWS_PER_SIZE * size)
        most = min(most, max(1, _ROWS_BYTES // max(1, patches[:1].nbytes)))
        share = math.ceil(most * len(patches) / max(self.rows, 1))
        if share < len(patches):
            chosen = np.sort(self.rng.choice(len(patches), share, replace=False))
            patches, targets = patches[chosen], targets[chosen]
        self._kept.append((patches, targets))

    def moments(self) -> list[Moments]:
        """Of each group."""
        group = self.conv.group
        flat = self.weight.reshape(*self.weight.shape[:3], -1).astype(np.float64)
        return [
            sums.moments(weight)
            for sums, weight in zip(self._sums, np.split(flat, group), strict=True)
        ]

    def kept(self) -> list[Rows]:
        """Of each group."""
        group = self.conv.group
        patches = np.concatenate([part[0] for part in self._kept])
        targets = np.concatenate([part[1] for part in self._kept])
        parts = zip(np.split(patches, group, axis=1), np.split(targets, group, axis=1), strict=True)
        return [Rows(p.reshape(len(p), -1), t) for p, t in parts]


class _Sums:
    """Running sums in float64."""

    def __init__(self, size: int, outputs: int) -> None:
        self.count = 0
        self.x = np.zeros(size)
        self.y = np.zeros(outputs)
        self.xx = np.zeros((size, size))
        self.yx = np.zeros((outputs, size))
        self.yy = 0.0

    def add(self, x: Array, y: Array) -> None:
        x, y = x.astype(np.float64), y.astype(np.float64)
        self.count += len(x)
        self.x += x.sum(axis=0)
        self.y += y.sum(axis=0)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.yy += float(np.sum(y * y))

    def moments(self, weight: npt.NDArray[np.float64]) -> Moments:
        count = max(self.count, 1)
        x, y = self.x / count, self.y / count
        o, c, i, j = weight.shape
        kernel: Kernel = (o, c, i, j)
        return Moments(
            kernel,
            self.xx / count - np.outer(x, x),
            self.yx / count - np.outer(y, x),
            x,
            y,
            max(self.yy / count - float(y @ y), 0.0),
            weight.reshape(o, -1),
        )


def total_rows(conv: ConvFacts, least: int, per_size: int) -> int:
    """How many positions tell enough about the moments of a layer: in proportion to their size."""
    size = conv.cin // conv.group * math.prod(conv.kernel)
    return max(least, per_size * size)
