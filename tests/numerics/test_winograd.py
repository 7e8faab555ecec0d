"""Minimal filtering against direct correlation, exactly and in float64."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics.winograd import Filtering, minimal_filtering, recommended_points

SIZES = [(m, r) for m in range(1, 8) for r in range(1, 8) if m + r - 1 <= 8]

fractions = st.fractions(-8, 8, max_denominator=6)


def exact(f: Filtering, g: list[Fraction], d: list[Fraction]) -> list[Fraction]:
    def times(matrix: tuple[tuple[Fraction, ...], ...], v: list[Fraction]) -> list[Fraction]:
        return [sum((a * b for a, b in zip(row, v, strict=True)), Fraction(0)) for row in matrix]

    products = [a * b for a, b in zip(times(f.weight, g), times(f.input, d), strict=True)]
    return times(f.output, products)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_distinct_points_give_the_correlation_exactly(data: st.DataObject) -> None:
    m, r = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    count = m + r - 2
    points = data.draw(st.lists(fractions, min_size=count, max_size=count, unique=True))
    f = minimal_filtering(m, r, points)
    g = data.draw(st.lists(fractions, min_size=r, max_size=r))
    d = data.draw(st.lists(fractions, min_size=f.size, max_size=f.size))
    expected = [sum((g[k] * d[i + k] for k in range(r)), Fraction(0)) for i in range(m)]
    assert exact(f, g, d) == expected


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_two_dimensions_in_float64(m: int, r: int) -> None:
    f = minimal_filtering(m, r)
    rng = np.random.default_rng(0)
    d, g = rng.standard_normal((f.size, f.size)), rng.standard_normal((r, r))
    weight = f.weight_array @ g @ f.weight_array.T
    data = f.input_array @ d @ f.input_array.T
    windows = np.lib.stride_tricks.sliding_window_view(d, (r, r))
    expected = np.einsum("ijkl,kl->ij", windows, g)
    actual = f.output_array @ (weight * data) @ f.output_array.T
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)


def test_the_matrices_of_lavin_and_gray() -> None:
    f = minimal_filtering(2, 3, [0, 1, -1])
    # Their rows differ by a sign or a factor that moves between G and B^T.
    theirs_g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    theirs_b = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
    ratios = np.array([[-1], [1], [1], [1]])
    np.testing.assert_array_equal(f.weight_array * ratios, theirs_g)
    np.testing.assert_array_equal(f.input_array * ratios, theirs_b)
    np.testing.assert_array_equal(f.output_array, [[1, 1, 1, 0], [0, 1, -1, 1]])


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_the_constant_makes_ones(m: int, r: int) -> None:
    f = minimal_filtering(m, r)
    np.testing.assert_allclose(f.output_array @ f.constant, np.ones(m), rtol=0, atol=1e-14)
    if Fraction(1) in f.points:
        assert np.flatnonzero(f.constant[:-1]).tolist() == [f.points.index(Fraction(1))]


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_input_and_output_are_exact_in_binary(m: int, r: int) -> None:
    f = minimal_filtering(m, r)
    for value in itertools.chain(*f.input, *f.output):
        assert value.denominator & (value.denominator - 1) == 0
        assert float(np.float32(value)) == value


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5)])
def test_no_other_symmetric_eighths_amplify_less(m: int, r: int) -> None:
    best = minimal_filtering(m, r).amplification
    eighths = [Fraction(k, 8) for k in range(2, 21)]
    for chosen in itertools.combinations(eighths, (m + r - 2) // 2):
        points = (Fraction(0), *chosen, *(-p for p in chosen))
        assert minimal_filtering(m, r, points).amplification >= best * (1 - 1e-12)


@pytest.mark.parametrize(("m", "r"), [(1, 3), (3, 3), (5, 3)])
def test_no_other_powers_of_two_amplify_less(m: int, r: int) -> None:
    powers = [s * Fraction(2) ** e for e in range(-2, 3) for s in (1, -1)]
    others = [p for p in powers if p != 1]
    size = m + r - 1
    best = minimal_filtering(m, r).amplification
    for chosen in itertools.combinations(others, max(size - 3, 0)):
        points = (Fraction(0), Fraction(1), *chosen)[: size - 1]
        assert minimal_filtering(m, r, points).amplification >= best * (1 - 1e-12)


def test_amplification_is_the_error_relative_to_a_direct_sum() -> None:
    assert minimal_filtering(1, 3, [0, 1]).amplification > 1
    assert minimal_filtering(4, 1, [0, 1, -1]).amplification == pytest.approx(
        minimal_filtering(4, 1).amplification
    )
    direct = minimal_filtering(1, 1)
    assert direct.amplification == direct.worst_amplification == 1.0


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (6, 3), (4, 5)])
def test_amplification_predicts_the_error_in_float32(m: int, r: int) -> None:
    # Products round in float32, everything around them in float64.
    f = minimal_filtering(m, r)
    rng = np.random.default_rng(1)
    g, d = rng.standard_normal((r, 40000)), rng.standard_normal((f.size, 40000))
    products = (f.weight_array @ g) * (f.input_array @ d)
    error = f.output_array @ (products.astype(np.float32) - products)
    direct = np.array([g[k] * d[k] for k in range(r)])
    unit = (direct.astype(np.float32) - direct).sum(0)
    ratio = np.sqrt((error**2).mean() / (unit**2).mean())
    assert ratio == pytest.approx(f.amplification, rel=0.05)


def test_larger_tiles_amplify_more() -> None:
    gains = [minimal_filtering(m, 3).amplification for m in (2, 3, 4, 5, 6)]
    assert gains == sorted(gains)
    assert gains[2] == pytest.approx(2.186, abs=1e-3)
    worst = [minimal_filtering(m, 3).worst_amplification for m in (2, 4, 6)]
    assert worst == pytest.approx([8 / 3, 7.9152, 22.5556], rel=1e-4)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        minimal_filtering(0, 3)
    with pytest.raises(ValueError, match="takes 3 finite points, not 2"):
        minimal_filtering(2, 3, [0, 1])
    with pytest.raises(ValueError, match="not distinct"):
        minimal_filtering(2, 3, [0, 1, 1])
    with pytest.raises(ValueError, match=r"known: 1\.\.8"):
        recommended_points(9)
