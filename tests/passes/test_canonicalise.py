"""Canonicalise: its rules, its reasons to decline, and the traps beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph import Facts, Rewriter, parse
from pwopt.passes._steps import Why
from pwopt.passes.canonicalise import Canonicalise
from pwopt.passes.contract import Match
from pwopt.remark import Decline, Kind
from pwopt.tuning.driver import Driver
from tests.passes.harness import (
    OPSETS,
    Outcome,
    assert_same_outputs,
    model,
    node,
    random_feeds,
    run_pass,
    run_unoptimized,
)

Array = np.ndarray[Any, Any]
PASS = Canonicalise()
RNG = np.random.default_rng(0)


def _i64(*values: int) -> Array:
    return np.array(values, np.int64)


def _f32(*values: float) -> Array:
    return np.array(values, np.float32)


def _value(name: str, shape: Any = None, elem_type: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, elem_type, shape)


def _graph(
    nodes: list[onnx.NodeProto],
    inputs: list[Any],
    outputs: list[Any],
    weights: dict[str, Array] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model with values of any type."""
    initializers = [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _around(
    op: str,
    *,
    shape: tuple[int | str | None, ...] = (2, 3, 4),
    weights: dict[str, Array] | None = None,
    inputs: list[str] | None = None,
    opset: int = 17,
    **attrs: Any,
) -> onnx.ModelProto:
    """``Sigmoid(op(Relu(x), weights...))``."""
    names = inputs or ["a", *(weights or {})]
    nodes = [
        node("Relu", ["x"], ["a"]),
        node(op, names, ["b"], **attrs),
        node("Sigmoid", ["b"], ["y"]),
    ]
    return model(nodes, {"x": shape}, {"y": None}, weights, opset=opset)


def _steps(outcome: Outcome) -> list[Any]:
    return [r.facts["step"] for r in outcome.remarks if r.kind is Kind.APPLIED]


def _reason_at(outcome: Outcome, site: str) -> str:
    return next(r.reason for r in outcome.remarks if r.site == site)


# -- nothing to compute ----------------------------------------------------------------------------

_END = 2**63 - 1

NO_OPS: dict[str, onnx.ModelProto] = {
    "identity": _around("Identity"),
    "dropout 7": _around("Dropout", opset=7, ratio=0.3),
    "dropout 12": _around("Dropout", opset=12),
    "dropout with ratio": _around("Dropout", opset=13, weights={"r": np.array(0.3, np.float32)}),
    "dropout not training": _around(
        "Dropout",
        opset=13,
        weights={"r": np.array(0.3, np.float32), "t": np.array(False)},
    ),
    "cast": _around("Cast", to=1),
    "cast like": _around("CastLike", inputs=["a", "x"]),
    "transpose": _around("Transpose", perm=[0, 1, 2]),
    "transpose of a vector": _around("Transpose", shape=(4,)),
    "reshape": _around("Reshape", weights={"s": _i64(2, 3, 4)}),
    "reshape copying": _around("Reshape", shape=("N", 3, 4), weights={"s": _i64(0, -1, 4)}),
    "reshape 5": _around("Reshape", weights={"s": _i64(2, 0, -1)}, opset=7),
    "reshape allowzero": _around("Reshape", weights={"s": _i64(2, -1, 4)}, allowzero=1),
    "flatten": _around("Flatten", shape=("N", 3)),
    "flatten negative": _around("Flatten", shape=(2, 3), axis=-1),
    "expand": _around("Expand", weights={"s": _i64(1, 4)}, shape=("N", 3, 4)),
    "tile": _around("Tile", weights={"r": _i64(1, 1, 1)}),
    "pad": _around("Pad", weights={"p": _i64(0, 0, 0, 0, 0, 0)}),
    "pad 2": _around("Pad", pads=[0] * 6, opset=7),
    "pad reflecting": _around("Pad", weights={"p": _i64(0, 0, 0, 0, 0, 0)}, mode="reflect"),
    "slice": _around("Slice", weights={"s": _i64(0), "e": _i64(3), "axes": _i64(1)}),
    "slice to the end": _around(
        "Slice",
        shape=("N", 3, 4),
        weights={"s": _i64(0, 0), "e": _i64(_END, 2**31 - 1), "axes": _i64(0, -1), "t": _i64(1, 1)},
    ),
    "slice 1": _around("Slice", starts=[0, 0], ends=[2, 9], opset=9),
    "concat": _around("Concat", axis=1),
    "sum": _around("Sum"),
    "mean": _around("Mean"),
    "max": _around("Max"),
    "min": _around("Min"),
    "times one": _around("Mul", weights={"c": _f32(1)}),
    "one times": _around("Mul", weights={"c": np.array(1, np.float32)}, inputs=["c", "a"]),
    "times ones": _around("Mul", weights={"c": np.ones((3, 4), np.float32)}),
    "over one": _around("Div", weights={"c": _f32(1)}, opset=7),
    "plus negative zero": _around("Add", weights={"c": _f32(-0.0)}),
    "minus zero": _around("Sub", weights={"c": _f32(0.0)}),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_no_ops_go(name: str) -> None:
    proto = NO_OPS[name]
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Relu", "Sigmoid"]
    assert outcome.model.graph.input == proto.graph.input
    assert outcome.model.graph.output == proto.graph.output
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


OPS: dict[str, onnx.ModelProto] = {
    "dropout in training": _around(
        "Dropout",
        opset=13,
        weights={"r": np.array(0.3, np.float32), "t": np.array(True)},
    ),
    "cast": _around("Cast", to=11),
    "transpose": _around("Transpose"),
    "transpose of unknown rank": _around("Transpose", shape=(2, 3), perm=[1, 0]),
    "reshape": _around("Reshape", weights={"s": _i64(3, 2, 4)}),
    "reshape to two inferred": _around("Reshape", shape=("N", "M"), weights={"s": _i64(-1, 4)}),
    "reshape to another rank": _around("Reshape", weights={"s": _i64(2, 3, 4, 1)}),
    "flatten": _around("Flatten"),
    "flatten everything": _around("Flatten", shape=(2, 3), axis=0),
    "expand": _around("Expand", weights={"s": _i64(2, 3, 5)}, shape=(2, 3, 1)),
    "expand of unknown": _around("Expand", weights={"s": _i64(2, 1, 1)}, shape=("N", 3, 1)),
    "expand by rank": _around("Expand", weights={"s": _i64(1, 2, 3)}, shape=(2, 3)),
    "tile": _around("Tile", weights={"r": _i64(1, 2, 1)}),
    "pad": _around("Pad", weights={"p": _i64(0, 0, 0, 0, 0, 1)}),
    "slice from one": _around("Slice", weights={"s": _i64(1), "e": _i64(9)}),
    "slice to two": _around("Slice", weights={"s": _i64(0), "e": _i64(2), "axes": _i64(1)}),
    "slice to minus one": _around("Slice", weights={"s": _i64(0), "e": _i64(-1)}),
    "slice by two": _around(
        "Slice", weights={"s": _i64(0), "e": _i64(9), "axes": _i64(1), "t": _i64(2)}
    ),
    "slice of unknown": _around("Slice", shape=("N", 3), weights={"s": _i64(0), "e": _i64(5)}),
    "times one of more dimensions": _around("Mul", weights={"c": np.ones((1, 1, 1, 1), "f4")}),
    "times ones that widen": _around("Mul", shape=(2, 1), weights={"c": np.ones((1, 3), "f4")}),
    "times ones of unknown size": _around("Mul", shape=(2, "C"), weights={"c": np.ones(3, "f4")}),
    "times nearly one": _around("Mul", weights={"c": _f32(1, 1, 1, 1.0000001)}),
    "one over": _around("Div", weights={"c": _f32(1)}, inputs=["c", "a"]),
    "zero minus": _around("Sub", weights={"c": _f32(0)}, inputs=["c", "a"]),
    "plus zero": _around("Add", weights={"c": _f32(0.0)}),
    "minus negative zero": _around("Sub", weights={"c": _f32(-0.0)}),
    "plus zeros of both signs": _around("Add", weights={"c": _f32(-0.0, -0.0, 0.0, -0.0)}),
}


@pytest.mark.parametrize("name", OPS)
def test_what_computes_something_stays(name: str) -> None:
    proto = OPS[name]
    outcome = run_pass(PASS, proto)
    assert outcome.ops == [n.op_type for n in proto.graph.node]
    if "training" not in name:
        assert_same_outputs(proto, outcome.model, RNG, factor=0, C=1)


def test_adding_an_integer_zero_computes_nothing() -> None:
    nodes = [
        node("Neg", ["x"], ["a"]),
        node("Add", ["zero", "a"], ["b"]),
        node("Abs", ["b"], ["y"]),
    ]
    proto = model(nodes, {"x": (4,)}, {"y": (4,)}, {"zero": _i64(0)}, dtype=np.int64)
    assert run_pass(PASS, proto).ops == ["Neg", "Abs"]


@pytest.mark.parametrize("first", ["Squeeze", "Unsqueeze"])
@pytest.mark.parametrize("opset", [7, 11, 13, 21])
def test_squeeze_and_unsqueeze_cancel(first: str, opset: int) -> None:
    second = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}[first]
    shape = (2, 1, 3, 1) if first == "Squeeze" else (2, 3)

    def one(op: str, source: str, target: str, axes: list[int]) -> onnx.NodeProto:
        if opset < 13:
            return node(op, [source], [target], axes=axes)
        return node(op, [source, f"{target}_axes"], [target])

    axes = {"b": [1, 3], "c": [1, 3] if opset < 11 else [-1, -3]}
    nodes = [
        node("Relu", ["x"], ["a"]),
        one(first, "a", "b", axes["b"]),
        one(second, "b", "c", axes["c"]),
        node("Sigmoid", ["c"], ["y"]),
    ]
    weights = {f"{k}_axes": _i64(*v) for k, v in axes.items()} if opset >= 13 else {}
    proto = model(nodes, {"x": shape}, {"y": None}, weights, opset=opset)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Relu", "Sigmoid"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_squeeze_and_unsqueeze_of_other_axes_stay() -> None:
    nodes = [
        node("Squeeze", ["x", "one"], ["a"]),
        node("Unsqueeze", ["a", "two"], ["b"]),
        node("Sigmoid", ["b"], ["y"]),
    ]
    weights = {"one": _i64(1), "two": _i64(2)}
    outcome = run_pass(PASS, model(nodes, {"x": (2, 1, 3)}, {"y": (2, 3, 1)}, weights))
    assert outcome.ops == ["Squeeze", "Unsqueeze", "Sigmoid"]


def test_a_squeeze_that_is_read_elsewhere_stays() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Squeeze", ["a", "axes"], ["b"]),
        node("Unsqueeze", ["b", "axes"], ["y"]),
        node("Neg", ["b"], ["z"]),
    ]
    proto = model(nodes, {"x": (2, 1)}, {"y": (2, 1), "z": (2,)}, {"axes": _i64(1)})
    outcome = run_pass(PASS, proto)
    assert sorted(outcome.ops) == ["Neg", "Relu", "Squeeze"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


# -- dropout ---------------------------------------------------------------------------------------


def _dropout(opset: int, *, mask: str = "", mask_read: bool = False) -> onnx.ModelProto:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Dropout", ["a"], ["b", mask] if mask else ["b"]),
        node("Sigmoid", ["b"], ["y"]),
    ]
    outputs = [_value("y", (2, 3))]
    if mask_read:
        outputs.append(_value(mask, (2, 3), TensorProto.BOOL if opset >= 10 else TensorProto.FLOAT))
    return _graph(nodes, [_value("x", (2, 3))], outputs, opset=opset)


@pytest.mark.parametrize("opset", [7, 10, 12, 13, 22])
def test_an_unread_mask_does_not_matter(opset: int) -> None:
    assert run_pass(PASS, _dropout(opset, mask="m")).ops == ["Relu", "Sigmoid"]


@pytest.mark.parametrize("opset", [10, 12, 13, 22])
def test_a_mask_that_is_read_keeps_the_dropout(opset: int) -> None:
    outcome = run_pass(PASS, _dropout(opset, mask="m", mask_read=True))
    assert outcome.ops == ["Relu", "Dropout", "Sigmoid"]
    assert _reason_at(outcome, "n_b") == Why.MASK_READ


@pytest.mark.parametrize("is_test", [0, 1])
def test_before_opset_seven_dropout_says_whether_it_is_a_test(is_test: int) -> None:
    nodes = [node("Dropout", ["x"], ["a"], is_test=is_test), node("Sigmoid", ["a"], ["y"])]
    outcome = run_pass(PASS, _graph(nodes, [_value("x", (2,))], [_value("y", (2,))], opset=6))
    assert ("Dropout" in outcome.ops) == (not is_test)


def test_a_training_mode_that_is_fed_keeps_the_dropout() -> None:
    nodes = [node("Dropout", ["x", "", "t"], ["a"]), node("Sigmoid", ["a"], ["y"])]
    inputs = [_value("x", (2,)), _value("t", (), TensorProto.BOOL)]
    outcome = run_pass(PASS, _graph(nodes, inputs, [_value("y", (2,))], opset=13))
    assert _reason_at(outcome, "n_a") == Why.TRAINING_MODE


# -- constants -------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, Array]] = {
    "value": (numpy_helper.from_array(_f32(1, 2), "inside"), _f32(1, 2)),
    "value_float": (2.5, np.array(2.5, np.float32)),
    "value_floats": ([1.5, 2.5], _f32(1.5, 2.5)),
    "value_int": (3, np.array(3, np.int64)),
    "value_ints": ([3, 4], _i64(3, 4)),
    "value_string": ("text", np.array("text", object)),
    "value_strings": (["a", "b"], np.array(["a", "b"], object)),
}


@pytest.mark.parametrize("form", FORMS)
def test_constant_nodes_become_initializers(form: str) -> None:
    attribute, expected = FORMS[form]
    elem_type = helper.np_dtype_to_tensor_dtype(expected.dtype)
    nodes = [
        node("Constant", [], ["c"], **{form: attribute}),
        helper.make_node("Where", ["x", "c", "c"], ["y"]),
    ]
    proto = _graph(
        nodes,
        [_value("x", expected.shape, TensorProto.BOOL)],
        [_value("y", expected.shape, elem_type)],
    )
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Where"]
    (written,) = outcome.model.graph.initializer
    assert written.name == "c"
    actual = numpy_helper.to_array(written)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "elem_type", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT4]
)
def test_constants_without_a_numpy_type_keep_their_bits(elem_type: int) -> None:
    tensor = helper.make_tensor("inside", elem_type, [2], [1, 3])
    nodes = [node("Constant", [], ["c"], value=tensor), node("Cast", ["c"], ["y"], to=1)]
    proto = _graph(nodes, [], [_value("y", (2,))], opset=21)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Cast"]
    written = outcome.model.graph.initializer[0]
    assert (written.data_type, written.raw_data, list(written.int32_data)) == (
        elem_type,
        tensor.raw_data,
        list(tensor.int32_data),
    )


def test_a_sparse_constant_stays() -> None:
    values = numpy_helper.from_array(_f32(5), "v")
    indices = numpy_helper.from_array(_i64(1), "i")
    sparse = helper.make_sparse_tensor(values, indices, [3])
    nodes = [node("Constant", [], ["c"], sparse_value=sparse), node("Add", ["x", "c"], ["y"])]
    outcome = run_pass(PASS, _graph(nodes, [_value("x", (3,))], [_value("y", (3,))]))
    assert outcome.ops == ["Constant", "Add"]
    assert _reason_at(outcome, "n_c") == Why.SPARSE


@pytest.mark.parametrize("opset", OPSETS)
def test_constant_expressions_are_folded(opset: int) -> None:
    """``scale / sqrt(var + eps)``, as old exporters write a normalisation."""
    nodes = [
        node("Add", ["var", "eps"], ["a"]),
        node("Sqrt", ["a"], ["b"]),
        node("Div", ["scale", "b"], ["c"]),
        node("Mul", ["x", "c"], ["y"]),
    ]
    weights = {"var": _f32(1, 2, 3), "eps": _f32(1e-5), "scale": _f32(2, 3, 4)}
    proto = model(nodes, {"x": ("N", 3)}, {"y": ("N", 3)}, weights, opset=opset)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Mul"]
    assert [t.name for t in outcome.model.graph.initializer] == ["c"]
    assert_same_outputs(proto, outcome.model, RNG)


def test_shared_weights_survive_folding() -> None:
    nodes = [
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["x", "t"], ["a"]),
        node("MatMul", ["a", "w"], ["y"]),
    ]
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    proto = model(nodes, {"x": (4, 3)}, {"y": (4, 3)}, {"w": weight})
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["MatMul", "MatMul"]
    assert {t.name for t in outcome.model.graph.initializer} == {"w", "t"}
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_split_constants_become_several_initializers() -> None:
    nodes = [
        node("Split", ["w"], ["p", "q", "r"], axis=0),
        node("Mul", ["x", "p"], ["a"]),
        node("Add", ["a", "r"], ["y"]),
    ]
    proto = model(nodes, {"x": (2,)}, {"y": (2,)}, {"w": _f32(1, 2, 3, 4, 5, 6)}, opset=13)
    outcome = run_pass(PASS, proto)
    assert [t.name for t in outcome.model.graph.initializer] == ["p", "r"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_large_results_are_not_folded() -> None:
    nodes = [node("Tile", ["w", "r"], ["t"]), node("Add", ["x", "t"], ["y"])]
    weights = {"w": _f32(*range(100)), "r": _i64(20)}
    proto = model(nodes, {"x": (2000,)}, {"y": (2000,)}, weights)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Tile", "Add"]
    assert _reason_at(outcome, "n_t") == Why.TOO_LARGE
    assert run_pass(Canonicalise(fold_limit=2000), proto).ops == ["Add"]


def test_overridable_initializers_are_no_constants() -> None:
    nodes = [node("Neg", ["w"], ["a"]), node("Mul", ["a", "x"], ["y"])]
    proto = model(nodes, {"x": (3,)}, {"y": (3,)}, {"w": _f32(1, 2, 3)}, ir=3, opset=7)
    kept = run_pass(PASS, proto, overridable=True)
    assert kept.ops == ["Neg", "Mul"]
    assert [v.name for v in kept.model.graph.input] == ["x", "w"]
    assert list(kept.model.graph.node[1].input) == ["a", "x"]
    folded = run_pass(PASS, proto)
    assert folded.ops == ["Mul"]
    assert [v.name for v in folded.model.graph.input] == ["x"]
    assert list(folded.model.graph.node[0].input) == ["x", "a"]


def test_folding_leaves_no_idle_initializer_behind() -> None:
    """What the pass stops reading goes at once; what nobody ever read, when the caller says so."""
    nodes = [node("Neg", ["w"], ["a"]), node("Add", ["x", "a"], ["y"])]
    weights = {"w": _f32(1, 2, 3), "spare": _f32(9)}
    wrapped = parse(model(nodes, {"x": (3,)}, {"y": (3,)}, weights))
    wrapped.infer_shapes()
    driver = Driver(wrapped)
    driver.run(PASS)
    assert [t.name for t in wrapped.to_proto().graph.initializer] == ["spare", "a"]
    assert driver.rewriter.drop_idle_initializers() == 1
    assert [t.name for t in wrapped.to_proto().graph.initializer] == ["a"]


# -- dead code -------------------------------------------------------------------------------------


def test_what_nobody_reads_goes() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["a"], ["b"]),
        node("Exp", ["b"], ["c"]),
        node("RandomNormalLike", ["c"], ["d"]),
        node("Sigmoid", ["a"], ["y"]),
    ]
    outcome = run_pass(PASS, model(nodes, {"x": (2,)}, {"y": (2,)}))
    assert outcome.ops == ["Relu", "Sigmoid"]
    assert _steps(outcome) == ["remove-dead"] * 3


def test_unread_optional_outputs_stay() -> None:
    nodes = [node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2])]
    proto = model(nodes, {"x": (1, 1, 4)}, {"y": (1, 1, 3)})
    assert list(run_pass(PASS, proto).model.graph.node[0].output) == ["y", "indices"]


# -- names that must stay --------------------------------------------------------------------------


def test_a_graph_output_keeps_its_name() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Identity", ["a"], ["y"])]
    outcome = run_pass(PASS, model(nodes, {"x": (2,)}, {"y": (2,)}))
    assert [(n.op_type, list(n.output)) for n in outcome.model.graph.node] == [("Relu", ["y"])]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([node("Identity", ["x"], ["y"])], {"y": (2,)}),
        ([node("Identity", ["w"], ["y"])], {"y": (2,)}),
        ([node("Neg", ["w"], ["y"])], {"y": (2,)}),
        ([node("Constant", [], ["y"], value_floats=[1.0, 2.0])], {"y": (2,)}),
        (
            [node("Relu", ["x"], ["a"]), node("Identity", ["a"], ["y"])],
            {"y": (2,), "a": (2,)},
        ),
    ],
    ids=["input", "initializer", "folded", "constant", "two outputs"],
)
def test_outputs_that_need_their_node_keep_it(
    nodes: list[onnx.NodeProto], outputs: dict[str, tuple[int, ...]]
) -> None:
    proto = model(nodes, {"x": (2,)}, outputs, {"w": _f32(1, 2)})
    outcome = run_pass(PASS, proto)
    assert outcome.ops == [n.op_type for n in nodes]
    assert Why.KEEPS_NAME in outcome.reasons
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def _conditional() -> onnx.ModelProto:
    """An If whose branches read a constant, an identity and a sum from outside."""
    then = helper.make_graph(
        [node("Add", ["i", "c"], ["then_y"])], "then", [], [_value("then_y", (2,))]
    )
    otherwise = helper.make_graph(
        [node("Mul", ["s", "c"], ["t"]), node("Identity", ["t"], ["else_y"])],
        "else",
        [],
        [_value("else_y", (2,))],
    )
    nodes = [
        node("Constant", [], ["c"], value_floats=[1.0, 2.0]),
        node("Relu", ["x"], ["a"]),
        node("Identity", ["a"], ["i"]),
        node("Add", ["w", "w"], ["s"]),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    inputs = [_value("x", (2,)), _value("flag", (), TensorProto.BOOL)]
    return _graph(nodes, inputs, [_value("y", (2,))], {"w": _f32(3, 4)})


def test_control_flow_and_what_it_reads_stay() -> None:
    proto = _conditional()
    outcome = run_pass(PASS, proto)
    assert outcome.model == proto
    assert _reason_at(outcome, "n_y") == Why.CONTROL_FLOW
    assert _reason_at(outcome, "n_c") == Why.KEEPS_NAME
    assert _reason_at(outcome, "n_i") == Why.KEEPS_NAME
    assert _reason_at(outcome, "n_s") == Why.KEEPS_NAME


def test_nodes_of_other_domains_stay() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["a"], name="n_a", domain="org.example"),
        helper.make_node("Print", ["x"], ["unread"], name="n_p", domain="org.example"),
        node("Sigmoid", ["a"], ["y"]),
    ]
    proto = model(nodes, {"x": (2,)}, {"y": (2,)}, domains={"org.example": 1})
    outcome = run_pass(PASS, proto)
    assert outcome.model == proto
    assert _reason_at(outcome, "n_a") == Why.UNKNOWN_OPERATOR


# -- equal nodes -----------------------------------------------------------------------------------


def _pair(op: str, first: list[str], second: list[str], **attrs: Any) -> list[onnx.NodeProto]:
    return [
        node("Relu", ["x"], ["a"]),
        node(op, first, ["p"], **attrs),
        node(op, second, ["q"], **attrs),
        node("Concat", ["p", "q"], ["y"], axis=0),
    ]


def test_equal_nodes_are_merged() -> None:
    proto = model(_pair("Exp", ["a"], ["a"]), {"x": (2,)}, {"y": (4,)})
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Relu", "Exp", "Concat"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_equal_chains_are_merged() -> None:
    nodes = [
        *(node("Exp", ["x"], [f"a{i}"]) for i in range(3)),
        *(node("Neg", [f"a{i}"], [f"b{i}"]) for i in range(3)),
        *(node("Add", [f"b{i}", f"a{i}"], [f"c{i}"]) for i in range(3)),
        node("Sum", ["c0", "c1", "c2"], ["y"]),
    ]
    proto = model(nodes, {"x": (2,)}, {"y": (2,)})
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Exp", "Neg", "Add", "Sum"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_equal_readers_of_an_input_that_another_node_reads_twice_are_merged_once() -> None:
    nodes = [
        node("Add", ["x", "x"], ["a"]),
        *(node("Exp", ["x"], [f"b{i}"]) for i in range(2)),
        node("Sum", ["a", "b0", "b1"], ["y"]),
    ]
    proto = model(nodes, {"x": (2,)}, {"y": (2,)})
    outcome = run_pass(PASS, proto)
    assert sorted(outcome.ops) == ["Add", "Exp", "Sum"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_small_constants_are_compared_by_value() -> None:
    nodes = _pair("Mul", ["a", "c"], ["a", "d"])
    same = model(nodes, {"x": (2,)}, {"y": (4,)}, {"c": _f32(2), "d": _f32(2)})
    assert run_pass(PASS, same).ops == ["Relu", "Mul", "Concat"]
    for other in (_f32(3), _f32(2, 2), np.array(2, np.float32)):
        differs = model(nodes, {"x": (2,)}, {"y": (4,)}, {"c": _f32(2), "d": other})
        assert run_pass(PASS, differs).ops == ["Relu", "Mul", "Mul", "Concat"]


def test_zeros_of_different_signs_are_different() -> None:
    nodes = _pair("Div", ["a", "c"], ["a", "d"])
    proto = model(nodes, {"x": (2,)}, {"y": (4,)}, {"c": _f32(0.0), "d": _f32(-0.0)})
    assert run_pass(PASS, proto).ops == ["Relu", "Div", "Div", "Concat"]


def test_attributes_tell_nodes_apart() -> None:
    nodes = [
        node("Elu", ["x"], ["p"], alpha=1.0),
        node("Elu", ["x"], ["q"], alpha=2.0),
        node("Elu", ["x"], ["r"], alpha=1.0),
        node("Concat", ["p", "q", "r"], ["y"], axis=0),
    ]
    assert run_pass(PASS, model(nodes, {"x": (2,)}, {"y": (6,)})).ops == ["Elu", "Elu", "Concat"]


@pytest.mark.parametrize("seeded", [False, True])
def test_random_nodes_are_never_merged(seeded: bool) -> None:
    attrs = {"seed": 1.0} if seeded else {}
    proto = model(_pair("RandomNormalLike", ["a"], ["a"], **attrs), {"x": (2,)}, {"y": (4,)})
    assert run_pass(PASS, proto).ops.count("RandomNormalLike") == 2


def test_a_node_that_is_seen_outside_is_the_one_to_keep() -> None:
    nodes = [
        node("Exp", ["x"], ["p"]),
        node("Exp", ["x"], ["q"]),
        node("Exp", ["x"], ["r"]),
        node("Neg", ["p"], ["y"]),
    ]
    proto = model(nodes, {"x": (2,)}, {"y": (2,), "q": (2,), "r": (2,)})
    outcome = run_pass(PASS, proto)
    assert sorted(outcome.ops) == ["Exp", "Exp", "Neg"]
    assert [v.name for v in outcome.model.graph.output] == ["y", "q", "r"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_all_outputs_are_merged() -> None:
    nodes = [
        node("Split", ["x"], ["a", "b"], axis=0),
        node("Split", ["x"], ["c", "d"], axis=0),
        node("Sub", ["a", "d"], ["e"]),
        node("Sub", ["c", "b"], ["f"]),
        node("Mul", ["e", "f"], ["y"]),
    ]
    proto = model(nodes, {"x": (4,)}, {"y": (2,)}, opset=13)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Split", "Sub", "Mul"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


# -- operand order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Add", "Mul", "Max", "Min", "Sum"])
@pytest.mark.parametrize("opset", [8, 13, 17])
def test_constants_go_last(op: str, opset: int) -> None:
    proto = _around(op, weights={"c": _f32(2, 3, 4, 5)}, inputs=["c", "a"], opset=opset)
    outcome = run_pass(PASS, proto)
    assert list(outcome.model.graph.node[1].input) == ["a", "c"]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_constant_booleans_go_last(op: str) -> None:
    nodes = [node(op, ["c", "x"], ["y"])]
    proto = model(nodes, {"x": (2,)}, {"y": (2,)}, {"c": np.array([True, False])}, dtype=np.bool_)
    assert list(run_pass(PASS, proto).model.graph.node[0].input) == ["x", "c"]


@pytest.mark.parametrize("op", ["Sub", "Div", "Pow", "MatMul"])
def test_what_does_not_commute_keeps_its_order(op: str) -> None:
    weights = {"c": np.full((2, 3, 3), 2, np.float32)}
    proto = _around(op, shape=(2, 3, 3), weights=weights, inputs=["c", "a"])
    assert list(run_pass(PASS, proto).model.graph.node[1].input) == ["c", "a"]


def test_a_longer_sum_keeps_its_order() -> None:
    """Else it would be rounded otherwise."""
    proto = _around("Sum", weights={"c": _f32(2)}, inputs=["c", "a", "x"])
    assert list(run_pass(PASS, proto).model.graph.node[1].input) == ["c", "a", "x"]


def test_old_broadcasting_keeps_its_order() -> None:
    """Before opset 7 only the second operand is broadcast."""
    nodes = [node("Mul", ["w", "x"], ["y"], broadcast=1)]
    weights = {"w": np.ones((2, 3), np.float32)}
    proto = _graph(nodes, [_value("x", (3,))], [_value("y", (2, 3))], weights, opset=6)
    assert list(run_pass(PASS, proto).model.graph.node[0].input) == ["w", "x"]


# -- attributes ------------------------------------------------------------------------------------


def _attributes(proto: onnx.ModelProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in proto.graph.node[0].attribute}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_defaults_of_a_convolution_are_spelled_out(opset: int, rank: int) -> None:
    weights = {"w": np.ones((4, 3, *[2] * rank), np.float32)}
    nodes = [node("Conv", ["x", "w"], ["y"])]
    proto = model(nodes, {"x": ("N", 3, *[5] * rank)}, {"y": None}, weights, opset=opset)
    outcome = run_pass(PASS, proto)
    assert _attributes(outcome.model) == {
        "dilations": [1] * rank,
        "group": 1,
        "kernel_shape": [2] * rank,
        "pads": [0] * 2 * rank,
        "strides": [1] * rank,
    }
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


def test_given_attributes_are_kept() -> None:
    attrs = {
        "dilations": [2],
        "group": 3,
        "kernel_shape": [2],
        "pads": [1, 0],
        "strides": [3],
    }
    nodes = [node("Conv", ["x", "w"], ["y"], **attrs)]
    weights = {"w": np.ones((3, 1, 2), np.float32)}
    outcome = run_pass(PASS, model(nodes, {"x": (1, 3, 9)}, {"y": None}, weights))
    assert _attributes(outcome.model) == attrs
    assert outcome.applied == 0


def test_a_transposed_convolution_with_an_output_shape_keeps_it() -> None:
    nodes = [node("ConvTranspose", ["x", "w"], ["y"], output_shape=[9], strides=[2])]
    proto = model(nodes, {"x": (1, 3, 5)}, {"y": None}, {"w": np.ones((3, 2, 3), np.float32)})
    outcome = run_pass(PASS, proto)
    attrs = _attributes(outcome.model)
    assert attrs["output_shape"] == [9]
    assert "pads" not in attrs
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


_PADDED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


@settings(max_examples=150, deadline=None)
@given(
    op=st.sampled_from(_PADDED),
    auto_pad=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
    size=st.integers(5, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    opset=st.sampled_from([7, 11, 17, 19, 22]),
    extra=st.integers(0, 1),
    rounds_up=st.booleans(),
)
def test_auto_pad_becomes_pads(
    op: str,
    auto_pad: str,
    size: int,
    kernel: int,
    stride: int,
    opset: int,
    extra: int,
    rounds_up: bool,
) -> None:
    # ONNX Runtime's pools run into an error where SAME would have to pad by less than nothing.
    assume(op.startswith("Conv") or auto_pad == "VALID" or stride <= kernel)
    attrs: dict[str, Any] = {"auto_pad": auto_pad, "strides": [stride]}
    weights = {}
    if op.startswith("Conv"):
        weights["w"] = np.random.default_rng(0).standard_normal((2, 2, kernel)).astype("f4")
    else:
        attrs["kernel_shape"] = [kernel]
    if op == "ConvTranspose":
        attrs["output_padding"] = [min(extra, stride - 1)]
    if op in ("MaxPool", "AveragePool") and opset >= 10 and rounds_up:
        attrs["ceil_mode"] = 1
    nodes = [node(op, ["x", *weights], ["y"], **attrs)]
    proto = model(nodes, {"x": (1, 2, size)}, {"y": None}, weights, opset=opset)
    outcome = run_pass(PASS, proto)
    left = _attributes(outcome.model).get("auto_pad")
    if left is not None:
        assert Why.PADS_AMBIGUOUS in outcome.reasons or op.startswith("Conv")
    if auto_pad == "VALID" or (op == "Conv" and stride <= kernel + 1):
        assert left is None
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


@pytest.mark.parametrize(
    ("auto_pad", "pads"), [("SAME_UPPER", [0, 1]), ("SAME_LOWER", [1, 0]), ("VALID", [0, 0])]
)
def test_the_odd_pad_of_a_transposed_convolution(auto_pad: str, pads: list[int]) -> None:
    nodes = [node("ConvTranspose", ["x", "w"], ["y"], auto_pad=auto_pad, strides=[2])]
    proto = model(nodes, {"x": (1, 1, "L")}, {"y": None}, {"w": np.ones((1, 1, 3), np.float32)})
    assert _attributes(run_pass(PASS, proto).model)["pads"] == pads


def test_pads_that_depend_on_an_unknown_size_stay_automatic() -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2])]
    proto = model(nodes, {"x": (1, 1, "L")}, {"y": None}, {"w": np.ones((1, 1, 3), np.float32)})
    outcome = run_pass(PASS, proto)
    attrs = _attributes(outcome.model)
    assert attrs["auto_pad"] == b"SAME_UPPER"
    assert "pads" not in attrs
    wrapped = parse(outcome.model)
    wrapped.infer_shapes()
    answer = PASS.match(next(iter(wrapped.nodes.values())), Facts(wrapped))
    assert isinstance(answer, Decline)
    assert answer.why is Why.SHAPE_UNKNOWN


# -- shapes ----------------------------------------------------------------------------------------


def _flattening(
    shape: tuple[int | str, ...], *, opset: int = 13, source: str = "x", axis: int = 0
) -> onnx.ModelProto:
    """``Reshape(Relu(x), [Shape(source)[axis], -1])`` as PyTorch writes ``view(x.size(0), -1)``."""
    unsqueeze = (
        node("Unsqueeze", ["dim"], ["row"], axes=[0])
        if opset < 13
        else node("Unsqueeze", ["dim", "zero_row"], ["row"])
    )
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Shape", [source], ["shape"]),
        node("Constant", [], ["index"], value=numpy_helper.from_array(np.array(axis, np.int64))),
        node("Gather", ["shape", "index"], ["dim"], axis=0),
        unsqueeze,
        node("Constant", [], ["rest"], value=numpy_helper.from_array(_i64(-1))),
        node("Concat", ["row", "rest"], ["target"], axis=0),
        node("Reshape", ["a", "target"], ["y"]),
    ]
    weights = {"zero_row": _i64(0)} if opset >= 13 else {}
    return model(nodes, {"x": shape}, {"y": (None, None)}, weights, opset=opset)


def _target(outcome: Outcome) -> list[int]:
    reshape = next(n for n in outcome.model.graph.node if n.op_type == "Reshape")
    constants = {t.name: t for t in outcome.model.graph.initializer}
    return [int(v) for v in numpy_helper.to_array(constants[reshape.input[1]])]


@pytest.mark.parametrize("opset", OPSETS)
def test_a_static_shape_is_folded(opset: int) -> None:
    proto = _flattening((2, 3, 4), opset=opset)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Relu", "Reshape"]
    assert _target(outcome) == [2, -1]
    assert_same_outputs(proto, outcome.model, RNG, factor=0)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("source", ["x", "a"])
def test_a_dynamic_batch_is_copied(opset: int, source: str) -> None:
    proto = _flattening(("N", 3, 4), opset=opset, source=source)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Relu", "Reshape"]
    assert _target(outcome) == [0, -1]
    for batch in (1, 5):
        assert_same_outputs(proto, outcome.model, RNG, factor=0, N=batch)


def test_a_dimension_from_another_place_is_not_copied() -> None:
    outcome = run_pass(PASS, _flattening((2, "H", 4), axis=1))
    assert "Concat" in outcome.ops
    assert Why.SHAPE_UNKNOWN in outcome.reasons


@pytest.mark.parametrize("shape", [("D", 3, "D"), ("?", 3, 4), ("None", 3, 4)])
def test_names_given_to_anything_are_not_trusted(
    shape: tuple[int | str, ...],
) -> None:
    assert "Concat" in run_pass(PASS, _flattening(shape)).ops


def test_a_name_on_different_axes_of_two_inputs_is_not_trusted() -> None:
    proto = _flattening(("D", 3, 4))
    proto.graph.input.append(_value("z", (7, "D")))
    assert "Concat" in run_pass(PASS, proto).ops


def _reshaping(
    target: list[int | str], shape: tuple[int | str, ...], **attrs: int
) -> onnx.ModelProto:
    """A Reshape of ``Relu(x)``; names in *target* are dimensions of x."""
    nodes = [node("Relu", ["x"], ["a"]), node("Shape", ["x"], ["shape"])]
    weights: dict[str, Array] = {}
    parts = []
    for place, entry in enumerate(target):
        weights[f"w{place}"] = _i64(shape.index(entry) if isinstance(entry, str) else entry)
        parts.append(f"w{place}")
        if isinstance(entry, str):
            nodes.append(node("Gather", ["shape", f"w{place}"], [f"g{place}"]))
            parts[-1] = f"g{place}"
    nodes += [
        node("Concat", parts, ["target"], axis=0),
        node("Reshape", ["a", "target"], ["y"], **attrs),
    ]
    return model(nodes, {"x": shape}, {"y": None}, weights)


@pytest.mark.parametrize(
    ("target", "shape", "expected"),
    [
        (["N", 12], ("N", 3, 4), [-1, 12]),
        (["N", 2, 2, "H", "W"], ("N", 4, "H", "W"), None),
        (["N", 4, "H", "W"], ("N", 4, "H", "W"), "no-op"),
        (["N", 4, "W", 2], ("N", 4, "W", 2), "no-op"),
        (["N", -1, "W"], ("N", 4, "W"), "no-op"),
        (["N", "H", 2, "W"], ("N", 2, "H", "W"), [0, -1, 2, 0]),
        (["N", 2, "C", "W"], ("N", "C", 2, "W"), [0, 2, -1, 0]),
        ([0, "H"], ("N", 2, "H"), None),
        ([0, 2, "H"], (3, "H", 2), [0, 2, -1]),
        ([12, "N"], ("N", 3, 4), [12, -1]),
        (["N", "N"], ("N", "N"), None),
    ],
    ids=str,
)
def test_targets_with_dynamic_dimensions(
    target: list[int | str], shape: tuple[int | str, ...], expected: list[int] | str | None
) -> None:
    proto = _reshaping(target, shape)
    outcome = run_pass(PASS, proto)
    if expected is None:
        assert "Concat" in outcome.ops
        return
    if expected == "no-op":
        assert outcome.ops == ["Relu"]
    else:
        assert _target(outcome) == expected
    assert_same_outputs(proto, outcome.model, RNG, factor=0, N=4, C=3, H=5, W=6)


def test_zero_is_not_copied_where_it_is_allowed() -> None:
    outcome = run_pass(PASS, _reshaping(["N", "M", 2], ("N", "M", 2), allowzero=1))
    assert "Concat" in outcome.ops
    single = run_pass(PASS, _reshaping(["N", 8], ("N", 4, 2), allowzero=1))
    assert _target(single) == [-1, 8]


def test_known_dimensions_are_folded_beside_dynamic_ones() -> None:
    """Spatial sizes of a Resize, halved, under a dynamic batch."""
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Slice", ["s", "two", "four"], ["hw"]),
        node("Div", ["hw", "two"], ["half"]),
        node("Slice", ["s", "zero", "two"], ["nc"]),
        node("Concat", ["nc", "half"], ["sizes"], axis=0),
        node("Resize", ["a", "", "", "sizes"], ["y"], mode="nearest"),
    ]
    weights = {"zero": _i64(0), "two": _i64(2), "four": _i64(4)}
    proto = model(nodes, {"x": ("N", 3, 8, 6)}, {"y": None}, weights)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Relu", "Shape", "Slice", "Concat", "Resize"]
    constants = {t.name: numpy_helper.to_array(t) for t in outcome.model.graph.initializer}
    np.testing.assert_array_equal(constants["half"], [4, 3])
    assert_same_outputs(proto, outcome.model, RNG, factor=0, N=2)


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        ({}, [3, 4, 5]),
        ({"start": 1}, [4, 5]),
        ({"start": -2, "end": -1}, [4]),
        ({"end": 9}, [3, 4, 5]),
        ({"start": -9, "end": 1}, [3]),
        ({"start": 2, "end": 1}, []),
    ],
    ids=str,
)
def test_parts_of_a_shape(attrs: dict[str, int], expected: list[int]) -> None:
    nodes = [node("Shape", ["x"], ["s"], **attrs), node("Add", ["s", "z"], ["y"])]
    inputs = [_value("x", (3, 4, 5)), _value("z", (len(expected),), TensorProto.INT64)]
    outputs = [_value("y", (len(expected),), TensorProto.INT64)]
    outcome = run_pass(PASS, _graph(nodes, inputs, outputs, opset=15))
    (written,) = outcome.model.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(written), np.array(expected, np.int64))


def test_the_number_of_elements_is_folded() -> None:
    nodes = [node("Size", ["x"], ["s"]), node("Add", ["z", "s"], ["y"])]
    scalar = (_value("z", (), TensorProto.INT64), _value("y", (), TensorProto.INT64))
    outcome = run_pass(PASS, _graph(nodes, [_value("x", (3, 4)), scalar[0]], [scalar[1]]))
    assert numpy_helper.to_array(outcome.model.graph.initializer[0]) == 12


def test_sizes_that_overflow_their_type_are_left_alone() -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["i"], to=TensorProto.INT32),
        node("Mul", ["i", "c"], ["m"]),
        node("Add", ["m", "z"], ["y"]),
    ]
    inputs = [_value("x", (3,)), _value("z", (1,), TensorProto.INT32)]
    weights = {"c": np.array([2**30], np.int32)}
    outcome = run_pass(PASS, _graph(nodes, inputs, [_value("y", (1,), TensorProto.INT32)], weights))
    assert _reason_at(outcome, "n_m") != Why.CANONICAL
    assert "Mul" in outcome.ops or numpy_helper.to_array(outcome.model.graph.initializer[0]) < 0


_ENTRIES = st.lists(st.integers(-4, 12), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), opset=st.sampled_from([7, 11, 13, 17, 21]))
def test_random_shape_arithmetic_is_the_runtimes(data: st.DataObject, opset: int) -> None:
    """Chains on the shape of ``[N, 3, 8, 6]``: what is folded must be what is computed."""
    nodes = [node("Shape", ["x"], ["t0"])]
    weights: dict[str, Array] = {}
    values: Any = [("t0", 4)]
    for step in range(1, data.draw(st.integers(2, 6))):
        source, length = data.draw(st.sampled_from(values))
        target = f"t{step}"
        kind = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Gather", "Slice", "Concat"]))
        if kind in ("Add", "Sub", "Mul", "Div"):
            low = 1 if kind == "Div" else 0
            weights[f"w{step}"] = _i64(data.draw(st.integers(low, 3)))
            nodes.append(node(kind, [source, f"w{step}"], [target]))
        elif kind == "Gather":
            index = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
            weights[f"w{step}"] = _i64(*index)
            nodes.append(node("Gather", [source, f"w{step}"], [target]))
            length = len(index)
        elif kind == "Slice":
            start = data.draw(st.integers(0, length - 1))
            if opset < 10:
                nodes.append(node("Slice", [source], [target], starts=[start], ends=[99]))
            else:
                weights[f"w{step}"], weights[f"v{step}"] = _i64(start), _i64(99)
                nodes.append(node("Slice", [source, f"w{step}", f"v{step}"], [target]))
            length -= start
        else:
            other, more = data.draw(st.sampled_from(values))
            nodes.append(node("Concat", [source, other], [target], axis=0))
            length += more
        values.append((target, length))
    last, length = values[-1]
    nodes += [node("Cast", [last], ["c"], to=1), node("Mul", ["c", "k"], ["y"])]
    inputs = [_value("x", ("N", 3, 8, 6)), _value("k", (1,))]
    proto = _graph(nodes, inputs, [_value("y", (length,))], weights, opset)
    outcome = run_pass(PASS, proto)
    assert_same_outputs(proto, outcome.model, RNG, factor=0, N=5)


# -- contract --------------------------------------------------------------------------------------


def test_every_reason_is_reached() -> None:
    """Each member of ``Why`` by one small graph."""
    reached = {
        Why.CANONICAL: _around("Tanh"),
        Why.CONTROL_FLOW: _conditional(),
        Why.KEEPS_NAME: model([node("Identity", ["x"], ["y"])], {"x": (2,)}, {"y": (2,)}),
        Why.TRAINING_MODE: OPS["dropout in training"],
        Why.MASK_READ: _dropout(13, mask="m", mask_read=True),
        Why.SIGN_OF_ZERO: OPS["plus zero"],
        Why.SHAPE_UNKNOWN: _flattening((2, "H", 4), axis=1),
        Why.PADS_AMBIGUOUS: _around(
            "MaxPool", auto_pad="SAME_UPPER", kernel_shape=[2], ceil_mode=1
        ),
        Why.TOO_LARGE: _around(
            "Add", shape=(5000,), weights={"w": _f32(*range(50)), "r": _i64(100)}, inputs=["a", "a"]
        ),
    }
    large = [node("Tile", ["w", "r"], ["t"]), node("Add", ["x", "t"], ["y"])]
    division = [node("Div", ["i", "z"], ["d"]), node("Add", ["x", "d"], ["y"])]
    lookup = [node("Softmax", ["w"], ["s"]), node("Add", ["x", "s"], ["y"])]
    foreign = [helper.make_node("Any", ["x"], ["y"], domain="org.example")]
    values = numpy_helper.from_array(_f32(5), "v")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(_i64(1), "i"), [3])
    spread = [node("Constant", [], ["c"], sparse_value=sparse), node("Add", ["x", "c"], ["y"])]
    many = {"w": _f32(*range(50)), "r": _i64(100)}
    reached |= {
        Why.TOO_LARGE: model(large, {"x": (5000,)}, {"y": (5000,)}, many),
        Why.NOT_DEFINED: model(
            division, {"x": (1,)}, {"y": (1,)}, {"i": _i64(1), "z": _i64(0)}, dtype=np.int64
        ),
        Why.NOT_EVALUATED: model(lookup, {"x": (2,)}, {"y": (2,)}, {"w": _f32(1, 2)}),
        Why.UNKNOWN_OPERATOR: model(foreign, {"x": (2,)}, {"y": (2,)}, domains={"org.example": 1}),
        Why.SPARSE: model(spread, {"x": (3,)}, {"y": (3,)}),
    }
    assert set(reached) == set(Why)
    for why, proto in reached.items():
        assert why in run_pass(PASS, proto).reasons, why


def test_every_site_ends_in_one_remark() -> None:
    proto = _flattening(("N", 3, 4))
    wrapped = parse(proto)
    wrapped.infer_shapes()
    driver = Driver(wrapped)
    applied, _ = driver.run(PASS)
    remarks = driver.ledger.remarks()
    assert applied == sum(r.kind is Kind.APPLIED for r in remarks)
    assert {r.kind for r in remarks} <= {Kind.APPLIED, Kind.DECLINED}
    assert {n.name for n in proto.graph.node} == {r.site for r in remarks}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_element_types_and_opsets(opset: int, dtype: type) -> None:
    """One graph with most of what the pass looks for."""
    nodes = [
        node("Identity", ["x"], ["a"]),
        node("Add", ["c", "a"], ["b"]),
        node("Mul", ["one", "b"], ["d"]),
        node("Transpose", ["d"], ["e"], perm=[0, 1, 2]),
        node("Relu", ["e"], ["f"]),
        node("Relu", ["e"], ["g"]),
        node("Add", ["f", "g"], ["h"]),
        node("Neg", ["c"], ["dead"]),
        node("Reshape", ["h", "s"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "c": np.array([1.5], dtype),
        "one": np.array([1], dtype),
        "s": _i64(0, -1),
    }
    shape = ("N", 3, 2)
    proto = model(nodes, {"x": shape}, {"y": ("N", 6)}, weights, opset=opset, dtype=dtype)
    outcome = run_pass(PASS, proto)
    assert outcome.ops == ["Add", "Relu", "Add", "Reshape"]
    feeds = random_feeds(proto, RNG, N=3)
    if dtype is not np.float16 or opset >= 13:
        expected, actual = run_unoptimized(proto, feeds), run_unoptimized(outcome.model, feeds)
        np.testing.assert_array_equal(actual["y"], expected["y"])


def test_a_match_can_be_taken_back() -> None:
    """Every rewrite undone at once gives every byte back."""
    wrapped = parse(_flattening(("N", 3, 4)))
    wrapped.infer_shapes()
    facts, rewriter = Facts(wrapped), Rewriter(wrapped)
    for site in list(wrapped.nodes.values()):
        answer = PASS.match(site, facts)
        if not isinstance(answer, Match):
            continue
        before = wrapped.to_proto().SerializeToString(deterministic=True)
        mark = rewriter.mark()
        PASS.rewrite(answer, PASS.variants(answer)[0], rewriter)
        assert wrapped.to_proto().SerializeToString(deterministic=True) != before
        rewriter.rollback(mark)
        assert wrapped.to_proto().SerializeToString(deterministic=True) == before
