"""Pointwise convolutions behind pools and before upsamplings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt import models as zoo
from pwopt.passes.commute_pointwise import CommutePointwise
from tests.passes import harness
from tests.passes.linear_models import BATCH, Draft, Geometry, assert_agree, seen_inside

Why = CommutePointwise.Why
POINT = Geometry.plain(1)
HALVE = {"kernel_shape": [2, 2], "strides": [2, 2]}


class Sketch(Draft):
    """A draft with Resize as the opset has it."""

    def exact(self, values: Any, dtype: Any) -> str:
        """A constant of its own type."""
        name = f"e{len(self.weights)}"
        self.weights[name] = np.asarray(values, dtype)
        return name

    def upsample(self, x: str, *factors: float, mode: str = "nearest", **attributes: Any) -> str:
        given = (1.0, 1.0, *factors)
        if self.opset < 9:
            return self.add("Upsample", [x], scales=given, mode=mode, **attributes)
        scales = self.exact(given, np.float32)
        if self.opset < 11:
            op = "Upsample" if self.opset == 9 else "Resize"
            return self.add(op, [x, scales], mode=mode, **attributes)
        region = "" if self.opset > 12 else self.exact([], np.float32)  # an input to give till 13
        return self.add("Resize", [x, region, scales], mode=mode, **attributes)

    def resize_to(self, x: str, sizes: Sequence[int], **attributes: Any) -> str:
        return self.add("Resize", [x, "", "", self.exact(sizes, np.int64)], **attributes)


def sketch(shape: Sequence[int | str] = (2, 8, 8, 6), **settings: Any) -> Sketch:
    return Sketch(np.random.default_rng(0), shape, **settings)


def commute(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(CommutePointwise(), proto, **settings)


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 10, 11, 17, 19, 21])
def test_a_pool_goes_first(opset: int) -> None:
    d = sketch(opset=opset)
    before = d.finish(d.add("AveragePool", [d.conv("x", 8, 4, POINT)], **HALVE))
    after = commute(before)
    assert after.ops == ["AveragePool", "Conv"]
    assert after.model.graph.node[0].input[0] == "x"
    assert_agree(before, after.model, d.rng)


def test_a_global_pool_goes_first() -> None:
    d = sketch()
    before = d.finish(d.add("GlobalAveragePool", [d.conv("x", 8, 4, POINT, group=2)]))
    after = commute(before)
    assert after.ops == ["GlobalAveragePool", "Conv"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 18, 21])
def test_an_upsampling_goes_last(opset: int, mode: str) -> None:
    d = sketch(opset=opset)
    before = d.finish(d.conv(d.upsample("x", 2, 2, mode=mode), 8, 4, POINT))
    after = commute(before)
    assert [op.replace("Upsample", "Resize") for op in after.ops] == ["Conv", "Resize"]
    assert_agree(before, after.model, d.rng)


def test_sizes_follow_the_channels() -> None:
    d = sketch()
    before = d.finish(d.conv(d.resize_to("x", (2, 8, 13, 9), mode="linear"), 8, 4, POINT))
    after = commute(before)
    assert after.ops == ["Conv", "Resize"]
    held = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    np.testing.assert_array_equal(held[after.model.graph.node[1].input[3]], [2, 4, 13, 9])
    assert_agree(before, after.model, d.rng)


def test_sizes_of_some_axes() -> None:
    d = sketch(opset=18)
    before = d.finish(d.conv(d.resize_to("x", (13, 8), axes=[-1, 2]), 8, 4, POINT))
    after = commute(before)
    assert after.ops == ["Conv", "Resize"]
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("build", ["pool", "upsampling"])
def test_dynamic_sizes(build: str) -> None:
    d = sketch(("batch", 8, "h", "w"))
    if build == "pool":
        y = d.add("AveragePool", [d.conv("x", 8, 4, POINT)], **HALVE)
    else:
        y = d.conv(d.upsample("x", 2, 1.5, mode="linear"), 8, 4, POINT)
    before = d.finish(y)
    after = commute(before)
    assert after.applied == 1
    assert_agree(before, after.model, d.rng, batch=3, h=7, w=5)


def test_a_computed_weight_and_a_weight_that_may_be_overridden() -> None:
    d = sketch()
    weight = d.add("Neg", [d.weight("w", d.noise(4, 8, 1, 1))])
    conv = d.add("Conv", ["x", weight], **POINT.attributes())
    before = d.finish(d.add("AveragePool", [conv], **HALVE))
    after = commute(before)
    assert after.ops == ["Neg", "AveragePool", "Conv"]
    assert_agree(before, after.model, d.rng)
    assert commute(before, overridable=True).applied == 1


def test_one_conv_through_two_upsamplings() -> None:
    d = sketch()
    inner = d.upsample("x", 2, 2)
    before = d.finish(d.conv(d.upsample(inner, 2, 2, mode="linear"), 8, 4, POINT))
    after = commute(before)
    assert after.ops == ["Conv", "Resize", "Resize"]
    assert_agree(before, after.model, d.rng)


# -- reasons to decline ----------------------------------------------------------------------------


def pooled(
    geometry: Geometry = POINT,
    op: str = "AveragePool",
    shape: Sequence[int | str] = (2, 8, 8, 6),
    channels: tuple[int, int] = (8, 4),
    **attributes: Any,
) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        d = sketch(shape)
        given = {} if op.startswith("Global") else HALVE | attributes
        return d.finish(d.add(op, [d.conv("x", *channels, geometry)], **given))

    return make


def upsampled(
    *factors: float,
    shape: Sequence[int | str] = (2, 8, 8, 6),
    channels: tuple[int, int] = (8, 4),
    **attributes: Any,
) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        d = sketch(shape, opset=18)
        return d.finish(d.conv(d.upsample("x", *factors, **attributes), *channels, POINT))

    return make


def shapeless_weight() -> onnx.ModelProto:
    d = sketch()
    weight = d.add("Anything", ["x"], domain="custom")
    conv = d.add("Conv", ["x", weight], **POINT.attributes())
    return d.finish(d.add("AveragePool", [conv], **HALVE), domains={"custom": 1})


def conv_is_output() -> onnx.ModelProto:
    d = sketch()
    conv = d.conv("x", 8, 4, POINT)
    return d.finish(d.add("AveragePool", [conv], **HALVE), conv)


def upsampling_is_output() -> onnx.ModelProto:
    d = sketch()
    larger = d.upsample("x", 2, 2)
    return d.finish(d.conv(larger, 8, 4, POINT), larger)


def conv_read_elsewhere() -> onnx.ModelProto:
    d = sketch()
    conv = d.conv("x", 8, 4, POINT)
    pool = d.add("GlobalAveragePool", [conv])
    return d.finish(d.add("Mul", [conv, pool]))


def upsampling_read_elsewhere() -> onnx.ModelProto:
    d = sketch()
    larger = d.upsample("x", 2, 2)
    return d.finish(d.add("Add", [d.conv(larger, 8, 8, POINT), larger]))


def computed_factors() -> onnx.ModelProto:
    d = sketch()
    scales = d.add("Abs", [d.exact([1, 1, 2, 2], np.float32)])
    return d.finish(d.conv(d.add("Resize", ["x", "", scales]), 8, 4, POINT))


def sizes_of_unknown() -> onnx.ModelProto:
    d = sketch((2, 8, "h", "w"))
    return d.finish(d.conv(d.resize_to("x", (2, 8, 9, 9)), 8, 4, POINT))


def keeps_aspect() -> onnx.ModelProto:
    d = sketch(opset=18)
    policy = {"keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]}
    return d.finish(d.conv(d.resize_to("x", (16, 16), **policy), 8, 4, POINT))


def more_channels() -> onnx.ModelProto:
    d = sketch()
    scales = d.exact([1, 2, 2, 2], np.float32)
    return d.finish(d.conv(d.add("Resize", ["x", "", scales]), 16, 4, POINT))


def cropped() -> onnx.ModelProto:
    d = sketch()
    region = d.exact([0, 0, 0, 0, 1, 1, 1.5, 1.5], np.float32)
    scales = d.exact([1, 1, 2, 2], np.float32)
    mode = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    return d.finish(d.conv(d.add("Resize", ["x", region, scales], **mode), 8, 4, POINT))


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.WEIGHT_SHAPE_UNKNOWN, shapeless_weight),
    (Why.NO_PARTNER, pooled(op="MaxPool")),
    (Why.NO_PARTNER, pooled(op="GlobalMaxPool")),
    (Why.NOT_POINTWISE, pooled(Geometry.plain(3))),
    (Why.STRIDED, pooled(Geometry.plain(1, stride=2))),
    (Why.PADDED_CONV, pooled(Geometry.plain(1, pad=1))),
    (Why.GRAPH_OUTPUT, conv_is_output),
    (Why.GRAPH_OUTPUT, upsampling_is_output),
    (Why.OTHER_READERS, conv_read_elsewhere),
    (Why.OTHER_READERS, upsampling_read_elsewhere),
    (Why.PADDED_POOL, pooled(pads=[0, 1, 0, 0])),
    (Why.PADDED_POOL, pooled(pads=[0, 0, 1, 0], count_include_pad=1)),
    (Why.PADS_UNKNOWN, pooled(shape=(1, 8, "h", "w"), auto_pad="SAME_UPPER")),
    (Why.ROUNDS_UP, pooled(ceil_mode=1)),
    (Why.MODE, upsampled(2, 2, mode="cubic")),
    (Why.MODE, upsampled(2, 2, mode="linear", antialias=1)),
    (Why.MODE, cropped),
    (Why.FACTORS_UNKNOWN, computed_factors),
    (Why.FACTORS_UNKNOWN, sizes_of_unknown),
    (Why.FACTORS_UNKNOWN, keeps_aspect),
    (Why.NOT_UPSAMPLING, upsampled(0.5, 2)),
    (Why.NOT_UPSAMPLING, upsampled(1, 1)),
    (Why.NOT_UPSAMPLING, more_channels),
    (Why.MORE_MACS, pooled(kernel_shape=[1, 1], strides=[1, 1])),
    (Why.MORE_MACS, pooled(channels=(8, 1), kernel_shape=[5, 5], strides=[1, 1])),
    (Why.MORE_MACS, upsampled(2, 2, channels=(1, 4), mode="linear")),
    (Why.SIZE_UNKNOWN, pooled(op="GlobalAveragePool", shape=(1, 8, "h", "w"))),
    (
        Why.SIZE_UNKNOWN,
        pooled(shape=(1, 8, "h", "w"), channels=(8, 4), kernel_shape=[4, 4], strides=[1, 1]),
    ),
]


@pytest.mark.parametrize(("why", "build"), DECLINES)
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    proto = build()
    outcome = commute(proto)
    assert outcome.reasons == {why.value}
    assert outcome.applied == 0
    assert outcome.ops == [n.op_type for n in proto.graph.node]


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    group = draw(st.sampled_from([1, 2]))
    cin, cout = (group * draw(st.integers(1, 4)) for _ in range(2))
    sizes: list[int | str] = draw(st.lists(st.integers(4, 7), min_size=2, max_size=2))
    if draw(st.booleans()):
        sizes = ["h", "w"]
    batch: int | str = draw(BATCH)
    kind = draw(st.sampled_from(["AveragePool", "GlobalAveragePool", "nearest", "linear"]))
    d = Sketch(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (batch, cin, *sizes),
        draw(st.sampled_from([np.float16, np.float32])),
        draw(st.sampled_from([7, 9, 10, 11, 13, 17, 18, 21, harness.NEWEST_OPSET])),
    )
    bias = draw(st.booleans())
    if kind in ("nearest", "linear"):
        factors = draw(st.sampled_from([(2, 2), (1, 3), (2, 1), (1.5, 2)]))
        larger = d.upsample("x", *factors, mode=kind)
        y = d.conv(larger, cin, cout, POINT, group=group, bias=bias)
        return draw(seen_inside(d.finish(y))), d
    hidden = d.conv("x", cin, cout, POINT, group=group, bias=bias)
    window = st.lists(st.integers(1, 3), min_size=2, max_size=2)
    given = {"kernel_shape": draw(window), "strides": draw(window)}
    attributes: dict[str, Any] = given if kind == "AveragePool" else {}
    return draw(seen_inside(d.finish(d.add(kind, [hidden], **attributes)))), d


def check(case: tuple[onnx.ModelProto, Draft]) -> None:
    proto, d = case
    outcome = commute(proto)
    if outcome.applied:
        two = [n.op_type for n in proto.graph.node][:2]
        assert outcome.ops[:2] == two[::-1]
    elif len(proto.graph.output) > 1 and len(proto.graph.node) == 2:
        assert outcome.reasons <= {Why.GRAPH_OUTPUT.value, Why.MORE_MACS.value}
    else:
        assert outcome.reasons <= {Why.MORE_MACS.value, Why.SIZE_UNKNOWN.value}
    assert_agree(proto, outcome.model, d.rng, factor=16, batch=2, h=5, w=6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(models())
def test_outputs_agree(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("densenet121", 3), ("unet_resize", 4)])
def test_whole_networks(name: str, count: int) -> None:
    before = zoo.build(name)
    after = commute(before)
    assert after.applied == count
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=16)
