"""Convolutions over a Concat as sums of convolutions, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pwopt.graph import Facts, parse
from pwopt.passes.split_concat_conv import Direction, SplitConcatConv
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
    seen_inside,
)

Array = np.ndarray[Any, Any]
Why = SplitConcatConv.Why
POINT = Geometry.plain(1)
SAME = Geometry.plain(3, pad=1)


def draft(shape: Any = (2, 3, 6, 7), **settings: Any) -> Draft:
    return Draft(np.random.default_rng(0), shape, **settings)


def split(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(SplitConcatConv(), proto, **settings)


def concat(proto: onnx.ModelProto, **settings: Any) -> harness.Outcome:
    return harness.run_pass(SplitConcatConv(Direction.CONCAT), proto, **settings)


def held(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def pieces(d: Draft, widths: Sequence[int], cin: int = 3) -> list[str]:
    """Tensors with *widths* channels, by convolutions that stay."""
    return [d.add("Relu", [d.conv("x", cin, width, POINT)]) for width in widths]


def compute(d: Draft, conv: int, position: int, op: str = "Abs", **attributes: Any) -> None:
    """Let input *position* of node *conv* be computed from what it was."""
    node = d.nodes[conv]
    d.nodes.insert(0, harness.node(op, [node.input[position]], ["computed"], **attributes))
    node.input[position] = "computed"


def over_concat(d: Draft, widths: Sequence[int], geometry: Geometry, **settings: Any) -> str:
    both = d.add("Concat", pieces(d, widths), axis=1)
    return d.conv(both, sum(widths), 4, geometry, **settings)


# -- split: golden ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_pointwise_conv_over_three_pieces(bias: bool) -> None:
    d = draft()
    before = d.finish(over_concat(d, (2, 5, 1), POINT, bias=bias))
    after = split(before)
    assert after.ops == ["Conv", "Relu"] * 3 + ["Conv", "Conv", "Add", "Conv", "Add"]
    convs = [n for n in after.model.graph.node if n.op_type == "Conv"][3:]
    weights = held(after.model)
    whole = next(v for v in d.weights.values() if v.shape == (4, 8, 1, 1))
    parts = [weights[n.input[1]] for n in convs]
    assert [p.shape[1] for p in parts] == [2, 5, 1]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert [len(n.input) for n in convs] == [2 + bias, 2, 2]
    (remark,) = [r for r in after.remarks if r.ordinal is not None]
    assert remark.facts["channels"] == [2, 5, 1]
    assert_agree(before, after.model, d.rng)


def test_a_padded_strided_dilated_conv_over_a_concat() -> None:
    d = draft((2, 3, 11, 12))
    geometry = Geometry((3, 2), (2, 1), (1, 2), (1, 0, 2, 1))
    before = d.finish(over_concat(d, (2, 3), geometry))
    after = split(before)
    assert after.ops[-3:] == ["Conv", "Conv", "Add"]
    assert_agree(before, after.model, d.rng)


def test_automatic_pads_stay() -> None:
    d = draft(("batch", 3, "h", "w"))
    geometry = Geometry((3, 3), (2, 2), (1, 1), (), "SAME_UPPER")
    before = d.finish(over_concat(d, (2, 3), geometry))
    after = split(before)
    assert after.ops[-3:] == ["Conv", "Conv", "Add"]
    for size in (6, 7):
        assert_agree(before, after.model, d.rng, batch=2, h=size, w=5)


def test_a_concat_within_a_concat() -> None:
    d = draft()
    a, b, c = pieces(d, (2, 3, 4))
    inner = d.add("Concat", [a, b], axis=-3)
    outer = d.add("Concat", [inner, c], axis=1)
    before = d.finish(d.conv(outer, 9, 4, POINT))
    after = split(before)
    assert "Concat" not in after.ops
    assert after.applied == 2
    assert_agree(before, after.model, d.rng)


def test_one_tensor_twice_and_a_constant() -> None:
    d = draft()
    (a,) = pieces(d, (2,))
    grid = d.weight("grid", d.noise(2, 1, 6, 7))
    before = d.finish(d.conv(d.add("Concat", [a, grid, a], axis=1), 5, 4, SAME))
    after = split(before)
    assert "Concat" not in after.ops
    assert_agree(before, after.model, d.rng)


def test_shared_weights_stay() -> None:
    d = draft((2, 5, 6, 7))
    a, b = pieces(d, (2, 3), 5)
    y = d.conv(d.add("Concat", [a, b], axis=1), 5, 4, POINT)
    other = d.add("Conv", ["x", d.nodes[-1].input[1]])
    before = d.finish(d.add("Max", [y, other]))
    after = split(before)
    assert after.applied == 1
    assert held(after.model)[d.nodes[-2].input[1]].shape == (4, 5, 1, 1)
    assert_agree(before, after.model, d.rng)


def test_a_computed_bias_stays() -> None:
    d = draft()
    y = over_concat(d, (2, 3), POINT)
    compute(d, -1, 2)
    before = d.finish(y)
    after = split(before)
    assert after.applied == 1
    assert_agree(before, after.model, d.rng)


# -- concat: golden --------------------------------------------------------------------------------


def two_convs(d: Draft, *, biases: tuple[bool, bool] = (True, True)) -> tuple[str, str]:
    a, b = pieces(d, (2, 5))
    return d.conv(a, 2, 4, SAME, bias=biases[0]), d.conv(b, 5, 4, SAME, bias=biases[1])


@pytest.mark.parametrize("biases", [(False, False), (False, True), (True, False), (True, True)])
def test_a_sum_of_two(biases: tuple[bool, bool]) -> None:
    d = draft()
    before = d.finish(d.add("Add", two_convs(d, biases=biases)))
    after = concat(before)
    assert after.ops == ["Conv", "Relu"] * 2 + ["Concat", "Conv"]
    conv = after.model.graph.node[-1]
    assert held(after.model)[conv.input[1]].shape == (4, 7, 3, 3)
    assert len(conv.input) == 2 + any(biases)
    assert_agree(before, after.model, d.rng)


def test_other_operands_stay() -> None:
    d = draft((2, 4, 6, 7))
    a, b = pieces(d, (2, 5), 4)
    left, right = d.conv(a, 2, 4, POINT), d.conv(b, 5, 4, POINT)
    before = d.finish(d.add("Sum", [left, "x", right]))
    after = concat(before)
    assert after.ops == ["Conv", "Relu"] * 2 + ["Concat", "Conv", "Sum"]
    assert_agree(before, after.model, d.rng)


def test_a_chain_of_sums() -> None:
    d = draft()
    a, b, c = (d.conv(p, w, 4, POINT) for p, w in zip(pieces(d, (2, 3, 5)), (2, 3, 5), strict=True))
    before = d.finish(d.add("Add", [d.add("Add", [a, b]), c]))
    after = concat(before)
    assert after.applied == 2
    assert after.ops.count("Conv") == 4
    assert_agree(before, after.model, d.rng)


def test_one_direction_takes_back_the_other() -> None:
    d = draft()
    before = d.finish(over_concat(d, (2, 5, 1), SAME))
    there = split(before)
    back = concat(there.model)
    assert back.ops.count("Conv") == 4
    assert "Add" not in back.ops
    assert_agree(before, back.model, d.rng)


@pytest.mark.parametrize("direction", Direction)
def test_the_direction_is_an_option(direction: Direction) -> None:
    assert SplitConcatConv(direction).direction is direction
    assert SplitConcatConv.options() == ("direction",)
    assert SplitConcatConv().spec() == "split-concat-conv"
    assert SplitConcatConv(Direction.CONCAT).spec() == "split-concat-conv:direction=concat"


def test_dynamic_sizes_of_equal_names() -> None:
    d = draft(("batch", 3, "h", "w"))
    sources = [d.add("Relu", ["x"]), d.add("Abs", ["x"])]
    before = d.finish(d.add("Add", [d.conv(source, 3, 4, SAME) for source in sources]))
    after = concat(before)
    assert after.ops == ["Relu", "Abs", "Concat", "Conv"]
    assert_agree(before, after.model, d.rng, batch=2, h=4, w=5)


# -- declines --------------------------------------------------------------------------------------

Case = tuple[Direction, Callable[[Draft], str], dict[str, Any]]


def plain(d: Draft) -> str:
    return d.conv("x", 3, 4, POINT)


def other_axis(d: Draft) -> str:
    a, b = pieces(d, (4, 4))
    return d.conv(d.add("Concat", [a, b], axis=2), 4, 4, POINT)


def grouped(d: Draft) -> str:
    return over_concat(d, (2, 2), POINT, group=2)


def read_elsewhere(d: Draft) -> str:
    y = over_concat(d, (2, 2), POINT)
    return d.add("Add", [y, d.nodes[-1].input[0]])


def unknown_channels(d: Draft) -> str:
    a, b = pieces(d, (2, 3))
    a = d.add("Anything", [a], domain="custom")
    return d.conv(d.add("Concat", [a, b], axis=1), 5, 4, POINT)


def computed_weight(d: Draft) -> str:
    y = over_concat(d, (2, 3), POINT)
    compute(d, -1, 1)
    return y


def shapeless_weight(d: Draft) -> str:
    y = plain(d)
    compute(d, -1, 1, "Anything", domain="custom")
    return y


def no_conv_beside(d: Draft) -> str:
    return d.add("Add", [plain(d), d.weight("c", d.noise(4, 1, 1))])


def same_input(d: Draft) -> str:
    return d.add("Add", [plain(d), plain(d)])


def other_geometry(d: Draft) -> str:
    a, b = pieces(d, (2, 5))
    return d.add("Add", [d.conv(a, 2, 4, POINT), d.conv(b, 5, 4, SAME)])


def other_channels(d: Draft) -> str:
    a, b = pieces(d, (2, 5))
    return d.add("Add", [d.conv(a, 2, 4, POINT), d.conv(b, 5, 1, POINT)])


def other_size(d: Draft) -> str:
    """What a pyramid's pooled branch does: its one position is broadcast."""
    a, b = pieces(d, (2, 5))
    return d.add(
        "Add", [d.conv(a, 2, 4, POINT), d.conv(d.add("GlobalAveragePool", [b]), 5, 4, POINT)]
    )


def sum_of(d: Draft) -> str:
    return d.add("Add", two_convs(d))


def sum_read_elsewhere(d: Draft) -> str:
    a, b = two_convs(d)
    return d.add("Mul", [d.add("Add", [a, b]), b])


def partly_computed(position: int) -> Callable[[Draft], str]:
    def build(d: Draft) -> str:
        y = sum_of(d)
        compute(d, -2, position)
        return y

    return build


def grouped_sum(d: Draft) -> str:
    a, b = pieces(d, (2, 4))
    return d.add("Add", [d.conv(a, 2, 4, POINT), d.conv(b, 4, 4, POINT, group=2)])


def large_biases(d: Draft) -> str:
    y = sum_of(d)
    for conv in d.nodes[-3:-1]:
        d.weights[conv.input[2]] = np.full(4, 6e4, np.float16)
    return y


BRAIN = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
S, C = Direction.SPLIT, Direction.CONCAT
CUSTOM = {"domains": {"custom": 1}}

DECLINES: list[tuple[Why, Direction, Callable[[Draft], str], dict[str, Any]]] = [
    (Why.NO_CONCAT_BEFORE, S, plain, {}),
    (Why.NOT_ON_CHANNELS, S, other_axis, {}),
    (Why.GROUPED, S, grouped, {}),
    (Why.GROUPED, C, grouped_sum, {}),
    (Why.OTHER_READERS, S, read_elsewhere, {}),
    (Why.OTHER_READERS, C, sum_read_elsewhere, {}),
    (Why.CHANNELS_UNKNOWN, S, unknown_channels, CUSTOM),
    (Why.WEIGHT_NOT_CONSTANT, S, computed_weight, {}),
    (Why.WEIGHT_NOT_CONSTANT, S, shapeless_weight, CUSTOM),
    (Why.WEIGHT_NOT_CONSTANT, C, shapeless_weight, CUSTOM),
    (Why.WEIGHT_NOT_CONSTANT, C, partly_computed(1), {}),
    (Why.WEIGHT_NOT_CONSTANT, C, partly_computed(2), {}),
    (Why.NOT_FLOAT, S, lambda d: over_concat(d, (2, 3), POINT), {"dtype": BRAIN}),
    (Why.NOT_FLOAT, C, sum_of, {"dtype": BRAIN}),
    (Why.NO_SUM_BEHIND, C, plain, {}),
    (Why.NO_CONV_BESIDE, C, no_conv_beside, {}),
    (Why.SAME_INPUT, C, same_input, {}),
    (Why.GEOMETRY_DIFFERS, C, other_geometry, {}),
    (Why.CHANNELS_DIFFER, C, other_channels, {}),
    (Why.SIZE_UNKNOWN, C, other_size, {}),
    (Why.SIZE_UNKNOWN, C, sum_of, {"shape": ("?", 3, "?", "?")}),
    (Why.OUT_OF_RANGE, C, large_biases, {"dtype": np.float16}),
]


@pytest.mark.parametrize(("why", "direction", "build", "given_"), DECLINES)
def test_declines(
    why: Why, direction: Direction, build: Callable[[Draft], str], given_: dict[str, Any]
) -> None:
    shape = given_.get("shape", (2, 3, 6, 7))
    d = draft(shape, dtype=given_.get("dtype", np.float32), opset=22 if "dtype" in given_ else 17)
    proto = d.finish(build(d), **{k: v for k, v in given_.items() if k == "domains"})
    outcome = harness.run_pass(SplitConcatConv(direction), proto)
    assert why.value in outcome.reasons
    assert outcome.applied == 0
    assert len(outcome.ops) == len(proto.graph.node)


@pytest.mark.parametrize("direction", Direction)
def test_declines_where_the_value_between_is_a_graph_output(direction: Direction) -> None:
    d = draft()
    y = over_concat(d, (2, 3), POINT) if direction is S else sum_of(d)
    between = d.nodes[-1].input[0]
    proto = d.finish(y, between)
    outcome = harness.run_pass(SplitConcatConv(direction), proto)
    assert Why.GRAPH_OUTPUT.value in outcome.reasons
    assert outcome.applied == 0


def test_every_reason_is_tested() -> None:
    assert {why for why, *_ in DECLINES} | {Why.GRAPH_OUTPUT, Why.PART_OF_GROUP} == set(Why)


def test_the_first_operand_leads() -> None:
    d = draft()
    left, right = two_convs(d)
    model = parse(d.finish(d.add("Add", [right, left])))
    model.infer_shapes()
    facts = Facts(model)
    results = [
        SplitConcatConv(Direction.CONCAT).match(node, facts)
        for node in model.nodes.values()
        if node.outputs[0].name in (left, right)
    ]
    later, first = results
    assert isinstance(later, Decline)
    assert later.why is Why.PART_OF_GROUP
    assert not isinstance(first, Decline)


def test_overridable_initializers_are_not_constant() -> None:
    d = draft(opset=7)
    proto = d.finish(over_concat(d, (2, 3), POINT), ir=3)
    assert Why.WEIGHT_NOT_CONSTANT.value in split(proto, overridable=True).reasons
    assert split(proto).applied == 1


# -- properties ------------------------------------------------------------------------------------


@st.composite
def concatenations(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """A Conv over pieces that may be computed twice, be constant or be graph outputs."""
    rank = draw(st.integers(1, 3))
    size: int | str = draw(st.one_of(st.integers(7, 9), st.just("size")))
    d = Draft(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (draw(BATCH), 2, *(size,) * rank),
        draw(st.sampled_from(DTYPES if rank == 2 else DTYPES[:2])),
        draw(st.sampled_from(OPSETS)),
    )
    d.shares = draw(st.booleans())
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    point = Geometry.plain(1, rank)
    parts = [d.add("Relu", [d.conv("x", 2, w, point)]) for w in widths]
    if draw(st.booleans()):
        parts.append(parts[0])
        widths = [*widths, widths[0]]
    whole = d.add("Concat", parts, axis=draw(st.sampled_from([1, -1 - rank])))
    cout = draw(st.integers(1, 4))
    geometry, bias = draw(geometries(rank)), draw(st.booleans())
    y = d.conv(whole, sum(widths), cout, geometry, bias=bias)
    extra = draw(st.lists(st.sampled_from([parts[0], whole]), max_size=1))
    return d.finish(y, *extra), d


@st.composite
def sums(draw: st.DrawFn) -> tuple[onnx.ModelProto, Draft]:
    """Convolutions of one or two geometries, added up with what else there is."""
    rank = draw(st.integers(1, 3))
    d = Draft(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        (draw(BATCH), 2, *(draw(st.integers(7, 9)),) * rank),
        draw(st.sampled_from(DTYPES if rank == 2 else DTYPES[:2])),
        draw(st.sampled_from([o for o in OPSETS if o >= 8])),
    )
    d.shares = draw(st.booleans())
    point, geometry = Geometry.plain(1, rank), draw(geometries(rank))
    cout = draw(st.integers(1, 4))
    terms: list[str] = []
    for width in draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)):
        source = d.add("Relu", [d.conv("x", 2, width, point)])
        group = width if cout % width == 0 and draw(st.booleans()) else 1
        bias = draw(st.booleans())
        terms.append(d.conv(source, width, cout, geometry, group=group, bias=bias))
    if draw(st.booleans()):
        terms.insert(1, d.add("Abs", [terms[0]]))
    if draw(st.booleans()):
        return draw(seen_inside(d.finish(d.add("Sum", terms)))), d
    value = terms[0]
    for term in terms[1:]:
        value = d.add("Add", [term, value])
    return draw(seen_inside(d.finish(value))), d


def check(case: tuple[onnx.ModelProto, Draft], direction: Direction) -> None:
    proto, d = case
    outcome = harness.run_pass(SplitConcatConv(direction), proto)
    assert_agree(proto, outcome.model, d.rng, factor=16, batch=2, size=8)


@settings(max_examples=50, deadline=None)
@given(concatenations())
def test_split_agrees(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case, S)


@settings(max_examples=50, deadline=None)
@given(sums())
def test_concat_agrees(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case, C)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(concatenations())
def test_split_agrees_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case, S)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(sums())
def test_concat_agrees_at_length(case: tuple[onnx.ModelProto, Draft]) -> None:
    check(case, C)


@pytest.mark.zoo
def test_a_trained_network() -> None:
    before = zoo.trained("squeezenet1.1.onnx")
    after = split(before)
    assert after.applied == 5
    assert after.ops.count("Concat") == 3
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=16.0)
