"""Strides that move up to where pixels are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import pwopt
from pwopt import models
from pwopt.passes.eliminate_dead_pixels import EliminateDeadPixels
from pwopt.passes.fold_batch_normalization import FoldBatchNormalization
from tests.passes import harness
from tests.passes.linear_models import BATCH, OPSETS, Draft, Geometry, assert_agree

Array = np.ndarray[Any, Any]
Why = EliminateDeadPixels.Why
SAME = Geometry.plain(3, pad=1)
POINT = Geometry.plain(1)
HALF = Geometry.plain(1, stride=2)


def draft(shape: Any = (2, 3, 9, 8), **settings: Any) -> Draft:
    return Draft(np.random.default_rng(0), shape, **settings)


def eliminate(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(EliminateDeadPixels(), proto, **settings)


def check(before: onnx.ModelProto, **dims: int) -> harness.Outcome:
    after = eliminate(before)
    assert_agree(before, after.model, np.random.default_rng(0), **dims)
    return after


def strides(proto: onnx.ModelProto) -> list[list[int]]:
    """Of all windows, in order."""
    found: list[list[int]] = []
    for node in proto.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if "kernel_shape" in attributes:
            found.append(list(attributes.get("strides", [1] * len(attributes["kernel_shape"]))))
    return found


def sampling(d: Draft, x: str, *steps: int, ends: Sequence[int] | None = None) -> str:
    """A Slice of every n-th row and column."""
    values = {
        "starts": [0] * len(steps),
        "ends": ends or [2**31 - 1] * len(steps),
        "axes": list(range(2, 2 + len(steps))),
        "steps": steps,
    }
    names = []
    for key, numbers in values.items():
        names.append(f"{key}{len(d.weights)}")
        d.weights[names[-1]] = np.array(numbers, np.int64)
    return d.add("Slice", [x, *names])


# -- golden ----------------------------------------------------------------------------------------


def test_a_convolution_takes_the_stride() -> None:
    d = draft()
    hidden = d.add("Relu", [d.conv("x", 3, 4, SAME)])
    after = check(d.finish(d.conv(hidden, 4, 5, HALF)))
    assert after.ops == ["Conv", "Relu", "Conv"]
    assert strides(after.model) == [[2, 2], [1, 1]]
    (remark,) = [r for r in after.remarks if r.ordinal is not None]
    assert (remark.facts["factor"], remark.facts["sampled"]) == ([2, 2], 0)
    inferred = onnx.shape_inference.infer_shapes(after.model, strict_mode=True)
    shapes = {
        v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim]
        for v in inferred.graph.value_info
    }
    assert set(map(tuple, shapes.values())) == {(2, 4, 5, 4)}


def test_the_end_of_a_stage_of_an_original_resnet() -> None:
    d = draft()
    shortcut = d.add("Relu", [d.conv("x", 3, 8, SAME)])
    hidden = d.add("Relu", [d.conv(shortcut, 8, 4, POINT)])
    hidden = d.batch_normalization(d.conv(hidden, 4, 4, SAME), 4)
    hidden = d.conv(d.add("Relu", [hidden]), 4, 8, POINT)
    joined = d.add("Relu", [d.add("Add", [hidden, shortcut])])
    one = d.conv(d.add("Relu", [d.conv(joined, 8, 4, HALF)]), 4, 16, POINT)
    before = d.finish(d.add("Add", [one, d.conv(joined, 8, 16, HALF)]))
    after = check(before)
    assert after.applied == 1
    assert after.ops.count("AveragePool") == 1
    assert len(after.ops) == len(before.graph.node) + 1
    convs = [n for n in after.model.graph.node if n.op_type == "Conv"]
    steps = [
        list(helper.get_attribute_value(a))
        for n in convs
        for a in n.attribute
        if a.name == "strides"
    ]
    assert sorted(steps) == [[1, 1]] * 6 + [[2, 2]]


def test_up_through_everything_that_works_by_pixel() -> None:
    d = draft((2, 3, 7, 8))
    d.weights["map"] = d.noise(1, 7, 8).astype(np.float32)
    d.weights["slope"] = d.noise(4, 1, 1).astype(np.float32)
    d.weights["low"] = np.array(-0.5, np.float32)
    conv = d.conv("x", 3, 4, SAME)
    value = d.add("Mul", [conv, d.add("Sigmoid", [conv])])  # read twice
    value = d.add("Add", [value, "map"])
    value = d.add("PRelu", [d.batch_normalization(value, 4), "slope"])
    gate = d.add("GlobalAveragePool", ["x"])
    gate = d.add("Sigmoid", [d.conv(gate, 3, 4, POINT)])
    value = d.add("LRN", [d.add("Mul", [gate, value])], size=3)
    value = d.add("Concat", [d.add("Clip", [value, "low"]), d.conv("x", 3, 2, SAME)], axis=-3)
    value = d.conv(value, 6, 4, POINT, group=2)
    before = d.finish(d.add("Tanh", [d.conv(value, 4, 2, Geometry.plain(1, stride=3))]))
    after = check(before)
    assert sorted(after.ops) == sorted(n.op_type for n in before.graph.node)
    assert sorted(strides(after.model))[-2:] == [[3, 3], [3, 3]]
    (sampled,) = [
        t for t in after.model.graph.initializer if t.name.startswith("map") and len(t.dims) == 3
    ]
    expected = d.weights["map"][:, ::3, ::3]
    np.testing.assert_array_equal(numpy_helper.to_array(sampled), expected)


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_pools_that_only_sample_go(op: str) -> None:
    d = draft()
    hidden = d.add("Relu", [d.conv("x", 3, 4, SAME)])
    pooled = d.add(op, [hidden], kernel_shape=[1, 1], strides=[2, 2])
    after = check(d.finish(d.add("Max", [pooled, d.conv(hidden, 4, 4, HALF)])))
    assert after.ops == ["Conv", "Relu", "Conv", "Max"]
    assert strides(after.model) == [[2, 2], [1, 1]]


def test_a_pool_that_names_an_output_stays_where_it_must() -> None:
    d = draft()
    hidden = d.conv("x", 3, 4, SAME)
    before = d.finish(d.add("MaxPool", [hidden], kernel_shape=[1, 1], strides=[2, 2]))
    after = check(before)
    assert after.ops == ["Conv"]
    assert after.model.graph.node[0].output == ["y"]


@pytest.mark.parametrize("ends", [[2**31 - 1] * 2, [9, 8], [-1, 8], [9, -1]], ids=str)
def test_slices_keep_reading_to_the_end(ends: list[int]) -> None:
    d = draft((2, 3, 10, 8))
    ends = [10 if e == 9 else e for e in ends]
    hidden = d.add("Relu", [d.conv("x", 3, 4, SAME)])
    after = check(d.finish(sampling(d, hidden, 2, 4, ends=ends)))
    assert after.ops == ["Conv", "Relu", "Slice"]
    assert strides(after.model) == [[2, 4]]
    again = pwopt.Pipeline([]).run(after.model)
    assert [n.op_type for n in again.graph.node] == ["Conv", "Relu"]


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_a_pool_takes_the_stride(op: str) -> None:
    d = draft()
    window = {"kernel_shape": [3, 2], "strides": [1, 2], "pads": [1, 0, 0, 1]}
    after = check(d.finish(d.conv(d.add(op, ["x"], **window), 3, 4, HALF)))
    assert strides(after.model) == [[2, 4], [1, 1]]


def test_what_the_strides_have_in_common() -> None:
    d = draft()
    hidden = d.conv("x", 3, 4, SAME)
    four, six = (d.conv(hidden, 4, 2, Geometry.plain(1, stride=s)) for s in (4, 6))
    before = d.finish(d.add("Concat", [d.add("GlobalMaxPool", [v]) for v in (four, six)], axis=1))
    after = check(before)
    assert strides(after.model) == [[2, 2], [2, 2], [3, 3]]


def test_axes_by_themselves() -> None:
    d = draft()
    row = Geometry((1, 3), (2, 2), (1, 1), (0, 1, 0, 1))
    after = check(d.finish(d.conv(d.conv("x", 3, 4, SAME), 4, 2, row)))
    assert strides(after.model) == [[2, 1], [1, 2]]


def test_a_stride_climbs_a_chain_of_strided_convolutions() -> None:
    d = draft()
    hidden = d.conv(d.conv("x", 3, 4, SAME), 4, 4, HALF)
    after = check(d.finish(d.conv(d.add("Relu", [hidden]), 4, 4, HALF)))
    assert strides(after.model) == [[4, 4], [1, 1], [1, 1]]


def test_branches_that_meet_above() -> None:
    d = draft()
    trunk = d.conv("x", 3, 4, SAME)
    left = d.conv(d.add("Relu", [trunk]), 4, 2, HALF)
    right = sampling(d, d.add("Tanh", [trunk]), 2, 2)
    after = check(d.finish(d.add("Concat", [left, right], axis=1)))
    assert after.applied == 1
    assert strides(after.model) == [[2, 2], [1, 1]]


def test_automatic_pads_are_spelled_out() -> None:
    """What they stand for depends on the stride."""
    d = draft()
    same = Geometry((3, 3), (1, 1), (1, 1), (0,) * 4, "SAME_UPPER")
    after = check(d.finish(d.conv(d.conv("x", 3, 4, same), 4, 2, HALF)))
    assert strides(after.model) == [[2, 2], [1, 1]]
    attributes = {a.name: a for a in after.model.graph.node[0].attribute}
    assert list(attributes["pads"].ints) == [1, 1, 1, 1]
    assert "auto_pad" not in attributes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("space", [(9,), (9, 8), (5, 6, 7)], ids=str)
def test_the_form_that_samples(space: tuple[int, ...], dtype: Any) -> None:
    d = draft((2, 3, *space), dtype=dtype)
    rank = len(space)
    hidden = d.conv("x", 3, 3, Geometry.plain(3, rank, pad=1))
    joined = d.add("Add", [hidden, "x"])
    before = d.finish(d.conv(joined, 3, 4, Geometry.plain(1, rank, stride=2)))
    after = check(before)
    form = "AveragePool" if dtype is np.float32 and rank == 2 else "Slice"
    assert sorted(after.ops) == sorted(["Add", "Conv", "Conv", form])


def test_values_that_are_no_numbers_are_sampled_too() -> None:
    """The kernels of MaxPool take NaN for less than any number."""
    d = draft((1, 1, 4, 4))
    hidden = d.conv("x", 1, 1, SAME)
    before = d.finish(sampling(d, d.add("Add", [hidden, d.add("Log", ["x"])]), 2, 2))
    after = eliminate(before).model
    feeds = {"x": np.full((1, 1, 4, 4), -1.0, np.float32)}
    expected, found = (harness.run_unoptimized(p, feeds)["y"] for p in (before, after))
    assert np.isnan(expected).all()
    np.testing.assert_array_equal(found, expected)


def test_dynamic_sizes() -> None:
    d = draft(("N", 3, "H", "W"))
    hidden = d.add("Add", [d.conv("x", 3, 3, SAME), "x"])
    before = d.finish(d.conv(hidden, 3, 4, HALF))
    after = eliminate(before)
    assert after.applied == 1
    for height, width in ((9, 8), (1, 2), (7, 1)):
        rng = np.random.default_rng(0)
        harness.assert_same_outputs(before, after.model, rng, N=2, H=height, W=width)


def test_a_broadcast_along_space() -> None:
    d = draft((2, 3, 9, 8))
    column = d.add("ReduceMax", ["x"], axes=[3])
    joined = d.add("Add", [d.conv("x", 3, 3, SAME), column])
    after = check(d.finish(d.conv(joined, 3, 4, HALF)))
    assert after.applied == 1


def test_a_shared_map_gets_a_copy() -> None:
    d = draft((2, 3, 9, 8))
    d.weights["map"] = d.noise(9, 8).astype(np.float32)
    joined = d.add("Mul", [d.conv("x", 3, 3, SAME), "map"])
    other = d.add("ReduceSum", [d.add("Mul", ["x", "map"])], keepdims=1)
    before = d.finish(d.add("Add", [d.conv(joined, 3, 4, HALF), other]))
    after = check(before)
    assert after.applied == 1
    found = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    np.testing.assert_array_equal(found["map"], d.weights["map"])


def test_the_original_resnet() -> None:
    before = pwopt.Pipeline([FoldBatchNormalization()]).run(models.build("resnet50_original"))
    outcome = eliminate(before)
    assert outcome.applied == 3
    assert [r.facts["sampled"] for r in outcome.remarks if r.ordinal is not None] == [1, 1, 1]
    assert outcome.ops.count("AveragePool") == 3
    harness.assert_same_outputs(before, outcome.model, np.random.default_rng(0), factor=64)


@pytest.mark.parametrize("name", ["resnet50", "resnet18", "resnet50_v2", "shufflenet_v2_1_0x"])
def test_networks_that_read_every_pixel(name: str) -> None:
    """Where a convolution with a larger kernel strides, it is what reads the rest."""
    assert eliminate(models.build(name)).applied == 0


# -- reasons to decline ----------------------------------------------------------------------------


def plain() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 3, 4, SAME), 4, 4, Geometry.plain(3, stride=2)))


def slice_of_channels() -> onnx.ModelProto:
    d = draft()
    values = {"starts": 0, "ends": 4, "axes": 1, "steps": 2}
    d.weights.update({k: np.array([v], np.int64) for k, v in values.items()})
    return d.finish(d.add("Slice", [d.conv("x", 3, 4, SAME), *values]))


def slice_from_the_second() -> onnx.ModelProto:
    d = draft()
    y = sampling(d, d.conv("x", 3, 4, SAME), 2, 2)
    d.weights[d.nodes[-1].input[1]] = np.array([1, 1])
    return d.finish(y)


def unknown_rank() -> onnx.ModelProto:
    d = draft(("N", 3, "H", "W", 1))
    squeezed = d.add("Squeeze", ["x"])
    proto = d.finish(d.conv(squeezed, 3, 4, HALF))
    del proto.graph.output[0].type.tensor_type.shape.dim[4:]
    return proto


def unknown_weight() -> onnx.ModelProto:
    d = draft()
    d.nodes.append(harness.node("NonZero", ["x"], ["indices"]))
    d.nodes.append(harness.node("ReduceMax", ["indices"], ["size"], axes=[1], keepdims=0))
    d.nodes.append(harness.node("ConstantOfShape", ["size"], ["weight"]))
    return d.finish(d.add("Conv", ["x", "weight"], strides=[2, 2]))


def padded() -> onnx.ModelProto:
    d = draft()
    reader = Geometry((1, 1), (2, 2), (1, 1), (1, 1, 0, 1))
    return d.finish(d.conv(d.conv("x", 3, 4, SAME), 4, 4, reader))


def rounds_up() -> onnx.ModelProto:
    d = draft()
    window = {"kernel_shape": [1, 1], "strides": [2, 2], "ceil_mode": 1}
    return d.finish(d.add("MaxPool", [d.conv("x", 3, 4, SAME)], **window))


def indices() -> onnx.ModelProto:
    d = draft()
    pooled = d.add("MaxPool", [d.conv("x", 3, 4, SAME)], kernel_shape=[1, 1], strides=[2, 2])
    d.nodes[-1].output.append("indices")
    proto = d.finish(pooled)
    proto.graph.output.append(
        helper.make_tensor_value_info("indices", onnx.TensorProto.INT64, [2, 4, 5, 4])
    )
    return proto


def read_elsewhere() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 3, 4, SAME)
    pooled = d.add("GlobalMaxPool", [hidden])
    return d.finish(d.add("Mul", [d.conv(hidden, 4, 4, HALF), pooled]))


def read_at_odd_pixels() -> onnx.ModelProto:
    d = draft((2, 3, 12, 12))
    hidden = d.conv("x", 3, 4, SAME)
    two, three = (d.conv(hidden, 4, 4, Geometry.plain(1, stride=s)) for s in (2, 3))
    return d.finish(d.add("Mul", [two, d.add("GlobalMaxPool", [three])]))


def captured() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 3, 4, SAME)
    value = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph([harness.node("Relu", [hidden], ["z"])], "branch", [], [value])
    d.weights["condition"] = np.array(True)
    taken = d.add("If", ["condition"], then_branch=branch, else_branch=branch)
    return d.finish(d.add("Mul", [d.conv(hidden, 4, 4, HALF), d.add("GlobalMaxPool", [taken])]))


def its_own_weight() -> onnx.ModelProto:
    d = draft((3, 3, 1, 1))
    hidden = d.conv("x", 3, 3, POINT)
    return d.finish(d.add("Conv", [hidden, hidden], strides=[2, 2], kernel_shape=[1, 1]))


def graph_output() -> onnx.ModelProto:
    d = draft()
    hidden = d.conv("x", 3, 4, SAME)
    return d.finish(d.conv(hidden, 4, 4, HALF), hidden)


def nothing_before() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv("x", 3, 4, HALF))


def nothing_but_activations() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.add("Relu", ["x"]), 3, 4, HALF))


def behind_a_transposed_one() -> onnx.ModelProto:
    d = draft()
    return d.finish(d.conv(d.conv("x", 3, 4, SAME, transposed=True), 4, 4, HALF))


def behind_a_pool_that_rounds_up() -> onnx.ModelProto:
    d = draft()
    pooled = d.add("MaxPool", ["x"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    return d.finish(d.conv(pooled, 3, 4, HALF))


def behind_unknown_pads() -> onnx.ModelProto:
    d = draft((2, 3, "H", "W"))
    same = Geometry((3, 3), (3, 3), (1, 1), (0,) * 4, "SAME_UPPER")
    return d.finish(d.conv(d.conv("x", 3, 4, same), 4, 4, HALF))


def no_slices_with_steps() -> onnx.ModelProto:
    d = draft(dtype=np.float16, opset=9)
    joined = d.add("Add", [d.conv("x", 3, 3, SAME), "x"])
    return d.finish(d.conv(joined, 3, 4, HALF))


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.READS_EVERY_PIXEL, plain),
    (Why.READS_EVERY_PIXEL, slice_of_channels),
    (Why.READS_EVERY_PIXEL, slice_from_the_second),
    (Why.SHAPE_UNKNOWN, unknown_rank),
    (Why.SHAPE_UNKNOWN, unknown_weight),
    (Why.PADDED, padded),
    (Why.ROUNDS_UP, rounds_up),
    (Why.INDICES_READ, indices),
    (Why.OTHER_READERS, read_elsewhere),
    (Why.OTHER_READERS, read_at_odd_pixels),
    (Why.OTHER_READERS, captured),
    (Why.OTHER_READERS, its_own_weight),
    (Why.GRAPH_OUTPUT, graph_output),
    (Why.NOTHING_SAVED, nothing_before),
    (Why.NOTHING_SAVED, nothing_but_activations),
    (Why.NOTHING_SAVED, behind_a_transposed_one),
    (Why.NOTHING_SAVED, behind_a_pool_that_rounds_up),
    (Why.NOTHING_SAVED, behind_unknown_pads),
    (Why.OP_NOT_IN_OPSET, no_slices_with_steps),
]


@pytest.mark.parametrize(("why", "build"), DECLINES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    outcome = eliminate(build())
    assert why.value in outcome.reasons
    assert outcome.reasons <= {why.value, Why.READS_EVERY_PIXEL.value}
    assert outcome.applied == 0


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """A model of a few tensors of one shape, drawn operator by operator."""

    draw: st.DrawFn
    d: Draft
    space: tuple[int, ...]
    tensors: list[str]

    CHANNELS = 2

    def any(self) -> str:
        return self.draw(st.sampled_from(self.tensors[-4:]))

    def pool(self) -> str:
        # ONNX's reference implementation, needed for float64, misplaces what MaxPool finds.
        ops = ["AveragePool"] if self.d.dtype is np.float64 else ["MaxPool", "AveragePool"]
        return self.draw(st.sampled_from(ops))

    def grow(self) -> None:
        """Another tensor of the same shape."""
        d, rank = self.d, len(self.space)
        kinds = ["conv", "conv", "pointwise", "Relu", "binary", "constant", "normalisation", "gate"]
        kind = self.draw(st.sampled_from([*kinds, "pool"]))
        size = self.CHANNELS
        if kind == "conv":
            window = Geometry((3,) * rank, (1,) * rank, (1,) * rank, (1,) * (2 * rank))
            group = self.draw(st.sampled_from([1, size]))
            made = d.conv(
                self.any(), size, size, window, group=group, bias=self.draw(st.booleans())
            )
        elif kind == "pointwise":
            made = d.conv(self.any(), size, size, Geometry.plain(1, rank))
        elif kind == "Relu":
            made = d.add(self.draw(st.sampled_from(["Relu", "Tanh"])), [self.any()])
        elif kind == "binary":
            made = d.add(self.draw(st.sampled_from(["Add", "Mul"])), [self.any(), self.any()])
        elif kind == "constant":
            shapes = [self.space, (size, *(1,) * rank), (1, size, *self.space), ()]
            values = d.noise(*self.draw(st.sampled_from(shapes)))
            made = d.add("Add", [self.any(), d.weight("c", values)])
        elif kind == "normalisation":
            made = d.batch_normalization(self.any(), size)
        elif kind == "gate":
            made = d.add("Mul", [self.any(), d.add("GlobalAveragePool", [self.any()])])
        else:
            op = self.pool()
            pads = self.draw(st.sampled_from([[0] * rank + [1] * rank, [1] * rank + [0] * rank]))
            made = d.add(op, [self.any()], kernel_shape=[2] * rank, pads=pads)
        self.tensors.append(made)

    def read(self, tensor: str, strides: tuple[int, ...]) -> str:
        """A scalar per channel of what is left of *tensor* by *strides*."""
        d, rank = self.d, len(self.space)
        kind = self.draw(st.sampled_from(["conv", "pool", "slice"]))
        if kind == "slice" and d.opset >= 10:
            found = sampling(d, tensor, *strides)
        elif kind == "pool":
            op = self.pool()
            found = d.add(op, [tensor], kernel_shape=[1] * rank, strides=list(strides))
        else:
            kernel = (1,) * rank
            window = Geometry(kernel, strides, (1,) * rank, (0,) * (2 * rank))
            found = d.conv(tensor, self.CHANNELS, self.CHANNELS, window)
        return d.add("GlobalAveragePool", [found]) if self.draw(st.booleans()) else found


@st.composite
def networks(draw: st.DrawFn) -> tuple[onnx.ModelProto, int]:
    """Tensors of one shape that feed each other, most of them read by strided nodes."""
    rank = draw(st.sampled_from([2, 2, 2, 1]))
    space = tuple(draw(st.lists(st.integers(3, 7), min_size=rank, max_size=rank)))
    shape: tuple[int | str, ...] = (draw(BATCH), Drawing.CHANNELS, *space)
    opset = draw(st.sampled_from(OPSETS))
    # It also trains before opset 14.
    dtypes = [np.float32, np.float32, np.float16, np.float64]
    dtype = draw(st.sampled_from(dtypes if opset >= 14 else dtypes[:3]))
    seed = draw(st.integers(0, 2**32 - 1))
    d = Draft(np.random.default_rng(seed), shape, dtype, opset)
    d.shares = draw(st.booleans())
    drawing = Drawing(draw, d, space, ["x"])
    for _ in range(draw(st.integers(2, 7))):
        drawing.grow()
    steps = st.tuples(*[st.sampled_from([2, 2, 2, 1, 4, 3])] * rank)
    stride = draw(steps)
    read = {name for node in d.nodes for name in node.input}
    outputs = [
        drawing.read(tensor, draw(st.sampled_from([stride, stride, draw(steps)])))
        for tensor in drawing.tensors[1:]
        if tensor not in read or draw(st.integers(0, 3)) == 0
    ]
    extra = [t for t in drawing.tensors[1:-1] if draw(st.integers(0, 7)) == 0]
    return d.finish(outputs[0], *outputs[1:], *extra), seed


def check_network(case: tuple[onnx.ModelProto, int]) -> None:
    before, seed = case
    after = eliminate(before).model
    assert_agree(before, after, np.random.default_rng(seed), factor=16, batch=3)


@settings(max_examples=50, deadline=None)
@given(networks())
def test_outputs_agree(case: tuple[onnx.ModelProto, int]) -> None:
    check_network(case)


@pytest.mark.slow
@settings(max_examples=700, deadline=None)
@given(networks())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, int]) -> None:
    check_network(case)
