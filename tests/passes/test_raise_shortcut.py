"""Residual shortcuts of Slice and Pad as pointwise convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pwopt import models as zoo
from pwopt.passes.raise_shortcut import RaiseShortcut
from tests.passes import harness
from tests.passes.linear_models import BATCH, Draft, seen_inside
from tests.zoo import trained

Why = RaiseShortcut.Why
END = 2**31
CHANNELS = (0, 2, 0, 0, 0, 3, 0, 0)


class Sketch(Draft):
    """A draft with Slices and Pads as the opset has them."""

    def integers(self, *values: int) -> str:
        name = f"i{len(self.weights)}"
        self.weights[name] = np.array(values, np.int64)
        return name

    def slice(
        self, x: str, steps: Sequence[int], *, start: int = 0, axes: Sequence[int] | None = None
    ) -> str:
        places = list(range(2, 2 + len(steps))) if axes is None else axes
        given = [[start] * len(steps), [END] * len(steps), places, steps]
        return self.add("Slice", [x, *(self.integers(*v) for v in given)])

    def pad(self, x: str, pads: Sequence[int] = CHANNELS, **attributes: Any) -> str:
        if self.opset < 11:
            return self.add("Pad", [x], pads=list(pads), **attributes)
        return self.add("Pad", [x, self.integers(*pads)], **attributes)


def sketch(shape: Sequence[int | str] = (2, 4, 7, 6), **settings: Any) -> Sketch:
    return Sketch(np.random.default_rng(0), shape, **settings)


def raise_shortcut(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(RaiseShortcut(), proto, **settings)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    """Equal but for the sign of zeros."""
    feeds = harness.random_feeds(before, np.random.default_rng(0), **dims)
    expected, actual = (harness.run_unoptimized(m, feeds)["y"] for m in (before, after))
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [10, 11, 13, 17, 18, 21])
def test_slice_and_pad(opset: int) -> None:
    d = sketch(opset=opset)
    before = d.finish(d.pad(d.slice("x", (2, 2))))
    after = raise_shortcut(before)
    assert after.ops == ["Conv"]
    (conv,) = after.model.graph.node
    assert attributes(conv)["strides"] == [2, 2]
    (weight,) = (numpy_helper.to_array(t) for t in after.model.graph.initializer)
    expected = np.zeros((9, 4, 1, 1), np.float32)
    expected[2:6, :, 0, 0] = np.eye(4)
    np.testing.assert_array_equal(weight, expected)
    check(before, after.model)


def test_one_axis_after_the_other_in_a_dynamic_residual_block() -> None:
    d = sketch(("batch", 4, "h", "w"))
    shortcut = d.pad(d.slice(d.slice("x", [2], axes=[2]), [3], axes=[-1]))
    before = d.finish(d.add("Relu", [d.add("Add", [shortcut, d.weight("c", d.noise(1))])]))
    after = raise_shortcut(before)
    assert after.ops == ["Conv", "Add", "Relu"]
    for h, w in ((1, 1), (5, 7), (6, 9)):
        check(before, after.model, batch=3, h=h, w=w)


def test_padding_by_axes_and_by_an_explicit_zero() -> None:
    d = sketch(opset=18)
    zero = d.weight("zero", np.zeros(()))
    given = [d.slice("x", (2, 2)), d.integers(1, 2), zero, d.integers(-3)]
    before = d.finish(d.add("Pad", given))
    after = raise_shortcut(before)
    assert after.ops == ["Conv"]
    check(before, after.model)


def test_not_a_number_spreads_over_the_pixel() -> None:
    """What the docstring warns of is so, and stays at the pixel."""
    d = sketch((1, 2, 4, 4))
    before = d.finish(d.pad(d.slice("x", (2, 2))))
    x = np.ones((1, 2, 4, 4), np.float32)
    x[0, 1, 2, 0] = np.nan
    after = harness.run_unoptimized(raise_shortcut(before).model, {"x": x})["y"]
    assert np.isnan(after[0, :, 1, 0]).all()
    assert np.isnan(after).sum() == after.shape[1]


def test_overridable_pads() -> None:
    d = sketch(opset=11)
    inner = d.slice("x", (2, 2))
    before = d.finish(d.pad(inner))
    pads = before.graph.node[1].input[1]
    before.graph.input.append(helper.make_tensor_value_info(pads, onnx.TensorProto.INT64, [8]))
    assert raise_shortcut(before, overridable=True).reasons == {Why.PADS_NOT_CONSTANT.value}
    assert raise_shortcut(before).applied == 1


# -- reasons to decline ----------------------------------------------------------------------------


def drawn(
    build: Callable[[Sketch], str], *extra: str, **settings: Any
) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        d = sketch(**settings)
        return d.finish(build(d), *extra)

    return make


def with_value(d: Sketch) -> str:
    return d.add("Pad", [d.slice("x", (2, 2)), d.integers(*CHANNELS), d.weight("v", np.ones(()))])


def with_computed_value(d: Sketch) -> str:
    zero = d.add("Neg", [d.weight("v", np.zeros(()))])
    return d.add("Pad", [d.slice("x", (2, 2)), d.integers(*CHANNELS), zero])


def computed_pads(d: Sketch) -> str:
    pads = d.add("Neg", [d.integers(*CHANNELS)])
    return d.add("Pad", [d.slice("x", (2, 2)), pads])


def computed_axes(d: Sketch) -> str:
    axes = d.add("Neg", [d.integers(-1)])
    return d.add("Pad", [d.slice("x", (2, 2)), d.integers(1, 1), "", axes])


def read_elsewhere(d: Sketch) -> str:
    sliced = d.slice("x", (2, 2))
    return d.add("Concat", [d.pad(sliced), sliced], axis=1)


def inner_read_elsewhere(d: Sketch) -> str:
    rows = d.slice("x", [2], axes=[2])
    padded = d.pad(d.slice(rows, [2], axes=[3]))
    return d.add("Concat", [padded, d.slice(rows, [2], axes=[3], start=1)], axis=1)


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.NO_STRIDED_SLICE, drawn(lambda d: d.pad("x"))),
    (Why.NO_STRIDED_SLICE, drawn(lambda d: d.pad(d.add("Neg", ["x"])))),
    (Why.NO_STRIDED_SLICE, drawn(lambda d: d.pad(d.slice("x", [2], axes=[0])))),
    (Why.NO_STRIDED_SLICE, drawn(lambda d: d.pad(d.slice("x", [1], axes=[2])))),
    (Why.OFFSET, drawn(lambda d: d.pad(d.slice("x", (2, 2), start=1)))),
    (Why.PADS_NOT_CONSTANT, drawn(computed_pads)),
    (Why.PADS_NOT_CONSTANT, drawn(computed_axes, opset=18)),
    (
        Why.NOT_CHANNELS_ONLY,
        drawn(lambda d: d.pad(d.slice("x", (2, 2)), (0, 1, 0, 0, 0, 1, 0, 1))),
    ),
    (
        Why.NOT_CHANNELS_ONLY,
        drawn(lambda d: d.pad(d.slice("x", (2, 2)), (0, -1, 0, 0, 0, 3, 0, 0))),
    ),
    (Why.NOT_ZEROS, drawn(with_value)),
    (Why.NOT_ZEROS, drawn(with_computed_value)),
    (Why.NOT_ZEROS, drawn(lambda d: d.pad(d.slice("x", (2, 2)), mode="edge"))),
    (Why.NOT_ZEROS, drawn(lambda d: d.pad(d.slice("x", (2, 2)), value=1.0), opset=10)),
    (Why.GRAPH_OUTPUT, drawn(lambda d: d.pad(d.slice("x", (2, 2))), "t0")),
    (Why.OTHER_READERS, drawn(read_elsewhere)),
    (Why.OTHER_READERS, drawn(inner_read_elsewhere)),
    (Why.SHAPE_UNKNOWN, drawn(lambda d: d.pad(d.slice("x", (2, 2))), shape=(1, "c", 6, 6))),
    (Why.ELEMENT_TYPE, drawn(lambda d: d.pad(d.slice("x", (2, 2))), dtype=np.float64)),
    (Why.ELEMENT_TYPE, drawn(lambda d: d.pad(d.slice("x", (2, 2))), dtype=np.int64)),
]


@pytest.mark.parametrize(("why", "build"), DECLINES)
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    proto = build()
    outcome = raise_shortcut(proto)
    assert outcome.reasons == {why.value}
    assert outcome.applied == 0


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    rank = draw(st.integers(1, 3))
    steps = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    sizes: list[int | str] = draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank))
    if draw(st.booleans()):
        sizes = ["n"] * rank
    batch: int | str = draw(BATCH)
    d = sketch(
        (batch, draw(st.integers(1, 4)), *sizes),
        dtype=draw(st.sampled_from([np.float16, np.float32])),
        opset=draw(st.sampled_from([10, 11, 13, 18, 21, harness.NEWEST_OPSET])),
    )
    steps[draw(st.integers(0, rank - 1))] = 2
    pads = [0] * (2 * rank + 4)
    pads[1], pads[rank + 3] = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    value = "x"
    for axis, step in draw(st.permutations(list(enumerate(steps)))):
        value = d.slice(value, [step], axes=[axis + 2])
    return draw(seen_inside(d.finish(d.pad(value, pads))))


def check_model(before: onnx.ModelProto) -> None:
    after = raise_shortcut(before)
    if len(before.graph.output) > 1:
        assert after.reasons == {Why.GRAPH_OUTPUT.value}
    else:
        assert after.ops == ["Conv"]
    check(before, after.model, batch=2, n=5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(models())
def test_outputs_agree(before: onnx.ModelProto) -> None:
    check_model(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_outputs_agree_at_length(before: onnx.ModelProto) -> None:
    check_model(before)


@pytest.mark.slow
def test_the_original_resnet() -> None:
    before = zoo.build("resnet18_original")
    after = raise_shortcut(before)
    assert after.applied == 3
    assert not {"Slice", "Pad"} & set(after.ops)
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=16)


@pytest.mark.zoo
def test_a_trained_network() -> None:
    before = trained("cifar10_resnet20.onnx")
    after = raise_shortcut(before)
    assert after.applied == 2
    assert not {"Slice", "Pad"} & set(after.ops)
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=16)
