"""ConvTranspose as convolutions of its input, and their phases put into place."""

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
from pwopt.passes.lower_conv_transpose import LowerConvTranspose
from tests import zoo
from tests.passes import harness

Why = LowerConvTranspose.Why
Dims = tuple[int | str | None, ...]
Pair = tuple[int, int]


def deconvolution(
    *,
    cin: int = 4,
    cout: int = 6,
    kernel: tuple[int, ...] = (2, 2),
    strides: tuple[int, ...] = (2, 2),
    group: int = 1,
    bias: bool = True,
    batch: int | str = 2,
    size: Dims = (5, 6),
    then: Sequence[onnx.NodeProto] = (),
    result: str = "y",
    opset: int = 17,
    ir: int = 8,
    dtype: Any = np.float32,
    weights: dict[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    values = {"w": rng.standard_normal((cin, cout // group, *kernel)).astype(dtype)}
    if bias:
        values["b"] = rng.standard_normal(cout).astype(dtype)
    inputs = ["x", *values]
    conv = harness.node(
        "ConvTranspose", inputs, [result], strides=list(strides), group=group, **attributes
    )
    named: dict[str, Sequence[int | str | None] | None] = dict.fromkeys(outputs or ["y"])
    return harness.model(
        [conv, *then],
        {"x": (batch, cin, *size)},
        named,
        {**values, **(weights or {})},
        opset=opset,
        ir=ir,
        dtype=dtype,
    )


def lower(proto: onnx.ModelProto, variant: str | None = None, **options: Any) -> harness.Outcome:
    return harness.run_pass(LowerConvTranspose(), proto, variant, **options)


def variants(proto: onnx.ModelProto) -> list[str]:
    return harness.offered(LowerConvTranspose(), proto)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    single, rewritten = single_precision(before), single_precision(after)
    harness.assert_same_outputs(single, rewritten, np.random.default_rng(0), **dims)


def single_precision(proto: onnx.ModelProto) -> onnx.ModelProto:
    """*proto* in float32 where it is in float64, in which nothing at hand can execute it."""
    result = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.checker.check_model(result, full_check=True)
    return result


def check_all(before: onnx.ModelProto, **dims: int) -> list[str]:
    return harness.assert_every_variant_agrees(LowerConvTranspose(), before, **dims)


def shapes(proto: onnx.ModelProto, op: str) -> list[tuple[int, ...]]:
    values = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    return [values[n.input[1]] for n in proto.graph.node if n.op_type == op]


# -- golden ----------------------------------------------------------------------------------------


def test_kernel_as_large_as_the_stride_is_pointwise() -> None:
    before = deconvolution()
    assert variants(before) == ["transpose", "channels-last", "depth-to-space"]
    after = lower(before)
    assert after.ops == ["Conv", "Reshape", "Transpose", "Reshape", "Transpose", "Reshape"]
    assert shapes(after.model, "Conv") == [(24, 4, 1, 1)]
    assert after.model.graph.node[-1].output == ["y"]
    check(before, after.model)
    last = lower(before, "channels-last")
    assert last.ops == ["Conv", "Transpose", "Reshape", "Transpose", "Reshape", "Transpose"]
    check(before, last.model)
    stock = lower(before, "depth-to-space")
    assert stock.ops == ["Conv", "DepthToSpace"]
    check(before, stock.model)


def test_weights_of_a_phase() -> None:
    before = deconvolution(cin=1, cout=1, bias=False)
    after = lower(before, "depth-to-space")
    weights = {t.name: numpy_helper.to_array(t) for t in (*before.graph.initializer,)}
    (conv,) = [n for n in after.model.graph.node if n.op_type == "Conv"]
    stored = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    np.testing.assert_array_equal(stored[conv.input[1]].reshape(2, 2), weights["w"][0, 0])
    assert len(conv.input) == 2


def test_overlapping_kernel() -> None:
    before = deconvolution(kernel=(4, 4), pads=[1, 1, 1, 1])
    names = check_all(before)
    assert names[3:] == ["per-phase-" + name for name in names[:3]]
    whole = lower(before, "depth-to-space")
    assert whole.ops == ["Conv", "DepthToSpace"]
    assert shapes(whole.model, "Conv") == [(24, 4, 3, 3)]
    parts = lower(before, "per-phase-depth-to-space")
    assert parts.ops == ["Conv"] * 4 + ["Concat", "DepthToSpace"]
    assert shapes(parts.model, "Conv") == [(6, 4, 2, 2)] * 4


def test_phases_have_their_own_taps_only() -> None:
    before = deconvolution(kernel=(3, 3), pads=[1, 1, 1, 1], output_padding=[1, 1])
    check_all(before)
    after = lower(before, "per-phase-transpose")
    kernels = [shape[2:] for shape in shapes(after.model, "Conv")]
    assert sorted(kernels) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert "Slice" not in after.ops


def test_an_odd_size_is_cut() -> None:
    before = deconvolution(kernel=(3, 3))
    check_all(before)
    assert lower(before, "depth-to-space").ops == ["Conv", "DepthToSpace", "Slice"]
    assert lower(before, "channels-last").ops[-2:] == ["Slice", "Transpose"]


def test_unit_strides_are_a_conv() -> None:
    before = deconvolution(kernel=(3, 2), strides=(1, 1), pads=[1, 0, 1, 2])
    assert check_all(before) == ["conv"]
    assert lower(before).ops == ["Conv"]


def test_groups_have_a_conv_per_phase() -> None:
    before = deconvolution(cin=4, cout=6, group=2, kernel=(4, 4), pads=[1, 1, 1, 1])
    assert all(name.startswith("per-phase-") for name in check_all(before))
    depthwise = deconvolution(cin=4, cout=4, group=4, kernel=(4, 4), pads=[1, 1, 1, 1])
    check_all(depthwise)
    assert check_all(deconvolution(group=2, kernel=(3, 3), strides=(1, 1))) == ["conv"]


def test_many_phases_have_one_conv() -> None:
    before = deconvolution(cin=2, cout=1, kernel=(10, 10), strides=(5, 5), pads=[2, 2, 3, 3])
    assert check_all(before) == ["transpose", "channels-last", "depth-to-space"]


def test_strides_that_differ_have_no_depth_to_space() -> None:
    before = deconvolution(kernel=(4, 2), strides=(3, 1))
    assert check_all(before) == [
        f"{form}{name}" for form in ("", "per-phase-") for name in ("transpose", "channels-last")
    ]


@pytest.mark.parametrize("opset", [9, 10, 17])
def test_slice_of_every_opset(opset: int) -> None:
    check_all(deconvolution(kernel=(3, 3), opset=opset))


# -- pads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attributes",
    [
        {"auto_pad": "VALID"},
        {"auto_pad": "SAME_UPPER", "kernel": (4, 4)},
        {"auto_pad": "SAME_LOWER", "kernel": (4, 4)},
        {"output_shape": [10, 12], "kernel": (4, 4)},
        {"output_shape": [10, 12], "auto_pad": "SAME_UPPER", "kernel": (4, 4)},
        {"output_shape": [12, 14], "auto_pad": "VALID", "kernel": (3, 3)},
        {"output_shape": [11, 13], "output_padding": [1, 1], "kernel": (4, 4), "pads": [9] * 4},
    ],
    ids=str,
)
def test_size_in_other_words(attributes: dict[str, Any]) -> None:
    check_all(deconvolution(**attributes))


def test_pads_larger_than_the_kernel() -> None:
    check_all(deconvolution(kernel=(2, 2), pads=[3, 2, 1, 4]))
    check_all(deconvolution(kernel=(1, 1), strides=(3, 2), pads=[4, 0, 0, 3], size=(7, 7)))


# -- what stands around it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [
        ("Relu", 17, {}),
        ("LeakyRelu", 17, {"alpha": 0.3}),
        ("HardSigmoid", 17, {"alpha": 0.3}),
        ("Clip", 9, {"min": -0.5, "max": 0.5}),
    ],
)
def test_an_activation_moves_to_the_conv(op: str, opset: int, attributes: dict[str, Any]) -> None:
    then = [harness.node(op, ["c"], ["y"], **attributes)]
    before = deconvolution(result="c", then=then, opset=opset)
    assert lower(before, "depth-to-space").ops == ["Conv", op, "DepthToSpace"]
    check_all(before)


def test_bounds_of_clip_come_along() -> None:
    then = [harness.node("Clip", ["c", "", "top"], ["y"])]
    before = deconvolution(result="c", then=then, weights={"top": np.float32(0.5)})
    assert lower(before, "depth-to-space").ops == ["Conv", "Clip", "DepthToSpace"]
    check_all(before)


def test_bounds_that_are_computed_stay_behind() -> None:
    then = [
        harness.node("ReduceMax", ["x"], ["top"], keepdims=0),
        harness.node("Clip", ["c", "", "top"], ["y"]),
    ]
    before = deconvolution(result="c", then=then)
    assert lower(before, "depth-to-space").ops[-1] == "Clip"
    check_all(before)


def test_an_activation_stays_if_the_output_is_seen() -> None:
    then = [harness.node("Relu", ["c"], ["y"])]
    before = deconvolution(result="c", then=then, outputs=["c", "y"])
    assert lower(before, "depth-to-space").ops == ["Conv", "DepthToSpace", "Relu"]
    check_all(before)


def test_an_activation_stays_if_others_read() -> None:
    then = [harness.node("Relu", ["c"], ["r"]), harness.node("Add", ["c", "r"], ["y"])]
    before = deconvolution(result="c", then=then)
    assert lower(before, "depth-to-space").ops == ["Conv", "DepthToSpace", "Relu", "Add"]
    check_all(before)


def test_an_activation_stays_if_a_branch_reads() -> None:
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["c"], ["z"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)],
    )
    then = [
        harness.node("Relu", ["c"], ["y"]),
        harness.node("If", ["condition"], ["i"], then_branch=branch, else_branch=branch),
    ]
    before = deconvolution(
        result="c", then=then, weights={"condition": np.array(True)}, outputs=["y", "i"]
    )
    after = lower(before, "depth-to-space")
    assert after.ops == ["Conv", "DepthToSpace", "Relu", "If"]
    check(before, after.model)


def test_shared_weights_stay_for_the_other() -> None:
    then = [harness.node("ConvTranspose", ["x", "w", "b"], ["z"], strides=[3, 3])]
    before = deconvolution(then=then, outputs=["y", "z"])
    after = lower(before)
    assert after.applied == 2
    check(before, after.model)


def test_dynamic_dimensions() -> None:
    padded = {"kernel": (3, 3), "pads": [1, 1, 1, 1]}
    rows = deconvolution(batch="N", size=("H", 6), **padded)  # type: ignore[arg-type]
    names = ["transpose", "channels-last", "depth-to-space"]
    assert check_all(rows, N=3, H=5) == names + ["per-phase-" + name for name in names]
    both = deconvolution(batch="N", size=("H", "W"), **padded)  # type: ignore[arg-type]
    assert check_all(both, N=3, H=5, W=4) == ["depth-to-space", "per-phase-depth-to-space"]


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)
    overridable: bool = False


def fed(name: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    shapes = {"x": (1, 4, 5, 6), "w": (4, 6, 2, 2), "b": (6,)}
    weights = {k: np.ones(v, np.float32) for k, v in shapes.items() if k not in ("x", name)}
    nodes = [harness.node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2])]
    inputs = {k: v for k, v in shapes.items() if k in ("x", name)}
    return harness.model(nodes, inputs, {"y": (1, 6, 10, 12)}, weights)


DECLINED = {
    Why.NOT_TWO_DIMENSIONAL: Declined(
        lambda: deconvolution(kernel=(2,), strides=(2,), size=(5,)), {"axes": 1}
    ),
    Why.WEIGHT_NOT_CONSTANT: Declined(lambda: fed("w", (4, 6, 2, 2))),
    Why.BIAS_NOT_CONSTANT: Declined(lambda: fed("b", (6,))),
    Why.ELEMENT_TYPE: Declined(
        lambda: deconvolution(
            dtype=onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16), opset=22
        )
    ),
    Why.PADS_AMBIGUOUS: Declined(
        lambda: deconvolution(kernel=(3, 3), auto_pad="SAME_UPPER"), {"total": 1}
    ),
    Why.SIZE_UNKNOWN: Declined(
        lambda: deconvolution(size=("H", "W"), kernel=(3, 2), strides=(3, 2)), {}
    ),
    Why.OUTPUT_PADDING: Declined(
        lambda: deconvolution(output_shape=[12, 14]), {"output_padding": 2}
    ),
    Why.TOO_MANY_PHASES: Declined(
        lambda: deconvolution(kernel=(5, 5), strides=(5, 5), group=2), {"phases": 25}
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


def test_a_given_size_needs_the_input_size() -> None:
    before = deconvolution(size=("H", "W"), output_shape=[10, 12])
    assert lower(before).reasons == {Why.SIZE_UNKNOWN.value}


def test_weights_listed_as_inputs_are_constants_unless_overridable() -> None:
    proto = deconvolution(opset=9, ir=3)
    assert lower(proto).applied == 1
    assert lower(proto, overridable=True).reasons == {Why.WEIGHT_NOT_CONSTANT.value}


# -- properties ------------------------------------------------------------------------------------


Drawn = tuple[onnx.ModelProto, dict[str, int], int]
"""A model, its unknown dimensions, and which variant to take."""


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    def pair(low: int, high: int) -> Pair:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    strides, kernel, dilations = pair(1, 3), pair(1, 5), pair(1, 2)
    size = pair(1, 6)
    extra = tuple(draw(st.integers(0, s - 1)) for s in strides)
    pads: list[int] = []
    full = [
        s * (n - 1) + e + (k - 1) * d + 1
        for s, n, e, k, d in zip(strides, size, extra, kernel, dilations, strict=True)
    ]
    begins = [draw(st.integers(0, min(3, n - 1))) for n in full]
    ends = [draw(st.integers(0, min(3, n - 1 - b))) for n, b in zip(full, begins, strict=True)]
    pads = [*begins, *ends]
    group = draw(st.sampled_from([1, 1, 2, 3]))
    dims: dict[str, int] = {}
    shape: list[int | str] = [draw(st.integers(1, 2)), *size]
    for index, name in enumerate("NHW"):
        if draw(st.sampled_from([False, False, True])):
            dims[name] = int(shape[index])
            shape[index] = name
    then = draw(st.sampled_from([None, "Relu", "Neg", "seen"]))
    behind = (
        None if then is None else harness.node("Relu" if then == "seen" else then, ["c"], ["y"])
    )
    proto = deconvolution(
        cin=group * draw(st.integers(1, 3)),
        cout=group * draw(st.integers(1, 3)),
        kernel=kernel,
        strides=strides,
        group=group,
        bias=draw(st.booleans()),
        batch=shape[0],
        size=tuple(shape[1:]),
        then=[] if behind is None else [behind],
        result="y" if behind is None else "c",
        outputs=["c", "y"] if then == "seen" else ["y"],
        opset=draw(st.sampled_from([7, 9, 10, 11, 13, 17, 22, harness.NEWEST_OPSET])),
        ir=draw(st.sampled_from([3, 8])),
        dtype=draw(st.sampled_from([np.float32, np.float32, np.float16, np.float64])),
        dilations=list(dilations),
        output_padding=list(extra),
        pads=pads,
    )
    return proto, dims, draw(st.integers(0, 5))


def check_model(drawn: Drawn) -> None:
    before, dims, choice = drawn
    after = lower(before)
    if not after.applied:
        assert after.reasons == {Why.SIZE_UNKNOWN.value}
        assert "W" in dims
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
@pytest.mark.parametrize(("name", "sites"), [("waifu2x_cunet_x2.onnx", 4), ("fns_mosaic.onnx", 2)])
def test_a_trained_network(name: str, sites: int) -> None:
    before = zoo.trained(name)
    after = lower(before)
    assert after.applied == sites
    assert "ConvTranspose" not in after.ops
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=20.0)


@pytest.mark.slow
def test_u_net() -> None:
    before = networks.build("unet_transpose")
    for value in (*before.graph.input, *before.graph.output):
        for dim in value.type.tensor_type.shape.dim[2:]:
            dim.dim_value = 32
    del before.graph.value_info[:]
    after = lower(before)
    assert after.applied == 4
    assert "ConvTranspose" not in after.ops
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=4.0)
