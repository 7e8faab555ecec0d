"""Convolutions on disjoint patches as pointwise ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt import models as networks
from pwopt.passes.compose_space_to_depth import ComposeSpaceToDepth
from pwopt.passes.lower_patchify import LowerPatchify
from tests.passes import harness
from tests.passes.linear_models import assert_agree

Why = LowerPatchify.Why
Dims = tuple[int | str | None, ...]

CHANNELS_LAST = ["Transpose", "Reshape", "Transpose", "Reshape", "Transpose", "Conv"]


def patches(
    *,
    cin: int = 3,
    cout: int = 5,
    kernel: tuple[int, ...] = (2, 2),
    strides: tuple[int, ...] | None = None,
    group: int = 1,
    bias: bool = True,
    batch: int | str = 2,
    size: Dims = (6, 8),
    then: Sequence[onnx.NodeProto] = (),
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    ir: int = 8,
    dtype: Any = np.float32,
    **attributes: Any,
) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    values = {"w": rng.standard_normal((cout, cin // group, *kernel)).astype(dtype)}
    if bias:
        values["b"] = rng.standard_normal(cout).astype(dtype)
    steps = list(kernel if strides is None else strides)
    node = harness.node("Conv", ["x", *values], ["y"], strides=steps, group=group, **attributes)
    inputs: dict[str, Dims] = {"x": (batch, cin, *size)}
    named = dict.fromkeys(outputs)
    return harness.model([node, *then], inputs, named, values, opset=opset, ir=ir, dtype=dtype)


def lower(proto: onnx.ModelProto, variant: str | None = None, **options: Any) -> harness.Outcome:
    return harness.run_pass(LowerPatchify(), proto, variant, **options)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    assert_agree(before, after, np.random.default_rng(0), factor=1.0, **dims)


def check_both(before: onnx.ModelProto, **dims: int) -> None:
    stock, last = lower(before), lower(before, "channels-last")
    assert stock.ops[:2] == ["SpaceToDepth", "Conv"]
    assert last.ops[:6] == CHANNELS_LAST
    check(before, stock.model, **dims)
    check(before, last.model, **dims)


# -- golden ----------------------------------------------------------------------------------------


def test_square_patches() -> None:
    before = patches()
    check_both(before)
    after = lower(before)
    assert after.ops == ["SpaceToDepth", "Conv"]
    stored = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    weight = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}["w"]
    conv = after.model.graph.node[1]
    np.testing.assert_array_equal(
        stored[conv.input[1]], weight.transpose(0, 2, 3, 1).reshape(5, 12, 1, 1)
    )


def test_other_patches_have_one_form() -> None:
    before = patches(kernel=(3, 2))
    after = lower(before)
    assert after.ops == CHANNELS_LAST
    check(before, after.model)


def test_dynamic_batch() -> None:
    check_both(patches(batch="N"), N=3)


def test_shared_weights_and_other_readers() -> None:
    then = [
        harness.node("Conv", ["x", "w", "b"], ["z"]),
        harness.node("Relu", ["y"], ["r"]),
    ]
    check_both(patches(then=then, outputs=["y", "z", "r"]))


def test_the_inverse_takes_it_back() -> None:
    before = patches()
    lowered = lower(before).model
    back = harness.run_pass(ComposeSpaceToDepth(), lowered)
    assert back.ops == ["Conv"]
    check(before, back.model)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def fed_weight() -> onnx.ModelProto:
    nodes = [harness.node("Conv", ["x", "w"], ["y"], strides=[2, 2])]
    inputs = {"x": (1, 3, 4, 4), "w": (5, 3, 2, 2)}
    return harness.model(nodes, inputs, {"y": (1, 5, 2, 2)})


DECLINED = {
    Why.NOT_TWO_DIMENSIONAL: Declined(lambda: patches(kernel=(2,), size=(6,)), {"axes": 1}),
    Why.NO_PATCHES: Declined(lambda: patches(kernel=(3, 3), strides=(2, 2), size=(7, 7))),
    Why.GROUPED: Declined(lambda: patches(cin=4, cout=4, group=2), {"group": 2}),
    Why.DILATED: Declined(lambda: patches(dilations=[2, 1])),
    Why.PADDED: Declined(lambda: patches(pads=[0, 0, 2, 0])),
    Why.WEIGHT_NOT_CONSTANT: Declined(fed_weight),
    Why.SIZE_UNKNOWN: Declined(lambda: patches(size=("H", 8))),
    Why.REST: Declined(lambda: patches(size=(7, 8)), {"size": [7, 8]}),
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


def test_pointwise_has_no_patches() -> None:
    assert lower(patches(kernel=(1, 1))).reasons == {Why.NO_PATCHES.value}


def test_weights_listed_as_inputs_are_constants_unless_overridable() -> None:
    proto = patches(opset=9, ir=3)
    assert lower(proto).applied == 1
    assert lower(proto, overridable=True).reasons == {Why.WEIGHT_NOT_CONSTANT.value}


# -- properties ------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    kernel = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    batches: list[int | str] = [1, 2, "N"]
    return patches(
        cin=draw(st.integers(1, 4)),
        cout=draw(st.integers(1, 4)),
        kernel=kernel,
        bias=draw(st.booleans()),
        batch=draw(st.sampled_from(batches)),
        size=tuple(k * draw(st.integers(1, 3)) for k in kernel),
        opset=draw(st.sampled_from([7, 9, 11, 13, 17, 22, harness.NEWEST_OPSET])),
        ir=draw(st.sampled_from([3, 8])),
        dtype=draw(st.sampled_from([np.float32, np.float32, np.float16, np.float64])),
    )


def check_model(before: onnx.ModelProto) -> None:
    after = lower(before)
    assert after.applied == 1
    check(before, after.model, N=3)
    check(before, lower(before, "channels-last").model, N=3)


@settings(max_examples=50, deadline=None)
@given(models())
def test_any_patches(before: onnx.ModelProto) -> None:
    check_model(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_any_patches_at_length(before: onnx.ModelProto) -> None:
    check_model(before)


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_convnext() -> None:
    before = networks.build("convnext_tiny")
    after = lower(before)
    assert after.applied == 4
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=4.0)
