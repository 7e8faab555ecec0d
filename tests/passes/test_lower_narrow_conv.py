"""Convolutions with few output channels, computed by blocks of pixels."""

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

from pwopt.passes.lower_narrow_conv import LowerNarrowConv
from tests import zoo
from tests.passes import harness
from tests.passes.linear_models import assert_agree

Why = LowerNarrowConv.Why
Dims = tuple[int | str | None, ...]


def conv(
    *,
    cin: int = 4,
    cout: int = 3,
    kernel: tuple[int, ...] = (3, 3),
    group: int = 1,
    bias: bool = True,
    batch: int | str = 2,
    size: Dims = (8, 12),
    then: Sequence[onnx.NodeProto] = (),
    result: str = "y",
    opset: int = 17,
    ir: int = 8,
    dtype: Any = np.float32,
    weights: dict[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    **attributes: Any,
) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    values = {"w": rng.standard_normal((cout, cin // group, *kernel)).astype(dtype)}
    if bias:
        values["b"] = rng.standard_normal(cout).astype(dtype)
    node = harness.node("Conv", ["x", *values], [result], group=group, **attributes)
    return harness.model(
        [node, *then],
        {"x": (batch, cin, *size)},
        dict.fromkeys(outputs),
        {**values, **(weights or {})},
        opset=opset,
        ir=ir,
        dtype=dtype,
    )


PADDED: dict[str, Any] = {"pads": [1, 1, 1, 1]}


def lower(proto: onnx.ModelProto, variant: str | None = None, **options: Any) -> harness.Outcome:
    return harness.run_pass(LowerNarrowConv(), proto, variant, **options)


def variants(proto: onnx.ModelProto) -> list[str]:
    return harness.offered(LowerNarrowConv(), proto)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    assert_agree(before, after, np.random.default_rng(0), factor=1.0, **dims)


def check_all(before: onnx.ModelProto, **dims: int) -> list[str]:
    return harness.assert_every_variant_agrees(LowerNarrowConv(), before, **dims)


# -- golden ----------------------------------------------------------------------------------------


def test_blocks_of_pixels() -> None:
    before = conv(**PADDED)
    names = check_all(before)
    assert "2x2-transpose" in names
    assert "2x2-depth-to-space" in names
    stock = lower(before, "2x2-depth-to-space")
    assert stock.ops == ["Conv", "DepthToSpace"]
    assert stock.model.graph.node[-1].output == ["y"]
    fast = lower(before, "2x2-transpose")
    assert fast.ops == ["Conv", "Reshape", "Transpose", "Reshape", "Transpose", "Reshape"]
    rows = lower(conv(cout=8, **PADDED))
    assert rows.ops == ["Conv", "Reshape", "Transpose", "Reshape"]


def test_weights_are_shifted_copies() -> None:
    before = conv(cin=1, bias=False)
    after = lower(before, "2x2-depth-to-space")
    (weight,) = (numpy_helper.to_array(t) for t in before.graph.initializer)
    node = after.model.graph.node[0]
    stored = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    packed = stored[node.input[1]]
    assert packed.shape == (12, 1, 4, 4)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        expected = np.zeros((3, 1, 4, 4), np.float32)
        expected[:, :, row : row + 3, column : column + 3] = weight
        np.testing.assert_array_equal(packed[3 * index : 3 * index + 3], expected)
    assert len(node.input) == 2


@pytest.mark.parametrize("cout", range(1, 9))
def test_the_result_is_not_narrow(cout: int) -> None:
    before = conv(cout=cout, size=(16, 16), kernel=(5, 5))
    check_all(before)
    after = lower(before)
    widths = [t.dims[0] for t in after.model.graph.initializer if len(t.dims) == 4]
    assert min(widths) > 8


def test_blocks_that_do_not_divide_the_image() -> None:
    before = conv(size=(9, 11), **PADDED)
    check_all(before)
    assert lower(before, "2x2-depth-to-space").ops == ["Conv", "DepthToSpace", "Slice"]


def test_strides_and_uneven_pads() -> None:
    check_all(conv(kernel=(5, 4), strides=[2, 1], pads=[1, 0, 2, 3], size=(15, 9)))
    check_all(conv(kernel=(5, 5), auto_pad="SAME_UPPER", size=(9, 12)))


def test_an_activation_moves_to_the_conv() -> None:
    then = [harness.node("Tanh", ["c"], ["y"])]
    before = conv(result="c", then=then, **PADDED)
    assert lower(before, "2x2-depth-to-space").ops == ["Conv", "Tanh", "DepthToSpace"]
    check_all(before)


def test_an_activation_stays_if_the_output_is_seen() -> None:
    then = [harness.node("Tanh", ["c"], ["y"])]
    before = conv(result="c", then=then, outputs=["c", "y"], **PADDED)
    assert lower(before, "2x2-depth-to-space").ops == ["Conv", "DepthToSpace", "Tanh"]
    check_all(before)


def test_shared_weights_stay_for_the_other() -> None:
    then = [harness.node("Conv", ["x", "w", "b"], ["z"], dilations=[2, 2])]
    before = conv(then=then, outputs=["y", "z"], **PADDED)
    after = lower(before)
    assert after.applied == 1
    check(before, after.model)


def test_images_of_any_size() -> None:
    before = conv(batch="N", size=("H", "W"), **PADDED)
    ops = ["Conv", "DepthToSpace", "Shape", "Gather", "Slice"]
    assert lower(before, "2x2-depth-to-space").ops == ops
    for height, width in ((8, 12), (9, 12), (7, 5), (1, 1)):
        assert check_all(before, N=2, H=height, W=width) == [
            "2x2-depth-to-space",
            "4x4-depth-to-space",
        ]
    rows = conv(size=("H", 11), **PADDED)
    for height in (4, 5, 6, 7):
        check_all(rows, H=height)


def test_a_column_of_any_width_is_cut_there_only() -> None:
    before = conv(size=(9, "W"), kernel=(5, 3), pads=[0, 1, 0, 1])
    check_all(before, W=7)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def fed(name: str) -> onnx.ModelProto:
    shapes = {"x": (1, 4, 8, 8), "w": (3, 4, 3, 3), "b": (3,)}
    weights = {k: np.ones(v, np.float32) for k, v in shapes.items() if k not in ("x", name)}
    nodes = [harness.node("Conv", ["x", "w", "b"], ["y"])]
    inputs = {k: v for k, v in shapes.items() if k in ("x", name)}
    return harness.model(nodes, inputs, {"y": (1, 3, 6, 6)}, weights)


BFLOAT16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)

DECLINED = {
    Why.NOT_TWO_DIMENSIONAL: Declined(lambda: conv(kernel=(3,), size=(9,)), {"axes": 1}),
    Why.POINTWISE: Declined(lambda: conv(kernel=(1, 1))),
    Why.GROUPED: Declined(lambda: conv(cout=4, group=2), {"group": 2}),
    Why.DILATED: Declined(lambda: conv(dilations=[2, 1]), {"dilations": [2, 1]}),
    Why.MANY_CHANNELS: Declined(lambda: conv(cout=9), {"cout": 9, "most": 8}),
    Why.WEIGHT_NOT_CONSTANT: Declined(lambda: fed("w")),
    Why.BIAS_NOT_CONSTANT: Declined(lambda: fed("b")),
    Why.ELEMENT_TYPE: Declined(lambda: conv(dtype=BFLOAT16, opset=22)),
    Why.PADS_UNKNOWN: Declined(lambda: conv(size=("H", 9), strides=[3, 3], auto_pad="SAME_UPPER")),
    Why.SIZE_UNKNOWN: Declined(lambda: conv(size=("H", "W"))),
    Why.NO_BLOCK: Declined(lambda: conv(size=(3, 3)), {"size": [1, 1]}),
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


def test_cutting_to_an_unknown_size_needs_slice_with_inputs() -> None:
    assert lower(conv(size=("H", "W"), opset=9, **PADDED)).reasons == {Why.SIZE_UNKNOWN.value}
    assert lower(conv(size=("H", "W"), opset=10, **PADDED)).applied == 1


def test_weights_listed_as_inputs_are_constants_unless_overridable() -> None:
    proto = conv(opset=9, ir=3, **PADDED)
    assert lower(proto).applied == 1
    assert lower(proto, overridable=True).reasons == {Why.WEIGHT_NOT_CONSTANT.value}


def test_large_strides_leave_no_gain() -> None:
    assert lower(conv(kernel=(2, 2), strides=[8, 8], size=(64, 64))).reasons == {Why.NO_BLOCK.value}


# -- properties ------------------------------------------------------------------------------------


Drawn = tuple[onnx.ModelProto, dict[str, int], int]
"""A model, its unknown dimensions, and which variant to take."""


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    kernel = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    strides = [draw(st.sampled_from([1, 1, 2])) for _ in range(2)]
    dims: dict[str, int] = {}
    shape: list[int | str] = [draw(st.integers(1, 2))]
    pads = [0, 0, 0, 0]
    for axis, name in enumerate("HW"):
        size = draw(st.integers(kernel[axis], 14))
        if draw(st.sampled_from([False, False, True])):
            dims[name], strides[axis] = size, 1
            shape.append(name)
            pads[axis] = draw(st.integers(0, kernel[axis] - 1))
            pads[axis + 2] = kernel[axis] - 1 - pads[axis]
        else:
            shape.append(size)
            pads[axis], pads[axis + 2] = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if draw(st.booleans()):
        dims["N"] = int(shape[0])
        shape[0] = "N"
    op = draw(st.sampled_from([None, "Relu", "Neg"]))
    proto = conv(
        cin=draw(st.integers(1, 4)),
        cout=draw(st.integers(1, 8)),
        kernel=kernel,
        bias=draw(st.booleans()),
        batch=shape[0],
        size=tuple(shape[1:]),
        then=[] if op is None else [harness.node(op, ["c"], ["y"])],
        result="y" if op is None else "c",
        opset=draw(
            st.sampled_from(
                [10, 11, 13, 17, 22, harness.NEWEST_OPSET]
                if {"H", "W"} & {*dims}
                else [7, 9, harness.NEWEST_OPSET]
            )
        ),
        ir=draw(st.sampled_from([3, 8])),
        dtype=draw(st.sampled_from([np.float32, np.float32, np.float16, np.float64])),
        pads=pads,
        strides=strides,
    )
    return proto, dims, draw(st.integers(0, 5))


def check_model(drawn: Drawn) -> None:
    before, dims, choice = drawn
    after = lower(before)
    if not after.applied:
        assert after.reasons == {Why.NO_BLOCK.value}
        return
    names = variants(before)
    check(before, lower(before, names[choice % len(names)]).model, **dims)


@settings(max_examples=50, deadline=None)
@given(models())
def test_any_geometry(drawn: Drawn) -> None:
    check_model(drawn)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_any_geometry_at_length(drawn: Drawn) -> None:
    check_model(drawn)


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "sites", "dims"),
    [("fns_mosaic.onnx", 1, {}), ("dncnn_sigma25_bn.onnx", 1, {"H": 30, "W": 45})],
)
def test_a_trained_network(name: str, sites: int, dims: dict[str, int]) -> None:
    before = zoo.trained(name)
    after = lower(before)
    assert after.applied == sites
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=20.0, **dims)
