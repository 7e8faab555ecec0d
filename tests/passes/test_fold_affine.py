"""Mul, Add, Sub and Div by constants into the weights around them, and into each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import pwopt
from pwopt.passes.fold_affine import FoldAffine
from tests.passes import harness
from tests.passes.linear_models import (
    BATCH,
    DTYPES,
    OPSETS,
    Draft,
    Geometry,
    assert_agree,
    channels,
    geometries,
    seen_inside,
)

Array = np.ndarray[Any, Any]
Why = FoldAffine.Why
POINT = Geometry.plain(1)
SQUARE = Geometry.plain(3)
SAME = Geometry.plain(3, pad=1)


def draft(shape: Any = (2, 3, 6, 6), **settings: Any) -> Draft:
    return Draft(np.random.default_rng(0), shape, **settings)


def affine(d: Draft, op: str, x: str, values: Any, *, constant_first: bool = False) -> str:
    constant = d.weight("c", np.asarray(values))
    return d.add(op, [constant, x] if constant_first else [x, constant])


def fold(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(FoldAffine(), proto, **settings)


def weights(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


PER_CHANNEL = np.array([0.5, -1.5, 2.0, 3.0])
SHAPES = [(), (1,), (1, 1, 1), (1, 1, 1, 1), (4, 1, 1), (1, 4, 1, 1)]


def constant_of(shape: tuple[int, ...]) -> Array:
    return PER_CHANNEL.reshape(shape) if 4 in shape else np.full(shape, -1.5)


FORMS = [
    ("Mul", False),
    ("Mul", True),
    ("Add", False),
    ("Add", True),
    ("Sub", False),
    ("Sub", True),
    ("Div", False),
]


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_behind_a_conv(op: str, constant_first: bool, shape: tuple[int, ...], bias: bool) -> None:
    d = draft()
    c = constant_of(shape)
    before = d.finish(
        affine(d, op, d.conv("x", 3, 4, SAME, bias=bias), c, constant_first=constant_first)
    )
    after = fold(before)
    assert after.ops == ["Conv"]
    (conv,) = after.model.graph.node
    assert (conv.name, list(conv.output)) == ("n_t0", ["y"])
    found = weights(after.model)
    w = d.weights["w0"].astype(np.float64)
    b = d.weights["b1"].astype(np.float64) if bias else np.zeros(4)
    c = np.broadcast_to(c.reshape(-1), 4)
    slope, new_bias = {
        ("Mul", False): (c, c * b),
        ("Mul", True): (c, c * b),
        ("Add", False): (np.ones(4), b + c),
        ("Add", True): (np.ones(4), c + b),
        ("Sub", False): (np.ones(4), b - c),
        ("Sub", True): (-np.ones(4), c - b),
        ("Div", False): (1 / c, b / c),
    }[op, constant_first]
    np.testing.assert_allclose(found[conv.input[1]], slope[:, None, None, None] * w, rtol=1e-6)
    if len(conv.input) > 2:
        np.testing.assert_allclose(found[conv.input[2]], new_bias, rtol=1e-6)
    assert (len(conv.input) > 2) == (bias or op in ("Add", "Sub"))
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("shape", [(), (1, 1, 1), (3, 1, 1), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_before_convs(op: str, constant_first: bool, shape: tuple[int, ...]) -> None:
    d = draft()
    c = PER_CHANNEL[:3].reshape(shape) if 3 in shape else np.full(shape, 0.75)
    value = affine(d, op, "x", c, constant_first=constant_first)
    one, other = d.conv(value, 3, 4, SQUARE), d.conv(value, 3, 4, SQUARE, bias=False)
    before = d.finish(d.add("Max", [one, other]))
    after = fold(before)
    assert after.ops == ["Conv", "Conv", "Max"]
    assert [n.input[0] for n in after.model.graph.node[:2]] == ["x", "x"]
    assert_agree(before, after.model, d.rng)


def test_a_shift_leaves_the_weight_alone() -> None:
    """So it needs not be constant, and a shared one gets no copy."""
    d = draft()
    conv = d.conv("x", 3, 4, SAME)
    d.nodes.insert(0, harness.node("Abs", ["w0"], ["computed"]))
    d.nodes[1].input[1] = "computed"
    before = d.finish(affine(d, "Add", conv, PER_CHANNEL.reshape(4, 1, 1)))
    after = fold(before)
    assert after.ops == ["Abs", "Conv"]
    assert_agree(before, after.model, d.rng)


def test_a_shared_weight_gets_a_copy() -> None:
    d = draft()
    conv = d.conv("x", 3, 3, SAME, bias=False)
    scaled = affine(d, "Mul", conv, 3.0)
    d.nodes.append(harness.node("Conv", ["x", "w0"], ["plain"], pads=[1] * 4))
    before = d.finish(d.add("Max", [scaled, "plain"]))
    after = fold(before)
    assert after.ops == ["Conv", "Conv", "Max"]
    np.testing.assert_array_equal(weights(after.model)["w0"], d.weights["w0"])
    assert_agree(before, after.model, d.rng)


def test_a_shared_constant_folds_everywhere() -> None:
    d = draft()
    first = affine(d, "Mul", d.conv("x", 3, 4, SAME), 0.5)
    shared = d.nodes[-1].input[1]
    before = d.finish(d.add("Mul", [d.conv(first, 4, 4, SAME), shared]))
    after = fold(before)
    assert after.ops == ["Conv", "Conv"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(
    ("op", "attributes", "inputs"),
    [
        ("Relu", {}, ()),
        ("LeakyRelu", {"alpha": 0.2}, ()),
        ("PRelu", {}, ("slope",)),
        ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "strides": [2, 1]}, ()),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 0, 1, 1]}, ()),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1] * 4, "count_include_pad": 1}, ()),
        ("GlobalAveragePool", {}, ()),
        ("GlobalMaxPool", {}, ()),
    ],
)
@pytest.mark.parametrize("side", ["behind", "before"])
def test_a_positive_scale_crosses(
    op: str, attributes: dict[str, Any], inputs: tuple[str, ...], side: str
) -> None:
    d = draft((2, 4, 6, 6))
    c = np.abs(PER_CHANNEL).reshape(4, 1, 1)
    d.weights.update({name: d.noise(4, 1, 1).astype(np.float32) for name in inputs})
    value = d.conv("x", 4, 4, SAME) if side == "behind" else affine(d, "Mul", "x", c)
    value = d.add(op, [value, *inputs], **attributes)
    value = affine(d, "Mul", value, c) if side == "behind" else d.conv(value, 4, 4, POINT)
    before = d.finish(value)
    after = fold(before)
    assert after.ops == (["Conv", op] if side == "behind" else [op, "Conv"])
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "GlobalAveragePool"])
def test_a_shift_crosses_pools(op: str) -> None:
    d = draft((2, 4, 6, 6))
    window = {} if op.startswith("Global") else {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1]}
    pooled = d.add(op, [affine(d, "Add", "x", PER_CHANNEL.reshape(4, 1, 1))], **window)
    before = d.finish(affine(d, "Add", d.add(op, [d.conv(pooled, 4, 4, POINT)], **window), 3.0))
    after = fold(before)
    assert after.ops == [op, "Conv", op]
    assert_agree(before, after.model, d.rng)


def test_a_negative_scale_crosses_an_average() -> None:
    d = draft()
    pool = d.add("GlobalAveragePool", [d.conv("x", 3, 4, SAME)])
    before = d.finish(affine(d, "Sub", pool, 1.0, constant_first=True))
    after = fold(before)
    assert after.ops == ["Conv", "GlobalAveragePool"]
    assert_agree(before, after.model, d.rng)


def test_image_normalisation_leaves_the_shift_at_a_padded_conv() -> None:
    d = draft()
    centred = affine(d, "Sub", "x", PER_CHANNEL[:3].reshape(3, 1, 1))
    scaled = affine(d, "Div", centred, np.array([2.0, 4.0, 5.0]).reshape(3, 1, 1))
    before = d.finish(d.conv(scaled, 3, 4, SAME))
    after = fold(before)
    assert after.ops == ["Sub", "Conv"]
    assert after.reasons == {Why.SHIFT_MEETS_PADDING.value}
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(
    ("chain", "merged", "constant"),
    [
        ([("Mul", 2.0, False), ("Mul", 4.0, True)], "Mul", 8.0),
        ([("Mul", 2.0, False), ("Div", 4.0, False)], "Mul", 0.5),
        ([("Div", 2.0, False), ("Div", 4.0, False)], "Mul", 0.125),
        ([("Add", 2.0, False), ("Add", 3.0, True)], "Add", 5.0),
        ([("Add", 2.0, False), ("Sub", 3.0, False)], "Add", -1.0),
        ([("Sub", 2.0, False), ("Sub", 3.0, True)], "Sub", 5.0),
        ([("Sub", 2.0, True), ("Add", 3.0, False)], "Sub", 5.0),
        ([("Sub", 2.0, True), ("Sub", 3.0, True)], "Add", 1.0),
        ([("Add", 1.0, False)] * 5, "Add", 5.0),
    ],
)
def test_consecutive_operators_merge(
    chain: list[tuple[str, float, bool]], merged: str, constant: float
) -> None:
    d = draft()
    value = "x"
    for op, values, constant_first in chain:
        value = affine(d, op, value, values, constant_first=constant_first)
    before = d.finish(value)
    after = fold(before)
    assert after.ops == [merged]
    (node,) = after.model.graph.node
    assert list(node.input).index("x") == (1 if merged == "Sub" else 0)
    (found,) = weights(after.model).values()
    assert found.shape == ()
    assert float(found) == constant
    assert_agree(before, after.model, d.rng)


def test_merging_keeps_a_broadcast_that_enlarges() -> None:
    d = draft((3, 1))
    before = d.finish(affine(d, "Add", affine(d, "Add", "x", np.ones((1, 4))), 1.0))
    after = fold(before)
    assert after.ops == ["Add"]
    (values,) = weights(after.model).values()
    np.testing.assert_array_equal(values, np.full((1, 4), 2.0))
    assert_agree(before, after.model, d.rng)


def test_the_upper_one_follows_the_lower_one() -> None:
    """Two operators stand between them, so the driver must be told to look again."""
    d = draft()
    upper = d.add("Relu", [d.add("MaxPool", [affine(d, "Mul", "x", 2.0)], kernel_shape=[2, 2])])
    before = d.finish(d.conv(affine(d, "Add", upper, 1.0), 3, 4, SQUARE))
    after = fold(before)
    assert after.ops == ["MaxPool", "Relu", "Conv"]
    assert_agree(before, after.model, d.rng)


def test_the_lower_one_follows_the_upper_one() -> None:
    """The two upper ones fit the weights only together."""
    d = draft(dtype=np.float16)
    upper = affine(d, "Mul", affine(d, "Mul", d.conv("x", 3, 4, SAME), 1e-5), 6e4)
    lower = d.add("Relu", [d.add("MaxPool", [upper], kernel_shape=[2, 2])])
    before = d.finish(affine(d, "Mul", lower, 2.0))
    assert fold(before).ops == ["Conv", "MaxPool", "Relu"]


def test_matmul_of_rank_2_becomes_gemm() -> None:
    d = draft((2, 3))
    hidden = affine(d, "Add", d.matmul(affine(d, "Sub", "x", 0.5), 3, 4), PER_CHANNEL)
    before = d.finish(hidden)
    after = fold(before)
    assert after.ops == ["Gemm"]
    assert after.applied == 2
    assert_agree(before, after.model, d.rng)


def test_matmul_of_rank_3_takes_a_scale() -> None:
    d = draft((2, 5, 3))
    before = d.finish(affine(d, "Div", d.matmul(affine(d, "Mul", "x", [1, 2, 3]), 3, 4), [2] * 4))
    after = fold(before)
    assert after.ops == ["MatMul"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4), ()], ids=str)
@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_matmul_of_rank_3_with_its_bias_in_an_add(
    op: str, constant_first: bool, bias_first: bool, shape: tuple[int, ...]
) -> None:
    d = draft((2, 5, 3))
    bias = d.noise(*shape)
    hidden = affine(d, "Add", d.matmul("x", 3, 4), bias, constant_first=bias_first)
    value = affine(d, op, d.add("Relu", [hidden]), np.abs(PER_CHANNEL))
    value = affine(d, op, value, PER_CHANNEL, constant_first=constant_first)
    before = d.finish(value)
    after = fold(before)
    if op in ("Mul", "Div"):
        assert after.ops[:3] == ["MatMul", "Add", "Relu"]
    assert_agree(before, after.model, d.rng)
    d = draft((2, 5, 3))
    hidden = affine(d, "Add", d.matmul("x", 3, 4), bias, constant_first=bias_first)
    before = d.finish(affine(d, op, hidden, PER_CHANNEL, constant_first=constant_first))
    after = fold(before)
    assert after.ops == ["MatMul", "Add"]
    assert_agree(before, after.model, d.rng)


def test_an_added_bias_must_be_per_channel() -> None:
    d = draft((2, 5, 3))
    hidden = affine(d, "Add", d.matmul("x", 3, 5), np.ones((5, 1)))
    outcome = fold(d.finish(affine(d, "Mul", hidden, 2.0)))
    assert outcome.reasons == {Why.NOT_PER_CHANNEL.value, Why.BIAS_NOT_PER_CHANNEL.value}
    assert outcome.applied == 0


def test_an_added_bias_must_not_enlarge() -> None:
    d = draft((2, 5, 3))
    hidden = affine(d, "Add", d.matmul("x", 3, 4), PER_CHANNEL.reshape(1, 1, 1, 4))
    proto = d.finish(affine(d, "Mul", hidden, 2.0))
    proto.graph.output[0].type.tensor_type.shape.dim.add()
    assert fold(proto).applied == 0


@pytest.mark.parametrize("attributes", [{}, {"transB": 1, "alpha": 0.5, "beta": 3.0}])
@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_gemm_before_and_behind(op: str, constant_first: bool, attributes: dict[str, Any]) -> None:
    d = draft((2, 3))
    inner = affine(d, op, "x", PER_CHANNEL[:3], constant_first=constant_first)
    hidden = d.gemm(inner, 3, 4, **attributes)
    before = d.finish(affine(d, op, hidden, PER_CHANNEL, constant_first=constant_first))
    after = fold(before)
    assert after.ops == ["Gemm"]
    assert_agree(before, after.model, d.rng)


# -- into a BatchNormalization ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_behind_a_normalisation(op: str, constant_first: bool, shape: tuple[int, ...]) -> None:
    d = draft((2, 4, 3, 5))
    c = constant_of(shape)
    before = d.finish(
        affine(d, op, d.batch_normalization("x", 4), c, constant_first=constant_first)
    )
    after = fold(before)
    assert after.ops == ["BatchNormalization"]
    (norm,) = after.model.graph.node
    assert (norm.name, list(norm.output)) == ("n_t0", ["y"])
    assert list(norm.input[3:]) == ["mean2", "var3"]
    found = weights(after.model)
    scale, bias = (d.weights[k].astype(np.float64) for k in ("scale0", "shift1"))
    c = np.broadcast_to(c.reshape(-1), 4)
    sign = -1.0 if (op, constant_first) == ("Sub", True) else 1.0
    slope = {"Mul": c, "Div": 1 / c}.get(op, np.full(4, sign))
    shift = {"Add": c, "Sub": -sign * c}.get(op, np.zeros(4))
    np.testing.assert_allclose(found[norm.input[1]], slope * scale, rtol=1e-6)
    np.testing.assert_allclose(found[norm.input[2]], slope * bias + shift, rtol=1e-6)
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_before_a_normalisation(op: str, constant_first: bool, shape: tuple[int, ...]) -> None:
    d = draft((2, 4, 3, 5))
    scaled = affine(d, op, "x", constant_of(shape), constant_first=constant_first)
    before = d.finish(d.batch_normalization(scaled, 4, epsilon=0.1))
    after = fold(before)
    assert after.ops == ["BatchNormalization"]
    (norm,) = after.model.graph.node
    assert not weights(after.model)[norm.input[3]].any()
    assert_agree(before, after.model, d.rng)


def test_a_large_scale_before_a_normalisation_costs_no_digits() -> None:
    """As in image / 255 taken back: kept means would make two large terms that cancel."""
    d = draft((2, 4, 3, 5))
    d.batch_normalization("x", 4)
    d.nodes.clear()
    d.weights["mean2"] = np.full(4, 3.0, np.float32)
    d.weights["c"] = np.array(1e4, np.float32)
    scaled = d.add("Mul", ["x", "c"])
    before = d.finish(d.add("BatchNormalization", [scaled, "scale0", "shift1", "mean2", "var3"]))
    assert_agree(before, fold(before).model, d.rng, factor=1.0)


def test_scale_and_shift_behind_a_normalisation() -> None:
    """What Caffe2 exports: BatchNormalization without weights of its own, Mul, Add."""
    d = draft((2, 4, 6, 6))
    normal = d.batch_normalization(d.add("MaxPool", ["x"], kernel_shape=[2, 2]), 4)
    scaled = affine(d, "Mul", normal, PER_CHANNEL.reshape(4, 1, 1))
    shifted = affine(d, "Add", scaled, PER_CHANNEL.reshape(4, 1, 1))
    before = d.finish(d.conv(d.add("Relu", [shifted]), 4, 4, SAME))
    after = fold(before)
    assert after.ops == ["MaxPool", "BatchNormalization", "Relu", "Conv"]
    assert after.applied == 2
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("op", ["Relu", "MaxPool", "GlobalAveragePool"])
@pytest.mark.parametrize("side", ["behind", "before"])
def test_a_normalisation_across_others(op: str, side: str) -> None:
    d = draft((2, 4, 6, 6))
    attributes = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
    c = np.abs(PER_CHANNEL).reshape(4, 1, 1)
    value = d.batch_normalization("x", 4) if side == "behind" else affine(d, "Mul", "x", c)
    value = d.add(op, [value], **attributes)
    value = affine(d, "Mul", value, c) if side == "behind" else d.batch_normalization(value, 4)
    before = d.finish(value)
    after = fold(before)
    assert after.applied == 1
    assert sorted(after.ops) == sorted(["BatchNormalization", op])
    assert_agree(before, after.model, d.rng)


def test_shared_parameters_of_a_normalisation_get_a_copy() -> None:
    d = draft((2, 4, 3, 5))
    scaled = affine(d, "Mul", d.batch_normalization("x", 4), PER_CHANNEL.reshape(4, 1, 1))
    other = d.add("BatchNormalization", ["x", "scale0", "shift1", "mean2", "var3"])
    before = d.finish(d.add("Max", [scaled, other]))
    after = fold(before)
    assert after.ops == ["BatchNormalization", "BatchNormalization", "Max"]
    np.testing.assert_array_equal(weights(after.model)["scale0"], d.weights["scale0"])
    assert_agree(before, after.model, d.rng)


def test_a_convolution_goes_first() -> None:
    d = draft()
    scaled = affine(d, "Mul", d.conv("x", 3, 4, SAME), PER_CHANNEL.reshape(4, 1, 1))
    before = d.finish(d.batch_normalization(scaled, 4))
    after = fold(before)
    assert after.ops == ["Conv", "BatchNormalization"]
    np.testing.assert_array_equal(weights(after.model)["scale3"], d.weights["scale3"])
    assert_agree(before, after.model, d.rng)


def training(d: Draft) -> None:
    d.nodes[0].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    d.nodes[0].output.extend(["running_mean", "running_var"])


def per_activation(d: Draft) -> None:
    d.nodes[0].attribute.append(onnx.helper.make_attribute("spatial", 0))


def computed_parameter(d: Draft) -> None:
    d.nodes.insert(0, harness.node("Abs", ["var3"], ["computed"]))
    d.nodes[1].input[4] = "computed"


def negative_variance(d: Draft) -> None:
    d.weights["var3"][0] = -1.0


@pytest.mark.parametrize(
    ("change", "opset"),
    [(training, 17), (per_activation, 8), (computed_parameter, 17), (negative_variance, 17)],
)
def test_not_into_every_normalisation(change: Callable[[Draft], None], opset: int) -> None:
    d = draft((2, 4, 3, 5), opset=opset)
    if change is per_activation:
        d.batch_normalization("x", 4 * 3 * 5)
        d.weights = {k: v.reshape(4, 3, 5) for k, v in d.weights.items()}
    else:
        d.batch_normalization("x", 4)
    change(d)
    before = d.finish(affine(d, "Mul", "t0", 2.0))
    outcome = fold(before)
    assert outcome.reasons == {Why.NO_LINEAR_NEIGHBOUR.value}
    assert outcome.applied == 0


@pytest.mark.parametrize("opset", [7, 9, 14, 17])
@pytest.mark.parametrize(
    ("chain", "scale", "shift"),
    [
        ([("Mul", 2.0), ("Add", PER_CHANNEL)], np.full(4, 2.0), PER_CHANNEL),
        ([("Div", 4.0 / PER_CHANNEL), ("Sub", 1.0)], PER_CHANNEL / 4, np.full(4, -1.0)),
        ([("Add", PER_CHANNEL), ("Mul", 2.0), ("Add", 1.0)], np.full(4, 2.0), 2 * PER_CHANNEL + 1),
    ],
    ids=["mul-add", "div-sub", "three"],
)
def test_a_scale_and_a_shift_become_a_normalisation(
    chain: list[tuple[str, Any]], scale: Array, shift: Array, opset: int
) -> None:
    d = draft((2, 4, 3, 5), opset=opset)
    value = d.add("MaxPool", ["x"], kernel_shape=[2, 2])
    for op, values in chain:
        shape = (4, 1, 1) if np.ndim(values) else ()
        value = affine(d, op, value, np.reshape(values, shape))
    before = d.finish(value)
    after = fold(before)
    assert after.ops == ["MaxPool", "BatchNormalization"]
    norm = after.model.graph.node[-1]
    found = weights(after.model)
    expected = (scale, shift, np.zeros(4), np.ones(4))
    for name, values in zip(norm.input[1:], expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-6)
    assert [a.f for a in norm.attribute] == [0.0]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(
    ("shape", "scale", "shift"),
    [
        ((2, 4, 3, 5), (), ()),  # an activation that is written out
        ((2, 4, 5), (4, 1), (4, 1)),  # a sequence
        ((2, "C", 3, 5), (), (1, 1, 1, 5)),
        ((2, 4, 3, 5), (4, 1, 1), (5,)),
        ((2, 4, 3, 5), (4, 1, 1), (4, 3, 1)),
        ((2, "C", 3, 5), (4, 1, 1), (4, 1, 1)),  # enlarges where C is 1
    ],
    ids=str,
)
def test_what_does_not_become_a_normalisation(
    shape: tuple[int | str, ...], scale: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    d = draft(shape)
    scaled = affine(d, "Mul", "x", np.full(scale, 2.0))
    outcome = fold(d.finish(affine(d, "Add", scaled, np.full(shift, 3.0))))
    tried = [r.facts.get("tried") for r in outcome.remarks]
    assert any(isinstance(t, list) and Why.NOT_ONE_OPERATOR.value in t for t in tried)
    assert outcome.applied == 0


# -- across Concat ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "constant_first"), FORMS)
def test_backward_across_concat(op: str, constant_first: bool) -> None:
    d = draft()
    pieces = [d.conv("x", 3, 1, SAME), d.conv("x", 3, 3, SAME, bias=False)]
    values = PER_CHANNEL.reshape(4, 1, 1)
    before = d.finish(
        affine(d, op, d.add("Concat", pieces, axis=1), values, constant_first=constant_first)
    )
    after = fold(before)
    assert after.ops == ["Conv", "Conv", "Concat"]
    assert after.model.graph.node[-1].output == ["y"]
    assert_agree(before, after.model, d.rng)


def test_backward_across_nested_concats_and_activations() -> None:
    d = draft()
    inner = d.add("Relu", [d.add("Concat", [d.conv("x", 3, 2, SAME)], axis=-3)])
    one = d.add("AveragePool", [d.conv("x", 3, 1, SAME)], kernel_shape=[1, 1])
    pieces = [one, inner, d.batch_normalization("x", 3)]
    scale = np.array([0.5, 2.0, 3.0, 0.25, 4.0, 1.5]).reshape(6, 1, 1)
    value = d.add("LeakyRelu", [d.add("Concat", pieces, axis=1)])
    before = d.finish(affine(d, "Mul", value, scale))
    after = fold(before)
    assert after.applied == 1
    assert "Mul" not in after.ops
    assert_agree(before, after.model, d.rng)


def test_a_piece_that_stays_as_it_is_may_be_anything() -> None:
    d = draft()
    pieces = ["x", d.conv("x", 3, 1, SAME)]
    scale = np.array([1.0, 1.0, 1.0, 2.0]).reshape(4, 1, 1)
    before = d.finish(affine(d, "Mul", d.add("Concat", pieces, axis=1), scale))
    after = fold(before)
    assert after.ops == ["Conv", "Concat"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_forward_across_concat(op: str) -> None:
    d = draft((2, 4, 6, 6))
    scaled = affine(d, op, "x", PER_CHANNEL.reshape(4, 1, 1))
    other = d.add("Tanh", ["x"])
    joined = d.add("Concat", [other, scaled, other], axis=1)
    one, two = d.conv(joined, 12, 2, POINT), d.conv(joined, 12, 2, POINT)
    before = d.finish(d.add("Max", [one, two]))
    after = fold(before)
    assert after.ops == ["Tanh", "Concat", "Conv", "Conv", "Max"]
    assert_agree(before, after.model, d.rng)


def test_every_scaled_piece_of_a_concat_folds() -> None:
    d = draft((2, 4, 6, 6))
    scale = np.abs(PER_CHANNEL).reshape(4, 1, 1)
    pieces = [affine(d, "Mul", "x", scale), affine(d, "Div", "x", 3.0)]
    value = d.add(
        "MaxPool", [d.add("Relu", [d.add("Concat", pieces, axis=1)])], kernel_shape=[2] * 2
    )
    before = d.finish(d.conv(value, 8, 2, SAME, group=2))
    after = fold(before)
    assert after.applied == 2
    assert after.ops == ["Concat", "Relu", "MaxPool", "Conv"]
    assert_agree(before, after.model, d.rng)


def test_the_pieces_of_a_matmul_lie_along_its_columns() -> None:
    d = draft((2, 3))
    joined = d.add("Concat", [d.matmul("x", 3, 1), d.gemm("x", 3, 3)], axis=-1)
    before = d.finish(affine(d, "Mul", affine(d, "Add", joined, PER_CHANNEL), PER_CHANNEL))
    after = fold(before)
    assert after.ops == ["Gemm", "Gemm", "Concat"]
    assert_agree(before, after.model, d.rng)


def concat_of_one_shared() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 4, SAME)
    joined = d.add("Concat", [conv, d.conv("x", 3, 4, SAME)], axis=1)
    return d.finish(d.add("Concat", [affine(d, "Mul", joined, 2.0), conv], axis=1))


def concat_twice() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 4, SAME)
    return d.finish(affine(d, "Mul", d.add("Concat", [conv, conv], axis=1), 2.0))


def concat_reached_twice() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 2.0)
    joined = d.add("Concat", [d.add("Relu", [scaled]), scaled], axis=1)
    return d.finish(d.conv(joined, 6, 2, POINT))


def concat_of_itself() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(d.conv(d.add("Concat", [scaled, scaled], axis=1), 6, 2, POINT))


def concat_of_shared_concat() -> onnx.ModelProto:
    d = draft()
    joined = d.add("Concat", [d.conv("x", 3, 2, SAME), d.conv("x", 3, 2, SAME)], axis=1)
    return d.finish(d.add("Max", [affine(d, "Mul", joined, 2.0), joined]))


def concat_along_width() -> onnx.ModelProto:
    d = draft((2, 4, 6, 6))
    joined = d.add("Concat", [affine(d, "Mul", "x", 2.0), "x"], axis=3)
    return d.finish(d.conv(joined, 4, 4, SAME))


def concat_of_other() -> onnx.ModelProto:
    d = draft()
    joined = d.add("Concat", ["x", d.conv("x", 3, 2, SAME)], axis=1)
    return d.finish(affine(d, "Mul", joined, 2.0))


def concat_of_unknown_sizes() -> onnx.ModelProto:
    d = draft(("N", "C", 6, 6))
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(d.conv(d.add("Concat", [scaled, "x"], axis=1), 6, 2, POINT))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (concat_of_one_shared, Why.OTHER_READERS),
        (concat_twice, Why.OTHER_READERS),
        (concat_reached_twice, Why.OTHER_READERS),
        (concat_of_itself, Why.OTHER_READERS),
        (concat_of_shared_concat, Why.OTHER_READERS),
        (concat_along_width, Why.NOT_PER_CHANNEL),
        (concat_of_other, Why.NO_LINEAR_NEIGHBOUR),
        (concat_of_unknown_sizes, Why.NO_LINEAR_NEIGHBOUR),
    ],
)
def test_not_across_every_concat(build: Callable[[], onnx.ModelProto], why: Why) -> None:
    outcome = fold(build())
    assert outcome.reasons == {why.value}
    assert outcome.applied == 0


def test_a_ladder_of_concats_is_climbed_once() -> None:
    """Every rung can be reached in two ways: a search that forgets would not come back."""
    d = draft((1, 1, 2, 2))
    value = affine(d, "Mul", "x", 2.0)
    for _ in range(18):
        value = d.add("Relu", [d.add("Concat", [d.add("Relu", [value]), value], axis=1)])
    assert fold(d.finish(affine(d, "Mul", value, 2.0))).applied == 0


def test_a_densenet_keeps_one_normalisation_per_layer() -> None:
    """DenseNet-121 as Caffe2 exported it, with one value for all weights, which it computes."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    before = onnx.load(folder / "light_densenet121.onnx")
    after = pwopt.Pipeline([FoldAffine()]).run(before)
    found = Counter(n.op_type for n in after.graph.node)
    assert found["Mul"] == found["Add"] == found["Unsqueeze"] == 0
    assert found["BatchNormalization"] == 121
    harness.assert_same_outputs(before, after, np.random.default_rng(0), factor=64)


def test_output_name_survives() -> None:
    d = draft()
    y = affine(d, "Mul", d.add("Relu", [d.conv("x", 3, 4, SAME)]), 2.0)
    d.add("Neg", [y])
    d.nodes[-1].output[0] = "extra"
    before = d.finish(y, "extra")
    after = fold(before)
    assert after.ops == ["Conv", "Relu", "Neg"]
    assert [o.name for o in after.model.graph.output] == ["y", "extra"]
    assert_agree(before, after.model, d.rng)


def test_overridable_initializers_are_not_constant() -> None:
    d = draft(opset=7)
    proto = d.finish(affine(d, "Mul", d.conv("x", 3, 4, SAME), 2.0), ir=3)
    assert fold(proto, overridable=True).reasons == {Why.TWO_VARIABLES.value}
    assert fold(proto).ops == ["Conv"]


# -- declines --------------------------------------------------------------------------------------


def residual() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.add("Add", [d.conv("x", 3, 3, SAME), "x"]))


def constant_expression() -> onnx.ModelProto:
    d = draft()
    d.add("Mul", [d.weight("c", np.ones(3)), d.weight("c", np.ones(3))])
    d.nodes[-1].output[0] = "z"
    d.add("Relu", ["x"])
    proto = d.finish(d.nodes[-1].output[0], "z")
    del proto.graph.output[1].type.tensor_type.shape.dim[1:]
    return proto


def integers() -> onnx.ModelProto:
    d = draft(dtype=np.int32)
    return d.finish(affine(d, "Div", affine(d, "Div", "x", 2), 3))


def old_broadcast() -> onnx.ModelProto:
    d = draft(opset=6)
    constant = d.weight("c", np.ones(4))
    return d.finish(d.add("Mul", [d.conv("x", 3, 4, SAME), constant], broadcast=1, axis=1))


def reciprocal() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Div", d.conv("x", 3, 4, SAME), 1.0, constant_first=True))


def division_by_zero() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Div", d.conv("x", 3, 2, SAME), [[[1.0]], [[0.0]]]))


def infinity() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Mul", d.conv("x", 3, 4, SAME), np.inf))


def unknown_shape() -> onnx.ModelProto:
    d = draft()
    return d.finish(
        affine(d, "Mul", d.add("Anything", ["x"], domain="custom"), 2.0), domains={"custom": 1}
    )


def rank_grows() -> onnx.ModelProto:
    d = draft()
    y = affine(d, "Mul", d.conv("x", 3, 4, SAME), np.ones((1, 1, 1, 1, 1)))
    proto = d.finish(y)
    proto.graph.output[0].type.tensor_type.shape.dim.add()
    return proto


def channels_grow() -> onnx.ModelProto:
    d = draft((2, 1, 6, 6))
    return d.finish(d.conv(affine(d, "Mul", "x", np.ones((4, 1, 1))), 4, 4, SAME))


def batch_may_grow() -> onnx.ModelProto:
    d = draft(("batch", 3, 6, 6))
    return d.finish(affine(d, "Mul", d.conv("x", 3, 4, SAME), np.ones((2, 1, 1, 1))))


def scale_then_shift() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Add", affine(d, "Mul", "x", 2.0), 1.0))


def outer_product() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Mul", affine(d, "Mul", "x", np.ones((3, 1, 1))), np.ones(6)))


def alone() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.add("Sigmoid", [affine(d, "Mul", d.add("Relu", ["x"]), 2.0)]))


def across_indices() -> onnx.ModelProto:
    """Rounding may change which of two close values a MaxPool points to."""
    d = draft()
    pool = d.add("MaxPool", [d.conv("x", 3, 3, SAME)], kernel_shape=[2, 2])
    d.nodes[-1].output.append("indices")
    return d.finish(affine(d, "Mul", pool, 2.0))


def across_ceil_mode() -> onnx.ModelProto:
    d = draft()
    pool = d.add("MaxPool", [d.conv("x", 3, 3, SAME)], kernel_shape=[2, 2], ceil_mode=1)
    return d.finish(affine(d, "Mul", pool, 2.0))


def transposed_data() -> onnx.ModelProto:
    """With transA the channels of the data are its rows."""
    d = draft((3, 3))
    return d.finish(d.gemm(affine(d, "Mul", "x", [1, 2, 3]), 3, 3, transA=1))


def constant_times_data() -> onnx.ModelProto:
    d = draft((3, 3))
    product = d.add("MatMul", [d.weight("w", d.noise(3, 3)), "x"])
    return d.finish(affine(d, "Mul", product, [1, 2, 3]))


def read_elsewhere() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 3, SAME)
    return d.finish(d.add("Max", [conv, affine(d, "Mul", conv, 2.0)]))


def two_readers_behind() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(d.add("Max", [scaled, d.conv(scaled, 3, 3, SAME)]))


def reads_itself_as_slope() -> onnx.ModelProto:
    d = draft((1, 3, 6, 6))
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(d.conv(d.add("PRelu", [scaled, scaled]), 3, 3, SAME))


def pair_read_elsewhere() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(d.add("Max", [scaled, affine(d, "Mul", scaled, 3.0)]))


def captured_by_a_branch(d: Draft, tensor: str) -> None:
    info = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, [None] * 4)
    branch = onnx.helper.make_graph([harness.node("Neg", [tensor], ["inner"])], "b", [], [info])
    yes = numpy_helper.from_array(np.array(True))
    d.nodes.insert(0, harness.node("Constant", [], ["yes"], value=yes))
    d.nodes.append(harness.node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))


def captured_between() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 3, SAME)
    y = affine(d, "Mul", conv, 3.0)
    captured_by_a_branch(d, conv)
    return d.finish(y, "z")


def captured_behind() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 3.0)
    y = d.conv(scaled, 3, 3, SAME)
    captured_by_a_branch(d, scaled)
    return d.finish(y, "z")


def product_read_before_its_bias() -> onnx.ModelProto:
    d = draft((2, 5, 3))
    product = d.matmul("x", 3, 4)
    biased = d.add("Add", [product, d.weight("c", PER_CHANNEL)])
    return d.finish(d.add("Max", [product, affine(d, "Mul", biased, 2.0)]))


def graph_output_between() -> onnx.ModelProto:
    d = draft()
    conv = d.conv("x", 3, 3, SAME)
    return d.finish(affine(d, "Mul", conv, 2.0), conv)


def graph_output_behind() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(d.conv(scaled, 3, 3, SAME), scaled)


def pair_with_graph_output() -> onnx.ModelProto:
    d = draft()
    scaled = affine(d, "Mul", "x", 2.0)
    return d.finish(affine(d, "Mul", scaled, 3.0), scaled)


def negative_across_relu() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Mul", d.add("Relu", [d.conv("x", 3, 3, SAME)]), -2.0))


def zero_across_maximum() -> onnx.ModelProto:
    """Zero times minus infinity, which a maximum may hold back, is not zero."""
    d = draft()
    return d.finish(affine(d, "Mul", d.add("GlobalMaxPool", [d.conv("x", 3, 3, SAME)]), 0.0))


def shift_across_relu() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.add("Relu", [affine(d, "Add", "x", 1.0)]), 3, 3, POINT))


def computed_weight() -> onnx.ModelProto:
    d = draft()
    y = affine(d, "Mul", d.conv("x", 3, 4, SAME), 2.0)
    d.nodes.insert(0, harness.node("Abs", ["w0"], ["computed"]))
    d.nodes[1].input[1] = "computed"
    return d.finish(y)


def computed_weight_behind() -> onnx.ModelProto:
    d = draft()
    y = d.conv(affine(d, "Add", "x", 2.0), 3, 4, POINT)
    d.nodes.insert(0, harness.node("Abs", ["w1"], ["computed"]))
    d.nodes[-1].input[1] = "computed"
    return d.finish(y)


def computed_gemm_bias() -> onnx.ModelProto:
    d = draft((2, 3))
    y = affine(d, "Add", d.gemm("x", 3, 4), 2.0)
    d.nodes.insert(0, harness.node("Abs", ["b1"], ["computed"]))
    d.nodes[1].input[2] = "computed"
    return d.finish(y)


def gemm_bias_per_row() -> onnx.ModelProto:
    d = draft((2, 3))
    y = affine(d, "Mul", d.gemm("x", 3, 2), 2.0)
    d.weights["b1"] = d.noise(2, 1).astype(np.float32)
    return d.finish(y)


def along_width() -> onnx.ModelProto:
    d = draft((2, 3, 4, 4))
    return d.finish(affine(d, "Mul", d.conv("x", 3, 4, SAME), PER_CHANNEL))


def map_across_pool() -> onnx.ModelProto:
    d = draft((1, 3, 4, 4))
    pool = d.add("AveragePool", [d.conv("x", 3, 4, SAME)], kernel_shape=[1, 1])
    return d.finish(affine(d, "Mul", pool, PER_CHANNEL))


def pool_over_the_channels_of_a_matmul() -> onnx.ModelProto:
    d = draft((2, 3, 5))
    pool = d.add("MaxPool", [d.matmul("x", 5, 4)], kernel_shape=[3], pads=[1, 1])
    return d.finish(affine(d, "Mul", pool, np.abs(PER_CHANNEL)))


def padded_behind() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(affine(d, "Add", "x", 1.0), 3, 4, SAME))


def automatically_padded_behind() -> onnx.ModelProto:
    d = draft((2, 3, "h", "w"))
    geometry = Geometry((3, 3), (2, 2), (1, 1), (), "SAME_UPPER")
    return d.finish(d.conv(affine(d, "Add", "x", 1.0), 3, 4, geometry))


def transposed_behind() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(affine(d, "Add", "x", 1.0), 3, 4, SQUARE, transposed=True))


def average_of_padding() -> onnx.ModelProto:
    d = draft()
    window = {"kernel_shape": [3, 3], "pads": [0, 0, 0, 1], "count_include_pad": 1}
    return d.finish(affine(d, "Add", d.add("AveragePool", [d.conv("x", 3, 4, SAME)], **window), 1))


def matmul_of_rank_3() -> onnx.ModelProto:
    d = draft((2, 5, 3))
    return d.finish(affine(d, "Add", d.matmul("x", 3, 4), PER_CHANNEL))


def too_large_for_half() -> onnx.ModelProto:
    d = draft(dtype=np.float16)
    return d.finish(affine(d, "Div", d.conv("x", 3, 4, SAME), 1e-7))


def too_small_for_half() -> onnx.ModelProto:
    """Weights of 1e-6 would keep four bits, where the product itself would keep all eleven."""
    d = draft(dtype=np.float16)
    return d.finish(affine(d, "Mul", d.conv("x", 3, 4, SAME), 1e-5))


def pair_too_small() -> onnx.ModelProto:
    d = draft()
    return d.finish(affine(d, "Mul", affine(d, "Mul", "x", 1e-30), 1e-30))


def gelu_before_a_conv() -> onnx.ModelProto:
    d = draft()
    x = d.conv("x", 3, 4, SAME)
    erf = d.add("Erf", [affine(d, "Div", x, np.sqrt(2))])
    gate = d.add("Mul", [x, affine(d, "Add", erf, 1.0)])
    return d.finish(d.conv(affine(d, "Mul", gate, 0.5), 4, 5, POINT))


def layer_normalisation(d: Draft, x: str) -> str:
    centred = d.add("Sub", [x, d.add("ReduceMean", [x], axes=[-1])])
    variance = d.add("ReduceMean", [d.add("Mul", [centred, centred])], axes=[-1])
    root = d.add("Sqrt", [affine(d, "Add", variance, 1e-5)])
    return d.add("Div", [centred, root])


def scaled_normalisation() -> onnx.ModelProto:
    d = draft((2, 5, 3))
    return d.finish(d.matmul(affine(d, "Mul", layer_normalisation(d, "x"), PER_CHANNEL[:3]), 3, 4))


def shifted_normalisation() -> onnx.ModelProto:
    d = draft((2, 5, 3))
    scaled = affine(d, "Mul", layer_normalisation(d, "x"), PER_CHANNEL[:3], constant_first=True)
    return d.finish(d.matmul(affine(d, "Add", scaled, PER_CHANNEL[:3]), 3, 4))


FUSED_BY_THE_RUNTIME: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.PART_OF_ACTIVATION, gelu_before_a_conv),
    (Why.PART_OF_NORMALISATION, scaled_normalisation),
    (Why.PART_OF_NORMALISATION, shifted_normalisation),
]

DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.TWO_VARIABLES, residual),
    (Why.NO_VARIABLE, constant_expression),
    (Why.NOT_FLOAT, integers),
    (Why.LEGACY_BROADCAST, old_broadcast),
    (Why.DIVIDES_BY_VARIABLE, reciprocal),
    (Why.NOT_FINITE, division_by_zero),
    (Why.NOT_FINITE, infinity),
    (Why.SHAPE_UNKNOWN, unknown_shape),
    (Why.ENLARGES_OUTPUT, rank_grows),
    (Why.ENLARGES_OUTPUT, channels_grow),
    (Why.ENLARGES_OUTPUT, batch_may_grow),
    (Why.NOT_ONE_OPERATOR, scale_then_shift),
    (Why.WOULD_GROW, outer_product),
    (Why.NO_LINEAR_NEIGHBOUR, alone),
    (Why.NO_LINEAR_NEIGHBOUR, across_indices),
    (Why.NO_LINEAR_NEIGHBOUR, across_ceil_mode),
    (Why.NO_LINEAR_NEIGHBOUR, transposed_data),
    (Why.WEIGHT_NOT_CONSTANT, constant_times_data),
    (Why.OTHER_READERS, read_elsewhere),
    (Why.OTHER_READERS, two_readers_behind),
    (Why.OTHER_READERS, reads_itself_as_slope),
    (Why.OTHER_READERS, pair_read_elsewhere),
    (Why.OTHER_READERS, captured_between),
    (Why.OTHER_READERS, captured_behind),
    (Why.NOT_ONE_OPERATOR, product_read_before_its_bias),
    (Why.GRAPH_OUTPUT, graph_output_between),
    (Why.GRAPH_OUTPUT, graph_output_behind),
    (Why.GRAPH_OUTPUT, pair_with_graph_output),
    (Why.NON_LINEAR_BETWEEN, negative_across_relu),
    (Why.NON_LINEAR_BETWEEN, zero_across_maximum),
    (Why.NON_LINEAR_BETWEEN, shift_across_relu),
    (Why.WEIGHT_NOT_CONSTANT, computed_weight),
    (Why.WEIGHT_NOT_CONSTANT, computed_weight_behind),
    (Why.WEIGHT_NOT_CONSTANT, computed_gemm_bias),
    (Why.BIAS_NOT_PER_CHANNEL, gemm_bias_per_row),
    (Why.NOT_PER_CHANNEL, along_width),
    (Why.NOT_PER_CHANNEL, map_across_pool),
    (Why.NOT_PER_CHANNEL, pool_over_the_channels_of_a_matmul),
    (Why.SHIFT_MEETS_PADDING, padded_behind),
    (Why.SHIFT_MEETS_PADDING, automatically_padded_behind),
    (Why.SHIFT_MEETS_PADDING, transposed_behind),
    (Why.SHIFT_MEETS_PADDING, average_of_padding),
    (Why.NO_BIAS_INPUT, matmul_of_rank_3),
    (Why.OUT_OF_RANGE, too_large_for_half),
    (Why.OUT_OF_RANGE, too_small_for_half),
    (Why.OUT_OF_RANGE, pair_too_small),
]


@pytest.mark.parametrize(("why", "build"), DECLINES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    proto = build()
    outcome = fold(proto)
    assert why.value in outcome.reasons
    # The first of two in a row has no neighbour, or is an added bias read twice.
    assert outcome.reasons <= {why.value, Why.NO_LINEAR_NEIGHBOUR.value, Why.OTHER_READERS.value}
    assert outcome.applied == 0
    assert len(outcome.ops) == len(proto.graph.node)


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in (*DECLINES, *FUSED_BY_THE_RUNTIME)} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """A model under construction, drawn operator by operator."""

    draw: st.DrawFn
    d: Draft
    rank: int

    def sprinkle(self, value: str, size: int, *others: str) -> str:
        """A few affine operators on *size* channels, and *others*, in a row."""
        for _ in range(self.draw(st.integers(0, 3))):
            kinds = ["affine", "affine", "affine", "normalisation", *others]
            kind = self.draw(st.sampled_from(kinds))
            if kind == "affine":
                value = self.affine(value, size)
            elif kind == "normalisation":
                value = self.d.batch_normalization(value, size)
            elif kind == "Relu":
                value = self.d.add(self.draw(st.sampled_from(["Relu", "LeakyRelu"])), [value])
            else:
                pool = self.draw(st.sampled_from(["MaxPool", "AveragePool"]))
                window = {"kernel_shape": [2] * self.rank, "pads": [1] * (2 * self.rank)}
                value = self.d.add(pool, [value], **window)
        return value

    def affine(self, value: str, size: int) -> str:
        op, constant_first = self.draw(st.sampled_from(FORMS))
        ones = (1,) * self.rank
        shape = self.draw(st.sampled_from([(), (1, *ones), (size, *ones), (1, size, *ones)]))
        values = self.d.signed(*shape)
        if self.draw(st.booleans()):
            values = np.abs(values)
        return affine(self.d, op, value, values, constant_first=constant_first)

    def convs(self, value: str, double: bool) -> tuple[str, int]:
        """One linear operator, or two and a Concat, with others behind each; and its channels."""
        cin, cout, group = self.draw(channels())
        self.d.shape = (*self.d.shape[:1], cin, *self.d.shape[2:])
        value = self.sprinkle(value, cin, "Relu", "pool")
        # The reference implementation, which float64 needs, lacks some forms of ConvTranspose.
        transposed = not double and self.draw(st.booleans())
        geometry = self.draw(geometries(self.rank, transposed=transposed))
        pieces: list[str] = []
        for _ in range(self.draw(st.sampled_from([1, 1, 2]))):
            form: dict[str, Any] = {
                "group": group,
                "bias": self.draw(st.booleans()),
                "transposed": transposed,
            }
            piece = self.d.conv(value, cin, cout, geometry, **form)
            pieces.append(self.sprinkle(piece, cout, "Relu"))
        if len(pieces) == 1:
            return pieces[0], cout
        return self.d.add("Concat", pieces, axis=1), 2 * cout


@st.composite
def chains(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """Affine operators, activations, pools and Concat around a few linear operators."""
    rank = draw(st.integers(1, 3))
    opset = draw(st.sampled_from(OPSETS))
    seed = draw(st.integers(0, 2**32 - 1))
    # ONNX's reference implementation, needed for float64, trains before opset 14.
    dtype = draw(st.sampled_from(DTYPES if rank == 2 and opset >= 14 else DTYPES[:2]))
    shape = (draw(BATCH), 1, *(draw(st.integers(5, 7)),) * rank)
    d = Draft(np.random.default_rng(seed), shape, dtype, opset)
    d.shares = draw(st.booleans())
    drawing = Drawing(draw, d, rank)
    value, size = drawing.convs("x", dtype is np.float64)
    value = drawing.sprinkle(value, size, "Relu", "pool")
    if draw(st.booleans()):
        value = d.conv(value, size, 2, Geometry.plain(1, rank))
        value = drawing.sprinkle(value, 2, "Relu", "pool")
    return draw(seen_inside(d.finish(d.add("Identity", [value])))), d


def check(case: tuple[onnx.ModelProto, Draft]) -> None:
    proto, d = case
    assert_agree(proto, fold(proto).model, d.rng, factor=16, batch=3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(chains())
def test_outputs_agree(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(chains())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.parametrize(("why", "build"), FUSED_BY_THE_RUNTIME)
def test_leaves_alone_what_the_runtime_fuses(
    why: Why, build: Callable[[], onnx.ModelProto]
) -> None:
    proto = build()
    outcome = fold(proto)
    assert why.value in outcome.reasons
    assert outcome.applied == 0
