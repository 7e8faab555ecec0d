"""Models that hold what is easily lost on the way through a graph library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


def value(
    name: str, shape: Sequence[int | str | None] | None = (2, 3), elem_type: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, shape)


def weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    return numpy_helper.from_array(values, name)


def model(graph: onnx.GraphProto, *, opset: int = 17, ir: int = 10) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def plain() -> onnx.ModelProto:
    """``y = Relu(x + w)`` with everything described that ONNX can describe."""
    add = helper.make_node("Add", ["x", "w"], ["t"], name="add", doc_string="adds")
    add.metadata_props.add(key="source", value="line 3")
    relu = helper.make_node("Relu", ["t"], ["y"], name="relu")
    graph = helper.make_graph(
        [add, relu],
        "plain",
        [value("x", ("N", 3))],
        [value("y", ("N", 3))],
        [weight("w", 3)],
        doc_string="a graph",
        value_info=[value("t", ("N", 3))],
    )
    graph.metadata_props.add(key="graph", value="kept")
    graph.quantization_annotation.add(tensor_name="t").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="w"
    )
    proto = model(graph)
    proto.producer_name, proto.producer_version = "someone", "1.2"
    proto.domain, proto.model_version, proto.doc_string = "org.example", 7, "a model"
    proto.metadata_props.add(key="author", value="somebody")
    return proto


def branches(*, inner_initializer: bool = False, direct: bool = False) -> onnx.ModelProto:
    """An If whose branches read ``t``, ``w`` and ``spare`` of the outer graph.

    ``spare`` is read by the innermost branch alone. With *direct*, ``t`` is handed straight to an
    output of a branch, which the checker accepts but ONNX Runtime does not.
    """
    copied = [] if direct else [helper.make_node("Identity", ["t"], ["same"])]
    deepest = helper.make_graph(copied, "deepest", [], [value("t" if direct else "same")])
    other = helper.make_graph(
        [helper.make_node("Neg", ["spare"], ["negated"])], "other", [], [value("negated")]
    )
    inner = helper.make_node(
        "If", ["flag"], ["nested"], name="inner", then_branch=deepest, else_branch=other
    )
    own = [weight("own", 3)] if inner_initializer else []
    addend = "own" if inner_initializer else "w"
    then = helper.make_graph(
        [inner, helper.make_node("Add", ["nested", addend], ["then_y"])],
        "then",
        [],
        [value("then_y")],
        own,
    )
    otherwise = helper.make_graph(
        [helper.make_node("Mul", ["t", "w"], ["else_y"])], "else", [], [value("else_y")]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["t"], name="relu"),
        helper.make_node(
            "If", ["flag"], ["y"], name="branch", then_branch=then, else_branch=otherwise
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "branches",
        [value("x"), value("flag", (), TensorProto.BOOL)],
        [value("y")],
        [weight("w", 3), weight("spare", 2, 3)],
    )
    return model(graph)


def loop() -> onnx.ModelProto:
    """A Loop that adds the outer ``step`` to its state, three times."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "step"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("state")],
        [value("on", (), TensorProto.BOOL), value("next")],
    )
    nodes = [
        helper.make_node("Abs", ["x"], ["step"]),
        helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body),
    ]
    trips = numpy_helper.from_array(np.array(3, np.int64), "trips")
    graph = helper.make_graph(nodes, "loop", [value("x")], [value("y")], [trips])
    return model(graph)


def functions() -> onnx.ModelProto:
    """A model-local function with an attribute, called twice."""
    body = helper.make_node("LeakyRelu", ["a"], ["b"])
    body.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function(
        "local", "Leaky", ["a"], ["b"], [body], [helper.make_opsetid("", 17)], ["slope"]
    )
    calls = [
        helper.make_node("Leaky", ["x"], ["t"], domain="local", slope=0.5),
        helper.make_node("Leaky", ["t"], ["y"], domain="local", slope=0.25),
    ]
    graph = helper.make_graph(calls, "functions", [value("x")], [value("y")])
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        functions=[function],
        ir_version=10,
    )


def sparse(*, linear: bool = False, read: bool = True) -> onnx.ModelProto:
    """``y = x * s`` with a sparse ``s`` that has 5 at (0, 2) and 7 at (1, 0)."""
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    indices = np.array([2, 3] if linear else [[0, 2], [1, 0]], np.int64)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "s" if read else "x"], ["y"])],
        "sparse",
        [value("x")],
        [value("y")],
        sparse_initializer=[
            helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), [2, 3])
        ],
    )
    return model(graph)


def listed(ir: int = 3) -> onnx.ModelProto:
    """An old model, whose initializers are all listed among the inputs."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "listed",
        [value("x"), value("w", (3,))],
        [value("y")],
        [weight("w", 3)],
    )
    return model(graph, opset=7, ir=ir)


def idle() -> onnx.ModelProto:
    """Two initializers that nothing reads, between one that is read."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "idle",
        [value("x")],
        [value("y")],
        [weight("before", 4), weight("w", 3), weight("after", 2)],
    )
    return model(graph)


def omitted() -> onnx.ModelProto:
    """Optional inputs and outputs that are left out, and attributes of every kind."""
    nodes = [
        helper.make_node("Clip", ["x", "", "high"], ["t"], name="clip"),
        helper.make_node("MaxPool", ["t"], ["p", ""], kernel_shape=[1]),
        helper.make_node(
            "Anything",
            ["p"],
            ["y"],
            domain="org.example",
            number=1.5,
            count=3,
            text="word",
            numbers=[1.0, 2.0],
            counts=[1, 2],
            texts=["a", "b"],
            tensor=weight("inside", 2),
            tensors=[weight("first", 1), weight("second", 2)],
        ),
    ]
    nodes[-1].attribute.append(
        helper.make_attribute("nothing", [], attr_type=onnx.AttributeProto.INTS)
    )
    high = numpy_helper.from_array(np.array(6, np.float32), "high")
    graph = helper.make_graph(
        nodes, "omitted", [value("x", (1, 2, 3))], [value("y", (1, 2, 3))], [high]
    )
    proto = model(graph)
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    return proto


def foreign() -> onnx.ModelProto:
    """No standard operator set at all."""
    graph = helper.make_graph(
        [helper.make_node("Binarizer", ["x"], ["y"], domain="ai.onnx.ml", threshold=0.5)],
        "foreign",
        [value("x")],
        [value("y")],
    )
    imports = [helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


ALL = {
    "plain": plain(),
    "branches": branches(),
    "branches with initializers": branches(inner_initializer=True),
    "branches that hand on": branches(direct=True),
    "loop": loop(),
    "functions": functions(),
    "sparse": sparse(),
    "sparse, linear indices": sparse(linear=True),
    "sparse, not read": sparse(read=False),
    "IR 3": listed(),
    "listed at IR 10": listed(ir=10),
    "idle initializers": idle(),
    "omitted": omitted(),
    "foreign": foreign(),
}


def chain(length: int) -> onnx.ModelProto:
    """*length* Relus one after the other."""
    names = ["x", *(f"t{i}" for i in range(length - 1)), "y"]
    nodes = [
        helper.make_node("Relu", [names[i]], [names[i + 1]], name=f"n{i}") for i in range(length)
    ]
    return model(helper.make_graph(nodes, "chain", [value("x")], [value("y")]))
