"""A Sum of two as the Add that runtimes fuse into a convolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes.canonicalise import Canonicalise
from tests.passes import harness

Dims = tuple[int | str, ...]


def total(*shapes: Dims, **options: Any) -> onnx.ModelProto:
    """The Sum of one graph input per shape."""
    inputs = {f"x{i}": shape for i, shape in enumerate(shapes)}
    rank = max(len(shape) for shape in shapes)
    return harness.model(
        [harness.node("Sum", list(inputs), ["y"])], inputs, {"y": [None] * rank}, **options
    )


def canonicalise(proto: onnx.ModelProto) -> harness.Outcome:
    return harness.run_pass(Canonicalise(), proto)


def check(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """To the bit."""
    feeds = harness.random_feeds(before, np.random.default_rng(0))
    expected, actual = (harness.run_unoptimized(m, feeds)["y"] for m in (before, after))
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def test_a_sum_of_two_is_an_add() -> None:
    before = total((2, 3), (2, 3))
    after = canonicalise(before)
    assert after.ops == ["Add"]
    assert list(after.model.graph.node[0].input) == ["x0", "x1"]
    assert [r.facts.get("step") for r in after.remarks if r.ordinal] == ["sum-of-two-to-add"]
    check(before, after.model)


def test_a_constant_goes_last() -> None:
    before = harness.model(
        [harness.node("Sum", ["c", "x"], ["y"])],
        {"x": (2, 3)},
        {"y": (2, 3)},
        {"c": np.arange(3, dtype=np.float32)},
    )
    after = canonicalise(before)
    assert after.ops == ["Add"]
    assert list(after.model.graph.node[0].input) == ["x", "c"]
    check(before, after.model)


def test_a_value_twice() -> None:
    nodes = [harness.node("Sum", ["x", "x"], ["y"])]
    before = harness.model(nodes, {"x": (2, 3)}, {"y": (2, 3)})
    after = canonicalise(before)
    assert after.ops == ["Add"]
    check(before, after.model)


def test_a_longer_sum_stays() -> None:
    after = canonicalise(total((2, 3), (2, 3), (2, 3)))
    assert after.ops == ["Sum"]
    assert after.applied == 0


def test_before_adds_broadcast_a_sum_stays() -> None:
    after = canonicalise(total((2, 3), (2, 3), opset=6))
    assert after.ops == ["Sum"]
    assert after.applied == 0


@pytest.mark.parametrize("opset", harness.OPSETS)
def test_opsets(opset: int) -> None:
    before = total(("batch", 3), ("batch", 3), opset=opset)
    after = canonicalise(before)
    assert after.ops == ["Add"]
    check(before, after.model)


@st.composite
def sums(draw: st.DrawFn) -> onnx.ModelProto:
    """Of two or three values that broadcast against each other."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shapes = [
        tuple(draw(st.sampled_from([1, size])) for size in shape)[draw(st.integers(0, 1)) :]
        for _ in range(draw(st.integers(2, 3)))
    ]
    return total(
        *shapes,
        opset=draw(st.sampled_from([8, 13, 17, 21, harness.NEWEST_OPSET])),
        dtype=draw(st.sampled_from([np.float16, np.float32, np.float64])),
    )


def check_sum(before: onnx.ModelProto) -> None:
    after = canonicalise(before)
    assert after.ops == (["Add"] if len(before.graph.input) == 2 else ["Sum"])
    check(before, after.model)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sums())
def test_outputs_are_the_same(before: onnx.ModelProto) -> None:
    check_sum(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(sums())
def test_outputs_are_the_same_at_length(before: onnx.ModelProto) -> None:
    check_sum(before)
