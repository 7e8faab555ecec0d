"""PRelu as LeakyRelu, or as products per channel and a Relu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt.graph import Facts, parse
from pwopt.passes.lower_prelu import LowerPrelu
from tests import zoo
from tests.passes import harness

Why = LowerPrelu.Why
SHAPE = (2, 3, 4, 5)
Dims = tuple[int | str | None, ...]


def slopes(*values: float, shape: tuple[int, ...] = (3, 1, 1), dtype: Any = np.float32) -> Any:
    return np.asarray(values, dtype).reshape(shape)


def prelu(slope: Any, *, shape: Dims = SHAPE, **settings: Any) -> onnx.ModelProto:
    nodes = [harness.node("PRelu", ["x", "slope"], ["y"])]
    settings.setdefault("dtype", slope.dtype)
    return harness.model(nodes, {"x": shape}, {"y": shape}, {"slope": slope}, **settings)


def lower(proto: onnx.ModelProto, **options: Any) -> harness.Outcome:
    return harness.run_pass(LowerPrelu(), proto, **options)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    harness.assert_same_outputs(before, after, np.random.default_rng(0), **dims)


# -- golden ----------------------------------------------------------------------------------------


def test_gentle_slopes() -> None:
    before = prelu(slopes(0.25, -0.5, 1.0))
    after = lower(before)
    assert after.ops == ["Mul", "Mul", "Relu", "Add"]
    assert after.model.graph.node[-1].output == ["y"]
    weights = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    linear, inner = after.model.graph.node[:2]
    np.testing.assert_array_equal(weights[linear.input[1]], slopes(0.25, -0.5, 1.0))
    np.testing.assert_array_equal(weights[inner.input[1]], slopes(0.75, 1.5, 0.0))
    check(before, after.model)
    second = lower(before, variant="two-slopes")
    assert second.ops == ["Mul", "Relu", "Mul", "Add"]
    check(before, second.model)


def test_a_slope_above_one_has_one_form() -> None:
    before = prelu(slopes(0.25, -0.5, 1.5))
    after = lower(before)
    assert after.ops == ["Mul", "Relu", "Mul", "Add"]
    check(before, after.model)
    (remark,) = after.remarks
    assert remark.facts["largest"] == 1.5
    assert remark.facts["variants"] == ["two-slopes"]


@pytest.mark.parametrize(
    "slope", [slopes(0.25, shape=(1,)), slopes(0.25, shape=()), slopes(0.25, 0.25, 0.25)]
)
def test_one_slope_is_leaky_relu(slope: Any) -> None:
    before = prelu(slope)
    after = lower(before)
    assert after.ops == ["LeakyRelu"]
    assert [a.f for a in after.model.graph.node[0].attribute] == [0.25]
    assert not after.model.graph.initializer
    check(before, after.model)


def test_no_slope_is_relu() -> None:
    before = prelu(slopes(0.0, 0.0, 0.0))
    after = lower(before)
    assert after.ops == ["Relu"]
    check(before, after.model)


def test_slopes_shared_by_two_nodes_keep_their_tensor_for_the_other() -> None:
    nodes = [
        harness.node("PRelu", ["x", "slope"], ["a"]),
        harness.node("Mul", ["a", "slope"], ["b"]),
        harness.node("PRelu", ["b", "slope"], ["y"]),
    ]
    weights = {"slope": slopes(0.25, -0.5, 2.0)}
    before = harness.model(nodes, {"x": SHAPE}, {"a": SHAPE, "y": SHAPE}, weights)
    after = lower(before)
    assert after.applied == 2
    assert "PRelu" not in after.ops
    check(before, after.model)


@pytest.mark.parametrize("shape", [("N", 3, "H", "W"), ("N", "C", "H", "W"), ("N", 3, "L")])
def test_dynamic_dimensions(shape: Dims) -> None:
    slope = slopes(0.25, -0.5, 0.5, shape=(3, *(1,) * (len(shape) - 2)))
    before = prelu(slope, shape=shape)
    after = lower(before)
    assert after.ops == ["Mul", "Mul", "Relu", "Add"]
    check(before, after.model, N=2, C=3, H=4, W=5, L=6)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)
    overridable: bool = False


def without_rank() -> onnx.ModelProto:
    nodes = [
        harness.node("Squeeze", ["input"], ["x"]),
        harness.node("PRelu", ["x", "slope"], ["y"]),
    ]
    inputs = {"input": ("N", 3, 2, "W")}
    return harness.model(nodes, inputs, {"y": ("A", "B", "C")}, {"slope": slopes(0.1, 0.2, 0.3)})


def fed_slope() -> onnx.ModelProto:
    nodes = [harness.node("PRelu", ["x", "slope"], ["y"])]
    return harness.model(nodes, {"x": SHAPE, "slope": (3, 1, 1)}, {"y": SHAPE})


DECLINED = {
    Why.SLOPE_NOT_CONSTANT: Declined(fed_slope),
    Why.SLOPE_NOT_PER_CHANNEL: Declined(
        lambda: prelu(slopes(0.1, 0.2, 0.3, 0.4, 0.5, shape=(5,))), {"slope": [5], "rank": 4}
    ),
    Why.SLOPE_NOT_FINITE: Declined(lambda: prelu(slopes(0.1, np.inf, 0.3))),
    Why.RANK_UNKNOWN: Declined(without_rank),
    Why.ELEMENT_TYPE: Declined(lambda: prelu(slopes(2, 3, 4, dtype=np.int32)), {"dtype": "int32"}),
    Why.SINGLE_PRECISION_ONLY: Declined(
        lambda: prelu(slopes(0.1, shape=(1,), dtype=np.float64)), {"slope": 0.1}
    ),
    Why.OP_NOT_IN_OPSET: Declined(
        lambda: prelu(slopes(0.1, shape=(1,)), opset=6), {"op": "PRelu", "since": 7, "opset": 6}
    ),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    after = lower(case.proto(), overridable=case.overridable)
    (remark,) = after.remarks
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


def test_slopes_listed_as_inputs_are_constants_unless_overridable() -> None:
    proto = prelu(slopes(0.1, 0.2, 0.3), opset=9, ir=3)
    assert lower(proto).applied == 1
    after = lower(proto, overridable=True)
    assert after.reasons == {Why.SLOPE_NOT_CONSTANT.value}


def test_double_precision_leaky_relu_waits_for_its_kernel() -> None:
    slope = slopes(0.25, shape=(1,), dtype=np.float64)
    assert lower(prelu(slope, opset=13)).reasons == {Why.SINGLE_PRECISION_ONLY.value}
    before = prelu(slope, opset=17)
    after = lower(before)
    assert after.ops == ["LeakyRelu"]
    check(before, after.model)


# -- properties ------------------------------------------------------------------------------------

numbers = st.floats(-2.0, 2.0, width=16)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    rank = draw(st.integers(3, 5))
    channels = draw(st.integers(1, 4))
    spatial = draw(st.lists(st.integers(1, 4), min_size=rank - 2, max_size=rank - 2))
    values = draw(st.lists(numbers, min_size=channels, max_size=channels))
    if draw(st.booleans()):
        values = [min(v, 1.0) for v in values]
    lead = (1,) if draw(st.booleans()) else ()
    slope = slopes(
        *values,
        shape=(*lead, channels, *(1,) * (rank - 2)),
        dtype=draw(st.sampled_from([np.float32, np.float16, np.float64])),
    )
    opset = draw(st.sampled_from([7, 9, 11, 13, 16, 17, 21, 22, harness.NEWEST_OPSET]))
    return prelu(slope, shape=(draw(st.integers(1, 2)), channels, *spatial), opset=opset)


def check_model(before: onnx.ModelProto) -> None:
    (value,) = before.graph.input
    is_double = value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    after = lower(before)
    assert after.applied == 1 or is_double
    try:
        harness.run_unoptimized(before, harness.random_feeds(before, np.random.default_rng(0)))
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        assume(not is_double)
        raise
    check(before, after.model)
    variants = {v.name for v in LowerPrelu().variants(_match(before))} if after.applied else set()
    if "two-slopes" in variants:
        check(before, lower(before, variant="two-slopes").model)


def _match(proto: onnx.ModelProto) -> Any:
    model = parse(proto)
    model.infer_shapes()
    (node,) = model.nodes.values()
    return LowerPrelu().match(node, Facts(model))


@settings(max_examples=50, deadline=None)
@given(models())
def test_any_rank_slope_opset_and_type(before: onnx.ModelProto) -> None:
    check_model(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_any_rank_slope_opset_and_type_at_length(before: onnx.ModelProto) -> None:
    check_model(before)


@pytest.mark.zoo
def test_a_trained_network() -> None:
    before = zoo.trained("realesr_animevideov3_x2.onnx")
    after = lower(before)
    assert after.applied == 17
    assert "PRelu" not in after.ops
    sizes = before.graph.input[0].type.tensor_type.shape.dim
    dims = {d.dim_param: 24 for d in sizes if d.dim_param}
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=8.0, **dims)
