"""Shuffles, splits and gathers of channels, done by weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper

from pwopt import models
from pwopt.graph import Facts, parse
from pwopt.passes import FoldBatchNormalization
from pwopt.passes.absorb_channel_permutation import AbsorbChannelPermutation
from pwopt.remark import Decline
from tests import zoo
from tests.passes import harness
from tests.passes.channel_models import STRIDED, Net, networks
from tests.passes.linear_models import OPSETS, assert_agree

Why = AbsorbChannelPermutation.Why
PLAIN = "as-they-come"
MOVERS = {"Gather", "Slice", "Split", "Transpose", "Reshape"}


def absorb(proto: onnx.ModelProto, variant: str = PLAIN, **options: Any) -> harness.Outcome:
    return harness.run_pass(_Preferring(variant), proto, **options)


class _Preferring(AbsorbChannelPermutation):
    """Puts one variant first where it is offered, as a ruling does."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        object.__setattr__(self, "variant", variant)

    def variants(self, match: Any) -> Any:
        return tuple(sorted(super().variants(match), key=lambda v: v.name != self.variant))  # type: ignore[attr-defined]


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    assert_agree(before, after, np.random.default_rng(0), factor=16.0, **dims)


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


# -- golden ----------------------------------------------------------------------------------------


def test_a_shuffle_between_dense_convolutions_goes() -> None:
    net = Net()
    before = net.finish(net.layer(net.shuffle(net.relu(net.layer("x", 12)), 3), 5))
    after = absorb(before)
    assert after.ops == ["Conv", "Relu", "Conv"]
    check(before, after.model)
    first, last = (weights(after.model)[n.input[1]] for n in after.model.graph.node[::2])
    old = weights(before)
    np.testing.assert_array_equal(first, old["w0"])
    order = np.arange(12).reshape(3, 4).T.reshape(-1)
    np.testing.assert_array_equal(last[:, order], old[before.graph.node[-1].input[1]])


def test_a_permutation_reaches_the_rows_before_where_groups_stand_behind() -> None:
    net = Net()
    y = net.depthwise(net.shuffle(net.relu(net.layer("x", 12)), 3))
    before = net.finish(net.layer(y, 12, group=3))
    after = absorb(before)
    assert after.ops == ["Conv", "Relu", "Conv", "Conv"]
    np.testing.assert_array_equal(
        weights(after.model)[after.model.graph.node[0].input[1]],
        weights(before)["w0"][np.arange(12).reshape(3, 4).T.reshape(-1)],
    )
    check(before, after.model)


def test_a_gather_of_the_input_goes_into_the_columns() -> None:
    net = Net(4)
    before = net.finish(net.layer(net.gather("x", [2, 0, 3, 1]), 3))
    after = absorb(before)
    assert after.ops == ["Conv"]
    check(before, after.model)


@pytest.mark.parametrize("opset", OPSETS)
def test_a_split_makes_two_convolutions(opset: int) -> None:
    net = Net(opset=opset)
    a, b = net.split(net.relu(net.layer("x", 27)), 13, 14)
    before = net.finish(net.layer(a, 3), net.layer(b, 4))
    after = absorb(before)
    assert sorted(after.ops) == ["Conv"] * 4 + ["Relu"] * 2
    check(before, after.model)
    filled = absorb(before, "blocks-of-16")
    first = weights(filled.model)[filled.model.graph.node[0].input[1]]
    assert first.shape[0] == 16
    check(before, filled.model)


@pytest.mark.parametrize("opset", OPSETS)
def test_an_unread_part_is_not_computed(opset: int) -> None:
    net = Net(opset=opset)
    y = net.relu(net.slice(net.layer("x", 20), 4, 12))
    before = net.finish(y)
    after = absorb(before)
    assert after.ops == ["Conv", "Relu"]
    assert weights(after.model)[after.model.graph.node[0].input[1]].shape[0] == 8
    check(before, after.model)


def unit(net: Net, kept: str, rest: str, half: int) -> str:
    """One unit of ShuffleNet v2 up to its shuffle."""
    y = net.relu(net.layer(rest, half))
    y = net.relu(net.layer(net.depthwise(y), half))
    return net.concat(kept, y)


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("variant", ["blocks-of-16", "blocks-of-8", PLAIN])
def test_a_stage_of_shufflenet_v2_has_nothing_but_concats(authors: bool, variant: str) -> None:
    net, half = Net(6, batch=1), 30
    x = unit(net, net.relu(net.layer("x", half)), "x", half)
    for _ in range(3):
        a, b = net.halves(x) if authors else net.split(net.shuffle(x, 2), half, half)
        x = unit(net, a, b, half)
    if not authors:
        x = net.shuffle(x, 2)
    y = net.layer(net.depthwise(x, STRIDED), 7)
    before = net.finish(net.relu(y), net.relu(net.layer(x, 5)))
    after = absorb(before, variant)
    assert set(after.ops) == {"Conv", "Relu", "Concat"}
    assert after.applied == 1
    (remark,) = (r for r in after.remarks if r.ordinal)
    assert sorted(remark.facts["variants"]) == [PLAIN, "blocks-of-16", "blocks-of-8"]  # type: ignore[arg-type,type-var]
    check(before, after.model)


def test_a_shuffle_before_another_has_its_turn_once_that_is_gone() -> None:
    net = Net()
    y = net.relu(net.shuffle(net.relu("x"), 2))
    before = net.finish(net.layer(net.shuffle(y, 2), 3))
    after = absorb(before)
    assert after.ops == ["Relu", "Relu", "Conv"]
    check(before, after.model)


def test_one_gather_is_left_for_a_graph_output() -> None:
    net = Net()
    x = net.relu(net.layer("x", 16))
    a, b = net.split(net.shuffle(x, 2), 8, 8)
    out = net.shuffle(net.concat(net.relu(net.layer(a, 8)), b), 2)
    before = net.finish(out, net.layer(out, 3))
    after = absorb(before)
    assert [op for op in after.ops if op in MOVERS] == ["Gather"]
    assert after.model.graph.output[0].name == "y"
    check(before, after.model)


def test_a_permutation_between_groups_moves_behind_the_stride() -> None:
    net = Net(12)
    y = net.shuffle(net.relu(net.layer("x", 12, group=3)), 3)
    y = net.depthwise(net.relu(y), STRIDED)
    before = net.finish(net.layer(y, 12, group=3))
    after = absorb(before)
    assert after.ops == ["Conv", "Relu", "Relu", "Conv", "Gather", "Conv"]
    check(before, after.model)
    (remark,) = (r for r in after.remarks if r.ordinal)
    assert remark.facts["behind"] == ["Relu", "Conv"]


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_it_moves_behind_a_pool(op: str) -> None:
    net = Net(6)
    before = net.finish(net.relu(net.pool(net.shuffle("x", 2), op=op)))
    after = absorb(before)
    assert after.ops == [op, "Gather", "Relu"]
    check(before, after.model)


def test_a_selection_does_not_move_behind_a_stride() -> None:
    net = Net(12)
    y = net.depthwise(net.slice(net.layer("x", 12, group=3), 0, 6), STRIDED)
    assert absorb(net.finish(net.layer(y, 6, group=3))).reasons == {Why.ORDER_NEEDED.value}


# -- interactions ----------------------------------------------------------------------------------


def test_weights_shared_with_another_convolution_stay() -> None:
    net = Net()
    a = net.layer("x", 8)
    b = net.made(net.add("Conv", ["x", *net.nodes[0].input[1:]]), 8, 4)
    before = net.finish(net.relu(net.shuffle(a, 2)), b)
    after = absorb(before)
    assert sorted(after.ops) == ["Conv", "Conv", "Relu"]
    check(before, after.model)


def test_a_source_that_is_read_elsewhere_stays_whole() -> None:
    net = Net()
    x = net.relu(net.layer("x", 8))
    before = net.finish(net.layer(net.shuffle(x, 2), 3), net.relu(x))
    after = absorb(before)
    assert sorted(after.ops) == ["Conv", "Conv", "Relu", "Relu"]
    assert after.model.graph.node[0].input[1] == "w0"
    check(before, after.model)


def test_a_source_that_is_a_graph_output_stays_whole() -> None:
    net = Net()
    x = net.relu(net.layer("x", 8))
    before = net.finish(net.layer(net.shuffle(x, 2), 3), x)
    after = absorb(before)
    assert after.ops == ["Conv", "Relu", "Conv"]
    check(before, after.model)


def test_a_sink_that_is_a_graph_output_keeps_its_name() -> None:
    net = Net()
    a, b = net.split(net.layer("x", 8), 3, 5)
    before = net.finish(a, b)
    after = absorb(before)
    assert after.ops == ["Conv", "Conv", "Identity", "Identity"]
    assert [o.name for o in after.model.graph.output] == ["y", b]
    check(before, after.model)


def test_what_a_subgraph_reads_keeps_its_order() -> None:
    net = Net(8)
    shuffled = net.shuffle(net.relu(net.layer("x", 8)), 2)
    inner = helper.make_graph(
        [harness.node("Neg", [shuffled], ["inner"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    net.weights["yes"] = np.array(True)
    chosen = net.add("If", ["yes"], then_branch=inner, else_branch=inner)
    before = net.finish(net.layer(shuffled, 3), chosen)
    after = absorb(before)
    check(before, after.model)


def test_a_sum_takes_the_order_up_in_the_other_convolution() -> None:
    net = Net()
    a = net.shuffle("x", 2)
    y = net.same(a, "Add", net.layer("x", 8))
    before = net.finish(net.layer(y, 3))
    after = absorb(before)
    assert sorted(after.ops) == ["Add", "Conv", "Conv"]
    check(before, after.model)


def test_channels_read_twice_are_gathered() -> None:
    net = Net()
    y = net.gather(net.gather(net.layer("x", 8), [1, 0, 2, 3, 5, 4, 7, 6]), [0, 0, 3, 3, 5])
    before = net.finish(net.layer(y, 3))
    after = absorb(before)
    assert after.ops == ["Conv", "Gather", "Conv"]
    check(before, after.model)


@pytest.mark.parametrize("batch", [1, 3, "batch"])
def test_batches(batch: int | str) -> None:
    net = Net(batch=batch)
    before = net.finish(net.layer(net.shuffle(net.layer("x", 8), 4), 3))
    after = absorb(before)
    assert after.ops == ["Conv", "Conv"]
    check(before, after.model, batch=3)


def test_a_dynamic_size() -> None:
    net = Net(batch="batch")
    net.shape = ("batch", 8, "H", "W")
    y = net.gather(net.layer("x", 8), [3, 2, 1, 0, 7, 6, 5, 4])
    before = net.finish(net.layer(y, 3))
    after = absorb(before)
    assert after.ops == ["Conv", "Conv"]
    check(before, after.model, batch=2, H=5, W=3)


def test_half_precision() -> None:
    net = Net(dtype=np.float16)
    a, b = net.split(net.shuffle(net.relu(net.layer("x", 12)), 2), 6, 6)
    before = net.finish(net.layer(a, 3), net.layer(b, 4))
    after = absorb(before, "blocks-of-8")
    assert not MOVERS & set(after.ops)
    check(before, after.model)


def test_double_precision() -> None:
    net = Net(dtype=np.float64)
    before = net.finish(net.layer(net.shuffle(net.layer("x", 8), 2), 3))
    after = absorb(before)
    assert after.ops == ["Conv", "Conv"]
    check(before, after.model)


def test_initializers_listed_as_inputs() -> None:
    net = Net(opset=8)
    before = net.finish(net.layer(net.shuffle(net.layer("x", 8), 2), 3), ir=3)
    assert absorb(before).ops == ["Conv", "Conv"]
    assert absorb(before, overridable=True).applied == 0


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def not_channels() -> onnx.ModelProto:
    net = Net()
    y = net.add("Transpose", [net.layer("x", 8)], perm=[0, 2, 3, 1])
    return net.finish(y)


def led_by_another() -> onnx.ModelProto:
    net = Net()
    y = net.gather(net.gather("x", [1, 0, 2, 3, 5, 4, 7, 6]), [7, 6, 5, 4, 3, 2, 1, 0])
    z = net.layer(net.same(y, "Add", net.shuffle("x", 2)), 3)
    return net.finish(z)


def order_needed() -> onnx.ModelProto:
    net = Net(12)
    y = net.shuffle(net.layer("x", 12, group=3), 3)
    return net.finish(net.layer(y, 12, group=3))


def more_macs() -> onnx.ModelProto:
    net = Net(32)
    return net.finish(net.layer(net.slice("x", 0, 4), 3))


def too_large() -> onnx.ModelProto:
    net, y = Net(2, size=1), "x"
    for _ in range(201):
        y = net.gather(y, [1, 0])
    return net.finish(net.layer(y, 3))


DECLINED = {
    Why.NOT_CHANNELS: Declined(not_channels),
    Why.LED_BY_ANOTHER: Declined(led_by_another),
    Why.ORDER_NEEDED: Declined(order_needed, {"by": ("Conv",)}),
    Why.MORE_MACS: Declined(more_macs, {"weights": (12, 96)}),
    Why.TOO_LARGE: Declined(too_large, {"routes": 201}),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    model = parse(case.proto())
    model.infer_shapes()
    facts = Facts(model)
    roots = [n for n in model.nodes.values() if n.op in AbsorbChannelPermutation.roots]
    found = [AbsorbChannelPermutation().match(node, facts) for node in roots]
    decline = next(f for f in found if isinstance(f, Decline) and f.why is why)
    assert {k: decline.facts[k] for k in case.facts} == case.facts


@pytest.mark.parametrize("axis", [2, 3])
def test_other_axes_are_not_channels(axis: int) -> None:
    net = Net()
    y = net.add("Gather", [net.layer("x", 8), net.integers(3, 1, 2, 0)], axis=axis)
    assert absorb(net.finish(net.made(y, 8, 4))).reasons == {Why.NOT_CHANNELS.value}


def test_a_reshape_that_cuts_rows_is_no_shuffle() -> None:
    net = Net(4, size=4)
    y = net.reshape("x", 0, 2, 8, 2, 4)
    y = net.add("Transpose", [y], perm=[0, 2, 1, 3, 4])
    before = net.finish(net.layer(net.made(net.reshape(y, 0, 4, 4, 4), 4, 4), 3))
    assert absorb(before).reasons == {Why.NOT_CHANNELS.value}


def test_an_inner_value_that_is_read_elsewhere_is_no_shuffle() -> None:
    net = Net(4)
    y = net.shuffle("x", 2)
    inner = net.nodes[1].output[0]
    before = net.finish(net.layer(y, 3))
    before.graph.output.append(helper.make_tensor_value_info(inner, TensorProto.FLOAT, [None] * 5))
    assert absorb(before).reasons == {Why.NOT_CHANNELS.value}


# -- networks --------------------------------------------------------------------------------------


def prepared(proto: onnx.ModelProto) -> onnx.ModelProto:
    return harness.run_pass(FoldBatchNormalization(), proto).model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("shufflenet_v1", 15), ("shufflenet_v2_1_0x", 0)])
def test_reference_networks(name: str, left: int) -> None:
    before = prepared(models.build(name))
    after = absorb(before, "blocks-of-16")
    assert sum(op in ("Transpose", "Gather", "Split") for op in after.ops) == left
    check(before, after.model)


@pytest.mark.zoo
def test_a_trained_network() -> None:
    before = zoo.trained("fastestdet_352.onnx")
    after = absorb(before)
    assert after.applied == 3
    assert after.ops.count("Transpose") == 2  # of its head
    assert "Gather" not in after.ops
    check(before, after.model)


# -- properties ------------------------------------------------------------------------------------


def check_network(before: onnx.ModelProto) -> None:
    for variant in ("blocks-of-16", "blocks-of-8", PLAIN):
        after = absorb(before, variant)
        check(before, after.model, batch=2)
        if not after.applied:
            return


@settings(max_examples=50, deadline=None)
@given(networks())
def test_any_network(before: onnx.ModelProto) -> None:
    check_network(before)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(networks())
def test_any_network_at_length(before: onnx.ModelProto) -> None:
    check_network(before)
