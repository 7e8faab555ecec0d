"""What may be asked about a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, parse
from tests.graph import samples

Array = np.ndarray[Any, Any]


def _window(
    op: str,
    weight: Array | None,
    size: tuple[int | str, ...],
    opset: int = 17,
    **attrs: Any,
) -> onnx.ModelProto:
    inputs = ["x"] if weight is None else ["x", "w"]
    weights = [] if weight is None else [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], name="n", **attrs)],
        "window",
        [samples.value("x", (1, 2, *size))],
        [samples.value("y", None)],
        weights,
    )
    return samples.model(graph, opset=opset)


def _facts(proto: onnx.ModelProto) -> tuple[Facts, Node]:
    model = parse(proto)
    model.infer_shapes()
    return Facts(model), next(iter(model.nodes.values()))


def _conv(proto: onnx.ModelProto) -> ConvFacts:
    facts, node = _facts(proto)
    conv = facts.conv(node)
    assert conv is not None
    return conv


def _weight(*shape: int) -> Array:
    return np.ones(shape, np.float32)


# -- convolutions ----------------------------------------------------------------------------------


def test_defaults_are_filled_in() -> None:
    conv = _conv(_window("Conv", _weight(6, 2, 3, 5), (9, 9)))
    assert (conv.cin, conv.cout, conv.group) == (2, 6, 1)
    assert (conv.kernel, conv.strides, conv.dilations) == ((3, 5), (1, 1), (1, 1))
    assert conv.pads == (0, 0, 0, 0)
    assert conv.bias is None
    assert conv.spatial_rank == 2
    assert (conv.is_pointwise, conv.is_unit_stride, conv.is_unpadded) == (False, True, True)
    assert not conv.is_depthwise


def test_attributes_are_read() -> None:
    conv = _conv(
        _window(
            "Conv",
            _weight(4, 1, 1, 1),
            (9, 9),
            group=2,
            strides=[2, 1],
            dilations=[3, 1],
            pads=[0, 1, 0, 0],
        )
    )
    assert (conv.group, conv.strides, conv.dilations) == (2, (2, 1), (3, 1))
    assert conv.pads == (0, 1, 0, 0)
    assert (conv.is_pointwise, conv.is_unit_stride, conv.is_unpadded) == (True, False, False)
    assert conv.is_depthwise


def test_a_transposed_convolution_has_its_channels_the_other_way() -> None:
    conv = _conv(_window("ConvTranspose", _weight(2, 3, 4), (9,), group=2))
    assert (conv.cin, conv.cout, conv.kernel) == (2, 6, (4,))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_any_number_of_spatial_axes(rank: int) -> None:
    conv = _conv(_window("Conv", _weight(3, 2, *[1] * rank), (5,) * rank))
    assert conv.spatial_rank == rank
    assert conv.is_pointwise


def test_what_is_no_convolution_has_no_facts() -> None:
    facts, node = _facts(_window("MaxPool", None, (4,), kernel_shape=[2]))
    assert facts.conv(node) is None
    assert facts.conv(None) is None


def test_a_convolution_of_another_domain_is_another_operator() -> None:
    proto = _window("Conv", _weight(2, 2, 1), (4,))
    proto.graph.node[0].domain = "org.example"
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    facts, node = _facts(proto)
    assert facts.conv(node) is None
    assert facts.op(node) == "org.example.Conv"
    assert not facts.is_op(node, "Conv")


@pytest.mark.parametrize(
    ("auto_pad", "size", "kernel", "stride", "dilation", "pads"),
    [
        ("VALID", 9, 3, 2, 1, (0, 0)),
        ("SAME_UPPER", 9, 3, 1, 1, (1, 1)),
        ("SAME_UPPER", 9, 4, 1, 1, (1, 2)),
        ("SAME_LOWER", 9, 4, 1, 1, (2, 1)),
        ("SAME_UPPER", 10, 3, 2, 1, (0, 1)),
        ("SAME_LOWER", 10, 3, 2, 1, (1, 0)),
        ("SAME_UPPER", 9, 3, 2, 1, (1, 1)),
        ("SAME_UPPER", 9, 3, 1, 2, (2, 2)),
        ("SAME_UPPER", 10, 1, 3, 1, (0, 0)),
        ("SAME_UPPER", 9, 1, 3, 1, None),
        ("SAME_UPPER", 9, 2, 3, 1, (0, 0)),
        ("SAME_UPPER", "W", 3, 1, 1, (1, 1)),
        ("SAME_UPPER", "W", 1, 2, 1, (0, 0)),
        ("SAME_UPPER", "W", 1, 3, 1, None),
        ("SAME_UPPER", "W", 3, 2, 1, None),
        ("VALID", "W", 3, 2, 1, (0, 0)),
        ("NOTSET", "W", 3, 2, 1, (0, 0)),
    ],
)
def test_auto_pad(
    auto_pad: str,
    size: int | str,
    kernel: int,
    stride: int,
    dilation: int,
    pads: tuple[int, ...] | None,
) -> None:
    proto = _window(
        "Conv",
        _weight(2, 2, kernel),
        (size,),
        auto_pad=auto_pad,
        strides=[stride],
        dilations=[dilation],
    )
    assert _conv(proto).pads == pads


@pytest.mark.parametrize(
    ("attrs", "pads"),
    [
        ({}, (0, 0)),
        ({"pads": [1, 2]}, (1, 2)),
        ({"auto_pad": "VALID"}, (0, 0)),
        ({"auto_pad": "SAME_UPPER"}, None),
        ({"output_shape": [20]}, None),
        ({"auto_pad": "VALID", "output_shape": [20]}, None),
    ],
)
def test_transposed_pads(attrs: dict[str, Any], pads: tuple[int, ...] | None) -> None:
    assert _conv(_window("ConvTranspose", _weight(2, 2, 3), (9,), **attrs)).pads == pads


def _run(proto: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


@settings(max_examples=60, deadline=None)
@given(
    auto_pad=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
    size=st.integers(3, 11),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    opset=st.sampled_from([7, 11, 17, 22]),
)
def test_resolved_pads_are_the_runtimes(
    auto_pad: str, size: int, kernel: int, stride: int, dilation: int, opset: int
) -> None:
    assume((kernel - 1) * dilation < size)
    # ONNX Runtime runs no dilated convolution whose pads it must resolve.
    assume(auto_pad == "VALID" or dilation == 1)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 2, kernel)).astype(np.float32)
    x = rng.standard_normal((1, 2, size)).astype(np.float32)
    attrs = {"strides": [stride], "dilations": [dilation]}
    implicit = _window("Conv", weight, (size,), opset, auto_pad=auto_pad, **attrs)
    pads = _conv(implicit).pads
    assume(stride <= kernel + 1 or pads is not None)
    assert pads is not None
    explicit = _window("Conv", weight, (size,), opset, pads=list(pads), **attrs)
    np.testing.assert_array_equal(_run(implicit, x), _run(explicit, x))


# -- tensors ---------------------------------------------------------------------------------------


def _typed(elem_type: int) -> tuple[Facts, Node]:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "typed",
        [samples.value("x", ("N", None, 3), elem_type)],
        [samples.value("y", ("N", None, 3), elem_type)],
    )
    return _facts(samples.model(graph, opset=21))


def test_shapes_tell_known_symbolic_and_unknown_apart() -> None:
    facts, node = _typed(TensorProto.FLOAT)
    assert facts.shape(node.inputs[0]) == ("N", None, 3)
    assert facts.static_shape(node.inputs[0]) is None
    assert facts.rank(node.inputs[0]) == 3
    assert facts.channels(node.inputs[0]) is None
    assert facts.shape(None) is None


@pytest.mark.parametrize(
    "elem_type",
    [
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT64,
        TensorProto.INT4,
        TensorProto.STRING,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.BOOL,
    ],
)
def test_element_types_are_known_where_numpy_has_none(elem_type: int) -> None:
    facts, node = _typed(elem_type)
    assert facts.elem_type(node.inputs[0]) == elem_type
    assert facts.elem_type(node.outputs[0]) == elem_type


def test_scalars() -> None:
    weights: dict[str, Array] = {
        "one": np.array([[2.5]], np.float32),
        "count": np.array(3, np.int64),
        "two": np.array([1, 2], np.float32),
        "flag": np.array(True),
    }
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_y"]) for name in weights],
        "scalars",
        [],
        [onnx.ValueInfoProto(name=f"{name}_y") for name in weights],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = parse(samples.model(graph))
    facts = Facts(model)
    values = {n.inputs[0].name: facts.scalar(n.inputs[0]) for n in model.nodes.values()}
    assert values == {"one": 2.5, "count": 3.0, "two": None, "flag": None}


def test_readers_of_a_tensor() -> None:
    model = parse(samples.branches())
    facts = Facts(model)
    relu, branch = model.sorted_nodes()
    captured = relu.outputs[0]
    assert facts.is_read(captured)
    assert facts.is_seen_outside(captured)
    assert not facts.is_private(captured)
    assert facts.sole_consumer(captured) is None
    assert facts.producer(captured) is relu
    assert facts.consumers(relu.inputs[0]) == [relu]
    assert facts.is_seen_outside(branch.outputs[0])
    assert not facts.is_seen_outside(relu.inputs[0])
    assert facts.inputs == model.inputs


def test_a_private_tensor_has_one_reader_that_reads_it_once() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Mul", ["a", "a"], ["b"], name="square"),
        helper.make_node("Neg", ["b"], ["y"], name="neg"),
    ]
    graph = helper.make_graph(nodes, "private", [samples.value("x")], [samples.value("y")])
    model = parse(samples.model(graph))
    facts = Facts(model)
    relu, square, neg = model.sorted_nodes()
    assert not facts.is_private(relu.outputs[0])
    assert facts.sole_consumer(square.outputs[0]) is neg
    assert not facts.is_private(neg.outputs[0])


def test_operators_of_the_opset() -> None:
    facts, _ = _facts(_window("Relu", None, (4,), opset=13))
    assert facts.opset == 13
    assert facts.has_op("HardSigmoid")
    assert facts.has_op("Clip", since=11)
    assert not facts.has_op("Gelu")
    assert not facts.has_op("Upsample")
    assert not facts.has_op("Relu", since=14)
    assert not facts.has_op("NoSuchOperator")


def test_sites_are_named() -> None:
    facts, node = _facts(_window("Relu", None, (4,)))
    assert facts.site(node) == "n"
    node.name = ""
    assert facts.site(node) == "Relu(y)"


def test_a_tensor_that_a_subgraph_reads_too_is_not_private() -> None:
    model = parse(samples.branches())
    facts = Facts(model)
    relu = model.sorted_nodes()[0]
    captured = relu.outputs[0]
    rewriter = Rewriter(model)
    node = rewriter.add("Abs", [captured], [rewriter.variable("abs")], near=relu)
    assert facts.consumers(captured) == [node]
    assert not facts.is_private(captured)
    assert facts.sole_consumer(captured) is None
