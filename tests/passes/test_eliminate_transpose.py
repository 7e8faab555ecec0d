"""eliminate-transpose: pairs cancel across everything that does not mind the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pwopt.graph import parse
from pwopt.passes._movable import inverse
from pwopt.passes.eliminate_transpose import EliminateTranspose
from pwopt.passes.lower_pointwise_conv import LowerPointwiseConv
from pwopt.tuning.driver import Driver
from tests.passes.harness import (
    Array,
    Outcome,
    assert_same_outputs,
    model,
    node,
    random_feeds,
    run_pass,
    run_unoptimized,
)

Why = EliminateTranspose.Why
TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)
OPSETS = (7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 20, 21, 23)


def transpose(source: str, result: str, perm: Sequence[int]) -> onnx.NodeProto:
    return node("Transpose", [source], [result], perm=list(perm))


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str | None]],
    outputs: dict[str, int] | None = None,
    weights: dict[str, Array] | None = None,
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model whose outputs are given with their ranks."""
    ranks = outputs or {"y": 4}
    return model(nodes, inputs, {k: [None] * r for k, r in ranks.items()}, weights, opset=opset)


def eliminate(proto: onnx.ModelProto, seed: int = 0) -> Outcome:
    """Run the pass and compare outputs; the number of Transposes falls with every rewrite."""
    out = run_pass(EliminateTranspose(), proto)
    before = [n.op_type for n in proto.graph.node].count("Transpose")
    assert out.ops.count("Transpose") <= before - out.applied
    assert_same_outputs(proto, out.model, np.random.default_rng(seed))
    return out


def attribute(outcome: Outcome, op: str, key: str) -> Any:
    found = next(n for n in outcome.model.graph.node if n.op_type == op)
    return helper.get_node_attr_value(found, key)


def constants(outcome: Outcome) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in outcome.model.graph.initializer}


def operand(outcome: Outcome, op: str, index: int) -> Array:
    """The constant that the first node of type *op* reads as input *index*."""
    found = next(n for n in outcome.model.graph.node if n.op_type == op)
    return constants(outcome)[found.input[index]]


# -- golden --------------------------------------------------------------------------------------


def test_a_pair_around_relu_vanishes() -> None:
    proto = build(
        [
            node("MaxPool", ["x"], ["m"], kernel_shape=[1, 1]),
            transpose("m", "t", TO_LAST),
            node("Relu", ["t"], ["r"]),
            transpose("r", "u", TO_FIRST),
            node("MaxPool", ["u"], ["y"], kernel_shape=[1, 1]),
        ],
        {"x": ["N", 3, "H", "W"]},
    )
    assert eliminate(proto).ops == ["MaxPool", "Relu", "MaxPool"]


def test_a_pair_at_the_edges_of_the_graph_keeps_the_names() -> None:
    proto = build(
        [transpose("x", "t", TO_LAST), node("Relu", ["t"], ["r"]), transpose("r", "y", TO_FIRST)],
        {"x": [1, 3, 4, 5]},
    )
    out = eliminate(proto)
    assert out.ops == ["Relu"]
    assert out.model.graph.node[0].output[0] == "y"


def test_several_inverse_readers_vanish_together() -> None:
    nodes = [transpose("x", "t", TO_FIRST)]
    for i in range(3):
        nodes += [transpose("t", f"u{i}", TO_LAST), node("Softplus", [f"u{i}"], [f"s{i}"])]
    nodes += [node("Sum", ["s0", "s1", "s2"], ["y"])]
    out = eliminate(build(nodes, {"x": [1, 4, 5, 3]}))
    assert out.ops == ["Softplus"] * 3 + ["Sum"]


def test_two_transposes_become_one() -> None:
    proto = build(
        [transpose("x", "t", (0, 2, 1, 3)), transpose("t", "y", (1, 0, 2, 3))],
        {"x": [2, 3, 4, 5]},
    )
    out = eliminate(proto)
    assert out.ops == ["Transpose"]
    assert attribute(out, "Transpose", "perm") == [2, 0, 1, 3]


def test_two_transposes_become_one_across_relu() -> None:
    proto = build(
        [
            transpose("x", "t", (0, 2, 1, 3)),
            node("Relu", ["t"], ["r"]),
            transpose("r", "y", (1, 0, 2, 3)),
        ],
        {"x": [2, 3, 4, 5]},
    )
    assert sorted(eliminate(proto).ops) == ["Relu", "Transpose"]


def test_a_transpose_takes_over_from_one_behind_it_that_only_some_readers_need() -> None:
    # The reduction reads the value in the layout of "t" just as well, but not in that of "x".
    proto = build(
        [
            transpose("x", "v", (0, 1, 3, 2)),
            transpose("v", "t", TO_LAST),
            node("GlobalMaxPool", ["t"], ["y"]),
            node("ReduceMean", ["v"], ["z"], axes=[1], keepdims=0),
        ],
        {"x": [2, 3, 4, 5]},
        {"y": 4, "z": 3},
    )
    out = eliminate(proto)
    assert out.ops.count("Transpose") == 1
    assert attribute(out, "Transpose", "perm") == [0, 3, 2, 1]


def test_equal_transposes_of_one_value_are_shared() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            transpose("x", "u", TO_LAST),
            node("GlobalMaxPool", ["t"], ["p"]),
            node("GlobalAveragePool", ["u"], ["q"]),
            node("Add", ["p", "q"], ["y"]),
        ],
        {"x": [1, 3, 4, 5]},
    )
    assert eliminate(proto).ops.count("Transpose") == 1


def test_a_residual_add_of_two_transposed_values() -> None:
    proto = build(
        [
            transpose("a", "ta", TO_FIRST),
            transpose("b", "tb", TO_FIRST),
            node("Add", ["ta", "tb"], ["s"]),
            node("Relu", ["s"], ["r"]),
            transpose("r", "y", TO_LAST),
        ],
        {"a": [1, 4, 5, 3], "b": [1, 4, 5, 3]},
    )
    assert eliminate(proto).ops == ["Add", "Relu"]


def test_two_transposes_before_an_add_become_one_behind_it() -> None:
    proto = build(
        [
            transpose("a", "ta", TO_FIRST),
            transpose("b", "tb", TO_FIRST),
            node("Add", ["ta", "tb"], ["s"]),
            node("GlobalMaxPool", ["s"], ["y"]),
        ],
        {"a": [1, 4, 5, 3], "b": [1, 4, 5, 3]},
    )
    assert eliminate(proto).ops == ["Add", "Transpose", "GlobalMaxPool"]


def test_a_skip_from_the_other_layout_pays_one_transpose_for_two() -> None:
    # The cut stops at the Add: pulling the pools into the region would cost more.
    proto = build(
        [
            node("MaxPool", ["x"], ["g"], kernel_shape=[1, 1]),
            node("Relu", ["g"], ["skip"]),
            transpose("x", "t", TO_LAST),
            node("Softmax", ["t"], ["s"], axis=-1),
            transpose("s", "u", TO_FIRST),
            node("Add", ["u", "skip"], ["a"]),
            transpose("a", "v", TO_LAST),
            node("Softmax", ["v"], ["y1"], axis=-1),
            node("LRN", ["skip"], ["y2"], size=1),
        ],
        {"x": [1, 3, 4, 5]},
        {"y1": 4, "y2": 4},
        opset=12,
    )
    out = eliminate(proto)
    assert out.ops.count("Transpose") == 2


def test_constants_are_transposed_and_scalars_stay() -> None:
    bias = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    proto = build(
        [
            transpose("x", "t", TO_FIRST),
            node("Add", ["t", "bias"], ["a"]),
            node("Mul", ["half", "a"], ["m"]),
            transpose("m", "y", TO_LAST),
        ],
        {"x": [1, 4, 5, 3]},
        weights={"bias": bias, "half": np.array(0.5, np.float32)},
    )
    out = eliminate(proto)
    assert out.ops == ["Add", "Mul"]
    np.testing.assert_array_equal(operand(out, "Add", 1), bias.reshape(3))
    assert operand(out, "Mul", 0).shape == ()


@pytest.mark.parametrize("opset", [9, 13, 18])
def test_axes_are_renamed(opset: int) -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Concat", ["t", "t"], ["c"], axis=3 if opset < 11 else -1),
            node("Split", ["c"], ["a", "b"], axis=1, **({"num_outputs": 2} if opset > 17 else {})),
            node("Add", ["a", "b"], ["s"]),
            transpose("s", "y", TO_FIRST),
        ],
        {"x": [1, 3, 4, 6]},
        opset=opset,
    )
    out = eliminate(proto)
    assert out.ops == ["Concat", "Split", "Add"]
    assert attribute(out, "Concat", "axis") == 1
    assert attribute(out, "Split", "axis") == 2


def test_softmax_moves_from_opset_13_on() -> None:
    def proto(opset: int) -> onnx.ModelProto:
        nodes = [
            transpose("x", "t", TO_LAST),
            node("Softmax", ["t"], ["s"], axis=3),
            transpose("s", "y", TO_FIRST),
        ]
        return build(nodes, {"x": [1, 3, 4, 6]}, opset=opset)

    assert eliminate(proto(13)).ops == ["Softmax"]
    assert eliminate(proto(12)).ops == ["Transpose", "Softmax", "Transpose"]


@pytest.mark.parametrize("opset", [9, 17])
def test_slice_and_pad(opset: int) -> None:
    numbers = {
        "starts": np.array([1]),
        "ends": np.array([4]),
        "axes": np.array([-2]),
        "pads": np.array([0, 1, 0, 2, 0, 0, 3, 0]),
    }
    old = opset < 10
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Slice", ["t"], ["s"], starts=[1], ends=[4], axes=[2])
            if old
            else node("Slice", ["t", "starts", "ends", "axes"], ["s"]),
            node("Pad", ["s"], ["p"], pads=numbers["pads"].tolist())
            if old
            else node("Pad", ["s", "pads"], ["p"]),
            transpose("p", "y", TO_FIRST),
        ],
        {"x": [1, 3, 4, 6]},
        weights=None if old else numbers,
        opset=opset,
    )
    out = eliminate(proto)
    assert out.ops == ["Slice", "Pad"]
    pads = [0, 2, 1, 0, 0, 0, 0, 3]
    if old:
        assert attribute(out, "Slice", "axes") == [3]
        assert attribute(out, "Pad", "pads") == pads
    else:
        assert operand(out, "Slice", 3).tolist() == [3]
        assert operand(out, "Pad", 1).tolist() == pads


@pytest.mark.parametrize("opset", [13, 18])
def test_a_reduction_that_drops_its_axes_ends_the_region(opset: int) -> None:
    axes: dict[str, Any] = {"axes": [1, 2]} if opset < 18 else {}
    operands = ["r"] if opset < 18 else ["r", "axes"]
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Relu", ["t"], ["r"]),
            node("ReduceMean", operands, ["y"], keepdims=0, **axes),
        ],
        {"x": [2, 3, 4, 6]},
        {"y": 2},
        {"axes": np.array([1, 2])} if opset >= 18 else None,
        opset=opset,
    )
    out = eliminate(proto)
    assert out.ops == ["Relu", "ReduceMean"]
    assert (
        attribute(out, "ReduceMean", "axes")
        if opset < 18
        else operand(out, "ReduceMean", 1).tolist()
    ) == [2, 3]


def test_moving_axes_of_size_one_is_a_reshape() -> None:
    proto = build([transpose("x", "y", TO_LAST)], {"x": ["N", 8, 1, 1]})
    out = eliminate(proto)
    assert out.ops == ["Reshape"]
    assert operand(out, "Reshape", 1).tolist() == [-1, 1, 1, 8]


def test_a_reshape_or_flatten_behind_takes_it_in() -> None:
    proto = build(
        [
            node("GlobalMaxPool", ["x"], ["p"]),
            transpose("p", "t", TO_LAST),
            node("Reshape", ["t", "shape"], ["y"]),
            node("Flatten", ["t"], ["z"]),
        ],
        {"x": [2, 8, 3, 3]},
        {"y": 2, "z": 2},
        {"shape": np.array([2, -1])},
    )
    assert eliminate(proto).ops == ["GlobalMaxPool", "Reshape", "Flatten"]


@pytest.mark.parametrize(("axis", "is_taken_in"), [(1, True), (2, False), (-1, False)])
def test_flatten_takes_it_in_where_it_cuts_between_the_same_axes(
    axis: int, is_taken_in: bool
) -> None:
    proto = build(
        [
            node("GlobalMaxPool", ["x"], ["p"]),
            transpose("p", "t", TO_LAST),
            node("Flatten", ["t"], ["y"], axis=axis),
        ],
        {"x": [2, 8, 3, 3]},
        {"y": 2},
    )
    rest = ["Flatten"] if is_taken_in else ["Reshape", "Flatten"]
    assert eliminate(proto).ops == ["GlobalMaxPool", *rest]


def test_a_reshape_before_takes_it_in() -> None:
    proto = build(
        [node("Reshape", ["x", "shape"], ["r"]), transpose("r", "y", (1, 0, 2))],
        {"x": [12]},
        {"y": 3},
        {"shape": np.array([1, 3, 4])},
    )
    out = eliminate(proto)
    assert out.ops == ["Reshape"]
    assert operand(out, "Reshape", 1).tolist() == [3, 1, 4]


def test_an_identity_permutation_goes() -> None:
    proto = build([transpose("x", "t", range(4)), node("Relu", ["t"], ["y"])], {"x": [1, 2, 3, 4]})
    assert eliminate(proto).ops == ["Relu"]


def test_the_default_permutation_reverses_the_axes() -> None:
    proto = build(
        [
            node("Transpose", ["x"], ["t"]),
            node("Relu", ["t"], ["r"]),
            transpose("r", "y", (2, 1, 0)),
        ],
        {"x": [2, 3, 4]},
        {"y": 3},
    )
    assert eliminate(proto).ops == ["Relu"]


@pytest.mark.parametrize("form", ["nhwc-matmul", "nhwc-gemm"])
def test_lowered_pointwise_convs_leave_one_transpose_at_each_end(form: str) -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {f"w{i}": weight(6, 6, 1, 1) for i in range(4)}
    weights |= {f"b{i}": weight(6) for i in range(4)}
    nodes = []
    last = "x"
    for i in range(4):
        nodes += [node("Conv", [last, f"w{i}", f"b{i}"], [f"c{i}"], strides=[1 + i % 2] * 2)]
        nodes += [node("Relu", [f"c{i}"], [f"r{i}"])]
        last = f"r{i}"
    nodes += [node("LRN", [last], ["y"], size=1)]
    nodes.insert(0, node("LRN", ["in"], ["x"], size=1))
    proto = build(nodes, {"in": [1, 6, 9, 8]}, weights=weights)
    layout, op = form.split("-")
    lowered = run_pass(LowerPointwiseConv(layout, op), proto).model
    assert [n.op_type for n in lowered.graph.node].count("Transpose") == 8
    ops = eliminate(lowered).ops
    assert ops.count("Transpose") == 2
    core = [op for op in ops if op not in ("Reshape", "Slice", "Add")]
    product = "MatMul" if form == "nhwc-matmul" else "Gemm"
    assert core == ["LRN", "Transpose", *[product, "Relu"] * 4, "Transpose", "LRN"]


def residual_net() -> onnx.ModelProto:
    """Lowered bottlenecks on a residual stream, with a 3x3 convolution inside each."""
    rng = np.random.default_rng(1)

    def weight(*shape: int) -> Array:
        fan = float(np.sqrt(np.prod(shape[1:])))
        return (rng.standard_normal(shape) / fan).astype(np.float32)

    weights: dict[str, Array] = {}
    nodes = [node("MaxPool", ["x"], ["s0"], kernel_shape=[1, 1])]
    for i in range(3):
        weights |= {f"u{i}": weight(4, 8, 1, 1), f"v{i}": weight(4, 4, 3, 3)}
        weights |= {f"w{i}": weight(8, 4, 1, 1)}
        nodes += [
            node("Conv", [f"s{i}", f"u{i}"], [f"a{i}"]),
            node("Relu", [f"a{i}"], [f"b{i}"]),
            node("Conv", [f"b{i}", f"v{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            node("Relu", [f"c{i}"], [f"d{i}"]),
            node("Conv", [f"d{i}", f"w{i}"], [f"e{i}"]),
            node("Add", [f"e{i}", f"s{i}"], [f"f{i}"]),
            node("Relu", [f"f{i}"], [f"s{i + 1}"]),
        ]
    nodes += [node("GlobalAveragePool", ["s3"], ["y"])]
    return build(nodes, {"x": [1, 8, 6, 6]}, weights=weights)


def test_the_residual_stream_of_a_lowered_network_stays_in_one_layout() -> None:
    proto = residual_net()
    lowered = run_pass(LowerPointwiseConv("nhwc", "matmul"), proto).model
    out = eliminate(lowered)
    # Two around each 3x3 convolution, one into the stream, one out of it.
    assert out.ops.count("Transpose") == 8
    assert_same_outputs(proto, out.model, np.random.default_rng(2))


# -- declines ------------------------------------------------------------------------------------


def _unknown_rank() -> onnx.ModelProto:
    graph = helper.make_graph(
        [node("Reshape", ["x", "shape"], ["r"]), node("Transpose", ["r"], ["y"])],
        "test",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [12]),
            helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, ["R"]),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, None])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _named_on_both_sides() -> onnx.ModelProto:
    return build([transpose("x", "y", range(4))], {"x": [1, 2, 3, 4]})


def _nothing_cancels() -> onnx.ModelProto:
    nodes = [transpose("x", "t", TO_LAST), node("GlobalMaxPool", ["t"], ["y"])]
    return build(nodes, {"x": [1, 2, 3, 4]})


DECLINES: dict[Any, Callable[[], onnx.ModelProto]] = {
    Why.UNKNOWN_RANK: _unknown_rank,
    Why.NAMES_ON_BOTH_SIDES: _named_on_both_sides,
    Why.NOTHING_CANCELS: _nothing_cancels,
}


@pytest.mark.parametrize("why", Why)
def test_declines(why: Any) -> None:
    outcome = run_pass(EliminateTranspose(), DECLINES[why]())
    assert outcome.applied == 0
    assert outcome.reasons == {why.value}


def test_a_decline_names_what_is_in_the_way() -> None:
    remark = run_pass(EliminateTranspose(), _nothing_cancels()).remarks[0]
    assert remark.facts["blocked_by"] == ("GlobalMaxPool",)


# -- traps ---------------------------------------------------------------------------------------


def test_an_intermediate_output_is_still_written() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Relu", ["t"], ["r"]),
            transpose("r", "u", TO_FIRST),
            node("Neg", ["u"], ["y"]),
        ],
        {"x": [1, 3, 4, 5]},
        {"y": 4, "r": 4},
    )
    out = eliminate(proto)
    assert sorted(out.ops) == ["Neg", "Relu", "Transpose"]


def test_both_ends_and_the_middle_are_outputs() -> None:
    proto = build(
        [
            node("Relu", ["x"], ["a"]),
            transpose("a", "b", TO_LAST),
            transpose("b", "c", TO_FIRST),
            transpose("c", "d", TO_LAST),
        ],
        {"x": [1, 3, 4, 5]},
        {"a": 4, "b": 4, "c": 4, "d": 4},
    )
    out = eliminate(proto)
    assert [o.name for o in out.model.graph.output] == ["a", "b", "c", "d"]


def test_a_region_that_gains_without_its_root_leaves_the_root_its_turn() -> None:
    # "b" cannot share with "a", whose name must stay as well; it is a Reshape in its own right.
    proto = build(
        [
            transpose("x", "a", (2, 0, 1)),
            node("Mul", ["a", "a"], ["m"]),
            transpose("m", "n", (1, 2, 0)),
            node("Cast", ["x"], ["unread"], to=onnx.TensorProto.FLOAT),
            transpose("x", "b", (2, 0, 1)),
            transpose("n", "dead", (0, 1, 2)),
        ],
        {"x": [1, 1, 3]},
        {"a": 3, "b": 3},
    )
    assert "Transpose" not in eliminate(proto).ops


def test_a_constant_shared_with_another_layout_is_copied() -> None:
    bias = np.arange(1, 4, dtype=np.float32).reshape(3, 1, 1)
    proto = build(
        [
            transpose("x", "t", TO_FIRST),
            node("Add", ["t", "bias"], ["a"]),
            transpose("a", "y", TO_LAST),
            node("Mul", ["z", "bias"], ["w"]),
        ],
        {"x": [1, 4, 5, 3], "z": [1, 3, 2, 2]},
        {"y": 4, "w": 4},
        {"bias": bias},
    )
    out = eliminate(proto)
    assert "Transpose" not in out.ops
    np.testing.assert_array_equal(constants(out)["bias"], bias)


def test_an_overridable_constant_stays_as_it_is() -> None:
    bias = np.ones((1, 3, 4, 5), np.float32)
    proto = model(
        [
            transpose("x", "t", TO_FIRST),
            node("Add", ["t", "bias"], ["a"]),
            transpose("a", "y", TO_LAST),
        ],
        {"x": [1, 4, 5, 3]},
        {"y": [None] * 4},
        {"bias": bias},
        ir=3,
    )
    kept = run_pass(EliminateTranspose(), proto, overridable=True)
    assert [t.name for t in kept.model.graph.initializer] == ["bias"]
    assert kept.ops == ["Transpose", "Add"]
    assert_same_outputs(proto, kept.model, np.random.default_rng(3))
    assert run_pass(EliminateTranspose(), proto).ops == ["Add"]


def test_a_value_added_to_its_own_transpose() -> None:
    proto = build(
        [transpose("x", "t", (1, 0)), node("Add", ["x", "t"], ["s"]), transpose("s", "y", (1, 0))],
        {"x": [4, 4]},
        {"y": 2},
    )
    eliminate(proto)


def test_a_subgraph_reads_a_transposed_value_by_name() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        return helper.make_graph([node(op, ["t"], [name])], name, [], [result])

    nodes = [
        transpose("x", "t", TO_LAST),
        transpose("t", "y", TO_FIRST),
        helper.make_node(
            "If", ["c"], ["z"], then_branch=branch("p", "Relu"), else_branch=branch("q", "Neg")
        ),
    ]
    proto = build(
        nodes,
        {"x": [1, 3, 4, 5]},
        {"y": 4, "z": 4},
        {"c": np.array(True)},
    )
    assert eliminate(proto).ops == ["Transpose", "Transpose", "If"]


def test_a_region_larger_than_the_limit_is_treated_piece_by_piece() -> None:
    nodes = []
    last = "x"
    for i in range(450):
        nodes += [transpose(last, f"t{i}", TO_LAST), node("Relu", [f"t{i}"], [f"r{i}"])]
        nodes += [transpose(f"r{i}", f"u{i}", TO_FIRST)]
        last = f"u{i}"
    nodes += [node("Relu", [last], ["y"])]
    proto = build(nodes, {"x": [1, 2, 3, 4]})
    wrapped = parse(proto)
    wrapped.infer_shapes()
    applied, visited = Driver(wrapped).run(EliminateTranspose())
    assert applied < 10
    assert visited < 20
    after = wrapped.to_proto()
    # A pair may be left whose ends do not see each other.
    assert [n.op_type for n in after.graph.node].count("Transpose") <= 2
    assert_same_outputs(proto, after, np.random.default_rng(4))


# -- properties ----------------------------------------------------------------------------------


class Generator:
    """Draws a graph with Transposes in it, node by node, and keeps the shapes."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.opset: int = draw(st.sampled_from(OPSETS))
        dtypes = [np.float32, np.float32, np.float16, np.float64]
        # Before opset 12 ONNX Runtime has even less in float64.
        self.dtype = draw(st.sampled_from(dtypes if self.opset >= 12 else dtypes[:3]))
        self.rng = np.random.default_rng(draw(st.integers(0, 99)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.perms: list[tuple[int, ...]] = []
        self.inputs: dict[str, list[int | str | None]] = {}
        rank = draw(st.sampled_from([2, 3, 4, 4, 4, 5]))
        for name in ["x", "z"][: draw(st.integers(1, 2))]:
            shape = tuple(draw(st.sampled_from([3, 2, 4, 1])) for _ in range(rank))
            self.shapes[name] = shape
            self.inputs[name] = [
                f"{name}{i}x{d}" if draw(st.integers(0, 4)) == 0 else d for i, d in enumerate(shape)
            ]

    def constant(self, values: Array) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = values
        return name

    def floats(self, shape: Sequence[int]) -> str:
        return self.constant(self.rng.standard_normal(tuple(shape)).astype(self.dtype))

    def emit(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attrs: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op, inputs, [name], **attrs))
        self.shapes[name] = tuple(shape)
        return name

    def pick(self) -> tuple[str, tuple[int, ...]]:
        names = [name for name, shape in self.shapes.items() if shape]
        # The latest value makes chains; others make branches.
        is_chain = self.draw(st.integers(0, 3)) > 0
        name = names[-1] if is_chain else self.draw(st.sampled_from(names))
        return name, self.shapes[name]

    def step(self) -> None:
        kinds = [*[self.transpose] * 5, self.unary, self.with_constant, self.with_constant]
        kinds += [self.binary, self.binary, self.concat, self.split, self.slice, self.pad]
        kinds += [self.reduce, self.softmax, self.fixed, self.select]
        self.draw(st.sampled_from(kinds))()

    def transpose(self) -> None:
        x, shape = self.pick()
        known = [p for p in self.perms if len(p) == len(shape)]
        if known and self.draw(st.integers(0, 5)) > 0:
            perm = self.draw(st.sampled_from(known))
            perm = inverse(perm) if self.draw(st.integers(0, 3)) > 0 else perm
        else:
            perm = tuple(self.draw(st.permutations(list(range(len(shape))))))
        self.perms.append(perm)
        self.emit("Transpose", [x], [shape[i] for i in perm], perm=list(perm))

    def unary(self) -> None:
        x, shape = self.pick()
        ops = ["Relu", "Neg", "Sigmoid", "Abs", "Clip"]
        # ONNX Runtime has no LeakyRelu, PRelu or GlobalMaxPool in float64.
        ops += ["LeakyRelu"] * (self.dtype is not np.float64)
        op = self.draw(st.sampled_from(ops))
        if op == "Clip" and self.opset >= 11:
            low = self.constant(np.array(-0.5, self.dtype))
            self.emit(op, [x, low], shape)
        else:
            self.emit(op, [x], shape, **({"min": -0.5} if op == "Clip" else {}))

    def with_constant(self) -> None:
        x, shape = self.pick()
        rank = self.draw(st.integers(0, len(shape)))
        dims = [d if self.draw(st.booleans()) else 1 for d in shape[len(shape) - rank :]]
        ops = ["Add", "Sub", "Mul"] + ["PRelu"] * (self.dtype is not np.float64)
        op = self.draw(st.sampled_from(ops))
        operands = [x, self.floats(dims)]
        if op != "PRelu" and self.draw(st.booleans()):
            operands.reverse()
        self.emit(op, operands, shape)

    def binary(self) -> None:
        x, shape = self.pick()
        like = [
            name
            for name, other in self.shapes.items()
            if len(other) == len(shape)
            and all(a == b or b == 1 for a, b in zip(shape, other, strict=True))
        ]
        y = self.draw(st.sampled_from(like))
        self.emit(self.draw(st.sampled_from(["Add", "Mul", "Sub"])), [x, y], shape)

    def concat(self) -> None:
        x, shape = self.pick()
        axis = self.draw(st.integers(0, len(shape) - 1))
        if shape[axis] > 8:
            return
        other = [name for name, s in self.shapes.items() if s == shape]
        parts = [x, self.draw(st.sampled_from(other))]
        longer = 2 * shape[axis]
        if self.draw(st.booleans()):
            parts.append(self.floats([1 if i == axis else d for i, d in enumerate(shape)]))
            longer += 1
        # Before opset 11 a negative axis stops shape inference.
        sign = self.draw(st.sampled_from([0, len(shape) if self.opset >= 11 else 0]))
        result = [longer if i == axis else d for i, d in enumerate(shape)]
        self.emit("Concat", parts, result, axis=axis - sign)

    def split(self) -> None:
        x, shape = self.pick()
        even = [i for i, d in enumerate(shape) if d % 2 == 0 and d]
        if not even:
            return
        axis = self.draw(st.sampled_from(even))
        half = tuple(d // 2 if i == axis else d for i, d in enumerate(shape))
        names = [f"v{len(self.nodes)}", f"v{len(self.nodes)}b"]
        attrs = {"num_outputs": 2} if self.opset >= 18 else {}
        self.nodes.append(node("Split", [x], names, axis=axis, **attrs))
        self.shapes |= dict.fromkeys(names, half)

    def slice(self) -> None:
        x, shape = self.pick()
        axis = self.draw(st.integers(0, len(shape) - 1))
        start = self.draw(st.integers(0, shape[axis] - 1))
        result = [d - start if i == axis else d for i, d in enumerate(shape)]
        if self.opset < 10:
            self.emit("Slice", [x], result, starts=[start], ends=[99], axes=[axis])
            return
        step = self.draw(st.integers(1, 2))
        result[axis] = -(-result[axis] // step)
        sign = len(shape) if self.opset >= 11 else 0
        numbers = [self.constant(np.array([v])) for v in (start, 99, axis - sign, step)]
        self.emit("Slice", [x, *numbers], result)

    def pad(self) -> None:
        x, shape = self.pick()
        pads = [self.draw(st.integers(0, 1)) for _ in range(2 * len(shape))]
        result = [d + pads[i] + pads[i + len(shape)] for i, d in enumerate(shape)]
        if self.opset < 11:
            self.emit("Pad", [x], result, pads=pads)
        elif self.opset < 18:
            self.emit("Pad", [x, self.constant(np.array(pads))], result)
        else:
            axes = self.draw(st.permutations(range(len(shape))))
            ordered = [pads[i] for i in axes] + [pads[i + len(shape)] for i in axes]
            numbers = [self.constant(np.array(v)) for v in (ordered, list(axes))]
            self.emit("Pad", [x, numbers[0], "", numbers[1]], result)

    def reduce(self) -> None:
        x, shape = self.pick()
        op = self.draw(st.sampled_from(["ReduceMean", "ReduceMax"]))
        axes = sorted(self.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
        keep = self.draw(st.integers(0, 1))
        kept = [1 if i in axes else d for i, d in enumerate(shape)]
        result = kept if keep else [d for i, d in enumerate(shape) if i not in axes]
        if self.opset >= 18:
            self.emit(op, [x, self.constant(np.array(axes))], result, keepdims=keep)
        elif len(axes) == len(shape):
            self.emit(op, [x], result, keepdims=keep)
        else:
            signed = axes if self.opset < 11 else [a - len(shape) for a in axes]
            self.emit(op, [x], result, axes=signed, keepdims=keep)

    def softmax(self) -> None:
        x, shape = self.pick()
        self.emit("Softmax", [x], shape, axis=self.draw(st.integers(0, len(shape) - 1)))

    def select(self) -> None:
        x, shape = self.pick()
        axis = self.draw(st.integers(0, len(shape) - 1))
        result = [1 if i == axis else d for i, d in enumerate(shape)]
        chosen = self.emit("ArgMax", [x], result, axis=axis)
        del self.shapes[chosen]
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.emit("Cast", [chosen], result, to=to)

    def fixed(self) -> None:
        x, shape = self.pick()
        if len(shape) > 2 and self.dtype is not np.float64:
            self.emit("GlobalMaxPool", [x], [*shape[:2], *(1 for _ in shape[2:])])
        else:
            self.emit("Flatten", [x], [shape[0], int(np.prod(shape[1:]))])

    def finish(self) -> onnx.ModelProto:
        read = {name for n in self.nodes for name in n.input}
        written = [name for name in self.shapes if name not in self.inputs]
        outputs = [n for n in written if n not in read or self.draw(st.integers(0, 9)) == 0]
        return model(
            self.nodes,
            self.inputs,
            {name: [None] * len(self.shapes[name]) for name in outputs},
            self.weights,
            opset=self.opset,
            dtype=self.dtype,
        )


@st.composite
def graphs(draw: st.DrawFn, longest: int) -> onnx.ModelProto:
    generator = Generator(draw)
    generator.transpose()
    for _ in range(draw(st.integers(1, longest))):
        generator.step()
    return generator.finish()


def check_graph(proto: onnx.ModelProto) -> None:
    out = run_pass(EliminateTranspose(), proto)
    before = [n.op_type for n in proto.graph.node].count("Transpose")
    assert out.ops.count("Transpose") <= before - out.applied
    symbols = {
        d.dim_param: int(d.dim_param.split("x")[-1])
        for value in proto.graph.input
        for d in value.type.tensor_type.shape.dim
        if d.dim_param
    }
    # Sums of reductions cancel, so the scale of a deep output may lie far below its parts'.
    assert_same_outputs(proto, out.model, np.random.default_rng(4), factor=50, **symbols)


@settings(max_examples=50, deadline=None)
@given(graphs(14))
def test_any_graph_computes_the_same(proto: onnx.ModelProto) -> None:
    check_graph(proto)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(graphs(25))
def test_any_graph_computes_the_same_at_length(proto: onnx.ModelProto) -> None:
    check_graph(proto)


@settings(max_examples=10, deadline=None)
@given(
    shift=st.tuples(st.integers(0, 5), st.integers(0, 4)), op=st.sampled_from(["matmul", "gemm"])
)
def test_a_shifted_input_gives_a_shifted_output(shift: tuple[int, int], op: str) -> None:
    rng = np.random.default_rng(5)
    weights = {f"w{i}": rng.standard_normal((6, 6, 1, 1)).astype(np.float32) for i in range(3)}
    proto = build(
        [
            node("Conv", ["x", "w0"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "w1"], ["c"]),
            node("Sigmoid", ["c"], ["d"]),
            node("Add", ["d", "x"], ["e"]),
            node("Conv", ["e", "w2"], ["y"]),
        ],
        {"x": [1, 6, 6, 5]},
        weights=weights,
    )
    lowered = run_pass(LowerPointwiseConv("nhwc", op), proto).model
    out = eliminate(lowered)
    assert out.ops.count("Transpose") == 2
    feeds = random_feeds(proto, np.random.default_rng(6))
    plain = run_unoptimized(out.model, feeds)["y"]
    shifted = run_unoptimized(out.model, {"x": np.roll(feeds["x"], shift, (2, 3))})["y"]
    np.testing.assert_allclose(shifted, np.roll(plain, shift, (2, 3)), rtol=1e-5, atol=1e-5)
