"""Means over all pixels as global pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes import CommutePointwise, RaiseGlobalPool
from tests.passes import harness
from tests.passes.linear_models import BATCH, DTYPES, OPSETS, Draft, Geometry, assert_agree

Why = RaiseGlobalPool.Why
SPACE = (2, 3)


class Means(Draft):
    """A draft with means in the opset's own spelling."""

    def mean(self, x: str, axes: Sequence[int] | None = SPACE, *, keepdims: bool = True) -> str:
        attributes: dict[str, Any] = {"keepdims": int(keepdims)}
        if self.opset < 18 or axes is None:
            return self.add("ReduceMean", [x], **attributes, **({"axes": axes} if axes else {}))
        name = f"i{len(self.weights)}"
        self.weights[name] = np.array(axes, np.int64)
        return self.add("ReduceMean", [x, name], **attributes)

    def _unknown(self, name: str) -> list[None]:
        gone = any(
            name in node.output and any(a.name == "keepdims" and not a.i for a in node.attribute)
            for node in self.nodes
        )
        return [None] * (2 if gone else len(self.shape))


def draft(shape: Sequence[int | str] = (2, 3, 5, 7), **settings: Any) -> Means:
    return Means(np.random.default_rng(0), shape, **settings)


def raised(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(RaiseGlobalPool(), proto, **settings)


def assert_raised(proto: onnx.ModelProto, *ops: str, **dims: int) -> None:
    after = raised(proto)
    assert after.ops == list(ops)
    assert_agree(proto, after.model, np.random.default_rng(0), **dims)


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(2, 3), (3, 2), (-2, -1)])
@pytest.mark.parametrize("opset", OPSETS)
def test_a_mean_that_keeps_the_axes(opset: int, axes: tuple[int, ...]) -> None:
    d = draft(opset=opset)
    # Negative axes came with opset 11.
    legal = axes if opset >= 11 else [axis % 4 for axis in axes]
    assert_raised(d.finish(d.mean("x", legal)), "GlobalAveragePool")


@pytest.mark.parametrize("opset", OPSETS)
def test_a_mean_that_drops_the_axes(opset: int) -> None:
    d = draft(opset=opset)
    assert_raised(d.finish(d.mean("x", keepdims=False)), "GlobalAveragePool", "Flatten")


def test_three_axes_of_space() -> None:
    d = draft((2, 3, 4, 5, 6))
    proto = d.finish(d.mean("x", (2, 3, 4), keepdims=False))
    assert_raised(proto, "GlobalAveragePool", "Flatten")


@pytest.mark.parametrize("keepdims", [True, False])
def test_dynamic_sizes(keepdims: bool) -> None:
    d = draft(("N", "C", "H", "W"))
    ops = ["GlobalAveragePool"] + ["Flatten"] * (not keepdims)
    assert_raised(d.finish(d.mean("x", keepdims=keepdims)), *ops, N=3, C=2, H=4, W=5)


def test_axes_that_others_read_stay() -> None:
    d = draft(opset=18)
    one = d.mean("x")
    two = d.add("ReduceMax", ["x", "i0"], keepdims=1)
    assert_raised(d.finish(d.add("Add", [one, two])), "GlobalAveragePool", "ReduceMax", "Add")


def test_a_conv_then_moves_behind_the_pool() -> None:
    d = draft()
    proto = d.finish(d.mean(d.conv("x", 3, 4, Geometry.plain(1))))
    after = harness.run_pass(CommutePointwise(), raised(proto).model)
    assert after.ops == ["GlobalAveragePool", "Conv"]


# -- reasons to decline ----------------------------------------------------------------------------


def over(*axes: int, shape: Sequence[int] = (2, 3, 5, 7)) -> onnx.ModelProto:
    d = draft(shape)
    return d.finish(d.mean("x", axes or None))


def double() -> onnx.ModelProto:
    d = draft(dtype=np.float64)
    return d.finish(d.mean("x"))


def computed_axes() -> onnx.ModelProto:
    d = draft(opset=18)
    y = d.mean("x")
    d.nodes.insert(0, harness.node("Abs", ["i0"], ["axes"]))
    d.nodes[-1].input[1] = "axes"
    return d.finish(y)


DECLINES: list[tuple[Why, Callable[[], onnx.ModelProto]]] = [
    (Why.NOT_OVER_SPACE, lambda: over(1)),
    (Why.NOT_OVER_SPACE, lambda: over(2)),
    (Why.NOT_OVER_SPACE, lambda: over(1, 2)),
    (Why.NOT_OVER_SPACE, lambda: over(1, 2, 3)),
    (Why.NOT_OVER_SPACE, over),
    (Why.RANK, lambda: over(2, shape=(2, 3, 5))),
    (Why.ELEMENT_TYPE, double),
    (Why.AXES_NOT_CONSTANT, computed_axes),
]


@pytest.mark.parametrize(("why", "build"), DECLINES)
def test_declines(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    after = raised(build())
    assert after.reasons == {why.value}
    assert not after.applied


def test_every_reason_is_tested() -> None:
    assert {why for why, _ in DECLINES} == set(Why)


# -- properties ------------------------------------------------------------------------------------


@st.composite
def means(draw: st.DrawFn) -> tuple[onnx.ModelProto, bool]:
    """A mean over any axes, and whether it is a pool."""
    rank = draw(st.integers(3, 5))
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.integers(1, 6), min_size=rank - 1, max_size=rank - 1))
    batch: int | str = draw(BATCH)
    d = draft((batch, *sizes), dtype=dtype, opset=draw(st.sampled_from(OPSETS)))
    space = list(range(2, rank))
    some = st.lists(st.integers(0, rank - 1), min_size=1, unique=True)
    axes = draw(st.one_of(st.permutations(space), some))
    is_pool = sorted(axes) == space
    x = d.add("Abs", ["x"])
    y = d.mean(x, axes, keepdims=not is_pool or draw(st.booleans()))
    extra = draw(st.lists(st.just(x), max_size=1))
    return d.finish(y, *extra), is_pool and rank > 3 and dtype is not np.float64


def check(case: tuple[onnx.ModelProto, bool]) -> None:
    before, is_pool = case
    after = raised(before)
    assert after.applied == is_pool
    assert_agree(before, after.model, np.random.default_rng(0), batch=2)


@settings(max_examples=50, deadline=None)
@given(means())
def test_any_mean(case: tuple[onnx.ModelProto, bool]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(means())
def test_any_mean_at_length(case: tuple[onnx.ModelProto, bool]) -> None:
    check(case)
