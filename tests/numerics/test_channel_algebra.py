"""Channel algebra against convolutions computed tap by tap."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics import channel_algebra

Array = np.ndarray[Any, Any]


def convolve(x: Array, weight: Array, bias: Array | None = None, group: int = 1) -> Array:
    """A Conv with unit strides and no pads on ``[Cin, H, W]``, from its definition."""
    cout, width, *kernel = weight.shape
    size = [n - k + 1 for n, k in zip(x.shape[1:], kernel, strict=True)]
    out = np.zeros((cout, *size))
    for o, i in itertools.product(range(cout), range(width)):
        channel = o // (cout // group) * width + i
        for tap in itertools.product(*map(range, kernel)):
            window = tuple(slice(t, t + n) for t, n in zip(tap, size, strict=True))
            out[o] += weight[(o, i, *tap)] * x[(channel, *window)]
    return out if bias is None else out + bias[:, None, None]


def transpose_convolve(x: Array, weight: Array, group: int = 1) -> Array:
    """A ConvTranspose with unit strides and no pads on ``[Cin, H, W]``, from its definition."""
    cin, width, *kernel = weight.shape
    size = [n + k - 1 for n, k in zip(x.shape[1:], kernel, strict=True)]
    out = np.zeros((width * group, *size))
    for i, o in itertools.product(range(cin), range(width)):
        channel = i // (cin // group) * width + o
        for tap in itertools.product(*map(range, kernel)):
            window = tuple(slice(t, t + n) for t, n in zip(tap, x.shape[1:], strict=True))
            out[(channel, *window)] += weight[(i, o, *tap)] * x[i]
    return out


seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 3)
quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(seeds, counts, counts, counts, st.sampled_from([(1, 1), (2, 3)]))
def test_scales_of_a_conv(
    seed: int, group: int, wide: int, narrow: int, kernel: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((group * wide, 5, 4))
    weight = rng.standard_normal((group * narrow, wide, *kernel))
    outer, inner = rng.standard_normal(group * narrow), rng.standard_normal(group * wide)
    np.testing.assert_allclose(
        convolve(x, channel_algebra.scale_outputs(weight, outer, group=group), group=group),
        outer[:, None, None] * convolve(x, weight, group=group),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        convolve(x, channel_algebra.scale_inputs(weight, inner, group=group), group=group),
        convolve(inner[:, None, None] * x, weight, group=group),
        atol=1e-12,
    )


@quick
@given(seeds, counts, counts, counts, st.sampled_from([(1, 1), (2, 3)]))
def test_scales_of_a_transposed_conv(
    seed: int, group: int, wide: int, narrow: int, kernel: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((group * wide, 5, 4))
    weight = rng.standard_normal((group * wide, narrow, *kernel))
    outer, inner = rng.standard_normal(group * narrow), rng.standard_normal(group * wide)
    scaled = channel_algebra.scale_outputs(weight, outer, group=group, transposed=True)
    np.testing.assert_allclose(
        transpose_convolve(x, scaled, group),
        outer[:, None, None] * transpose_convolve(x, weight, group),
        atol=1e-12,
    )
    scaled = channel_algebra.scale_inputs(weight, inner, group=group, transposed=True)
    np.testing.assert_allclose(
        transpose_convolve(x, scaled, group),
        transpose_convolve(inner[:, None, None] * x, weight, group),
        atol=1e-12,
    )


@quick
@given(seeds, counts, counts, counts)
def test_constant_response(seed: int, group: int, wide: int, narrow: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((group * narrow, wide, 2, 3))
    values = rng.standard_normal(group * wide)
    x = np.broadcast_to(values[:, None, None], (group * wide, 4, 4))
    response = channel_algebra.constant_response(weight, values, group=group)
    expected = convolve(x, weight, group=group)
    np.testing.assert_allclose(
        expected, np.broadcast_to(response[:, None, None], expected.shape), atol=1e-12
    )


@quick
@given(seeds, st.sampled_from([1, 2, 3, 6]), counts, counts)
def test_regroup_computes_the_same(seed: int, group: int, wide: int, narrow: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((group * wide, 4, 3))
    weight = rng.standard_normal((group * narrow, wide, 2, 2))
    for to in (d for d in range(1, group + 1) if group % d == 0):
        merged = channel_algebra.regroup(weight, group, to)
        assert merged.shape == (group * narrow, group // to * wide, 2, 2)
        np.testing.assert_allclose(
            convolve(x, merged, group=to), convolve(x, weight, group=group), atol=1e-12
        )


@quick
@given(
    seeds,
    st.sampled_from([1, 2, 4, 6]),
    st.sampled_from([1, 2, 3, 6]),
    counts,
    counts,
    st.sampled_from([((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1, 1), (3, 2))]),
)
def test_compose_is_one_after_the_other(
    seed: int,
    first_group: int,
    second_group: int,
    wide: int,
    narrow: int,
    kernels: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    rng = np.random.default_rng(seed)
    middle = 2 * math.lcm(first_group, second_group)
    x = rng.standard_normal((first_group * wide, 5, 5))
    first = rng.standard_normal((middle, wide, *kernels[0]))
    second = rng.standard_normal((second_group * narrow, middle // second_group, *kernels[1]))
    weight, group = channel_algebra.compose(
        first, second, first_group=first_group, second_group=second_group
    )
    assert group == math.gcd(first_group, second_group)
    np.testing.assert_allclose(
        convolve(x, weight, group=group),
        convolve(convolve(x, first, group=first_group), second, group=second_group),
        atol=1e-10,
    )


def test_a_batch_normalization_is_an_affine_map() -> None:
    scale, bias, mean, variance = (
        np.array(v, np.float32) for v in ([2, -1], [0.5, 3], [1, -2], [4, 0.25])
    )
    found = channel_algebra.batch_normalization_affine(scale, bias, mean, variance, 0.0)
    assert found is not None
    np.testing.assert_allclose(found[0], [1, -2])
    np.testing.assert_allclose(found[1], [-0.5, -1])
    assert found[0].dtype == np.float64


@pytest.mark.parametrize("variance", [[-1.0, 1.0], [0.0, 1.0], [np.nan, 1.0]])
def test_a_variance_must_be_positive(variance: list[float]) -> None:
    ones = np.ones(2, np.float32)
    assert (
        channel_algebra.batch_normalization_affine(ones, ones, ones, np.array(variance), 0.0)
        is None
    )


def test_an_infinite_parameter_is_no_affine_map() -> None:
    ones = np.ones(2, np.float32)
    wild = np.array([np.inf, 1.0])
    assert channel_algebra.batch_normalization_affine(wild, ones, ones, ones, 0.0) is None


def test_cast_refuses_what_it_would_ruin() -> None:
    half = np.dtype(np.float16)
    assert channel_algebra.cast(np.array([1e5, 1.0]), half) is None
    assert channel_algebra.cast(np.array([np.nan]), half) is None
    assert channel_algebra.cast(np.array([1e-6, -1e-7]), half) is None
    faint = channel_algebra.cast(np.array([1e-6, -1e-7]), half, may_vanish=True)
    assert faint is not None
    for values in ([1e-6, 1.0], [0.0, 0.0], []):
        rounded = channel_algebra.cast(np.array(values, np.float64), half)
        assert rounded is not None
        assert rounded.dtype == half
        np.testing.assert_allclose(rounded, values, atol=1e-7)


def test_cast_keeps_the_shape() -> None:
    for values in (np.array(2.0), np.broadcast_to(np.ones(3), (2, 3)), np.ones((3, 2)).T):
        rounded = channel_algebra.cast(values, np.dtype(np.float32))
        assert rounded is not None
        assert rounded.shape == values.shape
        assert rounded.flags.c_contiguous


def test_scales_leave_their_operands_alone() -> None:
    weight = np.ones((4, 2, 1, 1), np.float32)
    scale = np.arange(4.0)
    channel_algebra.scale_outputs(weight, scale, group=2)
    channel_algebra.scale_inputs(weight, scale, group=2)
    channel_algebra.compose(weight, weight, first_group=2, second_group=2)
    assert (weight == 1).all()
    assert (scale == np.arange(4.0)).all()
