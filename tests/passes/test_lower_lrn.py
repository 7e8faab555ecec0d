"""LRN as a window sum over channels and square roots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pwopt.passes.lower_lrn import LowerLrn
from tests.passes import harness
from tests.passes.linear_models import BATCH

Why = LowerLrn.Why
Dims = tuple[int | str | None, ...]
VARIANTS = ("conv", "pool")


def lrn(shape: Dims = (2, 7, 4, 5), size: int = 5, **settings: Any) -> onnx.ModelProto:
    """An LRN whose window sum matters: alpha is 1 unless given."""
    keys = ("alpha", "beta", "bias")
    attributes = {"alpha": 1.0} | {k: settings.pop(k) for k in keys if k in settings}
    nodes = [harness.node("LRN", ["x"], ["y"], size=size, **attributes)]
    return harness.model(nodes, {"x": shape}, {"y": shape}, **settings)


def lower(proto: onnx.ModelProto, variant: str | None = None) -> harness.Outcome:
    return harness.run_pass(LowerLrn(), proto, variant)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    """Against the definition, and against ONNX Runtime where it has the operator."""
    feeds = harness.random_feeds(before, np.random.default_rng(0), **dims)
    expected = defined(before, feeds["x"])
    if feeds["x"].dtype == np.float64:
        actual = refer(after, feeds)
    else:
        actual = harness.run_unoptimized(after, feeds)["y"]
    assert actual.dtype == expected.dtype
    limit = 4 * harness.TOLERANCE[expected.dtype] * max(float(np.abs(expected).max()), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)
    if runs(before) and feeds["x"].dtype == np.float32:
        harness.assert_same_outputs(before, after, np.random.default_rng(0), factor=4, **dims)


def refer(proto: onnx.ModelProto, feeds: harness.Feeds) -> Any:
    """The output by ONNX's reference implementation."""
    outputs: Any = ReferenceEvaluator(proto).run(None, dict(feeds))
    return outputs[0]


def runs(proto: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime's kernel takes the attributes and the number of dimensions."""
    if len(proto.graph.input[0].type.tensor_type.shape.dim) != 4:
        return False
    given = {a.name: helper.get_attribute_value(a) for a in proto.graph.node[0].attribute}
    return bool(given["size"] % 2 == 1 and given["alpha"] > 0 and given.get("beta", 0.75) > 0)


def attribute(node: onnx.NodeProto, key: str) -> Any:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}[key]


def defined(proto: onnx.ModelProto, x: Any) -> Any:
    """LRN as its definition reads, in float64."""
    given = {a.name: helper.get_attribute_value(a) for a in proto.graph.node[0].attribute}
    size, squares = given["size"], x.astype(np.float64) ** 2
    total = np.zeros_like(squares)
    for c in range(x.shape[1]):
        total[:, c] = squares[:, max(0, c - (size - 1) // 2) : c + size // 2 + 1].sum(axis=1)
    base = given.get("bias", 1.0) + given["alpha"] / size * total
    return (x / base ** given.get("beta", 0.75)).astype(x.dtype)


# -- golden ----------------------------------------------------------------------------------------


def test_a_banded_convolution() -> None:
    before = lrn((2, 4, 3, 3), 3, alpha=0.75, bias=2.0)
    after = lower(before, "conv")
    assert after.ops == ["Mul", "Conv", "Sqrt", "Sqrt", "Mul", "Div"]
    conv = after.model.graph.node[1]
    weights = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    band = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    np.testing.assert_array_equal(weights[conv.input[1]][:, :, 0, 0], np.array(band) * 0.25)
    np.testing.assert_array_equal(weights[conv.input[2]], [2.0] * 4)
    assert after.model.graph.node[-1].output == ["y"]
    check(before, after.model)


def test_a_pool_over_channels() -> None:
    before = lrn()
    after = lower(before, "pool")
    ops = ["Mul", "Unsqueeze", "AveragePool", "Squeeze", "Mul", "Add", "Sqrt", "Sqrt", "Mul", "Div"]
    assert after.ops == ops
    pool = after.model.graph.node[2]
    assert attribute(pool, "kernel_shape") == [5, 1, 1]
    assert attribute(pool, "pads") == [2, 0, 0, 2, 0, 0]
    check(before, after.model)


@pytest.mark.parametrize(
    ("beta", "tail"),
    [(0.5, ["Sqrt", "Div"]), (1.0, ["Div"]), (0.6, ["Pow", "Mul"]), (-1.5, ["Pow", "Mul"])],
)
def test_other_powers(beta: float, tail: list[str]) -> None:
    before = lrn(beta=beta)
    after = lower(before, "conv")
    assert after.ops == ["Mul", "Conv", *tail]
    check(before, after.model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 4, 9, 16])
def test_windows_even_odd_and_wider_than_the_channels(size: int, variant: str) -> None:
    before = lrn(size=size)
    check(before, lower(before, variant).model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_definition_agrees_with_the_reference_on_even_windows(variant: str) -> None:
    before = lrn((7, 7, 2, 3), 4)  # the reference sums over as many channels as there are images
    feeds = harness.random_feeds(before, np.random.default_rng(1))
    expected = refer(before, feeds)
    actual = harness.run_unoptimized(lower(before, variant).model, feeds)["y"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 17, 21])
def test_opsets(opset: int, variant: str) -> None:
    before = lrn(("batch", 7, 4, "w"), opset=opset)
    check(before, lower(before, variant).model, batch=3, w=6)


def test_large_values_stay_in_range() -> None:
    """Their squares sum up to more than what the power 1.5 of is a number."""
    x = np.full((1, 7, 2, 2), 1e18, np.float32)
    before = lrn((1, 7, 2, 2))
    expected = defined(before, x)
    assert np.isfinite(expected).all()
    for variant in VARIANTS:
        actual = harness.run_unoptimized(lower(before, variant).model, {"x": x})["y"]
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_many_channels_are_pooled_first() -> None:
    assert "AveragePool" in lower(lrn((1, 192, 2, 2))).ops
    assert "Conv" in lower(lrn((1, 64, 2, 2))).ops
    assert "Conv" in lower(lrn((1, 192, 2, 2, 2))).ops


def test_a_graph_output_behind_and_other_readers() -> None:
    nodes = [
        harness.node("Relu", ["x"], ["r"]),
        harness.node("LRN", ["r"], ["l"], size=3),
        harness.node("Add", ["r", "l"], ["y"]),
    ]
    shape = (1, 4, 3, 3)
    before = harness.model(nodes, {"x": shape}, {"y": shape, "l": shape, "r": shape})
    for variant in VARIANTS:
        after = lower(before, variant)
        assert "LRN" not in after.ops
        harness.assert_same_outputs(before, after.model, np.random.default_rng(0))


# -- reasons to decline ----------------------------------------------------------------------------


def without_rank() -> onnx.ModelProto:
    nodes = [harness.node("Squeeze", ["i"], ["x"]), harness.node("LRN", ["x"], ["y"], size=3)]
    return harness.model(nodes, {"i": ("N", 3, 2, "W", 2)}, {"y": (None,) * 4})


DECLINED: dict[Why, Callable[[], onnx.ModelProto]] = {
    Why.RANK_UNKNOWN: without_rank,
    Why.NO_SPACE: lambda: lrn((2, 7)),
    Why.CHANNELS_UNKNOWN: lambda: lrn((2, "C", 3, 3)),
    Why.ELEMENT_TYPE: lambda: lrn(dtype=np.float16),
    Why.BIAS_NOT_POSITIVE: lambda: lrn(bias=0.0),
    Why.ALPHA_NEGATIVE: lambda: lrn(alpha=-0.1),
    Why.ATTRIBUTES_OUT_OF_RANGE: lambda: lrn(beta=float("inf")),
    Why.OP_NOT_IN_OPSET: lambda: lrn(opset=6),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    after = lower(DECLINED[why]())
    assert after.reasons == {why.value}
    assert after.applied == 0


# -- properties ------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    space = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    batch: int | str = draw(BATCH)
    return lrn(
        (batch, draw(st.integers(1, 9)), *space),
        draw(st.integers(1, 8)),
        alpha=draw(st.sampled_from([0.0, 1e-4, 0.5, 3.0])),
        beta=draw(st.sampled_from([0.0, 0.5, 0.6, 0.75, 1.0, 2.0])),
        bias=draw(st.sampled_from([0.1, 1.0, 2.0])),
        opset=draw(st.sampled_from(harness.OPSETS)),
        dtype=draw(st.sampled_from([np.float32, np.float64])),
    )


def check_model(before: onnx.ModelProto, variant: str) -> None:
    pools = len(before.graph.input[0].type.tensor_type.shape.dim) < 5
    after = lower(before, variant if pools else None)
    assert after.applied == 1
    check(before, after.model)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(models(), st.sampled_from(VARIANTS))
def test_outputs_agree(before: onnx.ModelProto, variant: str) -> None:
    check_model(before, variant)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models(), st.sampled_from(VARIANTS))
def test_outputs_agree_at_length(before: onnx.ModelProto, variant: str) -> None:
    check_model(before, variant)
