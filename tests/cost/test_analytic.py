"""Counts of parameters, MACs, FLOPs and bytes against figures worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.cost import ModelCost, NodeCost, WorkClass, model_cost, node_cost
from pwopt.errors import UsageError
from pwopt.graph import Facts, parse
from tests.cost.graphs import Shape, floats, model, node


def cost_of(proto: onnx.ModelProto, **shapes: tuple[int, ...]) -> ModelCost:
    return model_cost(parse(proto), shapes)


def single(
    op: str,
    inputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    *,
    opset: int = 17,
    dtype: Any = np.float32,
    outputs: int = 1,
    **attributes: Any,
) -> NodeCost:
    """The cost of a lone node that reads *inputs*, then *weights*."""
    names = [f"y{i}" for i in range(outputs)]
    lone = node(op, [*inputs, *(weights or {})], names, **attributes)
    proto = model([lone], inputs, names, weights, opset=opset, dtype=dtype)
    (cost,) = cost_of(proto).nodes
    assert cost.known, cost.unknown_because
    return cost


def conv(
    cin: int, cout: int, kernel: int, size: int = 8, *, bias: bool = True, **attributes: Any
) -> NodeCost:
    group = attributes.get("group", 1)
    weights = {"w": floats(cout, cin // group, kernel, kernel)}
    if bias:
        weights["b"] = floats(cout)
    return single("Conv", {"x": (1, cin, size, size)}, weights, **attributes)


# -- convolutions ----------------------------------------------------------------------------------


def test_published_parameter_counts() -> None:
    assert conv(256, 256, 3).params == (9 * 256 + 1) * 256 == 590_080
    assert conv(256, 256, 1).params == (256 + 1) * 256 == 65_792


def test_bottleneck() -> None:
    widths = {"reduce": (256, 64, 1), "middle": (64, 64, 3), "expand": (64, 256, 1)}
    costs = {
        name: conv(*shape, size=56, pads=[shape[2] // 2] * 4) for name, shape in widths.items()
    }
    assert costs["middle"].params == 36_928
    assert costs["reduce"].params == 257 * 64
    assert costs["expand"].params == 65 * 256
    assert costs["middle"].macs == 9 * 64 * 64 * 56 * 56
    assert costs["reduce"].macs == costs["expand"].macs == 256 * 64 * 56 * 56


@pytest.mark.parametrize(("cin", "cout"), [(16, 32), (64, 64), (32, 7), (3, 256)])
def test_separable_over_standard(cin: int, cout: int) -> None:
    standard = conv(cin, cout, 3, pads=[1] * 4)
    depthwise = conv(cin, cin, 3, pads=[1] * 4, group=cin)
    pointwise = conv(cin, cout, 1)
    ratio = Fraction(depthwise.macs + pointwise.macs, standard.macs)
    assert ratio == Fraction(1, cout) + Fraction(1, 9)


def test_work_classes_of_convolutions() -> None:
    assert conv(8, 8, 3).work_class is WorkClass.DENSE_CONV
    assert conv(8, 8, 1).work_class is WorkClass.POINTWISE_CONV
    assert conv(8, 8, 3, group=2).work_class is WorkClass.GROUPED_CONV
    assert conv(8, 8, 3, group=8).work_class is WorkClass.DEPTHWISE_CONV
    assert conv(8, 16, 3, group=8).work_class is WorkClass.DEPTHWISE_CONV


def test_bytes_of_a_convolution() -> None:
    cost = conv(4, 6, 3, size=10, strides=[2, 2])
    weights = 4 * (6 * 4 * 9 + 6)
    assert cost.output_shapes == ((1, 6, 4, 4),)
    assert cost.weight_bytes == weights
    assert cost.bytes_read == 4 * 4 * 100 + weights
    assert cost.bytes_written == 4 * 6 * 16
    assert cost.flops == 2 * cost.macs + 6 * 16
    assert cost.arithmetic_intensity == pytest.approx(cost.flops / cost.bytes)


def test_bias_adds_one_flop_per_output_and_no_mac() -> None:
    with_bias, without = conv(4, 6, 3), conv(4, 6, 3, bias=False)
    assert with_bias.macs == without.macs
    assert with_bias.flops - without.flops == 6 * 36


@st.composite
def conv_cases(draw: st.DrawFn) -> dict[str, Any]:
    group = draw(st.integers(1, 3))
    return {
        "group": group,
        "cin": group * draw(st.integers(1, 3)),
        "cout": group * draw(st.integers(1, 3)),
        "kernel": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "strides": [draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        "dilations": [draw(st.integers(1, 2)), draw(st.integers(1, 2))],
        "pads": [draw(st.integers(0, 2)) for _ in range(4)],
        "size": (draw(st.integers(5, 8)), draw(st.integers(5, 8))),
        "batch": draw(st.integers(1, 2)),
    }


@settings(max_examples=60, deadline=None)
@given(conv_cases())
def test_macs_of_conv_are_those_of_the_loops(case: dict[str, Any]) -> None:
    group, (kh, kw), (h, w) = case["group"], case["kernel"], case["size"]
    cost = single(
        "Conv",
        {"x": (case["batch"], case["cin"], h, w)},
        {"w": floats(case["cout"], case["cin"] // group, kh, kw)},
        group=group,
        strides=case["strides"],
        dilations=case["dilations"],
        pads=case["pads"],
    )
    top, left, bottom, right = case["pads"]
    reach_h, reach_w = (kh - 1) * case["dilations"][0], (kw - 1) * case["dilations"][1]
    rows = range(0, h + top + bottom - reach_h, case["strides"][0])
    columns = range(0, w + left + right - reach_w, case["strides"][1])
    macs = 0
    for _image, _row, _column, _cout in itertools.product(
        range(case["batch"]), rows, columns, range(case["cout"])
    ):
        for _cin, _y, _x in itertools.product(range(case["cin"] // group), range(kh), range(kw)):
            macs += 1
    assert cost.macs == macs


@settings(max_examples=40, deadline=None)
@given(conv_cases())
def test_macs_of_conv_transpose_are_those_of_the_loops(case: dict[str, Any]) -> None:
    group, (kh, kw), (h, w) = case["group"], case["kernel"], case["size"]
    cost = single(
        "ConvTranspose",
        {"x": (case["batch"], case["cin"], h, w)},
        {"w": floats(case["cin"], case["cout"] // group, kh, kw)},
        group=group,
        strides=case["strides"],
    )
    macs = 0
    for _image, _row, _column, _cin in itertools.product(
        range(case["batch"]), range(h), range(w), range(case["cin"])
    ):
        for _cout, _y, _x in itertools.product(range(case["cout"] // group), range(kh), range(kw)):
            macs += 1
    assert cost.macs == macs


@settings(max_examples=30, deadline=None)
@given(conv_cases())
def test_bytes_scale_with_the_element_size(case: dict[str, Any]) -> None:
    costs = {
        dtype: single(
            "Conv",
            {"x": (case["batch"], case["cin"], *case["size"])},
            {"w": np.ones((case["cout"], case["cin"] // case["group"], *case["kernel"]), dtype)},
            dtype=dtype,
            group=case["group"],
        )
        for dtype in (np.float16, np.float32, np.float64)
    }
    half, single_, double = costs[np.float16], costs[np.float32], costs[np.float64]
    assert 4 * half.bytes == 2 * single_.bytes == double.bytes
    assert 4 * half.weight_bytes == 2 * single_.weight_bytes == double.weight_bytes
    assert half.macs == single_.macs == double.macs


def test_one_and_three_dimensional_convolutions() -> None:
    line = single("Conv", {"x": (2, 4, 10)}, {"w": floats(6, 4, 3)})
    assert line.macs == 2 * 6 * 8 * 4 * 3
    volume = single("Conv", {"x": (1, 4, 5, 5, 5)}, {"w": floats(6, 4, 3, 3, 3)})
    assert volume.macs == 6 * 27 * 4 * 27


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_pads(auto_pad: str) -> None:
    assert conv(4, 6, 3, size=7, auto_pad=auto_pad, strides=[2, 2]).macs == 4 * 6 * 9 * 4 * 4


# -- other operators -------------------------------------------------------------------------------

X: Mapping[str, Shape] = {"x": (2, 4, 6, 6)}
N = 2 * 4 * 6 * 6
INT64 = np.int64


@pytest.mark.parametrize(
    ("op", "flops"),
    [
        ("Relu", 1),
        ("LeakyRelu", 2),
        ("Sigmoid", 4),
        ("HardSigmoid", 4),
        ("HardSwish", 5),
        ("Tanh", 1),
        ("Elu", 4),
        ("Softplus", 3),
        ("Softmax", 5),
        ("MeanVarianceNormalization", 6),
    ],
)
def test_flops_per_element(op: str, flops: int) -> None:
    cost = single(op, X)
    assert (cost.macs, cost.flops) == (0, flops * N)
    assert cost.bytes_read == cost.bytes_written == 4 * N


def test_matrix_products() -> None:
    gemm = single("Gemm", {"x": (3, 5)}, {"w": floats(7, 5), "b": floats(7)}, transB=1)
    assert (gemm.macs, gemm.flops, gemm.params) == (3 * 5 * 7, 2 * 3 * 5 * 7 + 3 * 7, 5 * 7 + 7)
    turned = single("Gemm", {"x": (5, 3)}, {"w": floats(5, 7)}, transA=1)
    assert turned.macs == 3 * 5 * 7
    batched = single("MatMul", {"x": (2, 1, 3, 5), "z": (4, 5, 6)})
    assert batched.output_shapes == ((2, 4, 3, 6),)
    assert batched.macs == 2 * 4 * 3 * 5 * 6
    vector = single("MatMul", {"x": (3, 5), "z": (5,)})
    assert vector.macs == 15


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        ("nchw,oc->nohw", [(2, 3, 4, 5), (6, 3)], 2 * 3 * 4 * 5 * 6),
        ("ij,kj", [(3, 4), (5, 4)], 3 * 4 * 5),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    inputs = {f"x{i}": shape for i, shape in enumerate(shapes)}
    assert single("Einsum", inputs, equation=equation).macs == macs


def test_einsum_of_one_operand() -> None:
    moved = single("Einsum", {"x": (3, 4)}, equation="ij->ji")
    assert (moved.macs, moved.flops, moved.bytes_read) == (0, 0, 48)
    assert single("Einsum", {"x": (3, 4)}, equation="ij->i").flops == 12


def test_einsum_that_is_not_simple_is_named() -> None:
    proto = model([node("Einsum", ["x"], ["y"], equation="...i->...")], {"x": (2, 3)}, ["y"])
    (unknown,) = cost_of(proto).unknown
    assert unknown == "Einsum 'n_y': this form of the operator has no cost rule"


def test_windows() -> None:
    pooled = single("MaxPool", X, kernel_shape=[3, 3], strides=[2, 2])
    assert pooled.flops == 2 * 4 * 2 * 2 * 9
    assert single("GlobalAveragePool", X).flops == N
    assert single("LRN", X, size=5).flops == 9 * N
    assert single("ReduceMean", X, axes=[2, 3]).flops == N
    assert single("ReduceL2", X, axes=[1]).flops == 2 * N


def test_normalizations() -> None:
    per_channel = {name: floats(4) for name in ("scale", "shift", "mean", "var")}
    batch = single("BatchNormalization", X, per_channel)
    assert (batch.flops, batch.params, batch.weight_bytes) == (2 * N, 8, 4 * 16)
    instance = single("InstanceNormalization", X, {"scale": floats(4), "shift": floats(4)})
    assert (instance.flops, instance.params) == (7 * N, 8)
    layer = single("LayerNormalization", X, {"scale": floats(6), "shift": floats(6)})
    assert (layer.flops, layer.params) == (7 * N, 12)
    for opset, size in ((18, 2), (21, 4)):
        weights = {"scale": floats(size), "shift": floats(size)}
        group = single("GroupNormalization", X, weights, opset=opset, num_groups=2)
        assert (group.flops, group.params) == (7 * N, 2 * size)


def test_broadcasting_reads_the_small_operand_once() -> None:
    cost = single("Mul", {"x": (2, 4, 6, 6), "gate": (2, 4, 1, 1)})
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (N, 4 * (N + 8), 4 * N)
    square = single("Add", {"x": (1, 1, 6), "z": (5, 1, 1)})
    assert (square.output_shapes, square.flops) == (((5, 1, 6),), 30)


def test_an_operand_that_is_read_twice_moves_once() -> None:
    proto = model([node("Mul", ["x", "x"], ["y"])], {"x": (10,)}, ["y"])
    (cost,) = cost_of(proto).nodes
    assert cost.bytes_read == 40


@pytest.mark.parametrize(("op", "flops"), [("Sum", 2), ("Max", 2), ("Min", 2), ("Mean", 3)])
def test_variadic(op: str, flops: int) -> None:
    assert single(op, {"a": (7,), "b": (7,), "c": (7,)}).flops == flops * 7


def test_resize() -> None:
    scales = {"roi": np.empty(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    nearest = single("Resize", X, scales, mode="nearest")
    assert (nearest.flops, nearest.params, nearest.bytes_written) == (0, 0, 4 * 4 * N)
    linear = single("Resize", X, scales, mode="linear")
    assert linear.flops == 2 * 4 * 4 * N
    rows = {"roi": scales["roi"], "scales": np.array([1, 1, 2, 1], np.float32)}
    assert single("Resize", X, rows, mode="linear").flops == 2 * 2 * 2 * N
    cubic = single("Resize", X, scales, mode="cubic")
    assert cubic.flops == 2 * 16 * 4 * N
    assert single("Upsample", X, {"scales": scales["scales"]}, opset=9).bytes_written == 16 * N


def test_movement_is_bytes_without_flops() -> None:
    permuted = single("Transpose", X, perm=[0, 2, 3, 1])
    assert (permuted.flops, permuted.bytes, permuted.work_class) == (0, 8 * N, WorkClass.TRANSPOSE)
    joined = single("Concat", {"a": (2, 3), "b": (2, 5)}, axis=1)
    assert (joined.flops, joined.bytes_read, joined.bytes_written) == (0, 64, 64)
    halves = single("Split", X, {"sizes": np.array([1, 3], INT64)}, outputs=2, axis=1)
    assert halves.bytes_written == 4 * N
    assert single("DepthToSpace", X, blocksize=2).bytes_written == 4 * N
    padded = single("Pad", X, {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], INT64)})
    assert padded.bytes_written == 4 * 2 * 4 * 8 * 8
    assert padded.params == 0


def test_a_transpose_of_unit_axes_keeps_the_order() -> None:
    assert single("Transpose", {"x": (1, 4, 1, 6)}, perm=[0, 2, 1, 3]).work_class is WorkClass.COPY


def test_slices_and_gathers_read_what_they_write() -> None:
    bounds = {"starts": [0], "ends": [1], "axes": [1]}
    cut = single("Slice", X, {k: np.array(v, INT64) for k, v in bounds.items()})
    assert cut.bytes_written == N
    assert cut.bytes_read == N + 3 * 8
    rows = model(
        [node("Gather", ["table", "i"], ["y"])],
        {"x": (1,)},
        ["y"],
        {"table": floats(1000, 8), "i": np.array([3, 5], INT64)},
    )
    (cost,) = cost_of(rows).nodes
    assert (cost.params, cost.bytes_read, cost.weight_bytes) == (8000, 64 + 16, 64 + 16)


def test_views_cost_nothing() -> None:
    shape = single("Reshape", X, {"shape": np.array([2, -1], INT64)})
    assert (shape.flops, shape.bytes, shape.params, shape.work_class) == (0, 0, 0, WorkClass.VIEW)
    assert shape.output_shapes == ((2, 144),)
    assert shape.arithmetic_intensity == 0
    assert single("Flatten", X).bytes == 0


def test_selection_is_bytes_only() -> None:
    cost = single("TopK", {"x": (3, 10)}, {"k": np.array([4], INT64)}, outputs=2)
    assert (cost.macs, cost.flops) == (0, 0)
    assert cost.bytes_written == 3 * 4 * (4 + 8)
    assert cost.bytes_read == 3 * 10 * 4 + 8


def test_conversion_counts_both_element_sizes() -> None:
    cost = single("Cast", X, to=TensorProto.FLOAT16)
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (0, 4 * N, 2 * N)


def test_recurrent() -> None:
    weights = {"w": floats(1, 4 * 6, 5), "r": floats(1, 4 * 6, 6)}
    cost = single("LSTM", {"x": (7, 2, 5)}, weights, hidden_size=6)
    assert cost.macs == 7 * 2 * 4 * 6 * (5 + 6)
    assert cost.params == 4 * 6 * (5 + 6)


def test_fused_kernels_of_the_runtime() -> None:
    fused = helper.make_node(
        "FusedConv", ["x", "w", "b", "z"], ["y"], "f", domain="com.microsoft", activation="Relu"
    )
    proto = model(
        [fused],
        {"x": (1, 4, 8, 8), "z": (1, 6, 8, 8)},
        ["y"],
        {"w": floats(6, 4, 1, 1), "b": floats(6)},
        domains={"com.microsoft": 1},
    )
    (cost,) = cost_of(proto).nodes
    assert cost.op == "com.microsoft.FusedConv"
    assert cost.output_shapes == ((1, 6, 8, 8),)
    assert cost.work_class is WorkClass.POINTWISE_CONV
    # Two per MAC, then bias, residual and Relu.
    assert cost.flops == 2 * cost.macs + 3 * 6 * 64
    assert cost.params == 30


def test_quantized_convolution() -> None:
    values: dict[str, np.ndarray[Any, Any]] = {
        "xs": np.array(0.1, np.float32),
        "xz": np.array(3, np.uint8),
        "w": np.ones((6, 4, 3, 3), np.uint8),
        "ws": np.array(0.1, np.float32),
        "wz": np.array(3, np.uint8),
        "ys": np.array(0.1, np.float32),
        "yz": np.array(3, np.uint8),
        "b": np.ones(6, np.int32),
    }
    cost = single("QLinearConv", {"x": (1, 4, 8, 8)}, values, dtype=np.uint8)
    assert cost.macs == 6 * 36 * 4 * 9
    assert cost.params == 6 * 4 * 9 + 6
    assert cost.bytes_written == 6 * 36


# -- whole models ----------------------------------------------------------------------------------


def two_convs(batch: int | str = 1) -> onnx.ModelProto:
    return model(
        [
            node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "w"], ["y"], pads=[1] * 4),
        ],
        {"x": (batch, 4, 8, 8)},
        ["y"],
        {"w": floats(4, 4, 3, 3)},
    )


def test_shared_weights_count_once_in_the_total() -> None:
    cost = cost_of(two_convs())
    assert [n.params for n in cost.nodes] == [144, 0, 144]
    assert cost.params == 144
    assert cost.unknown == ()


def test_totals_are_sums_over_nodes() -> None:
    cost = cost_of(two_convs())
    assert cost.macs == 2 * 144 * 64
    assert cost.flops == 2 * cost.macs + 4 * 64
    assert cost.bytes == sum(n.bytes_read + n.bytes_written for n in cost.nodes)
    assert cost.intensity == pytest.approx(cost.flops / cost.bytes)


def test_batch_scales_macs_and_activations_but_not_weights() -> None:
    one, five = cost_of(two_convs("N")), cost_of(two_convs("N"), x=(5, 4, 8, 8))
    assert one.macs == cost_of(two_convs(1)).macs
    assert five.macs == 5 * one.macs
    weights = sum(n.weight_bytes for n in one.nodes)
    assert five.bytes - weights == 5 * (one.bytes - weights)
    assert five.params == one.params


def test_counting_leaves_the_model_as_it_is() -> None:
    wrapped = parse(two_convs("N"))
    before = wrapped.to_proto().SerializeToString(deterministic=True)
    model_cost(wrapped, {"x": (5, 4, 8, 8)})
    assert wrapped.to_proto().SerializeToString(deterministic=True) == before
    assert wrapped.inputs[0].shape[0] == "N"


def test_unknown_sizes_are_reported_and_not_guessed() -> None:
    proto = model(
        [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])],
        {"x": ("N", 4, "H", "W")},
        ["y"],
        {"w": floats(4, 4, 3, 3)},
    )
    cost = cost_of(proto)
    assert cost.unknown == (
        "Conv 'n_a': the shape of 'x' is unknown",
        "Relu 'n_y': the shape of 'a' is unknown",
    )
    assert (cost.macs, cost.bytes, cost.params) == (0, 0, 144)
    assert not cost.nodes[0].known
    assert cost_of(proto, x=(2, 4, 10, 10)).unknown == ()


def test_unknown_operators_are_named() -> None:
    custom = helper.make_node("Bend", ["x"], ["a"], "bend", domain="example")
    proto = model(
        [custom, node("Relu", ["a"], ["y"])], {"x": (2, 3)}, ["y"], domains={"example": 1}
    )
    assert cost_of(proto).unknown == (
        "example.Bend 'bend': the operator has no cost rule",
        "Relu 'n_y': the shape of 'a' is unknown",
    )


def test_subgraphs_are_reported_and_their_weights_counted() -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("Conv", ["x", weight], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
        )

    graph = helper.make_graph(
        [
            helper.make_node(
                "If",
                ["c"],
                ["y"],
                "choice",
                then_branch=branch("then", "w"),
                else_branch=branch("else", "v"),
            )
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(floats(4, 4, 3, 3), "w"),
            numpy_helper.from_array(floats(4, 4, 1, 1), "v"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    cost = cost_of(proto)
    assert cost.unknown == ("If 'choice': it runs subgraphs",)
    assert (cost.params, cost.macs) == (144 + 16, 0)


def test_weights_in_constant_nodes_are_parameters() -> None:
    value = numpy_helper.from_array(floats(4, 4, 3, 3))
    proto = model(
        [helper.make_node("Constant", [], ["w"], value=value), node("Conv", ["x", "w"], ["y"])],
        {"x": (1, 4, 8, 8)},
        ["y"],
    )
    cost = cost_of(proto)
    assert cost.params == 144
    assert cost.nodes[1].weight_bytes == 4 * 144
    assert cost.nodes[0].bytes == 0


def test_bounds_shapes_and_scalars_are_not_parameters() -> None:
    proto = model(
        [
            node("Add", ["x", "three"], ["a"]),
            node("Clip", ["a", "low", "high"], ["b"]),
            node("Mul", ["b", "scale"], ["c"]),
            node("Reshape", ["c", "shape"], ["y"]),
        ],
        {"x": (1, 4, 2, 2)},
        ["y"],
        {
            "three": np.array(3, np.float32),
            "low": np.array(0, np.float32),
            "high": np.array(6, np.float32),
            "scale": floats(4, 1, 1),
            "shape": np.array([1, 16], INT64),
        },
    )
    assert [n.params for n in cost_of(proto).nodes] == [0, 0, 4, 0]


def test_a_weight_that_is_converted_on_its_way_is_a_parameter() -> None:
    proto = model(
        [
            node("DequantizeLinear", ["q", "s"], ["w"]),
            node("Conv", ["x", "w"], ["y"]),
        ],
        {"x": (1, 4, 8, 8)},
        ["y"],
        {"q": np.ones((4, 4, 3, 3), np.int8), "s": np.array(0.1, np.float32)},
    )
    assert cost_of(proto).params == 144


def test_wrong_input_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="no input 'z'"):
        cost_of(two_convs("N"), z=(1, 2))


# -- lone nodes ------------------------------------------------------------------------------------


def test_node_cost_binds_symbols() -> None:
    wrapped = parse(two_convs("N"))
    wrapped.infer_shapes()
    facts = Facts(wrapped)
    first = wrapped.sorted_nodes()[0]
    assert not node_cost(first, facts).known
    assert node_cost(first, facts, {"N": 3}).macs == 3 * 144 * 64


def test_node_cost_agrees_with_model_cost() -> None:
    wrapped = parse(two_convs())
    total = model_cost(wrapped)
    wrapped.infer_shapes()
    facts = Facts(wrapped)
    assert tuple(node_cost(n, facts) for n in wrapped.sorted_nodes()) == total.nodes
