"""Convolution and pooling in numpy, just enough to see what a small sample does to a network.

Arrays are float32 in NCHW; weights are ``[C_out, C_in / group, kH, kW]``; pads are ONNX's
``[top, left, bottom, right]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "average_pool",
    "convolve",
    "hard_sigmoid",
    "image_like",
    "max_pool",
    "shuffle",
    "sigmoid",
]

Array = npt.NDArray[np.float32]


def image_like(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """A random batch with the 1/f amplitude spectrum of natural images, zero mean, unit variance.

    Octaves of white noise with equal power, each twice as coarse as the last, as in D. J. Field,
    "Relations between the statistics of natural images and the response properties of cortical
    cells" (JOSA A, 1987).
    """
    batch, channels, height, width = shape
    octaves = max(1, min(height, width).bit_length() - 1)
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        block = 1 << octave
        coarse = rng.standard_normal(
            (batch, channels, -(-height // block), -(-width // block)), dtype=np.float32
        )
        fine = coarse.repeat(block, axis=2).repeat(block, axis=3)
        total += fine[:, :, :height, :width]
    total /= np.float32(np.sqrt(octaves))
    return total


def convolve(
    x: Array, weight: Array, *, strides: tuple[int, int], pads: Sequence[int], group: int
) -> Array:
    """Cross-correlation of *x* with *weight*, as ONNX ``Conv`` without bias and dilation."""
    batch = x.shape[0]
    out_channels, group_channels, *kernel = weight.shape
    if group_channels == 1 and out_channels == group:
        return _convolve_depthwise(x, weight, strides=strides, pads=pads)
    windows = _windows(x, kernel, strides, pads, 0.0)
    height, width = windows.shape[2:4]
    # [N, C, H, W, kH, kW] to one matrix of patches per group, with all images side by side
    columns = windows.transpose(1, 4, 5, 0, 2, 3).reshape(group, -1, batch * height * width)
    rows = weight.reshape(group, out_channels // group, -1)
    product: Array = np.matmul(rows, columns)
    return product.reshape(out_channels, batch, height, width).swapaxes(0, 1)


def _convolve_depthwise(
    x: Array, weight: Array, *, strides: tuple[int, int], pads: Sequence[int]
) -> Array:
    """Tap by tap: a depthwise convolution has no matrix product worth forming."""
    _, _, *kernel = weight.shape
    windows = _windows(x, kernel, strides, pads, 0.0)
    total = np.zeros(windows.shape[:4], np.float32)
    for i, j in np.ndindex(*kernel):
        total += windows[..., i, j] * weight[:, 0, i, j][:, None, None]
    return total


def max_pool(
    x: Array, kernel: Sequence[int], *, strides: tuple[int, int], pads: Sequence[int]
) -> Array:
    """Maximum over each window; padding never wins."""
    windows = _windows(x, kernel, strides, pads, -np.inf)
    best = windows[..., 0, 0].copy()
    for i, j in np.ndindex(*kernel):
        np.maximum(best, windows[..., i, j], out=best)
    return best


def average_pool(
    x: Array, kernel: Sequence[int], *, strides: tuple[int, int], pads: Sequence[int]
) -> Array:
    """Mean over each window's pixels inside the image, as ONNX does by default."""
    ones = np.ones((1, 1, *x.shape[2:]), np.float32)
    counts = _windows(ones, kernel, strides, pads, 0.0).sum(axis=(-2, -1))
    windows = _windows(x, kernel, strides, pads, 0.0)
    total = np.zeros(windows.shape[:4], np.float32)
    for i, j in np.ndindex(*kernel):
        total += windows[..., i, j]
    total /= counts
    return total


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))``, written so that no exponential overflows."""
    half = np.float32(0.5)
    result: Array = half + half * np.tanh(half * x)
    return result


def hard_sigmoid(x: Array) -> Array:
    """``max(0, min(1, x / 6 + 1 / 2))``."""
    result: Array = np.clip(x / np.float32(6) + np.float32(0.5), 0, 1)
    return result


def shuffle(x: Array, groups: int) -> Array:
    """Channel shuffle: channel ``g * k + i`` of *groups* blocks of k goes to ``i * groups + g``."""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, groups, channels // groups, height, width)
    return blocks.swapaxes(1, 2).reshape(x.shape)


def _windows(
    x: Array, kernel: Sequence[int], strides: tuple[int, int], pads: Sequence[int], fill: float
) -> Array:
    """A view ``[N, C, H_out, W_out, kH, kW]`` on the padded *x*."""
    top, left, bottom, right = pads
    if any(pads):
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    windows: Array = np.lib.stride_tricks.sliding_window_view(x, tuple(kernel), axis=(2, 3))
    return windows[:, :, :: strides[0], :: strides[1]]
