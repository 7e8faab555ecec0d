"""Phases of transposed convolutions, against their definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics.sub_pixel import (
    packed_weight,
    phase_weight,
    stacked_weight,
    transposed_phases,
)


def test_kernel_of_the_stride_has_one_tap_per_phase() -> None:
    plan = transposed_phases(2, stride=2)
    assert [phase.taps for phase in plan.phases] == [((0, 0),), ((1, 0),)]
    assert plan.window == (0, 0)
    assert plan.pads(plan.window) == (0, 0, (0, 0))


def test_pads_shift_the_phases() -> None:
    plan = transposed_phases(4, stride=2, begin=1)
    assert [phase.taps for phase in plan.phases] == [((1, 0), (3, -1)), ((0, 1), (2, 0))]
    assert plan.window == (-1, 1)


def test_a_phase_without_taps() -> None:
    plan = transposed_phases(1, stride=3)
    assert [phase.taps for phase in plan.phases] == [((0, 0),), (), ()]
    assert plan.phases[1].window == (0, 0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_phases_are_the_transposed_convolution(data: st.DataObject) -> None:
    kernel = data.draw(st.integers(1, 6))
    stride = data.draw(st.integers(1, 4))
    dilation = data.draw(st.integers(1, 3))
    size = data.draw(st.integers(1, 6))
    full = (size - 1) * stride + (kernel - 1) * dilation + 1
    begin = data.draw(st.integers(0, full - 1))
    length = data.draw(st.integers(1, full - begin + stride - 1))
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(size), rng.standard_normal(kernel)

    expected = np.zeros(begin + length + full)
    for i in range(size):
        for k in range(kernel):
            expected[i * stride + k * dilation] += x[i] * w[k]
    expected = expected[begin : begin + length]

    plan = transposed_phases(
        kernel, stride=stride, dilation=dilation, begin=begin, excess=length - stride * size
    )
    assert (size + plan.blocks) * stride - plan.surplus == length
    assert sum(len(phase.taps) for phase in plan.phases) == kernel
    answer = np.zeros((size + plan.blocks) * stride)
    for r, phase in enumerate(plan.phases):
        before, after, window = plan.pads(phase.window)
        assert min(before, after) >= 0
        taps = phase_weight(w.reshape(1, 1, -1), [phase], [window]).reshape(-1)
        answer[r::stride] = np.correlate(np.pad(x, (before, after)), taps)
    np.testing.assert_allclose(answer[:length], expected, atol=1e-12)


def test_stacked_phases_go_row_by_row() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 2, 2, 3))
    plans = [transposed_phases(2, stride=2), transposed_phases(3, stride=3)]
    stacked = stacked_weight(weight, plans, [plan.window for plan in plans])
    assert stacked.shape == (2 * 3 * 2, 3, 1, 1)
    expected = weight.transpose(2, 3, 1, 0).reshape(-1, 3)
    np.testing.assert_array_equal(stacked[:, :, 0, 0], expected)


def test_groups_keep_their_channels() -> None:
    weight = np.arange(12.0).reshape(4, 3, 1)
    plan = transposed_phases(1, stride=1)
    (phase,) = plan.phases
    turned = phase_weight(weight, [phase], [plan.window], group=2)
    expected = weight.reshape(2, 2, 3).swapaxes(1, 2).reshape(6, 2, 1)
    np.testing.assert_array_equal(turned, expected)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_block_of_outputs_is_one_of_a_strided_convolution(data: st.DataObject) -> None:
    kernel, stride = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    step, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal(stride * (step * blocks - 1) + kernel)
    w = rng.standard_normal((2, 1, kernel))
    packed = packed_weight(w, [step], [stride])
    assert packed.shape == (2 * step, 1, kernel + stride * (step - 1))
    answer = np.zeros((2, step * blocks))
    for r in range(step):
        for c in range(2):
            row = np.correlate(x, packed[r * 2 + c, 0])[:: stride * step]
            answer[c, r::step] = row
    expected = [np.correlate(x, w[c, 0])[::stride] for c in range(2)]
    np.testing.assert_allclose(answer, expected, atol=1e-12)
