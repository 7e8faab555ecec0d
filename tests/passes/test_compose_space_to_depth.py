"""Phases of an image and the convolution behind them as one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pwopt.passes.compose_space_to_depth import ComposeSpaceToDepth
from tests import zoo
from tests.passes import harness
from tests.passes.linear_models import BATCH, Draft, Geometry, assert_agree, geometries, seen_inside

Why = ComposeSpaceToDepth.Why
END = 2**63 - 1
SAME = Geometry.plain(3, pad=1)
FOCUS = ((0, 0), (1, 0), (0, 1), (1, 1))
Phase = tuple[int, ...]


class Sketch(Draft):
    """A draft with integer constants."""

    def integers(self, *values: int) -> str:
        name = f"i{len(self.weights)}"
        self.weights[name] = np.array(values, np.int64)
        return name

    def slice(
        self, x: str, starts: Sequence[int], steps: Sequence[int], axes: Sequence[int], end: int
    ) -> str:
        given = [starts, [end] * len(starts), axes, steps]
        return self.add("Slice", [x, *(self.integers(*v) for v in given)])

    def sample(self, x: str, phase: Phase, steps: Phase, nested: bool = False) -> str:
        """``x[:, :, phase::step, ...]``, by one Slice or one per axis."""
        axes = range(2, 2 + len(phase))
        if not nested:
            return self.slice(x, phase, steps, list(axes), END)
        for start, step, axis in zip(phase, steps, axes, strict=True):
            x = self.slice(x, [start], [step], [axis], END)
        return x

    def focus(
        self, phases: Sequence[Phase] = FOCUS, steps: Phase = (2, 2), nested: bool = False
    ) -> str:
        return self.add("Concat", [self.sample("x", p, steps, nested) for p in phases], axis=1)


def sketch(shape: Sequence[int | str] = (2, 3, 8, 6), **settings: Any) -> Sketch:
    return Sketch(np.random.default_rng(0), shape, **settings)


def compose(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(ComposeSpaceToDepth(), proto, **settings)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_focus(nested: bool) -> None:
    d = sketch()
    before = d.finish(d.conv(d.focus(nested=nested), 12, 5, SAME))
    after = compose(before)
    assert after.ops == ["Conv"]
    (conv,) = after.model.graph.node
    assert conv.input[0] == "x"
    assert attributes(conv)["strides"] == [2, 2]
    assert attributes(conv)["pads"] == [2, 2, 2, 2]
    weights = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    (held,) = (w for name, w in weights.items() if name == conv.input[1])
    (original,) = (w for w in d.weights.values() if w.ndim == 4)
    assert held.shape == (5, 3, 6, 6)
    np.testing.assert_array_equal(held[:, :, 1::2, 0::2], original[:, 3:6])
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("opset", [7, 9, 13, 17])
def test_space_to_depth(opset: int) -> None:
    d = sketch(opset=opset)
    before = d.finish(d.conv(d.add("SpaceToDepth", ["x"], blocksize=2), 12, 5, SAME))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert_agree(before, after.model, d.rng)


def test_rows_first_and_shared() -> None:
    """``x[:, :, ::2]`` serves two phases, and a negative axis is an axis."""
    d = sketch()
    rows = [d.slice("x", [a], [2], [-2], END) for a in (0, 1)]
    parts = [d.slice(row, [b], [2], [-1], END) for row in rows for b in (0, 1)]
    before = d.finish(d.conv(d.add("Concat", parts, axis=-3), 12, 5, SAME))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert_agree(before, after.model, d.rng)


def test_concats_of_concats_and_exact_ends() -> None:
    d = sketch()
    parts = [d.slice("x", p, (2, 2), (2, 3), 8) for p in FOCUS]
    halves = [d.add("Concat", parts[i : i + 2], axis=1) for i in (0, 2)]
    before = d.finish(d.conv(d.add("Concat", halves, axis=1), 12, 5, SAME))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert_agree(before, after.model, d.rng)


def test_one_axis_only_keeps_the_dilation_of_the_other() -> None:
    d = sketch((2, 3, 9, 6))
    parts = [d.slice("x", [a], [2], [3], END) for a in (1, 0)]
    geometry = Geometry((3, 2), (2, 1), (2, 1), (1, 0, 2, 1))
    before = d.finish(d.conv(d.add("Concat", parts, axis=1), 6, 4, geometry, bias=False))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert attributes(after.model.graph.node[0])["dilations"] == [2, 1]
    assert_agree(before, after.model, d.rng)


def test_dynamic_sizes_and_automatic_pads() -> None:
    d = sketch(("batch", 3, "h", "w"))
    geometry = Geometry((3, 3), (1, 1), (1, 1), (), "SAME_UPPER")
    before = d.finish(d.conv(d.focus(), 12, 5, geometry))
    after = compose(before)
    assert after.ops == ["Conv"]
    assert "auto_pad" not in attributes(after.model.graph.node[0])
    assert_agree(before, after.model, d.rng, batch=3, h=10, w=4)


def test_slices_read_elsewhere_stay() -> None:
    d = sketch()
    phases = [d.sample("x", p, (2, 2)) for p in FOCUS]
    y = d.conv(d.add("Concat", phases, axis=1), 12, 3, SAME)
    before = d.finish(d.add("Add", [y, phases[1]]), phases[2])
    after = compose(before)
    assert sorted(after.ops) == ["Add", "Conv", "Slice", "Slice"]
    assert_agree(before, after.model, d.rng)


def test_weights_listed_as_inputs() -> None:
    d = sketch(opset=8)
    y = d.conv(d.add("SpaceToDepth", ["x"], blocksize=2), 12, 5, SAME)
    before = d.finish(y, ir=3)
    assert compose(before).applied == 1
    assert compose(before, overridable=True).reasons == {Why.WEIGHT_NOT_CONSTANT.value}


# -- reasons to decline ----------------------------------------------------------------------------


def behind(build: Callable[[Sketch], str], cin: int = 12) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        d = sketch()
        return d.finish(d.conv(build(d), cin, 4, SAME))

    return make


def of_two_sources(d: Sketch) -> str:
    parts = [
        d.sample(x, p, (2, 2)) for x, p in zip(["x", d.add("Neg", ["x"])] * 2, FOCUS, strict=True)
    ]
    return d.add("Concat", parts, axis=1)


def shape_of(start: int, end: int, step: int, axis: int) -> Callable[[Sketch], str]:
    """Two Slices that only look like phases."""

    def build(d: Sketch) -> str:
        parts = [d.slice("x", [a], [step], [axis], end) for a in (start, start)]
        return d.add("Concat", parts, axis=1)

    return build


def computed_starts(d: Sketch) -> str:
    zero = d.add("Neg", [d.integers(0, 0)])
    given = [zero, d.integers(END, END), d.integers(2, 3), d.integers(2, 2)]
    return d.add("Concat", [d.add("Slice", ["x", *given])] * 4, axis=1)


def rows_instead(d: Sketch) -> str:
    return d.add("Concat", [d.sample("x", p, (2, 2)) for p in FOCUS], axis=2)


def graph_output() -> onnx.ModelProto:
    d = sketch()
    phases = d.focus()
    return d.finish(d.conv(phases, 12, 4, SAME), phases)


def read_elsewhere() -> onnx.ModelProto:
    d = sketch()
    phases = d.focus()
    return d.finish(d.add("Add", [d.conv(phases, 12, 12, SAME), phases]))


def grouped() -> onnx.ModelProto:
    d = sketch()
    return d.finish(d.conv(d.focus(), 12, 4, SAME, group=2))


def dilated() -> onnx.ModelProto:
    d = sketch()
    return d.finish(d.conv(d.focus(), 12, 4, Geometry((2, 2), (1, 1), (1, 2), (0,) * 4)))


def unknown_pads() -> onnx.ModelProto:
    d = sketch((1, 3, "h", "w"))
    geometry = Geometry((3, 3), (2, 2), (1, 1), (), "SAME_UPPER")
    return d.finish(d.conv(d.focus(), 12, 4, geometry))


def computed_weight() -> onnx.ModelProto:
    d = sketch()
    phases = d.focus()
    name = d.weight("w", d.noise(4, 12, 3, 3))
    weight = d.add("Neg", [name])
    return d.finish(d.add("Conv", [phases, weight], **SAME.attributes()))


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.NO_PHASES, behind(lambda d: d.add("Neg", ["x"]), 3)),
    (Why.NO_PHASES, behind(lambda d: "x", 3)),
    (Why.NO_PHASES, behind(lambda d: d.add("Concat", ["x", "x"], axis=1), 6)),
    (Why.NO_PHASES, behind(of_two_sources)),
    (Why.NO_PHASES, behind(shape_of(0, 5, 2, 2), 6)),
    (Why.NO_PHASES, behind(shape_of(0, -2, 2, 2), 6)),
    (Why.NO_PHASES, behind(shape_of(2, END, 2, 2), 6)),
    (Why.NO_PHASES, behind(shape_of(0, END, 3, 1), 2)),
    (Why.NO_PHASES, behind(computed_starts)),
    (Why.NO_PHASES, behind(rows_instead, 3)),
    (Why.NOT_ALL_PHASES, behind(lambda d: d.focus(FOCUS[:3]), 9)),
    (Why.NOT_ALL_PHASES, behind(lambda d: d.focus((*FOCUS[:3], FOCUS[0])))),
    (Why.NOT_ALL_PHASES, behind(lambda d: d.focus((*FOCUS, FOCUS[0])), 15)),
    (Why.GRAPH_OUTPUT, graph_output),
    (Why.OTHER_READERS, read_elsewhere),
    (Why.GROUPED, grouped),
    (Why.DILATED, dilated),
    (Why.PADS_UNKNOWN, unknown_pads),
    (Why.WEIGHT_NOT_CONSTANT, computed_weight),
]


@pytest.mark.parametrize(("why", "build"), DECLINES)
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    proto = build()
    outcome = compose(proto)
    assert outcome.reasons == {why.value}
    assert outcome.applied == 0
    assert len(outcome.ops) == len(proto.graph.node)


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """Any steps, any order of phases, any Conv behind."""
    rank = draw(st.integers(1, 2))
    steps = tuple(draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))
    if max(steps) == 1:
        steps = (2,) * rank
    geometry = draw(geometries(rank))
    plain = tuple(1 if f > 1 else d for f, d in zip(steps, geometry.dilations, strict=True))
    sizes: list[int | str] = [f * draw(st.integers(6, 7)) for f in steps]
    if draw(st.booleans()):
        sizes = [f"s{f}" for f in steps]
    channels = draw(st.integers(1, 3))
    batch: int | str = draw(BATCH)
    d = Sketch(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (batch, channels, *sizes),
        draw(st.sampled_from([np.float16, np.float32, np.float64])),
        draw(st.sampled_from([10, 11, 13, 17, 21, harness.NEWEST_OPSET])),
    )
    phases = draw(st.permutations(list(product(*(range(f) for f in steps)))))
    hidden = d.focus(phases, steps, draw(st.booleans()))
    window = Geometry(geometry.kernel, geometry.strides, plain, geometry.pads, geometry.auto_pad)
    cin = channels * len(phases)
    y = d.conv(hidden, cin, draw(st.integers(1, 3)), window, bias=draw(st.booleans()))
    return draw(seen_inside(d.finish(y))), d


def check(case: tuple[onnx.ModelProto, Draft]) -> None:
    proto, d = case
    outcome = compose(proto)
    seen = {value.name for value in proto.graph.output}
    allowed = {Why.PADS_UNKNOWN.value}
    if any(seen & {*node.output} for node in proto.graph.node if node.op_type == "Concat"):
        allowed = {Why.GRAPH_OUTPUT.value, Why.PADS_UNKNOWN.value}
    assert outcome.applied or outcome.reasons <= allowed
    assert "Concat" not in outcome.ops or not outcome.applied
    assert_agree(proto, outcome.model, d.rng, factor=16, batch=2, s1=7, s2=12, s3=18)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(models())
def test_outputs_agree(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.zoo
def test_a_trained_detector() -> None:
    before = zoo.trained("yolox_nano_416.onnx")
    after = compose(before)
    assert after.applied == 1
    assert len(after.ops) == len(before.graph.node) - 9
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=64)
