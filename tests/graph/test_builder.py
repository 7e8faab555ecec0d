"""The graph builder: shapes from onnx, names, opset variants, errors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from pwopt.errors import InvalidModelError, UsageError
from pwopt.graph.builder import MAX_OPSET, MIN_OPSET, GraphBuilder, Tensor

OPSETS = (9, 10, 11, 12, 13, 14, 17, 18, 21, MAX_OPSET)


def build(builder: GraphBuilder, output: Tensor) -> ReferenceEvaluator:
    builder.output(output, "y")
    model = builder.finish()
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model)


def test_shapes_and_types_come_from_onnx() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", ("N", 3, 8, 10))
    weight = builder.initializer(np.ones((4, 3, 3, 3), np.float32), "w")
    y = builder.node("Conv", x, weight, strides=[2, 2], pads=[1, 1, 1, 1])
    assert y.shape == ("N", 4, 4, 5)
    assert y.dtype == np.float32
    assert y.size(1) == 4
    assert builder.node("Shape", y).dtype == np.int64
    with pytest.raises(InvalidModelError, match=r"dimension 0 of Conv_output is dynamic \(N\)"):
        y.size(0)


def test_reshape_sees_its_target() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", ("N", 6, 2, 2))
    assert builder.reshape(x, [0, 2, 3, 2, 2]).shape == ("N", 2, 3, 2, 2)


def test_names_are_scoped_and_unique() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", (1,))
    with builder.scope("a"), builder.scope("b"):
        names = [builder.node("Relu", x).name for _ in range(3)]
    names.append(builder.node("Relu", x).name)
    assert names == ["a.b/Relu_output", "a.b/Relu_1_output", "a.b/Relu_2_output", "Relu_output"]


def test_output_renames_the_value_for_its_readers_too() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", (2,))
    hidden = builder.node("Relu", x)
    y = builder.node("Neg", hidden)
    builder.output(hidden, "hidden")
    evaluator = build(builder, y)
    hidden_value, y_value = evaluator.run(None, {"x": np.array([-1, 2], np.float32)})
    np.testing.assert_array_equal(hidden_value, [0, 2])
    np.testing.assert_array_equal(y_value, [0, -2])


def test_output_can_name_a_dimension_that_inference_loses() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", ("N", 1, 2, 2))
    enlarged = builder.resize(x, 2, "nearest")
    assert enlarged.shape[0] == ""
    builder.output(enlarged, "y", ("N", *enlarged.shape[1:]))
    (output,) = builder.finish().graph.output
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["N", 1, 4, 4]


def test_a_name_is_given_once() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", (1,))
    with pytest.raises(InvalidModelError, match="x is used twice"):
        builder.initializer(np.zeros(1, np.float32), "x")
    with pytest.raises(InvalidModelError, match="x is used twice"):
        builder.output(builder.node("Relu", x), "x")


def test_wrong_shapes_fail_where_they_are_built() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", (1, 3, 8, 8))
    weight = builder.initializer(np.ones((4, 3, 3), np.float32), "w")
    with pytest.raises(InvalidModelError, match="Conv Conv: "):
        builder.node("Conv", x, weight)


def test_operator_newer_than_the_opset_is_refused() -> None:
    builder = GraphBuilder("g", opset=13)
    x = builder.input("x", (1,))
    with pytest.raises(InvalidModelError, match="opset 13 has no operator HardSwish"):
        builder.node("HardSwish", x)


@pytest.mark.parametrize("opset", [MIN_OPSET - 1, MAX_OPSET + 1])
def test_opset_out_of_range_is_refused(opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset}"):
        GraphBuilder("g", opset=opset)


def test_slice_with_steps_needs_opset_10() -> None:
    builder = GraphBuilder("g", opset=9)
    x = builder.input("x", (4, 4))
    with pytest.raises(InvalidModelError):
        builder.slice(x, [0], [0], [4], [2])


def test_linear_resize_from_pixel_centres_needs_opset_11() -> None:
    builder = GraphBuilder("g", opset=10)
    x = builder.input("x", (1, 1, 2, 2))
    with pytest.raises(InvalidModelError, match="opset 10 cannot enlarge from pixel centres"):
        builder.resize(x, 2, "linear")


@pytest.mark.parametrize("opset", OPSETS)
def test_each_opset_has_its_own_spelling_of_the_same_function(opset: int) -> None:
    builder = GraphBuilder("g", opset=opset)
    x = builder.input("x", (1, 4, 2, 2))
    left, right = builder.split(builder.clip(x, 0.0, 6.0), [1, 3], axis=1)
    joined = builder.node("Concat", right, left, axis=1)
    padded = builder.pad(joined, [0, 0, 0, 0, 0, 1, 0, 0])
    mean = builder.reduce_mean(builder.dropout(padded, 0.5), [1])
    values = np.arange(-4, 12, dtype=np.float32).reshape(1, 4, 2, 2)
    (y,) = build(builder, mean).run(None, {"x": values})
    expected = np.clip(values, 0, 6).sum(axis=1, keepdims=True) / 5
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=1e-6)


@pytest.mark.parametrize("opset", OPSETS)
def test_nearest_resize_repeats_pixels(opset: int) -> None:
    builder = GraphBuilder("g", opset=opset)
    x = builder.input("x", (1, 1, 2, 2))
    y = builder.resize(x, 2, "nearest")
    assert y.shape == (1, 1, 4, 4)
    builder.output(y, "y")
    model = builder.finish()
    onnx.checker.check_model(model, full_check=True)
    if opset == 10:
        return  # The reference evaluator has no Resize of this opset.
    image = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    (result,) = ReferenceEvaluator(model).run(None, {"x": image})
    np.testing.assert_array_equal(result, image.repeat(2, axis=2).repeat(2, axis=3))
