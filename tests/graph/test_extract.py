"""Windows of a graph as models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pwopt.errors import InvalidModelError
from pwopt.graph import Model, Node, Rewriter, load, parse
from pwopt.graph.extract import extract
from tests.graph import samples

Array = np.ndarray[Any, Any]


def _net() -> onnx.ModelProto:
    """``a = x + w; b = relu(a); c = b * v; y = c - a`` with a dynamic batch."""
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Mul", ["b", "v"], ["c"], name="mul"),
        helper.make_node("Sub", ["c", "a"], ["y"], name="sub"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [samples.value("x", ("N", 3))],
        [samples.value("y", ("N", 3))],
        [samples.weight("w", 3), samples.weight("v", 3)],
    )
    proto = samples.model(graph)
    proto.opset_import.append(helper.make_opsetid("org.example", 2))
    return proto


def _load(proto: onnx.ModelProto) -> Model:
    model = parse(proto)
    model.infer_shapes()
    return model


def _nodes(model: Model, *names: str) -> list[Node]:
    return [n for n in model.nodes.values() if n.name in names]


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _run(proto: onnx.ModelProto, feeds: dict[str, Array], *outputs: str) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(v) for v in session.run(list(outputs), feeds)]


def test_a_window_reads_and_writes_what_crosses_its_border() -> None:
    model = _load(_net())
    before = model.to_proto()
    window = extract(model, _nodes(model, "mul", "relu"))
    onnx.checker.check_model(window, full_check=True)
    assert [n.name for n in window.graph.node] == ["relu", "mul"]
    assert [(v.name, _shape(v)) for v in window.graph.input] == [("a", ["N", 3])]
    assert [(v.name, _shape(v)) for v in window.graph.output] == [("c", ["N", 3])]
    assert [t.name for t in window.graph.initializer] == ["v"]
    assert window.opset_import == before.opset_import
    assert window.ir_version == before.ir_version
    assert model.to_proto() == before


def test_inner_values_that_are_read_outside_are_outputs() -> None:
    model = _load(_net())
    window = extract(model, _nodes(model, "add", "relu", "mul"))
    assert [v.name for v in window.graph.output] == ["a", "c"]


def test_the_whole_graph_is_a_window() -> None:
    proto = _net()
    model = _load(proto)
    window = extract(model, model.nodes.values())
    assert window.graph.node == proto.graph.node
    assert window.graph.output == proto.graph.output


def test_dynamic_dimensions_can_be_fixed() -> None:
    model = _load(_net())
    window = extract(model, _nodes(model, "relu"), {"N": 5, "unused": 1})
    assert _shape(window.graph.input[0]) == [5, 3]
    assert _shape(window.graph.output[0]) == [5, 3]
    assert model.inputs[0].shape == ["N", 3]


def test_a_window_computes_what_the_model_does() -> None:
    proto = _net()
    model = _load(proto)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    head = extract(model, _nodes(model, "add"))
    tail = extract(model, _nodes(model, "sub", "mul", "relu"))
    (a,) = _run(head, {"x": x}, "a")
    np.testing.assert_array_equal(_run(tail, {"a": a}, "y")[0], _run(proto, {"x": x}, "y")[0])


def test_what_a_subgraph_reads_is_an_input() -> None:
    model = _load(samples.branches())
    window = extract(model, _nodes(model, "branch"))
    onnx.checker.check_model(window)
    assert [v.name for v in window.graph.input] == ["flag", "t"]
    assert [t.name for t in window.graph.initializer] == ["w", "spare"]
    assert [n.op_type for n in window.graph.node] == ["If"]


def test_what_a_subgraph_outside_reads_is_an_output() -> None:
    model = _load(samples.branches(direct=True))
    window = extract(model, _nodes(model, "relu"))
    assert [v.name for v in window.graph.output] == ["t"]


def test_local_functions_are_carried() -> None:
    proto = samples.functions()
    model = _load(proto)
    window = extract(model, list(model.nodes.values())[:1])
    assert window.functions == proto.functions
    x = np.array([[-1, 2, -3], [4, -5, 6]], np.float32)
    np.testing.assert_array_equal(_run(window, {"x": x}, "t")[0], np.where(x < 0, x / 2, x))


def test_sparse_constants_are_carried() -> None:
    proto = samples.sparse()
    model = _load(proto)
    assert extract(model, model.nodes.values()).graph == proto.graph


def test_old_models_need_not_list_initializers() -> None:
    model = _load(samples.listed())
    window = extract(model, model.nodes.values())
    onnx.checker.check_model(window)
    assert window.ir_version == 4
    assert [v.name for v in window.graph.input] == ["x"]


def test_overridable_initializers_are_inputs() -> None:
    model = _load(samples.listed())
    model.overridable = True
    window = extract(model, model.nodes.values())
    assert [(v.name, _shape(v)) for v in window.graph.input] == [("x", [2, 3]), ("w", [3])]
    assert not window.graph.initializer


def test_external_data_is_carried_inline(tmp_path: Path) -> None:
    proto = _net()
    onnx.save_model(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    model = load(tmp_path / "m.onnx")
    model.infer_shapes()
    window = extract(model, _nodes(model, "add"))
    (tmp_path / "w.bin").unlink()
    x = np.zeros((1, 3), np.float32)
    np.testing.assert_array_equal(_run(window, {"x": x}, "a")[0], [[0, 1, 2]])


def test_new_constants_are_carried() -> None:
    model = _load(_net())
    Rewriter(model).set_weight(_nodes(model, "mul")[0], 1, np.full(3, 7, np.float32))
    window = extract(model, _nodes(model, "mul"))
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(_run(window, {"b": x}, "c")[0], np.full((2, 3), 7))


def test_sequences_keep_their_declaration() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"], name="make"),
        helper.make_node("SequenceLength", ["s"], ["y"], name="count"),
    ]
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes,
        "sequence",
        [samples.value("x")],
        [samples.value("y", (), TensorProto.INT64)],
        value_info=[sequence],
    )
    model = _load(samples.model(graph))
    assert extract(model, _nodes(model, "count")).graph.input[0] == sequence
    assert extract(model, _nodes(model, "make")).graph.output[0] == sequence


@pytest.mark.parametrize(
    ("names", "words"),
    [((), "at least one node"), (("stub",), "nothing reads what the nodes stub compute")],
)
def test_windows_without_purpose_are_refused(names: tuple[str, ...], words: str) -> None:
    proto = _net()
    proto.graph.node.append(helper.make_node("Neg", ["x"], ["unread"], name="stub"))
    model = _load(proto)
    with pytest.raises(InvalidModelError, match=words):
        extract(model, _nodes(model, *names))


def test_inputs_of_unknown_type_are_refused() -> None:
    nodes = [
        helper.make_node("Strange", ["x"], ["t"], domain="org.example"),
        helper.make_node("Relu", ["t"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(nodes, "strange", [samples.value("x")], [samples.value("y")])
    proto = samples.model(graph)
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    model = _load(proto)
    with pytest.raises(InvalidModelError, match="the type of tensor 't' is not known"):
        extract(model, _nodes(model, "relu"))
