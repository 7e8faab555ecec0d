"""Channels in another order, with fillers between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics import arrangement as arrangements
from pwopt.numerics.arrangement import PADDING


def test_spread_fills_every_group() -> None:
    assert arrangements.spread(4, 6, group=2) == (0, 1, PADDING, 2, 3, PADDING)
    assert arrangements.spread(3, 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("channels", "block", "group", "places"), [(24, 16, 1, 32), (60, 16, 3, 96), (32, 16, 1, 32)]
)
def test_aligned_counts_places(channels: int, block: int, group: int, places: int) -> None:
    assert arrangements.aligned(channels, block, group=group) == places


def test_keeps_groups() -> None:
    assert arrangements.keeps_groups((1, 0, PADDING, 3, PADDING, 2), 4, 2)
    assert not arrangements.keeps_groups((0, 2, 1, 3), 4, 2)
    assert not arrangements.keeps_groups((0, 1, 2), 3, 2)
    assert not arrangements.keeps_groups((0, 0, 1), 2, 1)


def test_take_fills() -> None:
    values = np.array([[1, 2], [3, 4]], np.float32)
    taken = arrangements.take(values, (1, PADDING, 0), fill=9)
    np.testing.assert_array_equal(taken, [[3, 4], [9, 9], [1, 2]])
    assert taken.dtype == np.float32
    assert taken.flags.c_contiguous
    np.testing.assert_array_equal(arrangements.take(values, (PADDING, 1), axis=1), [[0, 2], [0, 4]])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_grouped_product_is_the_same_over_arranged_inputs(
    group: int, rows: int, width: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    channels = group * width
    fillers = data.draw(st.integers(0, 2))
    parts = []
    for number in range(group):
        own = [*range(number * width, (number + 1) * width), *[PADDING] * fillers]
        parts += data.draw(st.permutations(own))
    weight = rng.standard_normal((group * rows, width))
    x = rng.standard_normal(channels)
    arranged = arrangements.take(x, parts, fill=7.0)
    assert arrangements.keeps_groups(parts, channels, group)
    taken = arrangements.take_inputs(weight, parts, group=group)
    expected = np.einsum("grw,gw->gr", weight.reshape(group, rows, width), x.reshape(group, width))
    actual = np.einsum(
        "grw,gw->gr", taken.reshape(group, rows, -1), arranged.reshape(group, width + fillers)
    )
    np.testing.assert_allclose(actual, expected)
