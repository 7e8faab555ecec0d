"""Pointwise convolutions and their neighbours into one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt.passes.compose_pointwise import ComposePointwise
from pwopt.passes.contract import Pass
from pwopt.passes.fold_affine import FoldAffine
from pwopt.passes.fold_batch_normalization import FoldBatchNormalization
from tests.passes import harness
from tests.passes.linear_models import (
    BATCH,
    DTYPES,
    OPSETS,
    Draft,
    Geometry,
    assert_agree,
    geometries,
    seen_inside,
)

Array = np.ndarray[Any, Any]
Why = ComposePointwise.Why
POINT = Geometry.plain(1)
SQUARE = Geometry.plain(3)
SAME = Geometry.plain(3, pad=1)


def draft(shape: Any = (2, 4, 7, 7), **settings: Any) -> Draft:
    return Draft(np.random.default_rng(0), shape, **settings)


def compose(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(ComposePointwise(), proto, **settings)


def weights(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def macs(proto: onnx.ModelProto) -> int:
    """Multiply-accumulates of all Convs, by counting."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.graph.value_info, *inferred.graph.output)
    }
    held = weights(proto)
    return sum(
        math.prod(shapes[n.output[0]][1:]) * held[n.input[1]][0].size
        for n in proto.graph.node
        if n.op_type == "Conv"
    )


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", list(itertools.product([False, True], repeat=2)), ids=str)
def test_two_pointwise(biases: tuple[bool, bool]) -> None:
    d = draft()
    hidden = d.conv("x", 4, 8, POINT, bias=biases[0])
    before = d.finish(d.conv(hidden, 8, 3, POINT, bias=biases[1]))
    after = compose(before)
    assert after.ops == ["Conv"]
    (conv,) = after.model.graph.node
    held = weights(after.model)
    first, second = (v for k, v in d.weights.items() if k[0] == "w")
    product = second[:, :, 0, 0].astype(np.float64) @ first[:, :, 0, 0]
    np.testing.assert_allclose(held[conv.input[1]][:, :, 0, 0], product, rtol=1e-5, atol=1e-7)
    assert len(held) == len(conv.input) - 1 == 1 + any(biases)
    assert_agree(before, after.model, d.rng)


def test_a_relu_keeps_two_pointwise_apart() -> None:
    d = draft()
    hidden = d.add("Relu", [d.conv("x", 4, 8, POINT)])
    after = compose(d.finish(d.conv(hidden, 8, 3, POINT)))
    assert after.ops == ["Conv", "Relu", "Conv"]
    assert Why.NON_LINEAR_BETWEEN.value in after.reasons


def test_a_chain_becomes_one() -> None:
    d = draft()
    value, channels = "x", 4
    for width in (6, 9, 5, 4):
        value, channels = d.conv(value, channels, width, POINT), width
    before = d.finish(value)
    after = compose(before)
    assert after.ops == ["Conv"]
    assert after.applied == 3
    assert_agree(before, after.model, d.rng)


def test_pointwise_behind_a_padded_strided_dilated_square() -> None:
    d = draft((2, 4, 11, 12))
    geometry = Geometry((3, 2), (2, 1), (2, 3), (1, 0, 2, 3))
    hidden = d.conv("x", 4, 8, geometry)
    before = d.finish(d.conv(hidden, 8, 2, Geometry((1, 1), (1, 2), (1, 1), (0,) * 4)))
    after = compose(before)
    assert after.ops == ["Conv"]
    found = attributes(after.model.graph.node[0])
    assert found == {
        "kernel_shape": [3, 2],
        "strides": [2, 2],
        "dilations": [2, 3],
        "pads": [1, 0, 2, 3],
        "group": 1,
    }
    assert_agree(before, after.model, d.rng)


def test_pointwise_before_a_padded_square() -> None:
    """Strides of the first one stretch the second one's window."""
    d = draft((2, 4, 13, 13))
    hidden = d.conv("x", 4, 9, Geometry((1, 1), (2, 3), (1, 1), (1, 0, 0, 2)), bias=False)
    before = d.finish(d.conv(hidden, 9, 2, Geometry((3, 3), (1, 2), (1, 1), (1, 1, 1, 0))))
    after = compose(before)
    assert after.ops == ["Conv"]
    found = attributes(after.model.graph.node[0])
    assert found == {
        "kernel_shape": [3, 3],
        "strides": [2, 6],
        "dilations": [2, 3],
        "pads": [3, 3, 2, 2],
        "group": 1,
    }
    assert_agree(before, after.model, d.rng)


def test_pointwise_with_bias_before_an_unpadded_square() -> None:
    d = draft()
    before = d.finish(d.conv(d.conv("x", 4, 40, POINT), 40, 4, SQUARE))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert_agree(before, after.model, d.rng)


def test_a_zero_bias_meets_padding_unharmed() -> None:
    d = draft()
    hidden = d.conv("x", 4, 40, POINT)
    d.weights["b1"] = np.zeros(40, np.float32)
    before = d.finish(d.conv(hidden, 40, 4, SAME))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_pads_become_explicit(auto_pad: str) -> None:
    d = draft((2, 4, 8, 8))
    geometry = Geometry((3, 2), (2, 1), (1, 1), (), auto_pad)
    before = d.finish(d.conv(d.conv("x", 4, 40, POINT, bias=False), 40, 4, geometry))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert "auto_pad" not in attributes(after.model.graph.node[0])
    assert_agree(before, after.model, d.rng)


def test_a_per_channel_scale_behind_a_depthwise_conv() -> None:
    d = draft()
    hidden = d.conv("x", 4, 4, SAME, group=4)
    before = d.finish(d.conv(hidden, 4, 4, POINT, group=4))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert attributes(after.model.graph.node[0])["group"] == 4
    assert_agree(before, after.model, d.rng)


def test_blocks_of_two_groupings() -> None:
    d = draft((2, 12, 5, 5))
    hidden = d.conv("x", 12, 48, POINT, group=4)
    before = d.finish(d.conv(hidden, 48, 6, POINT, group=6))
    after = compose(before)
    assert after.ops == ["Conv"]
    (conv,) = after.model.graph.node
    assert attributes(conv)["group"] == 2
    assert weights(after.model)[conv.input[1]].shape == (6, 6, 1, 1)
    assert macs(after.model) < macs(before)
    assert_agree(before, after.model, d.rng)


def test_shared_weights_stay() -> None:
    d = draft()
    hidden = d.conv("x", 4, 4, POINT)
    first = d.conv(hidden, 4, 4, POINT, bias=False)
    d.nodes.append(harness.node("Conv", ["x", d.nodes[0].input[1]], ["u"]))
    d.nodes.append(harness.node("Conv", ["x", d.nodes[1].input[1]], ["v"]))
    before = d.finish(d.add("Max", [first, "u", "v"]))
    after = compose(before)
    assert after.ops == ["Conv", "Conv", "Conv", "Max"]
    held = weights(after.model)
    for name in ("w0", "w2"):
        np.testing.assert_array_equal(held[name], d.weights[name])
    assert_agree(before, after.model, d.rng)


def test_a_strided_second_one_wastes_the_first_ones_work() -> None:
    """Its MACs fall only because the stride is taken into account; per position they rise."""
    d = draft((1, 4, 9, 9))
    strided = Geometry.plain(1, stride=3)
    before = d.finish(d.conv(d.conv("x", 4, 1, POINT), 1, 4, strided))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert macs(after.model) < macs(before)
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(
    "geometry", [Geometry.plain(1, stride=2), Geometry.plain(3, pad=1, stride=2)]
)
def test_dynamic_sizes(geometry: Geometry) -> None:
    d = draft(("batch", 4, "h", "w"))
    hidden = d.conv("x", 4, 8, POINT, bias=geometry.kernel == (1, 1))
    before = d.finish(d.conv(hidden, 8, 4, geometry))
    after = compose(before)
    assert after.ops == ["Conv"]
    for size in (5, 6):
        assert_agree(before, after.model, d.rng, batch=3, h=size, w=7)


def test_overridable_initializers_are_not_constant() -> None:
    d = draft(opset=7)
    proto = d.finish(d.conv(d.conv("x", 4, 8, POINT), 8, 3, POINT), ir=3)
    assert Why.WEIGHT_NOT_CONSTANT.value in compose(proto, overridable=True).reasons
    assert compose(proto).ops == ["Conv"]


# -- declines --------------------------------------------------------------------------------------


def two_pointwise(d: Draft) -> str:
    return d.conv(d.conv("x", 4, 8, POINT), 8, 3, POINT)


def computed(index: int, position: int) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        d = draft()
        y = two_pointwise(d)
        node = d.nodes[index]
        d.nodes.insert(0, harness.node("Abs", [node.input[position]], ["computed"]))
        node.input[position] = "computed"
        return d.finish(y)

    return build


def shapeless_weight() -> onnx.ModelProto:
    d = draft()
    y = two_pointwise(d)
    d.nodes.insert(0, harness.node("Anything", ["w2"], ["computed"], domain="custom"))
    d.nodes[2].input[1] = "computed"
    return d.finish(y, domains={"custom": 1})


def shapeless_first_weight() -> onnx.ModelProto:
    d = draft()
    y = two_pointwise(d)
    d.nodes.insert(0, harness.node("Anything", ["w0"], ["computed"], domain="custom"))
    d.nodes[1].input[1] = "computed"
    return d.finish(y, domains={"custom": 1})


def concatenated() -> onnx.ModelProto:
    d = draft()
    both = d.add("Concat", [d.conv("x", 4, 4, POINT), d.conv("x", 4, 4, POINT)], axis=1)
    return d.finish(d.conv(both, 8, 3, POINT))


def across(op: str) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        d = draft()
        return d.finish(d.conv(d.add(op, [d.conv("x", 4, 8, POINT)]), 8, 3, POINT))

    return build


def across_silu() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 4, 8, POINT)
    return d.finish(d.conv(d.add("Mul", [hidden, d.add("Sigmoid", [hidden])]), 8, 3, POINT))


def graph_output_between() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 4, 8, POINT)
    return d.finish(d.conv(hidden, 8, 3, POINT), hidden)


def read_elsewhere() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 4, 8, POINT)
    return d.finish(d.add("Add", [d.conv(hidden, 8, 8, POINT), hidden]))


def captured() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 4, 8, POINT)
    y = d.conv(hidden, 8, 3, POINT)
    info = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, [None] * 4)
    branch = onnx.helper.make_graph([harness.node("Neg", [hidden], ["inner"])], "b", [], [info])
    yes = numpy_helper.from_array(np.array(True))
    d.nodes.insert(0, harness.node("Constant", [], ["yes"], value=yes))
    d.nodes.append(harness.node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))
    return d.finish(y, "z")


def two_squares() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 8, SQUARE), 8, 1, SQUARE))


def brain_float() -> onnx.ModelProto:
    d = draft(dtype=onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16), opset=22)
    return d.finish(two_pointwise(d))


def unknown_automatic_pads() -> onnx.ModelProto:
    d = draft((1, 4, "h", "w"))
    hidden = d.conv("x", 4, 40, POINT, bias=False)
    return d.finish(d.conv(hidden, 40, 4, Geometry((3, 3), (2, 2), (1, 1), (), "SAME_UPPER")))


def padded_pointwise_behind_square() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 8, SQUARE), 8, 1, Geometry.plain(1, pad=1)))


def bias_before_padded_square() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 40, POINT), 40, 4, SAME))


def bias_before_padded_pointwise() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 8, POINT), 8, 3, Geometry.plain(1, pad=1)))


def bottleneck() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 1, POINT), 1, 4, POINT))


def as_many_macs() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 2, POINT), 2, 4, POINT))


def separable() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 4, 4, SAME, group=4), 4, 8, POINT))


def more_macs_for_any_size() -> onnx.ModelProto:
    d = draft((1, 4, "h", "w"))
    return d.finish(d.conv(d.conv("x", 4, 1, POINT, bias=False), 1, 4, SAME))


def strided_bottleneck_of_unknown_size() -> onnx.ModelProto:
    d = draft((1, 4, "h", "w"))
    return d.finish(d.conv(d.conv("x", 4, 1, POINT), 1, 4, Geometry.plain(1, stride=3)))


def padded_pointwise_of_unknown_size() -> onnx.ModelProto:
    """The second one answers at up to nine positions for one of the first."""
    d = draft((1, 4, "h", "w"))
    hidden = d.conv("x", 4, 3, POINT, bias=False)
    return d.finish(d.conv(hidden, 3, 4, Geometry.plain(1, pad=1)))


def too_large_for_half() -> onnx.ModelProto:
    d = draft(dtype=np.float16)
    y = two_pointwise(d)
    d.weights["w0"] = np.full_like(d.weights["w0"], 1e3)
    d.weights["w2"] = np.full_like(d.weights["w2"], 1e3)
    return d.finish(y)


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.NO_CONV_BEFORE, concatenated),
    (Why.NO_CONV_BEFORE, across("Neg")),
    (Why.NON_LINEAR_BETWEEN, across("Relu")),
    (Why.NON_LINEAR_BETWEEN, across("Sigmoid")),
    (Why.NON_LINEAR_BETWEEN, across("HardSwish")),
    (Why.NON_LINEAR_BETWEEN, across_silu),
    (Why.GRAPH_OUTPUT, graph_output_between),
    (Why.OTHER_READERS, read_elsewhere),
    (Why.OTHER_READERS, captured),
    (Why.NOT_POINTWISE, two_squares),
    (Why.NOT_FLOAT, brain_float),
    (Why.PADS_UNKNOWN, unknown_automatic_pads),
    (Why.PADDING_BETWEEN, padded_pointwise_behind_square),
    (Why.WEIGHT_NOT_CONSTANT, shapeless_weight),
    (Why.WEIGHT_NOT_CONSTANT, shapeless_first_weight),
    (Why.WEIGHT_NOT_CONSTANT, computed(0, 1)),
    (Why.WEIGHT_NOT_CONSTANT, computed(0, 2)),
    (Why.WEIGHT_NOT_CONSTANT, computed(1, 1)),
    (Why.WEIGHT_NOT_CONSTANT, computed(1, 2)),
    (Why.BIAS_MEETS_PADDING, bias_before_padded_square),
    (Why.BIAS_MEETS_PADDING, bias_before_padded_pointwise),
    (Why.MORE_MACS, bottleneck),
    (Why.MORE_MACS, as_many_macs),
    (Why.MORE_MACS, separable),
    (Why.MORE_MACS, more_macs_for_any_size),
    (Why.SIZE_UNKNOWN, strided_bottleneck_of_unknown_size),
    (Why.SIZE_UNKNOWN, padded_pointwise_of_unknown_size),
    (Why.OUT_OF_RANGE, too_large_for_half),
]


@pytest.mark.parametrize(("why", "build"), DECLINES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    proto = build()
    outcome = compose(proto)
    assert why.value in outcome.reasons
    # The first one of the two has nothing before it; where its weight has no shape, it says that.
    assert outcome.reasons <= {why.value, Why.NO_CONV_BEFORE.value, Why.WEIGHT_NOT_CONSTANT.value}
    assert outcome.applied == 0
    assert len(outcome.ops) == len(proto.graph.node)


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """A pointwise convolution and another one, in either order, groups and all."""
    rank = draw(st.integers(1, 3))
    opset = draw(st.sampled_from(OPSETS))
    groups = [draw(st.sampled_from([1, 2, 4])) for _ in range(2)]
    cin = groups[0] * draw(st.integers(1, 2))
    middle = math.lcm(*groups) * draw(st.integers(1, 4))
    cout = groups[1] * draw(st.integers(1, 2))
    # A stride of two leaves five of nine, which is what three taps apart by two reach.
    sizes = draw(st.one_of(st.integers(9, 11), st.just("size")))
    d = Draft(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (draw(BATCH), cin, *(sizes,) * rank),
        draw(st.sampled_from(DTYPES if rank == 2 else DTYPES[:2])),
        opset,
    )
    d.shares = draw(st.booleans())
    shapes = [draw(geometries(rank)), draw(geometries(rank))]
    narrow = draw(st.integers(0, 1))
    thin = shapes[narrow]
    pads = thin.pads if draw(st.booleans()) else (0,) * (2 * rank)
    shapes[narrow] = Geometry((1,) * rank, thin.strides, thin.dilations, pads, thin.auto_pad)
    hidden = d.conv("x", cin, middle, shapes[0], group=groups[0], bias=draw(st.booleans()))
    y = d.conv(hidden, middle, cout, shapes[1], group=groups[1], bias=draw(st.booleans()))
    return draw(seen_inside(d.finish(y))), d


def check(case: tuple[onnx.ModelProto, Draft]) -> None:
    proto, d = case
    outcome = compose(proto)
    assert_agree(proto, outcome.model, d.rng, factor=16, batch=2, size=9)
    if outcome.applied and "size" not in d.shape:
        assert macs(outcome.model) < macs(proto)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pairs())
def test_outputs_agree(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(pairs())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


widths = st.integers(1, 6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(widths, widths, widths, st.booleans(), st.sampled_from([None, "Relu", "Sigmoid", "Clip"]))
def test_linear_collapse(cin: int, middle: int, cout: int, bias: bool, between: str | None) -> None:
    """Two pointwise layers are one exactly if nothing bends between them and MACs fall."""
    d = draft((2, cin, 3, 3))
    hidden = d.conv("x", cin, middle, POINT, bias=bias)
    if between is not None:
        hidden = d.add(between, [hidden])
    proto = d.finish(d.conv(hidden, middle, cout, POINT, bias=bias))
    outcome = compose(proto)
    collapses = between is None and cin * cout < middle * (cin + cout)
    assert outcome.ops.count("Conv") == (1 if collapses else 2)
    if between is not None:
        assert Why.NON_LINEAR_BETWEEN.value in outcome.reasons
    assert_agree(proto, outcome.model, d.rng)


@st.composite
def pointwise_networks(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """Unpadded pointwise layers with per-channel operators and activations between."""
    d = Draft(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (1, 3, 4, 5),
        opset=draw(st.sampled_from(OPSETS)),
    )
    d.shares = draw(st.booleans())
    value, channels = "x", 3
    layers = st.sampled_from(["Conv", "Conv", "Conv", "BatchNormalization", "Mul", "Add", "Relu"])
    for layer in draw(st.lists(layers, min_size=3, max_size=8)):
        if layer == "Conv":
            width = draw(st.sampled_from([2, 4, 6]))
            group = draw(st.sampled_from([1, math.gcd(channels, width)]))
            value = d.conv(value, channels, width, POINT, group=group, bias=draw(st.booleans()))
            channels = width
        elif layer == "BatchNormalization":
            value = d.batch_normalization(value, channels)
        elif layer == "Relu":
            value = d.add("Relu", [value])
        else:
            value = d.add(layer, [value, d.weight("c", np.abs(d.signed(channels, 1, 1)))])
    return draw(seen_inside(d.finish(d.add("Identity", [value])))), d


SIMPLIFY: tuple[Pass[Any], ...] = (FoldBatchNormalization(), FoldAffine(), ComposePointwise())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pointwise_networks(), st.integers(0, 3), st.integers(0, 4), st.permutations(SIMPLIFY))
def test_a_shifted_input_gives_a_shifted_output(
    case: tuple[onnx.ModelProto, Draft], rows: int, columns: int, order: list[Pass[Any]]
) -> None:
    """A pointwise network treats all pixels alike, and so does what the passes make of it."""
    proto, d = case
    rewritten, applied = proto, 0
    for pass_ in order:
        outcome = harness.run_pass(pass_, rewritten)
        rewritten, applied = outcome.model, applied + outcome.applied
    assume(applied)
    x = d.noise(1, 3, 4, 5).astype(np.float32)
    straight = harness.run_unoptimized(rewritten, {"x": x})["y"]
    shifted = harness.run_unoptimized(rewritten, {"x": np.roll(x, (rows, columns), (2, 3))})["y"]
    scale = max(float(np.abs(straight).max()), 1e-3)
    expected = np.roll(straight, (rows, columns), (2, 3))
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-6 * scale)
    assert_agree(proto, rewritten, d.rng, factor=16)
