"""Names of sizes that operators leave as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pwopt.graph import Facts, Shape, parse

Dims = Sequence[int | str | None]


def inferred(
    nodes: Sequence[onnx.NodeProto], *inputs: Dims, values: Sequence[tuple[str, Dims]] = ()
) -> Shape | None:
    """What is known of the last node's output, ``y``, a graph output without a shape."""
    floats = onnx.TensorProto.FLOAT
    weight = numpy_helper.from_array(np.zeros((4, 4, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(f"x{i}", floats, list(d)) for i, d in enumerate(inputs)],
        [helper.make_tensor_value_info("y", floats, None)],
        [weight],
        value_info=[helper.make_tensor_value_info(k, floats, list(d)) for k, d in values],
    )
    model = parse(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    model.infer_shapes()
    return Facts(model).shape(model.outputs[0])


def conv(source: str, target: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, "w"], [target], **attributes)


def is_new(dim: object) -> bool:
    return isinstance(dim, str) and dim.startswith("unk__")


def test_a_chain_of_convolutions_that_keep_the_size() -> None:
    nodes = [
        conv("x0", "a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        conv("b", "c", pads=[2, 2, 2, 2], dilations=[2, 2], kernel_shape=[3, 3]),
        helper.make_node("MaxPool", ["c"], ["d"], kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
        conv("d", "y", pads=[0, 2, 2, 0]),
    ]
    assert inferred(nodes, ["N", 4, "H", "W"]) == ("N", 4, "H", "W")


@pytest.mark.parametrize(
    "attributes",
    [{}, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"auto_pad": "VALID"}, {"pads": [2] * 4}],
)
def test_a_size_that_changes_gets_a_new_name(attributes: dict[str, Any]) -> None:
    shape = inferred([conv("x0", "y", **attributes)], ["N", 4, "H", "W"])
    assert shape is not None
    assert shape[:2] == ("N", 4)
    assert is_new(shape[2])
    assert is_new(shape[3])


def test_axes_are_looked_at_one_by_one() -> None:
    shape = inferred([conv("x0", "y", pads=[1, 0, 1, 0])], ["N", 4, "H", "W"])
    assert shape is not None
    assert shape[2] == "H"
    assert is_new(shape[3])


def test_a_new_name_stays_from_there_on() -> None:
    """Such as half the size, whose further convolutions are equal."""
    nodes = [
        conv("x0", "a", pads=[1, 1, 1, 1], strides=[2, 2]),
        conv("a", "b", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        conv("c", "y", pads=[1, 1, 1, 1]),
    ]
    assert inferred(nodes, [1, 4, "H", "W"]) == (1, 4, "unk__0", "unk__1")


def test_names_that_an_exporter_let_onnx_invent_are_replaced() -> None:
    nodes = [conv("x0", "a", pads=[1, 1, 1, 1]), conv("a", "y", pads=[1, 1, 1, 1])]
    values: list[tuple[str, Dims]] = [("a", [1, 4, "unk__7", "unk__8"])]
    assert inferred(nodes, [1, 4, "H", "W"], values=values) == (1, 4, "H", "W")
    values = [("a", [1, 4, "h", "w"])]
    assert inferred(nodes, [1, 4, "H", "W"], values=values) == (1, 4, "h", "w")


def test_a_name_that_stands_for_several_sizes_is_not_handed_on() -> None:
    shape = inferred([conv("x0", "y", pads=[1, 1, 1, 1])], ["N", 4, "any", "any"])
    assert shape is not None
    assert is_new(shape[2])
    assert is_new(shape[3])
    assert shape[2] != shape[3]


def test_a_sum_of_different_sizes_gets_a_new_name() -> None:
    add = helper.make_node("Add", ["x0", "x1"], ["y"])
    assert inferred([add], [1, 4, "H", "W"], [4, 1, "W"]) == (1, 4, "H", "W")
    shape = inferred([add], [1, 4, "H", "W"], [1, 4, "h", "W"])
    assert shape is not None
    assert is_new(shape[2])
    assert shape[3] == "W"


def test_an_operand_of_unknown_shape_says_nothing() -> None:
    nodes = [
        conv("x0", "a", pads=[1, 1, 1, 1]),
        helper.make_node("Squeeze", ["x1"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    assert inferred(nodes, [1, 4, "H", "W"], ["A", "B"]) != (1, 4, "H", "W")
