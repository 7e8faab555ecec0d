"""Convolutions whose output channels are the pixels of a block: sub-pixel convolution.

Neighbouring outputs of any convolution read overlapping inputs, so a block of them is one output of
a strided convolution with a larger kernel. A transposed convolution of stride s computes every s-th
output from the same taps, so each of the ``s`` phases of its output is a convolution of its input
(Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

__all__ = [
    "Phase",
    "PhasePlan",
    "packed_weight",
    "phase_weight",
    "stacked_weight",
    "transposed_phases",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Phase:
    """Outputs ``s q + r`` of a transposed convolution along one axis.

    Attributes:
        taps: pairs ``(k, offset)``: tap k of the kernel meets input ``q + offset``.
    """

    taps: tuple[tuple[int, int], ...]

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last offset; ``(0, 0)`` if no tap contributes."""
        offsets = [offset for _, offset in self.taps] or [0]
        return min(offsets), max(offsets)


@dataclass(frozen=True)
class PhasePlan:
    """The phases of a transposed convolution along one axis.

    Attributes:
        phases: one per ``r`` below the stride.
        blocks: number of outputs per phase, less the input size.
        surplus: how many outputs the last block has too many.
    """

    phases: tuple[Phase, ...]
    blocks: int
    surplus: int

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last offset of all phases."""
        windows = [phase.window for phase in self.phases]
        return min(w[0] for w in windows), max(w[1] for w in windows)

    def pads(self, window: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
        """Begin pad, end pad and kernel window of a convolution that reads *window*.

        Pads cannot be negative, so the window grows (by taps of zero) where it would have to skip
        inputs at an end.
        """
        first = min(window[0], 0)
        last = max(window[1], -self.blocks)
        return -first, self.blocks + last, (first, last)


def transposed_phases(
    kernel: int, *, stride: int, dilation: int = 1, begin: int = 0, excess: int = 0
) -> PhasePlan:
    """The phases of a transposed convolution along one axis.

    Output o and tap k meet input i where ``stride i + dilation k - begin = o``. With
    ``o = stride q + r``, tap k belongs to the phase ``r = (dilation k - begin) mod stride``, and
    meets input ``q + (r + begin - dilation k) / stride``.

    Args:
        kernel: number of taps.
        stride: of the transposed convolution.
        dilation: distance of taps in the output.
        begin: outputs cropped at the begin (ONNX's begin pad).
        excess: output size less *stride* times input size.
    """
    phases = []
    for r in range(stride):
        taps = [
            (k, (r + begin - dilation * k) // stride)
            for k in range(kernel)
            if (r + begin - dilation * k) % stride == 0
        ]
        phases.append(Phase(tuple(taps)))
    blocks = -(-excess // stride)
    return PhasePlan(tuple(phases), blocks, blocks * stride - excess)


def phase_weight(
    weight: Array, phases: Sequence[Phase], windows: Sequence[tuple[int, int]], group: int = 1
) -> Array:
    """Weights of the Conv that computes one phase per axis.

    Args:
        weight: a ConvTranspose's, ``[Cin, Cout/g, *kernel]``.
        phases: one per axis.
        windows: first and last offset per axis, which contain the phase's.
        group: number of groups.

    Returns:
        ``[Cout, Cin/g, *sizes of the windows]``.
    """
    cin, width, *kernel = weight.shape
    sizes = [last - first + 1 for first, last in windows]
    blocks = weight.reshape(group, cin // group, width, *kernel).swapaxes(1, 2)
    out = np.zeros((group, width, cin // group, *sizes), weight.dtype)
    every = (slice(None),) * 3
    for taps in product(*(phase.taps for phase in phases)):
        source = tuple(k for k, _ in taps)
        place = tuple(o - first for (_, o), (first, _) in zip(taps, windows, strict=True))
        out[every + place] = blocks[every + source]
    return out.reshape(group * width, cin // group, *sizes)


def stacked_weight(
    weight: Array, plans: Sequence[PhasePlan], windows: Sequence[tuple[int, int]]
) -> Array:
    """Weights of one Conv that computes all phases, those of the first axis outermost.

    Args:
        weight: a ConvTranspose's without groups, ``[Cin, Cout, *kernel]``.
        plans: one per axis.
        windows: first and last offset per axis, which contain those of all phases.

    Returns:
        ``[phases * Cout, Cin, *sizes of the windows]``.
    """
    every = product(*(plan.phases for plan in plans))
    return np.concatenate([phase_weight(weight, phases, windows) for phases in every])


def packed_weight(weight: Array, steps: Sequence[int], strides: Sequence[int]) -> Array:
    """Weights of the Conv whose channels are the outputs of a block of another Conv.

    The output ``s q + r`` of a Conv with stride t reads ``t s q + t r + k``: for all ``r < s`` a
    Conv with stride ``t s``, whose kernels are the other one's, shifted by ``t r``.

    Args:
        weight: ``[Cout, Cin, *kernel]``, undilated.
        steps: size of the block per axis, s.
        strides: per axis, t.

    Returns:
        ``[block * Cout, Cin, *(kernel + t (s - 1))]``, the pixels of a block row by row.
    """
    cout, cin, *kernel = weight.shape
    sizes = [k + t * (s - 1) for k, s, t in zip(kernel, steps, strides, strict=True)]
    pixels = list(product(*(range(s) for s in steps)))
    out = np.zeros((len(pixels), cout, cin, *sizes), weight.dtype)
    for place, pixel in zip(out, pixels, strict=True):
        shifts = [r * t for r, t in zip(pixel, strides, strict=True)]
        taps = tuple(slice(a, a + k) for a, k in zip(shifts, kernel, strict=True))
        place[(slice(None), slice(None), *taps)] = weight
    return out.reshape(-1, cin, *sizes)
