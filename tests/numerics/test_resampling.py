"""Interpolation as convolutions, against its definition at clamped coordinates."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics.resampling import cubic, linear, resampling


def test_halving_by_cubic_has_four_taps() -> None:
    half = resampling(1, 2, centred=True, a=Fraction(-3, 4))
    assert half.window == (-1, 2)
    expected = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
    np.testing.assert_array_equal(half.kernels(half.window), [expected])


def test_points_meet_points() -> None:
    twice = resampling(2, 1, centred=False)
    assert twice.taps == ({0: 1.0}, {0: 0.5, 1: 0.5})


def test_no_input_is_cropped() -> None:
    quarter = resampling(1, 4, centred=True)
    assert quarter.taps == ({1: 0.5, 2: 0.5},)
    assert quarter.window == (0, 3)


@settings(max_examples=100, deadline=None)
@given(st.fractions(-4, 4, max_denominator=64), st.fractions(-2, 0, max_denominator=64))
def test_weights_sum_to_one(position: Fraction, a: Fraction) -> None:
    assert sum(linear(position).values()) == pytest.approx(1, abs=1e-12)
    assert sum(cubic(position, a).values()) == pytest.approx(1, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([None, Fraction(-3, 4), Fraction(-1, 2)]),
    st.integers(1, 5),
)
def test_a_convolution_on_the_padded_image(
    up: int, down: int, centred: bool, a: Fraction | None, blocks: int
) -> None:
    x = np.random.default_rng(0).standard_normal(down * blocks)
    plan = resampling(up, down, centred=centred, a=a)
    first, last = plan.window
    padded = np.pad(x, (-first, last + 1 - down), mode="edge")
    answer = np.zeros(up * blocks)
    for r, kernel in enumerate(plan.kernels(plan.window)):
        answer[r::up] = np.correlate(padded, kernel)[::down]
    half = Fraction(1, 2) if centred else Fraction(0)
    for o, value in enumerate(answer):
        position = (o + half) * Fraction(down, up) - half
        weights = linear(position) if a is None else cubic(position, a)
        clamped = sum(w * x[min(max(i, 0), len(x) - 1)] for i, w in weights.items())
        assert math.isclose(value, clamped, abs_tol=1e-12)
