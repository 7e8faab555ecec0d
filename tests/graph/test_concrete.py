"""Shapes under concrete inputs: what is fixed, inferred, computed, and left unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pwopt.errors import UsageError
from pwopt.graph import parse
from pwopt.graph.concrete import (
    concrete_dims,
    concrete_shapes,
    concrete_types,
    element_bits,
)

Shape = Sequence[int | str | None]


def make(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape | None],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    *,
    opset: int = 17,
    notes: Mapping[str, Shape] | None = None,
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    def info(name: str, shape: Shape | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, None if shape is None else list(shape)
        )

    graph = helper.make_graph(
        list(nodes),
        "test",
        [info(k, v) for k, v in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()],
        value_info=[info(k, v) for k, v in (notes or {}).items()],
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(d, v) for d, v in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def op(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [output], **attributes)


def conv_model(
    *shape: int | str | None, notes: Mapping[str, Shape] | None = None
) -> onnx.ModelProto:
    return make(
        [op("Conv", ["x", "w"], "a"), op("Relu", ["a"], "y")],
        {"x": shape},
        ["y"],
        {"w": np.ones((5, 3, 3, 3), np.float32)},
        notes=notes,
    )


def test_a_dynamic_batch_is_one() -> None:
    shapes = concrete_shapes(parse(conv_model("N", 3, 8, 8)))
    assert shapes["x"] == (1, 3, 8, 8)
    assert shapes["a"] == shapes["y"] == (1, 5, 6, 6)
    assert shapes["w"] == (5, 3, 3, 3)


def test_given_shapes_are_taken() -> None:
    shapes = concrete_shapes(parse(conv_model("N", 3, "H", "W")), {"x": (4, 3, 10, 12)})
    assert shapes["y"] == (4, 5, 8, 10)


def test_other_dynamic_dimensions_stay_unknown() -> None:
    shapes = concrete_shapes(parse(conv_model("N", 3, "H", 8)))
    assert "x" not in shapes
    assert "y" not in shapes
    assert shapes["w"] == (5, 3, 3, 3)


@pytest.mark.parametrize("batch", ["", None, "N"])
def test_unnamed_batches_count_as_batches(batch: str | None) -> None:
    assert concrete_shapes(parse(conv_model(batch, 3, 8, 8)))["y"] == (1, 5, 6, 6)


def test_the_model_stays_dynamic() -> None:
    model = parse(conv_model("N", 3, "H", "W"))
    before = model.to_proto().SerializeToString(deterministic=True)
    concrete_types(model, {"x": (4, 3, 10, 12)})
    concrete_dims(model, {"x": (4, 3, 10, 12)})
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_annotations_of_another_batch_do_not_count() -> None:
    outdated = conv_model("N", 3, 8, 8, notes={"a": (1, 5, 6, 6)})
    assert concrete_shapes(parse(outdated), {"x": (4, 3, 8, 8)})["y"] == (4, 5, 6, 6)


def test_annotations_help_where_inference_cannot() -> None:
    nodes = [
        helper.make_node("Bend", ["x"], ["a"], domain="example"),
        op("Relu", ["a"], "y"),
    ]
    proto = make(nodes, {"x": ("N", 3)}, ["y"], notes={"a": ("N", 7)}, domains={"example": 1})
    assert concrete_shapes(parse(proto), {"x": (4, 3)})["y"] == (4, 7)


def test_a_symbol_has_one_value() -> None:
    proto = make([op("Add", ["x", "z"], "y")], {"x": ("N", 3), "z": ("N", 3)}, ["y"])
    assert concrete_shapes(parse(proto), {"z": (6, 3)})["x"] == (6, 3)
    assert concrete_shapes(parse(proto))["y"] == (1, 3)


def test_a_default_batch_holds_wherever_its_symbol_stands() -> None:
    proto = make([op("MatMul", ["x", "z"], "y")], {"x": (2, "N"), "z": ("N", 3)}, ["y"])
    assert concrete_shapes(parse(proto))["x"] == (2, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": (1, 3, 8, 8)}, "has no input 'z' \\(its inputs: x\\)"),
        ({"x": (1, 3, 8)}, "has 4 dimensions, but 1x3x8 has 3"),
        ({"x": (1, 4, 8, 8)}, "cannot be 1x4x8x8: its dimension '3' is 3"),
        ({"x": (1, 3, -1, 8)}, "has a negative dimension"),
        ({"x": (2, 3, 7, 8)}, "cannot be 2x3x7x8: its dimension 'S' is 7"),
    ],
)
def test_contradictions_are_refused(given: Mapping[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        concrete_shapes(parse(conv_model("N", 3, "S", "S")), given)


def test_a_given_shape_helps_an_input_without_rank() -> None:
    proto = make([op("Relu", ["x"], "y")], {"x": None}, ["y"])
    assert concrete_shapes(parse(proto), {"x": (2, 3)})["y"] == (2, 3)
    assert "y" not in concrete_shapes(parse(proto))


def view_by_size(opset: int) -> onnx.ModelProto:
    """``x.view(x.size(0), -1)`` as exporters write it, then a MatMul."""
    unsqueeze: dict[str, Any] = {"axes": [0]} if opset < 13 else {}
    axes = ["zero1"] if opset >= 13 else []
    return make(
        [
            op("Shape", ["x"], "s"),
            op("Gather", ["s", "zero"], "n", axis=0),
            op("Unsqueeze", ["n", *axes], "n1", **unsqueeze),
            op("Unsqueeze", ["minus", *axes], "m1", **unsqueeze),
            op("Concat", ["n1", "m1"], "target", axis=0),
            op("Reshape", ["x", "target"], "flat"),
            op("MatMul", ["flat", "w"], "y"),
        ],
        {"x": ("N", 3, 2, 2)},
        ["y"],
        {
            "zero": np.array(0, np.int64),
            "zero1": np.array([0], np.int64),
            "minus": np.array(-1, np.int64),
            "w": np.ones((12, 5), np.float32),
        },
        opset=opset,
    )


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21])
def test_shape_arithmetic_is_computed(opset: int) -> None:
    shapes = concrete_shapes(parse(view_by_size(opset)), {"x": (4, 3, 2, 2)})
    assert shapes["flat"] == (4, 12)
    assert shapes["y"] == (4, 5)


def test_repeated_shape_arithmetic_is_computed_in_one_go() -> None:
    nodes = []
    weights = {"half": np.array([2], np.int64)}
    last = "x"
    for step in range(20):
        names = {key: f"{key}{step}" for key in ("s", "a", "b", "c", "t", "r", "o")}
        nodes += [
            op("Shape", [last], names["s"]),
            op("Slice", [names["s"]], names["a"], starts=[0], ends=[1]),
            op("Slice", [names["s"]], names["b"], starts=[1], ends=[2]),
            op("Slice", [names["s"]], names["c"], starts=[-1], ends=[9]),
            op("Mul", [names["b"], "half"], names["t"]),
            op("Div", [names["t"], "half"], names["r"]),
            op("Concat", [names["a"], names["r"], names["c"]], f"target{step}", axis=0),
            op("Reshape", [last, f"target{step}"], names["o"]),
        ]
        last = names["o"]
    proto = make(nodes, {"x": ("N", 6, 5)}, [last], weights, opset=9)
    assert concrete_shapes(parse(proto), {"x": (3, 6, 5)})[last] == (3, 6, 5)


def test_results_that_depend_on_data_stay_unknown() -> None:
    proto = make(
        [op("NonZero", ["x"], "i"), op("Shape", ["i"], "s"), op("Reshape", ["x", "s"], "y")],
        {"x": (2, 3)},
        ["y"],
    )
    shapes = concrete_shapes(parse(proto))
    assert "i" not in shapes
    assert "y" not in shapes


def test_impossible_arithmetic_leaves_its_result_unknown() -> None:
    proto = make(
        [
            op("Shape", ["x"], "s"),
            op("Gather", ["s", "far"], "n"),
            op("ConstantOfShape", ["n"], "y"),
        ],
        {"x": (2, 3)},
        ["y"],
        {"far": np.array([7], np.int64)},
    )
    shapes = concrete_shapes(parse(proto))
    assert shapes["n"] == (1,)
    assert "y" not in shapes


def test_symbols_get_the_values_they_stand_for() -> None:
    model = parse(conv_model("N", 3, "H", "W"))
    dims = concrete_dims(model, {"x": (4, 3, 10, 12)})
    assert dims == {"N": 4, "H": 10, "W": 12}


def test_symbols_that_inference_made_up_get_values_too() -> None:
    proto = conv_model("N", 3, "H", 8, notes={"a": ("N", 5, "H_out", 6)})
    dims = concrete_dims(parse(proto), {"x": (4, 3, 10, 8)})
    assert dims == {"N": 4, "H": 10, "H_out": 8}


def test_a_symbol_with_two_values_is_dropped() -> None:
    proto = conv_model("N", 3, 8, 8, notes={"a": ("N", "N", 6, 6)})
    assert concrete_dims(parse(proto)) == {}


def test_element_sizes() -> None:
    proto = make(
        [
            op("Cast", ["x"], "h", to=TensorProto.FLOAT16),
            op("Cast", ["x"], "b", to=TensorProto.BFLOAT16),
            op("Cast", ["x"], "q", to=TensorProto.INT4),
            op("Cast", ["x"], "t", to=TensorProto.STRING),
        ],
        {"x": (2, 3)},
        ["h", "b", "q", "t"],
        opset=21,
    )
    model = parse(proto)
    types = concrete_types(model)
    assert {n: types[n].bits for n in "xhbqt"} == {"x": 32, "h": 16, "b": 16, "q": 4, "t": None}
    assert types["q"].shape == (2, 3)
    model.infer_shapes()
    outputs = {n.outputs[0].name: element_bits(n.outputs[0]) for n in model.nodes.values()}
    assert outputs == {"h": 16, "b": 16, "q": 4, "t": None}


# -- operators without inference -------------------------------------------------------------------


def test_shapes_pass_through_fused_kernels() -> None:
    nodes = [
        helper.make_node(
            "FusedConv", ["x", "w", "b", "z"], ["a"], domain="com.microsoft", activation="Relu"
        ),
        helper.make_node("QuickGelu", ["a"], ["g"], domain="com.microsoft", alpha=1.7),
        op("Flatten", ["g"], "f"),
        helper.make_node(
            "FusedGemm",
            ["f", "m", "c"],
            ["y"],
            domain="com.microsoft",
            activation="LeakyRelu",
            activation_alpha=0.1,
            transB=1,
        ),
    ]
    proto = make(
        nodes,
        {"x": ("N", 3, 4, 4), "z": ("N", 5, 2, 2)},
        ["y"],
        {
            "w": np.ones((5, 3, 3, 3), np.float32),
            "b": np.ones(5, np.float32),
            "m": np.ones((7, 20), np.float32),
            "c": np.ones(7, np.float32),
        },
        domains={"com.microsoft": 1},
    )
    model = parse(proto)
    shapes = concrete_shapes(model, {"x": (2, 3, 4, 4)})
    assert (shapes["a"], shapes["g"], shapes["y"]) == ((2, 5, 2, 2), (2, 5, 2, 2), (2, 7))
    model.infer_shapes()
    inferred = {t.name: t.shape for n in model.nodes.values() for t in n.outputs}
    assert list(inferred["a"])[1:] == [5, 2, 2]
    assert list(inferred["y"])[1:] == [7]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"border": [1, 2, 3, 4]}, (1, 3, 4, 6)),
        ({"border": [1, 2, 0, 0]}, (1, 3, 8, 9)),
        ({"border": [0, 0, 0, 0]}, (1, 3, 10, 10)),
        ({"border": [1, 2, 0, 0], "scale": [5, 6]}, (1, 3, 5, 6)),
    ],
)
def test_shapes_pass_through_removed_operators(
    attributes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    nodes = [
        op("ImageScaler", ["x"], "a", bias=[0.1, 0.2, 0.3], scale=1.0),
        op("Crop", ["a"], "y", **attributes),
    ]
    model = parse(make(nodes, {"x": (1, 3, 10, 10)}, ["y"], opset=7))
    assert concrete_shapes(model)["y"] == expected
    model.infer_shapes()
    assert tuple(model.outputs[0].shape) == expected
    assert [n.op for n in model.sorted_nodes()] == ["ImageScaler", "Crop"]


@pytest.mark.parametrize(("opset", "size"), [(18, 2), (21, 6)])
def test_shapes_pass_through_group_normalization(opset: int, size: int) -> None:
    scale = np.ones(size, np.float32)
    proto = make(
        [op("GroupNormalization", ["x", "s", "s"], "y", num_groups=2)],
        {"x": (2, 6, 4)},
        ["y"],
        {"s": scale},
        opset=opset,
    )
    assert concrete_shapes(parse(proto))["y"] == (2, 6, 4)
