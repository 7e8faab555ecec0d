"""Mish, Softplus and Swish as vectorised arithmetic."""

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

from pwopt.passes.lower_activation import LowerActivation
from tests.passes import harness

Why = LowerActivation.Why
SHAPE = (2, 3, 4, 5)
FIRST = {"Mish": 18, "Softplus": 7, "Swish": 24}
EXPECTED = {
    "Mish": ["Clip", "Exp", "Add", "Mul", "Add", "Div", "Mul"],
    "Softplus": ["Abs", "Neg", "Exp", "Add", "Log", "Relu", "Add"],
    "Swish": ["Sigmoid", "Mul"],
}
Dims = tuple[int | str | None, ...]


def model(
    op: str, opset: int | None = None, dtype: Any = np.float32, shape: Dims = SHAPE, **attrs: Any
) -> onnx.ModelProto:
    """The operator behind a ``Sum`` that spreads its input."""
    nodes = [
        harness.node("Sum", ["input"] * 4, ["x"]),
        harness.node(op, ["x"], ["y"], **attrs),
    ]
    opset = FIRST[op] if opset is None else opset
    return harness.model(nodes, {"input": shape}, {"y": shape}, opset=opset, dtype=dtype)


def lower(proto: onnx.ModelProto, **options: Any) -> harness.Outcome:
    return harness.run_pass(LowerActivation(), proto, **options)


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", EXPECTED)
@pytest.mark.parametrize("opset", [7, 11, 13, 17, 18, 21, 24])
def test_operators_become_arithmetic(op: str, opset: int) -> None:
    if opset < FIRST[op]:
        pytest.skip("the operator needs a newer opset")
    before = model(op, opset)
    after = lower(before)
    assert sorted(after.ops) == sorted(["Sum", *EXPECTED[op]])
    assert after.model.graph.node[-1].output == ["y"]
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0))


def test_swish_with_a_slope() -> None:
    before = model("Swish", alpha=1.702)
    after = lower(before)
    assert after.ops == ["Sum", "Mul", "Sigmoid", "Mul"]
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0))


@pytest.mark.parametrize("op", ["Mish", "Softplus"])
def test_nothing_overflows(op: str) -> None:
    before = model(op)
    after = lower(before)
    x = np.zeros(SHAPE, np.float32)
    x.flat[:8] = [1e30, 1e3, 30.0, 5.0, -5.0, -30.0, -1e3, -1e30]
    expected, actual = (
        harness.run_unoptimized(proto, {"input": x})["y"] for proto in (before, after.model)
    )
    assert np.isfinite(actual).all()
    # Beyond the last bit of 1, softplus keeps its absolute precision only.
    atol = 1e-7 if op == "Softplus" else 1e-30
    np.testing.assert_allclose(actual, expected, rtol=4e-6, atol=atol)


@pytest.mark.parametrize("dims", [("N", 3, "H", "W"), (None, None)])
def test_dynamic_dimensions_and_graph_outputs(dims: Dims) -> None:
    nodes = [
        harness.node("Softplus", ["x"], ["a"]),
        harness.node("Mish", ["a"], ["y"]),
    ]
    before = harness.model(nodes, {"x": dims}, {"a": dims, "y": dims}, opset=18)
    after = lower(before)
    assert after.applied == 2
    assert [o.name for o in after.model.graph.output] == ["a", "y"]
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), N=2, H=3, W=4)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def bfloat16() -> onnx.ModelProto:
    proto = model("Mish", 22)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    return proto


DECLINED = {
    Why.ELEMENT_TYPE: Declined(bfloat16, {"dtype": "None"}),
    Why.OP_NOT_IN_OPSET: Declined(
        lambda: model("Softplus", 6), {"op": "Add", "since": 7, "opset": 6}
    ),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    after = lower(case.proto())
    (remark,) = after.remarks
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


# -- properties ------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    op = draw(st.sampled_from(sorted(EXPECTED)))
    # ONNX Runtime runs Swish in the operator set that it came with only.
    newest = FIRST[op] if op == "Swish" else harness.NEWEST_OPSET
    opset = draw(st.sampled_from([7, 8, 9, 11, 13, 17, 18, 20, 22, newest]))
    alpha = draw(st.sampled_from([1.0, 0.5, 1.702, -1.0]))
    return model(
        op,
        max(opset, FIRST[op]),
        draw(st.sampled_from([np.float32, np.float16, np.float64])),
        tuple(draw(st.lists(st.integers(1, 5), max_size=5))),
        **({"alpha": alpha} if op == "Swish" else {}),
    )


def check(before: onnx.ModelProto) -> None:
    after = lower(before)
    assert after.applied == 1
    elem = before.graph.input[0].type.tensor_type.elem_type
    factor = 4.0 if elem == onnx.TensorProto.FLOAT16 else 1.0
    rng = np.random.default_rng(1)
    try:
        harness.run_unoptimized(before, harness.random_feeds(before, rng))
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        assume(elem != onnx.TensorProto.DOUBLE)
        raise
    harness.assert_same_outputs(before, after.model, rng, factor=factor)


@settings(max_examples=50, deadline=None)
@given(models())
def test_any_opset_shape_and_type(before: onnx.ModelProto) -> None:
    check(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_any_opset_shape_and_type_at_length(before: onnx.ModelProto) -> None:
    check(before)
