"""Convolution weights as matrices over channels: scale, shift and multiply them.

A convolution is, at every tap of its kernel, a matrix over channels (`Y[:, p] = W X[:, p] + b` for
one tap). So a per-channel map in front of it or behind it, and a pointwise convolution next to it,
can be multiplied into its weights. Everything here is computed in float64; :func:`cast` rounds
once, at the end.

Weights have ONNX's layouts, with ``group`` g:

* Conv: ``[Cout, Cin/g, *kernel]``; a Gemm's ``[N, K]`` is the same without kernel axes;
* ConvTranspose: ``[Cin, Cout/g, *kernel]``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "batch_normalization_affine",
    "cast",
    "compose",
    "constant_response",
    "regroup",
    "scale_inputs",
    "scale_outputs",
]

Array = np.ndarray[Any, Any]
Float64 = npt.NDArray[np.float64]


def batch_normalization_affine(
    scale: Array, bias: Array, mean: Array, variance: Array, epsilon: float
) -> tuple[Float64, Float64] | None:
    """The per-channel map ``s x + t`` that an inference-mode BatchNormalization is.

    ``s = scale / sqrt(variance + epsilon)``, ``t = bias - s mean`` (Ioffe and Szegedy 2015,
    algorithm 2).

    Args:
        scale: ``[C]``.
        bias: ``[C]``.
        mean: ``[C]``.
        variance: ``[C]``.
        epsilon: added to the variance.

    Returns:
        ``(s, t)``, each ``[C]``; ``None`` if ``variance + epsilon`` is not positive everywhere or
        a result is not finite.
    """
    denominator = variance.astype(np.float64) + epsilon
    if not (denominator > 0).all():
        return None
    s = scale.astype(np.float64) / np.sqrt(denominator)
    t = bias.astype(np.float64) - s * mean.astype(np.float64)
    if not (np.isfinite(s).all() and np.isfinite(t).all()):
        return None
    return s, t


def scale_outputs(
    weight: Array, scale: Array, *, group: int = 1, transposed: bool = False
) -> Float64:
    """Weights of ``diag(scale) W``: the convolution followed by a scale per output channel.

    Args:
        weight: ``[Cout, Cin/g, *kernel]``, or ``[Cin, Cout/g, *kernel]`` if *transposed*.
        scale: ``[Cout]``.
        group: number of groups.
        transposed: whether the weights are a ConvTranspose's.
    """
    if not transposed:
        return weight.astype(np.float64) * _along_first(scale, weight.ndim)
    return _scale_second(weight, scale, group)


def scale_inputs(
    weight: Array, scale: Array, *, group: int = 1, transposed: bool = False
) -> Float64:
    """Weights of ``W diag(scale)``: the convolution behind a scale per input channel.

    Args:
        weight: ``[Cout, Cin/g, *kernel]``, or ``[Cin, Cout/g, *kernel]`` if *transposed*.
        scale: ``[Cin]``.
        group: number of groups.
        transposed: whether the weights are a ConvTranspose's.
    """
    if transposed:
        return weight.astype(np.float64) * _along_first(scale, weight.ndim)
    return _scale_second(weight, scale, group)


def constant_response(weight: Array, values: Array, *, group: int = 1) -> Float64:
    """What a Conv answers, without its bias, where every tap reads the constant *values*.

    Args:
        weight: ``[Cout, Cin/g, *kernel]``.
        values: ``[Cin]``, one value per input channel.
        group: number of groups.

    Returns:
        ``[Cout]``. Holds away from zero padding only.
    """
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
    blocks = taps.reshape(group, -1, weight.shape[1])
    columns = values.astype(np.float64).reshape(group, -1, 1)
    answers: Float64 = blocks @ columns
    return answers.reshape(-1)


def regroup(weight: Array, group: int, to: int) -> Float64:
    """The same Conv with fewer groups: block-diagonal weights, zeros included.

    Args:
        weight: ``[Cout, Cin/group, *kernel]``.
        group: its number of groups.
        to: a divisor of *group*.

    Returns:
        ``[Cout, Cin/to, *kernel]``.
    """
    cout, width, *kernel = weight.shape
    merged = group // to
    blocks = weight.reshape(to, merged, cout // group, width, *kernel)
    out = np.zeros((to, merged, cout // group, merged, width, *kernel))
    for index in range(merged):
        out[:, index, :, index] = blocks[:, index]
    return out.reshape(cout, merged * width, *kernel)


def compose(
    first: Array, second: Array, *, first_group: int = 1, second_group: int = 1
) -> tuple[Float64, int]:
    """Weights of the Conv that does *first*, then *second*; one of the two is pointwise.

    Tap by tap ``W = W2 W1``, in blocks: with groups g1 and g2 the product is block-diagonal with
    ``gcd(g1, g2)`` blocks.

    Args:
        first: ``[Cmid, Cin/g1, *kernel]``.
        second: ``[Cout, Cmid/g2, *kernel]``.
        first_group: g1.
        second_group: g2.

    Returns:
        ``[Cout, Cin/g, *kernel]`` and the number of groups g.
    """
    group = math.gcd(first_group, second_group)
    kernel = first.shape[2:] if math.prod(second.shape[2:]) == 1 else second.shape[2:]
    inner = regroup(first, first_group, group)
    outer = regroup(second, second_group, group)
    cout, width = outer.shape[0], inner.shape[1]
    # One of the two last axes is 1, so broadcasting over taps pairs each tap with the only one.
    left = np.moveaxis(outer.reshape(group, cout // group, outer.shape[1], -1), 3, 1)
    right = np.moveaxis(inner.reshape(group, inner.shape[0] // group, width, -1), 3, 1)
    product = np.moveaxis(left @ right, 1, 3)
    return product.reshape(cout, width, *kernel), group


def cast(values: Float64, dtype: np.dtype[Any], *, may_vanish: bool = False) -> Array | None:
    """*values* rounded to *dtype*, or ``None`` where that would ruin them.

    That is so if one of them overflows, or, unless they *may_vanish* (a bias beside larger
    numbers), if all of them fall below the smallest normal number, where digits are lost: float16
    keeps full precision down to 6e-5 only.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(dtype, order="C")
    if not np.isfinite(rounded).all():
        return None
    if not may_vanish and 0 < np.abs(values).max(initial=0.0) < np.finfo(dtype).tiny:
        return None
    return rounded


def _along_first(scale: Array, rank: int) -> Float64:
    return scale.astype(np.float64).reshape(-1, *(1,) * (rank - 1))


def _scale_second(weight: Array, scale: Array, group: int) -> Float64:
    """Scale the second axis, whose meaning depends on the group that the first axis lies in."""
    first, second, *kernel = weight.shape
    blocks = weight.astype(np.float64).reshape(group, first // group, second, *kernel)
    factors = scale.astype(np.float64).reshape(group, 1, second, *(1,) * len(kernel))
    return (blocks * factors).reshape(weight.shape)
