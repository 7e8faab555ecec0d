"""BatchNormalization into the weights around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt.passes.fold_batch_normalization import FoldBatchNormalization
from tests.passes import harness
from tests.passes.linear_models import (
    BATCH,
    DTYPES,
    OPSETS,
    Draft,
    Geometry,
    assert_agree,
    channels,
    geometries,
    seen_inside,
)

Why = FoldBatchNormalization.Why
POINT = Geometry.plain(1)
SQUARE = Geometry.plain(3)
SAME = Geometry.plain(3, pad=1)


def draft(shape: Any = (2, 3, 6, 6), **settings: Any) -> Draft:
    return Draft(np.random.default_rng(0), shape, **settings)


def fold(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(FoldBatchNormalization(), proto, **settings)


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


# -- golden ----------------------------------------------------------------------------------------


def test_conv_then_batch_normalization() -> None:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME, bias=False), 4, epsilon=0.5)
    before = d.finish(y)
    after = fold(before)
    assert after.ops == ["Conv"]
    (conv,) = after.model.graph.node
    assert conv.name == "n_t0"
    assert conv.output == ["y"]
    w, scale, shift, mean, var = d.weights.values()
    s = scale / np.sqrt(var + 0.5)
    found = weights(after.model)
    np.testing.assert_allclose(found[conv.input[1]], w * s[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(found[conv.input[2]], shift - mean * s, rtol=1e-5)
    assert len(found) == 2
    assert_agree(before, after.model, d.rng)


def test_batch_normalization_then_convs_that_share_a_weight() -> None:
    d = draft()
    normal = d.batch_normalization("x", 3)
    first = d.conv(normal, 3, 3, SQUARE, bias=False)
    d.nodes.append(harness.node("Conv", [normal, d.nodes[-1].input[1]], ["second"]))
    raw = d.add("Conv", ["x", d.nodes[-1].input[1]])
    y = d.add("Sum", [first, "second", raw])
    before = d.finish(y)
    after = fold(before)
    assert after.ops == ["Conv", "Conv", "Conv", "Sum"]
    folded, other, untouched = after.model.graph.node[:3]
    assert untouched.input[1] == "w4", "a shared weight must not change for its other readers"
    assert [folded.input[0], other.input[0]] == ["x", "x"]
    np.testing.assert_array_equal(weights(after.model)["w4"], d.weights["w4"])
    assert_agree(before, after.model, d.rng)


def test_matmul_becomes_gemm() -> None:
    d = draft((2, 3))
    before = d.finish(d.batch_normalization(d.matmul("x", 3, 4), 4))
    after = fold(before)
    assert after.ops == ["Gemm"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(
    "attributes",
    [{}, {"transB": 1}, {"alpha": 0.5, "beta": -2.0}, {"alpha": 3.0, "transB": 1}],
)
@pytest.mark.parametrize("bias", ["vector", "row", "scalar", "none"])
def test_gemm_before_and_behind(attributes: dict[str, Any], bias: str) -> None:
    d = draft((2, 3))
    hidden = d.gemm(d.batch_normalization("x", 3), 3, 4, bias=bias != "none", **attributes)
    if bias == "row":
        d.weights[d.nodes[-1].input[2]] = d.noise(1, 4).astype(np.float32)
    if bias == "scalar":
        d.weights[d.nodes[-1].input[2]] = np.asarray(1.5, np.float32)
    before = d.finish(d.batch_normalization(hidden, 4))
    after = fold(before)
    assert after.ops == ["Gemm"]
    assert after.applied == 2
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
def test_across_a_pool(pool: str) -> None:
    d = draft()
    attributes = {} if pool.startswith("Global") else {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}
    normal = d.batch_normalization(d.add(pool, [d.conv("x", 3, 4, SAME)], **attributes), 4)
    d.weights["scale2"] = np.abs(d.weights["scale2"])
    before = d.finish(normal)
    after = fold(before)
    assert after.ops == ["Conv", pool]
    assert after.model.graph.node[1].output == ["y"]
    assert_agree(before, after.model, d.rng)


def test_a_chain_waits_for_the_one_below() -> None:
    """The upper one can go only when the lower one has gone, two operators further down."""
    d = draft()
    upper = d.add("MaxPool", [d.batch_normalization("x", 3)], kernel_shape=[2, 2])
    lower = d.add("MaxPool", [d.batch_normalization(upper, 3)], kernel_shape=[2, 2])
    for name in ("scale0", "scale4"):
        d.weights[name] = np.abs(d.weights[name])
    before = d.finish(d.conv(lower, 3, 2, SQUARE))
    after = fold(before)
    assert after.ops == ["MaxPool", "MaxPool", "Conv"]
    assert_agree(before, after.model, d.rng)


def test_two_in_a_row_become_one() -> None:
    d = draft((2, 4, 3, 5))
    before = d.finish(d.batch_normalization(d.batch_normalization("x", 4), 4, epsilon=0.5))
    after = fold(before)
    assert after.ops == ["BatchNormalization"]
    assert_agree(before, after.model, d.rng)


def test_across_concat() -> None:
    d = draft()
    pieces = [d.add("Relu", [d.conv("x", 3, 2, SAME)]), d.conv("x", 3, 3, SAME)]
    joined = d.add("Concat", pieces, axis=1)
    d.batch_normalization(joined, 5)
    d.weights["scale4"][:2] = [0.5, 2.0]
    d.weights["shift5"][:2] = d.weights["mean6"][:2] = 0.0
    before = d.finish(d.nodes[-1].output[0])
    after = fold(before)
    assert after.ops == ["Conv", "Relu", "Conv", "Concat"]
    assert_agree(before, after.model, d.rng)


def test_output_name_survives() -> None:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    extra = d.add("Relu", [y])
    d.nodes[-1].output[0] = "extra"
    before = d.finish(y, "extra")
    assert extra != "extra"
    after = fold(before)
    assert after.ops == ["Conv", "Relu"]
    assert [o.name for o in after.model.graph.output] == ["y", "extra"]
    assert_agree(before, after.model, d.rng)


def test_padded_conv_takes_a_normalization_without_shift() -> None:
    d = draft()
    normal = d.batch_normalization("x", 3)
    d.weights["shift1"] = d.weights["mean2"] = np.zeros(3, np.float32)
    before = d.finish(d.conv(normal, 3, 4, SAME))
    after = fold(before)
    assert after.ops == ["Conv"]
    assert_agree(before, after.model, d.rng)


def test_mixed_parameter_types() -> None:
    """From opset 15 scale and bias, and mean and variance, may each have a type of their own."""
    d = draft(dtype=np.float16)
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    for key in ("mean4", "var5"):
        d.weights[key] = d.weights[key].astype(np.float32)
    before = d.finish(y)
    after = fold(before)
    assert after.ops == ["Conv"]
    assert all(v.dtype == np.float16 for v in weights(after.model).values())
    assert_agree(before, after.model, d.rng)


# -- declines --------------------------------------------------------------------------------------


def training_outputs() -> onnx.ModelProto:
    d = draft(opset=9)
    d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    d.nodes[-1].output.extend(["m", "v", "sm", "sv"])
    return d.finish(d.nodes[-1].output[0])


def training_mode() -> onnx.ModelProto:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4, training_mode=1)
    d.nodes[-1].output.extend(["running_mean", "running_var"])
    return d.finish(y)


def per_activation() -> onnx.ModelProto:
    d = draft((2, 3, 4, 4), opset=7)
    y = d.batch_normalization(d.conv("x", 3, 2, POINT), 2, spatial=0)
    for name in d.nodes[-1].input[1:]:
        d.weights[name] = np.ones((2, 4, 4), np.float32)
    return d.finish(y)


def shape_unknown() -> onnx.ModelProto:
    d = draft((3,))
    return d.finish(d.batch_normalization("x", 1))


def computed_parameters() -> onnx.ModelProto:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    scale = d.nodes[-1].input[1]
    d.nodes.insert(0, harness.node("Abs", [scale], ["computed"]))
    d.nodes[-1].input[1] = "computed"
    return d.finish(y)


def negative_variance() -> onnx.ModelProto:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    d.weights[d.nodes[-1].input[4]] = np.array([1, 1, -1, 1], np.float32)
    return d.finish(y)


def pre_activation() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.add("Relu", [d.batch_normalization("x", 3)]))


def read_elsewhere() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 3, SAME)
    return d.finish(d.add("Add", [conv, d.batch_normalization(conv, 3)]))


def two_readers_behind() -> onnx.ModelProto:
    d = draft()
    normal = d.batch_normalization("x", 3)
    return d.finish(d.add("Add", [normal, d.conv(normal, 3, 3, POINT)]))


def graph_output_between() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 3, SAME)
    return d.finish(d.batch_normalization(conv, 3), conv)


def graph_output_behind() -> onnx.ModelProto:
    d = draft()
    normal = d.batch_normalization("x", 3)
    return d.finish(d.conv(normal, 3, 3, POINT), normal)


def captured() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 3, SAME)
    y = d.batch_normalization(conv, 3)
    none = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, [None] * 4)
    branch = onnx.helper.make_graph([harness.node("Neg", [conv], ["inner"])], "b", [], [none])
    d.nodes.insert(
        0,
        harness.node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
    )
    d.nodes.append(harness.node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))
    return d.finish(y, "z")


def relu_between() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.batch_normalization(d.add("Relu", [d.conv("x", 3, 3, SAME)]), 3))


def relu_behind() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.add("Relu", [d.batch_normalization("x", 3)]), 3, 3, POINT))


def computed_weight() -> onnx.ModelProto:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    d.nodes.insert(0, harness.node("Abs", ["w0"], ["computed"]))
    d.nodes[1].input[1] = "computed"
    return d.finish(y)


def computed_bias() -> onnx.ModelProto:
    d = draft()
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    d.nodes.insert(0, harness.node("Abs", ["b1"], ["computed"]))
    d.nodes[1].input[2] = "computed"
    return d.finish(y)


def old_overridable() -> onnx.ModelProto:
    d = draft(opset=7)
    return d.finish(d.batch_normalization(d.conv("x", 3, 4, SAME), 4), ir=3)


def gemm_bias_per_row() -> onnx.ModelProto:
    d = draft((2, 3))
    hidden = d.gemm("x", 3, 2)
    d.weights[d.nodes[-1].input[2]] = d.noise(2, 1).astype(np.float32)
    return d.finish(d.batch_normalization(hidden, 2))


def channels_are_rows() -> onnx.ModelProto:
    d = draft((2, 3, 5))
    return d.finish(d.batch_normalization(d.matmul("x", 5, 4), 3))


def padded_behind() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.batch_normalization("x", 3), 3, 4, SAME))


def transposed_behind() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.batch_normalization("x", 3), 3, 4, POINT, transposed=True))


def average_of_padding() -> onnx.ModelProto:
    d = draft()
    attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    pool = d.add("AveragePool", [d.conv("x", 3, 4, SAME)], **attributes)
    return d.finish(d.batch_normalization(pool, 4))


def matmul_without_bias() -> onnx.ModelProto:
    d = draft((2, 1, 5))
    return d.finish(d.batch_normalization(d.matmul("x", 5, 4), 1))


def too_large_for_half() -> onnx.ModelProto:
    d = draft(dtype=np.float16)
    y = d.batch_normalization(d.conv("x", 3, 4, SAME), 4)
    d.weights[d.nodes[-1].input[1]] = np.full(4, 6e4, np.float16)
    d.weights[d.nodes[-1].input[4]] = np.full(4, 1e-4, np.float16)
    return d.finish(y)


def brain_float() -> onnx.ModelProto:
    d = draft(dtype=onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16), opset=22)
    return d.finish(d.batch_normalization(d.conv("x", 3, 4, SAME), 4))


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.TRAINING_MODE, training_outputs),
    (Why.TRAINING_MODE, training_mode),
    (Why.NOT_SPATIAL, per_activation),
    (Why.SHAPE_UNKNOWN, shape_unknown),
    (Why.PARAMETERS_NOT_CONSTANT, computed_parameters),
    (Why.VARIANCE_NOT_POSITIVE, negative_variance),
    (Why.NO_LINEAR_NEIGHBOUR, pre_activation),
    (Why.OTHER_READERS, read_elsewhere),
    (Why.OTHER_READERS, two_readers_behind),
    (Why.OTHER_READERS, captured),
    (Why.GRAPH_OUTPUT, graph_output_between),
    (Why.GRAPH_OUTPUT, graph_output_behind),
    (Why.NON_LINEAR_BETWEEN, relu_between),
    (Why.NON_LINEAR_BETWEEN, relu_behind),
    (Why.NOT_FLOAT, brain_float),
    (Why.WEIGHT_NOT_CONSTANT, computed_weight),
    (Why.WEIGHT_NOT_CONSTANT, computed_bias),
    (Why.BIAS_NOT_PER_CHANNEL, gemm_bias_per_row),
    (Why.NOT_PER_CHANNEL, channels_are_rows),
    (Why.SHIFT_MEETS_PADDING, padded_behind),
    (Why.SHIFT_MEETS_PADDING, transposed_behind),
    (Why.SHIFT_MEETS_PADDING, average_of_padding),
    (Why.NO_BIAS_INPUT, matmul_without_bias),
    (Why.OUT_OF_RANGE, too_large_for_half),
]


@pytest.mark.parametrize(("why", "build"), DECLINES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    proto = build()
    outcome = fold(proto)
    assert outcome.reasons == {why.value}
    assert outcome.applied == 0
    assert len(outcome.ops) == len(proto.graph.node)


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


def test_overridable_initializers_are_not_constant() -> None:
    proto = old_overridable()
    assert fold(proto, overridable=True).reasons == {Why.PARAMETERS_NOT_CONSTANT.value}
    assert fold(proto).ops == ["Conv"]


def test_overridable_weight() -> None:
    proto = old_overridable()
    fixed = ("scale2", "shift3", "mean4", "var5")
    kept = [v for v in proto.graph.input if v.name not in fixed]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.ir_version = 4
    assert fold(proto, overridable=True).reasons == {Why.WEIGHT_NOT_CONSTANT.value}


# -- properties ------------------------------------------------------------------------------------


@st.composite
def sandwiches(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """BatchNormalization before, behind, or around a convolution; at times a pool between."""
    rank = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    cin, cout, group = draw(channels(transposed=transposed))
    geometry = draw(geometries(rank, transposed=transposed))
    opset = draw(st.sampled_from(OPSETS))
    # ONNX's reference implementation, needed for float64, trains before opset 14.
    double = opset >= 14 and rank == 2 and not transposed
    d = Draft(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (draw(BATCH), cin, *(draw(st.integers(5, 7)),) * rank),
        draw(st.sampled_from(DTYPES if double else DTYPES[:2])),
        opset,
    )
    d.shares = draw(st.booleans())
    value = "x"
    if draw(st.booleans()):
        value = d.batch_normalization(value, cin)
        if draw(st.booleans()):
            for name in d.nodes[-1].input[2:4]:
                d.weights[name] = np.zeros_like(d.weights[name])
    extra: dict[str, Any] = {}
    if transposed and draw(st.booleans()):
        extra["output_padding"] = [draw(st.integers(0, s - 1)) for s in geometry.strides]
    value = d.conv(
        value,
        cin,
        cout,
        geometry,
        group=group,
        bias=draw(st.booleans()),
        transposed=transposed,
        **extra,
    )
    if draw(st.booleans()):
        pool = draw(st.sampled_from(["MaxPool", "AveragePool", "Relu"]))
        window = {} if pool == "Relu" else {"kernel_shape": [1] * rank}
        value = d.add(pool, [value], **window)
    if draw(st.booleans()):
        value = d.batch_normalization(value, cout)
        if draw(st.booleans()):
            name = d.nodes[-1].input[1]
            d.weights[name] = np.abs(d.weights[name])
    return draw(seen_inside(d.finish(d.add("Identity", [value])))), d


def check(case: tuple[onnx.ModelProto, Draft]) -> None:
    proto, d = case
    outcome = fold(proto)
    assert_agree(proto, outcome.model, d.rng, batch=3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sandwiches())
def test_outputs_agree(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(sandwiches())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)
