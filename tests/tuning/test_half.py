"""Conversion to fp16: asked for, calibrated, and as exact as it can be."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pwopt.errors import UsageError
from pwopt.graph import parse
from pwopt.runtime.half import converted_to_half
from pwopt.target import Target
from pwopt.tuning.half import convert_to_half, half_with

CPU = Target(threads=1)
TOLERANCE = 0.01


def chain(scale: float = 1.0, *, dtype: Any = np.float32) -> onnx.ModelProto:
    """Conv -> Relu -> Mul by *scale* -> Mul by its inverse -> Conv."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)) / 5,
        "w2": rng.standard_normal((4, 8, 1, 1)) / 3,
        "up": np.full((), scale),
        "down": np.full((), 1 / scale),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "up"], ["c"], name="large"),
        helper.make_node("Mul", ["c", "down"], ["d"], name="small"),
        helper.make_node("Conv", ["d", "w2"], ["y"], name="last"),
    ]
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", elem, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", elem, ["N", 4, 6, 6])],
        [numpy_helper.from_array(np.asarray(v, dtype), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(2)]


def types(proto: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in proto.graph.initializer}


def test_inputs_and_outputs_stay_in_single_precision() -> None:
    original = chain()
    before = original.SerializeToString(deterministic=True)
    half = convert_to_half(parse(original), feeds(), CPU, TOLERANCE)
    assert original.SerializeToString(deterministic=True) == before
    proto = half.model.to_proto()
    assert proto.graph.input[0].type == original.graph.input[0].type
    assert proto.graph.output[0].type == original.graph.output[0].type
    assert set(types(proto).values()) == {TensorProto.FLOAT16}
    assert half.kept == ()
    assert 0 < half.deviation < TOLERANCE
    onnx.checker.check_model(proto)


def test_what_fp16_cannot_hold_stays_in_single_precision() -> None:
    half = convert_to_half(parse(chain(1e6)), feeds(), CPU, TOLERANCE)
    assert half.kept == ("large", "small")
    assert half.deviation < TOLERANCE
    found = types(half.model.to_proto())
    assert (found["w1"], found["w2"]) == (TensorProto.FLOAT16,) * 2
    assert (found["up"], found["down"]) == (TensorProto.FLOAT,) * 2


def test_what_deviates_most_follows_until_the_tolerance_is_met() -> None:
    loose = convert_to_half(parse(chain()), feeds(), CPU, TOLERANCE)
    tight = convert_to_half(parse(chain()), feeds(), CPU, 0.8 * loose.deviation)
    assert 0 < len(tight.kept) < tight.nodes
    assert tight.deviation <= 0.8 * loose.deviation
    hopeless = convert_to_half(parse(chain()), feeds(), CPU, 1e-12)
    assert hopeless.deviation <= tight.deviation


def test_a_choice_can_be_repeated() -> None:
    half = convert_to_half(parse(chain(1e6)), feeds(), CPU, TOLERANCE)
    again = half_with(parse(chain(1e6)), half.kept)
    assert again.to_proto().SerializeToString(deterministic=True) == (
        half.model.to_proto().SerializeToString(deterministic=True)
    )


def test_nodes_without_names_of_their_own_are_told_apart() -> None:
    model = chain(1e6)
    for node in model.graph.node:
        node.name = "same"
    half = convert_to_half(parse(model), feeds(), CPU, TOLERANCE)
    assert len(set(half.kept)) == 2


def test_there_must_be_something_to_convert() -> None:
    with pytest.raises(UsageError, match="no weights in fp32"):
        convert_to_half(parse(chain(dtype=np.float16)), feeds(), CPU, TOLERANCE)


def test_the_converter_leaves_the_search_path_alone() -> None:
    before = list(sys.path)
    converted_to_half(chain(), ())
    assert sys.path == before
