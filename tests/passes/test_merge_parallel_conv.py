"""Parallel convolutions on one input as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt import models
from pwopt.graph import Facts, parse
from pwopt.passes.lower_conv_winograd import LowerConvWinograd
from pwopt.passes.merge_parallel_conv import MergeParallelConv, Why
from pwopt.passes.split_concat_conv import SplitConcatConv
from pwopt.remark import Decline
from tests import zoo
from tests.passes import harness
from tests.passes.linear_models import (
    BATCH,
    DTYPES,
    OPSETS,
    Draft,
    Geometry,
    assert_agree,
    geometries,
)

Array = np.ndarray[Any, Any]
POINT = Geometry.plain(1)
SAME = Geometry.plain(3, pad=1)


def draft(shape: Any = (2, 3, 6, 7), **settings: Any) -> Draft:
    return Draft(np.random.default_rng(0), shape, **settings)


def merge(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(MergeParallelConv(), proto, **settings)


def held(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def node(proto: onnx.ModelProto, op: str) -> onnx.NodeProto:
    (found,) = (n for n in proto.graph.node if n.op_type == op)
    return found


def attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}


def variants(outcome: harness.Outcome) -> Any:
    (remark,) = [r for r in outcome.remarks if r.ordinal is not None]
    return remark.facts.get("variants")


def keep_apart(d: Draft, values: Sequence[str]) -> str:
    """One output from several values, each of which is read by an operator of its own."""
    total = d.add("Exp", [values[0]])
    for op, value in zip(("Neg", "Sqrt", "Abs"), values[1:], strict=False):
        other = d.add("Abs", [value]) if op == "Sqrt" else value
        reduced = d.add("ReduceMean", [d.add(op, [other])], axes=[1])
        total = d.add("Mul", [total, reduced])
    return total


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [POINT, SAME])
def test_two_convs_and_a_split(geometry: Geometry) -> None:
    d = draft()
    a, b = d.conv("x", 3, 4, geometry), d.conv("x", 3, 2, geometry)
    before = d.finish(keep_apart(d, (a, b)))
    after = merge(before)
    assert after.ops[:2] == ["Conv", "Split"]
    assert after.ops.count("Conv") == 1
    assert node(after.model, "Split").output == [a, b]
    assert variants(after) is None
    weights = held(after.model)
    conv = node(after.model, "Conv")
    for index in (1, 2):
        parts = [d.weights[n.input[index]] for n in before.graph.node[:2]]
        np.testing.assert_array_equal(weights[conv.input[index]], np.concatenate(parts))
    np.testing.assert_array_equal(weights[node(after.model, "Split").input[1]], [4, 2])
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(("opset", "by_attribute"), [(7, True), (11, True), (13, False)])
def test_split_has_its_lengths_as_the_opset_wants(opset: int, *, by_attribute: bool) -> None:
    d = draft(opset=opset)
    before = d.finish(keep_apart(d, [d.conv("x", 3, width, POINT) for width in (1, 5, 2)]))
    after = merge(before)
    split = node(after.model, "Split")
    assert attributes(split) == ({"axis": 1, "split": [1, 5, 2]} if by_attribute else {"axis": 1})
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("biases", [(False, False), (False, True), (True, False)])
def test_a_missing_bias_is_zero(biases: tuple[bool, bool]) -> None:
    d = draft()
    before = d.finish(keep_apart(d, [d.conv("x", 3, 4, POINT, bias=bias) for bias in biases]))
    after = merge(before)
    assert len(node(after.model, "Conv").input) == 2 + any(biases)
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize(
    ("op", "settings"),
    [("Relu", {}), ("LeakyRelu", {"alpha": 0.25}), ("HardSigmoid", {"alpha": 0.3}), ("Tanh", {})],
)
def test_the_activation_goes_before_the_split(op: str, settings: dict[str, Any]) -> None:
    d = draft()
    branches = [d.add(op, [d.conv("x", 3, width, SAME)], **settings) for width in (4, 2, 3)]
    before = d.finish(keep_apart(d, branches))
    after = merge(before)
    assert after.ops[:3] == ["Conv", op, "Split"]
    assert after.ops.count(op) == 1
    assert attributes(node(after.model, op)) == pytest.approx(settings)
    assert variants(after) is None
    assert_agree(before, after.model, d.rng)


def test_bounds_of_a_clip_are_compared_by_value() -> None:
    d = draft()
    branches = []
    for upper in (6.0, 6.0, 5.0):
        bounds = [d.weight("low", np.array(0.0)), d.weight("high", np.array(upper))]
        branches.append(d.add("Clip", [d.conv("x", 3, 4, POINT), *bounds]))
    before = d.finish(keep_apart(d, branches))
    after = merge(before)
    assert after.ops.count("Conv") == after.ops.count("Clip") == 2
    assert Why.ACTIVATION_DIFFERS.value in after.reasons
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_activation_times_its_input(gate: str, *, swapped: bool) -> None:
    d = draft()
    branches = []
    for width in (4, 2):
        value = d.conv("x", 3, width, POINT)
        operands = [value, d.add(gate, [value])]
        branches.append(d.add("Mul", operands[::-1] if swapped else operands))
    before = d.finish(keep_apart(d, branches))
    after = merge(before)
    assert after.ops[:4] == ["Conv", gate, "Mul", "Split"]
    assert after.ops.count(gate) == 1
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_split_vanishes_in_a_concat(order: Sequence[int], *, act: bool) -> None:
    d = draft()
    ends = [d.conv("x", 3, width, SAME) for width in (4, 2, 3)]
    if act:
        ends = [d.add("Relu", [end]) for end in ends]
    whole = d.add("Concat", [ends[i] for i in order], axis=1)
    before = d.finish(d.conv(whole, 9, 2, POINT))
    after = merge(before)
    assert after.ops == ["Conv", *["Relu"] * act, "Conv"]
    assert variants(after) == ["deep", "shallow"]
    assert_agree(before, after.model, d.rng)
    shallow = merge(before, variant="shallow")
    assert shallow.ops == ["Conv", *["Relu"] * act, "Split", "Concat", "Conv"]
    assert_agree(before, shallow.model, d.rng)


def test_a_concat_of_more_stays() -> None:
    d = draft()
    a, b = d.conv("x", 3, 4, POINT), d.conv("x", 3, 2, POINT)
    before = d.finish(d.add("Concat", ["x", b, a, d.add("Relu", ["x"])], axis=-3))
    after = merge(before)
    assert sorted(after.ops) == ["Concat", "Conv", "Relu"]
    assert len(node(after.model, "Concat").input) == 3
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_concat_elsewhere_needs_the_split(axis: int) -> None:
    """Pieces that do not lie side by side, or that are stacked along another axis."""
    d = draft()
    a, b = d.conv("x", 3, 4, POINT), d.conv("x", 3, 4, POINT)
    between = [d.conv("x", 3, 4, SAME)] if axis == 1 else []
    before = d.finish(d.add("Concat", [a, *between, b], axis=axis))
    after = merge(before)
    assert after.ops.count("Split") == 1
    assert_agree(before, after.model, d.rng)


def test_heads_of_a_detector() -> None:
    """Thin pointwise, then depthwise convolutions, then Transposes, as in YuNet."""
    d = draft()
    ends = []
    for width in (1, 4, 10):
        hidden = d.conv("x", 3, width, POINT)
        hidden = d.conv(hidden, width, width, SAME, group=width)
        ends.append(d.add("Transpose", [hidden], perm=[0, 2, 3, 1]))
    before = d.finish(d.add("Add", [d.add("Mul", ends[:2]), ends[0]]), ends[2])
    after = merge(before)
    assert after.ops[:4] == ["Conv", "Conv", "Transpose", "Split"]
    depthwise = after.model.graph.node[1]
    assert attributes(depthwise)["group"] == 15
    assert held(after.model)[depthwise.input[1]].shape == (15, 1, 3, 3)
    assert attributes(node(after.model, "Split"))["axis"] == 3
    assert_agree(before, after.model, d.rng)
    shallow = merge(before, variant="shallow")
    assert shallow.ops[:2] == ["Conv", "Split"]
    assert shallow.ops.count("Conv") == 4
    assert_agree(before, shallow.model, d.rng)


def test_towers_stay_dense() -> None:
    """As groups of one they would be out of reach for other rewrites."""
    d = draft()
    ends = []
    for last in (2, 5):
        hidden = d.add("Relu", [d.conv("x", 3, 4, SAME)])
        hidden = d.add("Relu", [d.conv(hidden, 4, 4, SAME)])
        ends.append(d.conv(hidden, 4, last, POINT))
    before = d.finish(keep_apart(d, ends))
    after = merge(before)
    assert after.ops[:3] == ["Conv", "Relu", "Split"]
    assert after.ops.count("Conv") == 5
    assert_agree(before, after.model, d.rng)


def test_depthwise_convs_of_one_multiplier() -> None:
    d = draft()
    ends = [d.conv(d.conv("x", 3, w, POINT), w, 2 * w, SAME, group=w) for w in (1, 3)]
    before = d.finish(keep_apart(d, ends))
    after = merge(before)
    assert after.ops[:3] == ["Conv", "Conv", "Split"]
    assert attributes(after.model.graph.node[1])["group"] == 4
    assert_agree(before, after.model, d.rng)


def test_depthwise_convs_of_other_multipliers_stay() -> None:
    d = draft()
    ends = [d.conv(d.conv("x", 3, 2, POINT), 2, 2 * m, SAME, group=2) for m in (1, 2)]
    before = d.finish(keep_apart(d, ends))
    after = merge(before)
    assert after.ops[:2] == ["Conv", "Split"]
    assert after.ops.count("Conv") == 3
    assert_agree(before, after.model, d.rng)


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool", "GlobalAveragePool"])
def test_pools_go_before_the_split(pool: str) -> None:
    d = draft()
    window = {} if pool.startswith("Global") else {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}
    ends = [d.add(pool, [d.conv("x", 3, width, POINT)], **window) for width in (4, 2)]
    before = d.finish(keep_apart(d, ends))
    after = merge(before)
    assert after.ops[:3] == ["Conv", pool, "Split"]
    assert_agree(before, after.model, d.rng)


def test_groups_by_activation() -> None:
    d = draft()
    branches = [d.conv("x", 3, width, POINT) for width in (4, 2, 3, 5)]
    branches = [d.add("Relu", [b]) if i % 2 else b for i, b in enumerate(branches)]
    before = d.finish(keep_apart(d, branches))
    after = merge(before)
    assert after.applied == 2
    assert after.ops.count("Conv") == after.ops.count("Split") == 2
    assert after.ops.count("Relu") == 1
    assert_agree(before, after.model, d.rng)


def test_names_seen_outside_stay() -> None:
    """Values between that are graph outputs, read twice or captured by a subgraph."""
    d = draft()
    a, b = d.conv("x", 3, 4, POINT), d.conv("x", 3, 4, POINT)
    ends = [d.add("Relu", [value]) for value in (a, b)]
    d.nodes.insert(
        0, harness.node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    )
    info = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, [None] * 4)
    branch = onnx.helper.make_graph([harness.node("Neg", [b], ["inner"])], "b", [], [info])
    d.nodes.append(harness.node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))
    before = d.finish(d.add("Add", ends), a, "z")
    after = merge(before)
    assert after.applied == 1
    assert [n.op_type for n in after.model.graph.node if n.op_type in ("Conv", "Relu")] == [
        "Conv",
        "Relu",
        "Relu",
    ]
    assert_agree(before, after.model, d.rng)


def test_shared_weights_stay() -> None:
    d = draft()
    a, b = d.conv("x", 3, 3, POINT), d.conv("x", 3, 3, POINT)
    for conv in d.nodes[:2]:
        conv.input[1:] = d.nodes[0].input[1:]
    other = d.add("Conv", [d.add("Tanh", ["x"]), d.nodes[0].input[1]])
    before = d.finish(keep_apart(d, (a, b, other)))
    after = merge(before)
    assert after.applied == 1
    assert held(after.model)[d.nodes[0].input[1]].shape == (3, 3, 1, 1)
    assert_agree(before, after.model, d.rng)


def test_dynamic_sizes_and_automatic_pads() -> None:
    d = draft(("batch", 3, "h", "w"))
    geometry = Geometry((3, 3), (2, 2), (1, 1), (), "SAME_UPPER")
    ends = []
    for width in (4, 2):
        value = d.add("Relu", [d.conv("x", 3, width, geometry)])
        ends.append(d.add("Transpose", [d.conv(value, width, width, SAME, group=width)]))
    before = d.finish(d.add("Concat", [ends[0], d.add("Neg", [ends[1]])], axis=2))
    after = merge(before)
    assert after.ops[:5] == ["Conv", "Relu", "Conv", "Transpose", "Split"]
    assert attributes(node(after.model, "Split"))["axis"] == 2
    for size in (6, 7):
        assert_agree(before, after.model, d.rng, batch=2, h=size, w=5)


def test_pads_are_equal_however_they_are_spelled() -> None:
    d = draft()
    automatic = Geometry((3, 3), (1, 1), (1, 1), (), "SAME_UPPER")
    before = d.finish(keep_apart(d, [d.conv("x", 3, 4, g) for g in (SAME, automatic)]))
    after = merge(before)
    assert after.applied == 1
    assert_agree(before, after.model, d.rng)


def test_overridable_initializers_are_not_constant() -> None:
    d = draft(opset=7)
    proto = d.finish(keep_apart(d, [d.conv("x", 3, w, POINT) for w in (4, 2)]), ir=3)
    assert Why.WEIGHT_NOT_CONSTANT.value in merge(proto, overridable=True).reasons
    assert merge(proto).applied == 1


# -- beside other passes ---------------------------------------------------------------------------


def test_convs_of_a_split_sum_stay_apart() -> None:
    """Merging them would bring back what split-concat-conv took apart."""
    d = draft()
    a, b = (d.add("Relu", [d.conv("x", 3, 2, SAME)]) for _ in range(2))
    pairs = (((a, b), 2), ((b, a), 3))
    ends = [d.conv(d.add("Concat", both, axis=1), 4, width, POINT) for both, width in pairs]
    before = d.finish(keep_apart(d, ends))
    apart = harness.run_pass(SplitConcatConv(), before)
    assert apart.applied == 2
    after = merge(apart.model)
    assert after.applied == 1  # the two that read x
    assert Why.SUM_FOLLOWS.value in after.reasons
    assert harness.run_pass(SplitConcatConv(), after.model).applied == 0
    assert_agree(before, after.model, d.rng)


def test_merged_convs_share_a_winograd_transform() -> None:
    d = draft((1, 32, 14, 14))
    before = d.finish(keep_apart(d, [d.conv("x", 32, width, SAME) for width in (32, 16)]))
    merged = merge(before)
    after = harness.run_pass(LowerConvWinograd(), merged.model)
    assert after.applied == 1
    assert_agree(before, after.model, d.rng, factor=64)


# -- declines --------------------------------------------------------------------------------------


def alone(d: Draft) -> str:
    return d.add("Add", [d.conv("x", 3, 3, POINT), "x"])


def computed(position: int) -> Callable[[Draft], str]:
    def build(d: Draft) -> str:
        ends = [d.conv("x", 3, 4, POINT), d.conv("x", 3, 2, POINT)]
        for index, conv in enumerate(d.nodes[-2:]):
            name = f"computed{index}"
            d.nodes.insert(0, harness.node("Abs", [conv.input[position]], [name]))
            conv.input[position] = name
        return keep_apart(d, ends)

    return build


def shapeless(d: Draft) -> str:
    y = d.conv("x", 3, 4, POINT)
    d.nodes.insert(0, harness.node("Anything", [d.nodes[0].input[1]], ["w"], domain="custom"))
    d.nodes[1].input[1] = "w"
    return y


def two(d: Draft, *settings: tuple[Geometry, int]) -> list[str]:
    return [d.conv("x", 3, 3, geometry, group=group) for geometry, group in settings]


def depthwise(d: Draft) -> str:
    return keep_apart(d, two(d, (SAME, 3), (SAME, 3)))


def other_kernel(d: Draft) -> str:
    return keep_apart(d, two(d, (SAME, 1), (POINT, 1)))


def other_strides(d: Draft) -> str:
    odd = Geometry((1, 1), (1, 1), (1, 1), (0, 0, 1, 1))
    return keep_apart(d, [d.add("GlobalMaxPool", [c]) for c in two(d, (POINT, 1), (odd, 1))])


def also_reads_it_as_weight(d: Draft) -> str:
    """The other one convolves something else with the tensor."""
    y = d.conv("x", 3, 2, Geometry((1, 1), (1, 1), (1, 1), (0, 0, 0, 0)))
    other = d.add("Conv", [d.weight("c", d.noise(1, 3, 6, 7)), "x"], kernel_shape=[6, 7])
    return d.add("Mul", [d.add("GlobalMaxPool", [y]), other])


def residual(d: Draft) -> str:
    hidden = d.add("Relu", ["x"])
    a, b = (d.add("Add", [d.conv("x", 3, 3, POINT), hidden]) for _ in range(2))
    return keep_apart(d, (a, b))


def other_activation(d: Draft) -> str:
    a, b = two(d, (POINT, 1), (POINT, 1))
    return keep_apart(d, (d.add("Relu", [a]), d.add("Tanh", [b])))


def mixed(d: Draft) -> str:
    a, b = two(d, (POINT, 1), (POINT, 1))
    return keep_apart(d, (d.add("Relu", [a]), b))


BRAIN = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)

DECLINES: list[tuple[Why, Callable[[Draft], str], dict[str, Any]]] = [
    (Why.NO_CONV_BESIDE, alone, {}),
    (Why.WEIGHT_NOT_CONSTANT, computed(1), {}),
    (Why.WEIGHT_NOT_CONSTANT, computed(2), {}),
    (Why.WEIGHT_NOT_CONSTANT, shapeless, {"domains": {"custom": 1}}),
    (Why.NOT_FLOAT, lambda d: d.add("Mul", two(d, (POINT, 1), (POINT, 1))), {"dtype": BRAIN}),
    (Why.GROUPED, depthwise, {}),
    (Why.GEOMETRY_DIFFERS, other_kernel, {}),
    (Why.GEOMETRY_DIFFERS, other_strides, {}),
    (Why.GEOMETRY_DIFFERS, also_reads_it_as_weight, {"shape": (2, 3, 6, 7)}),
    (Why.SUM_FOLLOWS, residual, {}),
    (Why.ACTIVATION_DIFFERS, other_activation, {}),
    (Why.ACTIVATION_DIFFERS, mixed, {}),
]


@pytest.mark.parametrize(("why", "build", "given_"), DECLINES)
def test_declines(why: Why, build: Callable[[Draft], str], given_: dict[str, Any]) -> None:
    d = draft(dtype=given_.get("dtype", np.float32), opset=22 if "dtype" in given_ else 17)
    proto = d.finish(build(d), **{k: v for k, v in given_.items() if k == "domains"})
    outcome = merge(proto)
    assert why.value in outcome.reasons
    assert outcome.applied == 0
    assert len(outcome.ops) == len(proto.graph.node)


def test_the_first_conv_leads() -> None:
    d = draft()
    model = parse(d.finish(keep_apart(d, two(d, (POINT, 1), (POINT, 1)))))
    model.infer_shapes()
    facts = Facts(model)
    convs = [n for n in model.nodes.values() if n.op == "Conv"]
    first, second = (MergeParallelConv().match(n, facts) for n in convs)
    assert not isinstance(first, Decline)
    assert isinstance(second, Decline)
    assert second.why is Why.PART_OF_GROUP


def test_every_reason_is_tested() -> None:
    assert {why for why, *_ in DECLINES} | {Why.PART_OF_GROUP} == set(Why)


# -- properties ------------------------------------------------------------------------------------

ELEMENTWISE = ("relu", "leaky", "gate", "clip")
SPATIAL = ("depthwise", "tower", "pool")


@st.composite
def networks(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """Branches on one input that go on alike for a while, then in their own ways, and meet."""
    rank = draw(st.integers(1, 3))
    size: int | str = draw(st.one_of(st.integers(7, 9), st.just("size")))
    d = Draft(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (draw(BATCH), 2, *(size,) * rank),
        draw(st.sampled_from(DTYPES if rank == 2 else DTYPES[:2])),
        draw(st.sampled_from(OPSETS)),
    )
    d.shares = draw(st.booleans())
    geometry, axis = draw(geometries(rank)), 1
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    values = [d.conv("x", 2, w, geometry, bias=draw(st.booleans())) for w in widths]
    seen: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        kinds = ELEMENTWISE if axis > 1 else (*ELEMENTWISE, *SPATIAL, "transpose")
        kind = draw(st.sampled_from(kinds))
        strays = kind != "transpose" and draw(st.integers(0, 3)) == 0
        for index, width in enumerate(widths):
            other = draw(st.sampled_from(ELEMENTWISE)) if strays else kind
            values[index] = _layer(d, other, values[index], width, rank)
        axis = rank + 1 if kind == "transpose" else axis
        if draw(st.integers(0, 5)) == 0:
            seen.append(draw(st.sampled_from(values)))
    ends = list(draw(st.permutations(values)))
    if draw(st.booleans()):
        ends.insert(draw(st.integers(0, len(ends))), d.add("Abs", [ends[0]]))
    y = d.add("Concat", ends, axis=axis)
    return d.finish(y, *sorted(set(seen))), d


def _layer(d: Draft, kind: str, value: str, width: int, rank: int) -> str:
    if kind == "relu":
        return d.add("Relu", [value])
    if kind == "leaky":
        return d.add("LeakyRelu", [value], alpha=0.5)
    if kind == "gate":
        return d.add("Mul", [value, d.add("Sigmoid", [value])])
    if kind == "clip" and d.opset < 11:
        return d.add("Clip", [value], min=-0.5, max=0.5)
    if kind == "clip":
        bounds = [d.weight("c", np.array(v)) for v in (-0.5, 0.5)]
        return d.add("Clip", [value, *bounds])
    if kind == "depthwise":
        return d.conv(value, width, width, Geometry.plain(3, rank, pad=1), group=width)
    if kind == "tower":
        return d.conv(value, width, width, Geometry.plain(1, rank))
    if kind == "transpose":
        return d.add("Transpose", [value], perm=[0, *range(2, rank + 2), 1])
    pads = [1] * rank + [0] * rank
    return d.add("MaxPool", [value], kernel_shape=[2] * rank, pads=pads)


def check(case: tuple[onnx.ModelProto, Draft]) -> None:
    proto, d = case
    for variant in (None, "shallow"):
        try:
            outcome = merge(proto, variant=variant)
        except StopIteration:
            continue  # some site has no such variant
        assert outcome.applied or Why.ACTIVATION_DIFFERS.value in outcome.reasons
        assert_agree(proto, outcome.model, d.rng, factor=16, batch=2, size=8)


@settings(max_examples=50, deadline=None)
@given(networks())
def test_outputs_agree(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(networks())
def test_outputs_agree_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case)


@pytest.mark.zoo
def test_heads_of_a_trained_detector() -> None:
    before = zoo.trained("yunet_n_640.onnx")
    after = merge(before)
    assert after.applied == 3
    assert after.ops.count("Conv") == len(convs(before)) - 18
    # Scores near zero come out of a Sigmoid, which is as exact as its values near one.
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=100.0)


def convs(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.op_type == "Conv"]


def test_modules_of_googlenet() -> None:
    before = models.build("googlenet")
    after = merge(before)
    assert after.applied == 9
    assert after.ops.count("Conv") == len(convs(before)) - 18
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=16.0)
