"""Gates of squeeze-excite blocks, repeated to the size of what they multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes.lower_gate import LowerGate
from tests.passes import harness

Why = LowerGate.Why
Dims = tuple[int | str | None, ...]


@dataclass
class Draft:
    """Features times a gate computed from them."""

    shape: Dims = (1, 4, 5, 7)
    opset: int = 17
    dtype: Any = np.float32
    activations: tuple[str, ...] = ("Relu", "Sigmoid")
    gate_first: bool = False
    by_convolution: bool = True
    channels: int = 4

    def model(self) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        nodes = [harness.node("GlobalAveragePool", ["x"], ["pool"])]
        weights = {}
        gate = "pool"
        if self.by_convolution:
            nodes.append(harness.node("Conv", ["pool", "w"], ["conv"]))
            weights["w"] = rng.standard_normal((self.channels, 4, 1, 1)).astype(self.dtype)
            gate = "conv"
        for index, op in enumerate(self.activations):
            nodes.append(harness.node(op, [gate], [f"gate{index}"]))
            gate = f"gate{index}"
        nodes.append(harness.node("Mul", [gate, "x"] if self.gate_first else ["x", gate], ["y"]))
        return harness.model(
            nodes,
            {"x": self.shape},
            {"y": self.shape},
            weights,
            opset=self.opset,
            dtype=self.dtype,
        )


def lower(proto: onnx.ModelProto) -> harness.Outcome:
    return harness.run_pass(LowerGate(), proto)


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    feeds = harness.random_feeds(before, np.random.default_rng(0), **dims)
    expected, actual = (harness.run_unoptimized(m, feeds)["y"] for m in (before, after))
    np.testing.assert_array_equal(actual, expected)


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 18, 22])
def test_a_gate_is_repeated(opset: int, first: bool) -> None:
    before = Draft(opset=opset, gate_first=first).model()
    after = lower(before)
    repeat = "Upsample" if opset == 9 else "Resize"
    assert after.ops == ["GlobalAveragePool", "Conv", "Relu", "Sigmoid", repeat, "Mul"]
    product = after.model.graph.node[-1]
    assert list(product.input)[1 if first else 0] == "x"
    assert_equal(before, after.model)


def test_a_gate_with_other_readers() -> None:
    before = Draft().model()
    before.graph.node.append(harness.node("Abs", ["gate1"], ["z"]))
    before.graph.output.append(onnx.helper.make_tensor_value_info("z", harness.FLOAT, [1, 4, 1, 1]))
    after = lower(before)
    assert after.applied == 1
    assert_equal(before, after.model)


def test_dynamic_batch() -> None:
    before = Draft(shape=("N", 4, 5, 7)).model()
    after = lower(before)
    assert after.applied == 1
    assert_equal(before, after.model, N=3)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def constant_gate() -> onnx.ModelProto:
    nodes = [harness.node("Mul", ["x", "g"], ["y"])]
    weights = {"g": np.ones((1, 4, 1, 1), np.float32)}
    return harness.model(nodes, {"x": (1, 4, 5, 7)}, {"y": (1, 4, 5, 7)}, weights)


DECLINED = {
    Why.NO_GATE: Declined(lambda: Draft(channels=1).model()),
    Why.SIZE_UNKNOWN: Declined(
        lambda: Draft(shape=(1, 4, 5, "W")).model(), {"height": 5, "width": "W"}
    ),
    Why.CONSTANT_GATE: Declined(constant_gate),
    Why.NOT_FROM_CONVOLUTION: Declined(
        lambda: Draft(by_convolution=False).model(), {"gate": "gate1"}
    ),
    Why.ELEMENT_TYPE: Declined(lambda: Draft(dtype=np.float16).model(), {"dtype": "float16"}),
    Why.OP_NOT_IN_OPSET: Declined(
        lambda: Draft(opset=8).model(), {"op": "Upsample", "since": 9, "opset": 8}
    ),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    (remark,) = lower(case.proto()).remarks
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


@pytest.mark.parametrize(
    "shapes",
    [((1, 4, 5, 7), (1, 4, 5, 7)), ((2, 4, 5, 7), (1, 4, 1, 1)), ((1, 4, 5, 7), (4, 1, 1))],
)
def test_other_products_are_left_alone(shapes: tuple[Dims, Dims]) -> None:
    nodes = [harness.node("Mul", ["x", "g"], ["y"])]
    inputs = dict(zip(("x", "g"), shapes, strict=True))
    after = lower(harness.model(nodes, inputs, {"y": shapes[0]}))
    assert after.reasons == {Why.NO_GATE.value}


def test_a_gate_behind_many_activations_is_not_followed() -> None:
    after = lower(Draft(activations=("Relu", "Tanh", "Sigmoid", "Tanh")).model())
    assert after.reasons == {Why.NOT_FROM_CONVOLUTION.value}


# -- properties ------------------------------------------------------------------------------------


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    batches: list[int | str] = [1, 2, "N"]
    batch = draw(st.sampled_from(batches))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda s: s != (1, 1)))
    return Draft(
        shape=(batch, 4, *size),
        opset=draw(st.sampled_from([9, 10, 11, 12, 13, 17, 18, 19, 21, 22, harness.NEWEST_OPSET])),
        activations=tuple(
            draw(st.lists(st.sampled_from(["Relu", "Sigmoid", "HardSigmoid", "Tanh"]), max_size=2))
        ),
        gate_first=draw(st.booleans()),
    )


def check(draft: Draft) -> None:
    before = draft.model()
    after = lower(before)
    assert after.applied == 1
    assert_equal(before, after.model, N=3)


@settings(max_examples=50, deadline=None)
@given(drafts())
def test_any_size_and_opset(draft: Draft) -> None:
    check(draft)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(drafts())
def test_any_size_and_opset_at_length(draft: Draft) -> None:
    check(draft)
