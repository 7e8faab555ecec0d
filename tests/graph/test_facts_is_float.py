"""Which element types count as floating point."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from pwopt.graph import Facts, parse

EXPECTED: dict[int, bool] = {
    TensorProto.FLOAT16: True,
    TensorProto.FLOAT: True,
    TensorProto.DOUBLE: True,
    TensorProto.BFLOAT16: False,
    TensorProto.FLOAT8E4M3FN: False,
    TensorProto.INT32: False,
    TensorProto.BOOL: False,
}


@pytest.mark.parametrize("data_type", EXPECTED)
def test_is_float(data_type: int) -> None:
    weight = helper.make_tensor("w", data_type, [1], [1])
    output = helper.make_tensor_value_info("y", data_type, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "test", [], [output], [weight]
    )
    imports = [helper.make_opsetid("", 19)]
    model = parse(helper.make_model(graph, opset_imports=imports, ir_version=9))
    model.infer_shapes()
    node = next(iter(model.nodes.values()))
    facts = Facts(model)
    assert facts.is_float(node.inputs[0]) is EXPECTED[data_type]
    assert facts.is_float(node.outputs[0]) is EXPECTED[data_type]
    assert facts.is_float(None) is False
