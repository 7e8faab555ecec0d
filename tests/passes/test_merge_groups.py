"""Groups of few channels, fenced in together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt import models
from pwopt.passes.merge_groups import MergeGroups
from tests.passes import harness
from tests.passes.linear_models import BATCH, OPSETS, Draft, Geometry, assert_agree, geometries

Why = MergeGroups.Why


def merge(proto: onnx.ModelProto, variant: str | None = None, **options: Any) -> harness.Outcome:
    return harness.run_pass(MergeGroups(), proto, variant, **options)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    assert_agree(before, after, np.random.default_rng(0), **dims)


def grouped(
    group: int,
    width: int,
    out: int | None = None,
    *,
    geometry: Geometry | None = None,
    batch: int | str = 2,
    opset: int = 17,
    dtype: Any = np.float32,
    **settings: Any,
) -> onnx.ModelProto:
    cin, cout = group * width, group * (out or width)
    draft = Draft(np.random.default_rng(0), (batch, cin, 6, 5), dtype, opset)
    geometry = geometry or Geometry.plain(3, pad=1)
    return draft.finish(draft.conv("x", cin, cout, geometry, group=group, **settings))


def groups(proto: onnx.ModelProto) -> list[int]:
    (node,) = (n for n in proto.graph.node if n.op_type == "Conv")
    return [a.i for a in node.attribute if a.name == "group"]


# -- golden ----------------------------------------------------------------------------------------


def test_four_groups_of_four_become_one_of_sixteen() -> None:
    before = grouped(8, 4)
    after = merge(before)
    assert groups(after.model) == [2]
    old, new = (
        numpy_helper.to_array(next(t for t in m.graph.initializer if t.name.startswith("w")))
        for m in (before, after.model)
    )
    assert new.shape == (32, 16, 3, 3)
    for channel in range(32):
        own = channel // 4 % 4
        np.testing.assert_array_equal(new[channel, own * 4 : own * 4 + 4], old[channel])
        assert np.count_nonzero(new[channel]) == old[channel].size
    check(before, after.model)


@pytest.mark.parametrize(("variant", "left"), [("16-wide", 8), ("8-wide", 16), ("32-wide", 4)])
def test_the_variants_of_resnext(variant: str, left: int) -> None:
    before = grouped(32, 4)
    after = merge(before, variant)
    assert groups(after.model) == [left]
    check(before, after.model)


def test_where_no_width_fits_all_groups_become_one() -> None:
    before = grouped(3, 5)
    after = merge(before)
    assert groups(after.model) == [1]
    check(before, after.model)


def test_inputs_and_outputs_both_count() -> None:
    assert groups(merge(grouped(8, 4, 8)).model) == [2]
    assert groups(merge(grouped(8, 8, 2)).model) == [1]


def test_a_channel_multiplier_is_depthwise() -> None:
    assert merge(grouped(8, 1, 2)).reasons == {Why.DEPTHWISE.value}


def test_shared_weights_stay_for_the_other() -> None:
    draft = Draft(np.random.default_rng(0), (1, 16, 4, 4))
    a = draft.conv("x", 16, 16, Geometry.plain(1), group=4)
    b = draft.add("Conv", [a, *draft.nodes[0].input[1:]], kernel_shape=[1, 1], group=4)
    before = draft.finish(b)
    after = merge(before)
    assert after.applied == 2
    check(before, after.model)


def test_initializers_listed_as_inputs() -> None:
    before = grouped(4, 4, opset=8)
    before.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in before.graph.initializer
    )
    before.ir_version = 3
    after = merge(before)
    assert groups(after.model) == [1]
    assert merge(before, overridable=True).reasons == {Why.WEIGHT_NOT_CONSTANT.value}


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def fed_weight() -> onnx.ModelProto:
    nodes = [harness.node("Conv", ["x", "w"], ["y"], group=2)]
    shape = (1, 4, 3, 3)
    return harness.model(nodes, {"x": shape, "w": (4, 2, 1, 1)}, {"y": shape})


def bfloat16() -> onnx.ModelProto:
    kind = onnx.TensorProto.BFLOAT16
    weight = onnx.helper.make_tensor("w", kind, [4, 2, 1, 1], [0.5] * 8)
    values = [onnx.helper.make_tensor_value_info(n, kind, [1, 4, 3, 3]) for n in "xy"]
    node = harness.node("Conv", ["x", "w"], ["y"], group=2)
    graph = onnx.helper.make_graph([node], "test", values[:1], values[1:], [weight])
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10
    )


def merged() -> onnx.ModelProto:
    return merge(grouped(8, 4), "8-wide").model


DECLINED = {
    Why.ONE_GROUP: Declined(lambda: grouped(1, 4)),
    Why.DEPTHWISE: Declined(lambda: grouped(8, 1)),
    Why.WEIGHT_NOT_CONSTANT: Declined(fed_weight),
    Why.NOT_FLOAT: Declined(bfloat16),
    Why.WIDE_ENOUGH: Declined(lambda: grouped(2, 18, 16), {"groups": 2, "width": (18, 16)}),
    Why.MERGED: Declined(merged, {"groups": 4, "width": (8, 8)}),
    Why.MORE_MACS: Declined(lambda: grouped(17, 3), {"groups": 17, "times": 17}),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    (remark,) = merge(case.proto()).remarks
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


# -- networks and properties -----------------------------------------------------------------------


@pytest.mark.slow
def test_resnext() -> None:
    before = models.build("resnext50_32x4d")
    after = merge(before)
    assert after.applied == 7
    check(before, after.model)


@st.composite
def convolutions(draw: st.DrawFn) -> onnx.ModelProto:
    rank = draw(st.integers(1, 2))
    group = draw(st.sampled_from([2, 3, 4, 6, 8]))
    width, out = draw(st.sampled_from([2, 4, 5, 8])), draw(st.sampled_from([1, 2, 4, 8]))
    spatial = draw(st.lists(st.integers(5, 7), min_size=rank, max_size=rank))
    draft = Draft(
        np.random.default_rng(draw(st.integers(0, 99))),
        (draw(BATCH), group * width, *spatial),
        draw(st.sampled_from([np.float16, np.float32, np.float64])),
        draw(st.sampled_from(OPSETS)),
    )
    geometry = draw(geometries(rank))
    bias = draw(st.booleans())
    y = draft.conv("x", group * width, group * out, geometry, group=group, bias=bias)
    extra = (y,) if draw(st.booleans()) else ()
    return draft.finish(draft.add("Relu", [y]), *extra)


def check_convolution(before: onnx.ModelProto) -> None:
    for variant in ("16-wide", "8-wide", "32-wide"):
        after = harness.run_pass(_Preferring(variant), before)
        assert after.applied or Why.WIDE_ENOUGH.value in after.reasons
        check(before, after.model, batch=2)


class _Preferring(MergeGroups):
    """Puts one variant first where it is offered, as a ruling does."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        object.__setattr__(self, "variant", variant)

    def variants(self, match: Any) -> Any:
        return tuple(sorted(super().variants(match), key=lambda v: v.name != self.variant))  # type: ignore[attr-defined]


@settings(max_examples=50, deadline=None)
@given(convolutions())
def test_any_grouped_convolution(before: onnx.ModelProto) -> None:
    check_convolution(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(convolutions())
def test_any_grouped_convolution_at_length(before: onnx.ModelProto) -> None:
    check_convolution(before)
