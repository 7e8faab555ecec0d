"""Channels filled up with zeros to whole blocks."""

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
from pwopt.passes import Canonicalise, FoldBatchNormalization
from pwopt.passes.align_channels import AlignChannels
from tests import zoo
from tests.passes import harness
from tests.passes.channel_models import STRIDED, Net, networks
from tests.passes.linear_models import OPSETS, assert_agree

Why = AlignChannels.Why


def align(proto: onnx.ModelProto, variant: str | None = None, **options: Any) -> harness.Outcome:
    return harness.run_pass(_Preferring(variant), proto, **options)


class _Preferring(AlignChannels):
    """Puts one variant first where it is offered, as a ruling does."""

    def __init__(self, variant: str | None) -> None:
        super().__init__()
        object.__setattr__(self, "variant", variant)

    def variants(self, match: Any) -> Any:
        return tuple(sorted(super().variants(match), key=lambda v: v.name != self.variant))  # type: ignore[attr-defined]


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    assert_agree(before, after, np.random.default_rng(0), factor=16.0, **dims)


def weight_shapes(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    weights = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    return [weights[n.input[1]] for n in proto.graph.node if n.op_type.startswith("Conv")]


# -- golden ----------------------------------------------------------------------------------------


def test_zeros_stand_between_two_convolutions() -> None:
    net = Net()
    before = net.finish(net.layer(net.relu(net.layer("x", 13)), 5))
    after = align(before)
    assert after.ops == ["Conv", "Relu", "Conv"]
    assert weight_shapes(after.model) == [(16, 8, 1, 1), (5, 16, 1, 1)]
    weights = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    first, last = after.model.graph.node[0], after.model.graph.node[-1]
    assert not weights[first.input[1]][13:].any()
    assert not weights[first.input[2]][13:].any()
    assert not weights[last.input[1]][:, 13:].any()
    check(before, after.model)
    (remark,) = (r for r in after.remarks if r.ordinal)
    assert remark.facts["channels"] == (13, 16)


def test_the_variants_differ_where_blocks_do() -> None:
    net = Net()
    before = net.finish(net.layer(net.layer("x", 36), 5))
    assert weight_shapes(align(before).model)[0][0] == 48
    narrow = align(before, "blocks-of-8")
    assert weight_shapes(narrow.model)[0][0] == 40
    check(before, narrow.model)


def test_what_works_channel_by_channel_takes_part() -> None:
    net = Net()
    y = net.relu(net.scaled(net.scaled(net.layer("x", 14), "Mul"), "Div"))
    y = net.same(net.scaled(y, "PRelu"), "Sigmoid")
    y = net.pool(net.depthwise(y), op="AveragePool")
    y = net.made(net.batch_normalization(y, 14), 14, 2)
    before = net.finish(net.layer(y, 3))
    after = align(before)
    assert weight_shapes(after.model) == [(16, 8, 1, 1), (16, 1, 3, 3), (3, 16, 1, 1)]
    check(before, after.model)


@pytest.mark.parametrize("opset", OPSETS)
def test_a_gate_per_channel(opset: int) -> None:
    """Squeeze and excitation, as in MobileNetV3."""
    net = Net(opset=opset)
    x = net.relu(net.layer("x", 28))
    pooled = net.made(net.add("GlobalAveragePool", [x]), 28, 1)
    inner = net.relu(net.layer(pooled, 14))
    gate = net.same(net.layer(inner, 28), "HardSigmoid")
    before = net.finish(net.layer(net.same(x, "Mul", gate), 5))
    after = align(before)
    assert after.applied == 2
    assert {s[:2] for s in weight_shapes(after.model)} == {(32, 8), (16, 32), (32, 16), (5, 32)}
    check(before, after.model)


def test_a_residual_sum_takes_all_its_writers_along() -> None:
    net = Net()
    x = net.relu(net.layer("x", 12))
    y = net.same(x, "Add", net.layer(net.relu(net.layer(x, 6)), 12))
    before = net.finish(net.layer(net.relu(y), 4))
    after = align(before)
    assert weight_shapes(after.model) == [
        (16, 8, 1, 1),
        (8, 16, 1, 1),
        (16, 8, 1, 1),
        (4, 16, 1, 1),
    ]
    check(before, after.model)


def test_every_group_is_filled_up() -> None:
    net = Net()
    y = net.layer(net.relu(net.layer("x", 21)), 21, group=3)
    before = net.finish(net.layer(net.relu(y), 42, group=3))
    after = align(before)
    assert weight_shapes(after.model) == [(24, 8, 1, 1), (24, 8, 1, 1), (42, 8, 1, 1)]
    check(before, after.model)


def test_a_shuffle_among_them_becomes_a_gather() -> None:
    net = Net()
    y = net.layer(net.relu(net.layer("x", 42)), 42, group=3)
    y = net.depthwise(net.shuffle(net.relu(y), 3))
    before = net.finish(net.layer(y, 42, group=3))
    after = align(before)
    assert after.ops == ["Conv", "Relu", "Conv", "Relu", "Gather", "Conv", "Conv"]
    indices = numpy_helper.to_array(
        next(t for t in after.model.graph.initializer if t.name.endswith("/channels"))
    )
    assert sorted(indices) == list(range(48))
    check(before, after.model)


def test_between_a_dense_and_a_grouped_side_the_places_are_as_many() -> None:
    net = Net()
    y = net.depthwise(net.shuffle(net.relu(net.layer("x", 42)), 3))
    before = net.finish(net.layer(y, 42, group=3))
    after = align(before)
    assert weight_shapes(after.model)[0][0] == 48
    check(before, after.model)


@pytest.mark.parametrize("opset", OPSETS)
def test_other_readers_get_a_slice(opset: int) -> None:
    net = Net(opset=opset)
    x = net.relu(net.layer("x", 14))
    before = net.finish(net.concat(net.layer(net.pool(x, stride=1), 4), x))
    after = align(before)
    assert sorted(after.ops) == ["Concat", "Conv", "Conv", "MaxPool", "Relu", "Slice"]
    check(before, after.model)


def test_of_groups_other_readers_get_a_gather() -> None:
    net = Net()
    x = net.relu(net.layer("x", 28))
    before = net.finish(net.concat(net.layer(x, 28, group=2), x))
    after = align(before)
    assert "Gather" in after.ops
    check(before, after.model)


def test_a_selection_is_no_shuffle() -> None:
    net = Net()
    x = net.relu(net.layer("x", 28))
    before = net.finish(net.layer(net.slice(x, 0, 14), 4), net.layer(x, 4))
    after = align(before)
    assert after.ops.count("Slice") == 2
    check(before, after.model)


def test_a_transposed_convolution() -> None:
    net = Net()
    y = net.relu(net.layer("x", 14, transposed=True))
    before = net.finish(net.layer(y, 6, transposed=True))
    after = align(before)
    assert weight_shapes(after.model) == [(8, 16, 1, 1), (16, 6, 1, 1)]
    check(before, after.model)


# -- interactions ----------------------------------------------------------------------------------


def test_a_graph_output_keeps_name_and_shape() -> None:
    net = Net()
    x = net.relu(net.layer("x", 14))
    before = net.finish(net.layer(net.relu(x), 3), x)
    after = align(before)
    assert after.applied == 1
    assert [o.name for o in after.model.graph.output] == ["y", x]
    check(before, after.model)


def test_an_output_that_a_shuffle_computes() -> None:
    net = Net(opset=13)
    a = net.shuffle(net.layer("x", 28), 2)
    before = net.finish(net.layer(net.relu(a), 3), a)
    check(before, align(before).model)


def test_what_a_subgraph_reads_keeps_its_channels() -> None:
    net = Net()
    x = net.relu(net.layer("x", 14))
    inner = helper.make_graph(
        [harness.node("Neg", [x], ["inner"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    net.weights["yes"] = np.array(True)
    chosen = net.add("If", ["yes"], then_branch=inner, else_branch=inner)
    before = net.finish(net.layer(x, 3), chosen)
    after = align(before)
    assert after.applied == 1
    check(before, after.model)


def test_shared_weights_stay_for_the_other() -> None:
    net = Net(14)
    a = net.relu(net.layer("x", 14))
    b = net.made(net.add("Conv", [a, *net.nodes[0].input[1:]]), 14, 4)
    before = net.finish(b)
    after = align(before)
    assert weight_shapes(after.model) == [(16, 14, 1, 1), (14, 16, 1, 1)]
    check(before, after.model)


def test_without_bias() -> None:
    net = Net()
    before = net.finish(net.layer(net.layer("x", 14, bias=False), 3, bias=False))
    after = align(before)
    assert after.applied == 1
    assert all(len(n.input) == 2 for n in after.model.graph.node)
    check(before, after.model)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_element_types(dtype: Any) -> None:
    net = Net(dtype=dtype)
    before = net.finish(net.layer(net.depthwise(net.relu(net.layer("x", 14)), STRIDED), 3))
    after = align(before)
    assert after.applied == 1
    check(before, after.model)


def test_dynamic_dimensions() -> None:
    net = Net()
    net.shape = ("batch", 8, "H", "W")
    before = net.finish(net.layer(net.pool(net.layer("x", 14)), 3))
    after = align(before)
    assert after.applied == 1
    check(before, after.model, batch=2, H=5, W=6)


def test_initializers_listed_as_inputs() -> None:
    net = Net(opset=8)
    before = net.finish(net.layer(net.layer("x", 14), 3), ir=3)
    assert align(before).applied == 1
    assert align(before, overridable=True).applied == 0


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def chain(channels: int) -> onnx.ModelProto:
    net = Net()
    return net.finish(net.layer(net.relu(net.layer("x", channels)), 8))


def unknown() -> onnx.ModelProto:
    nodes = [harness.node("Conv", ["x", "w"], ["y"])]
    shape = (1, 2, 4, 4)
    return harness.model(nodes, {"x": shape, "w": (None, 2, 1, 1)}, {"y": (1, None, 4, 4)})


def too_large() -> onnx.ModelProto:
    net = Net(size=1)
    y = net.layer("x", 14)
    for _ in range(401):
        y = net.relu(y)
    return net.finish(net.layer(y, 3))


def fed_by_input() -> onnx.ModelProto:
    net = Net(14)
    y = net.same("x", "Add", net.layer("x", 14))
    return net.finish(net.layer(y, 3))


def no_reader() -> onnx.ModelProto:
    net = Net()
    return net.finish(net.relu(net.layer("x", 14)))


DECLINED = {
    Why.CHANNELS_UNKNOWN: Declined(unknown),
    Why.TOO_LARGE: Declined(too_large, {"channels": 14}),
    Why.ALIGNED: Declined(lambda: chain(32), {"channels": 32, "group": 1}),
    Why.TOO_MUCH_PADDING: Declined(lambda: chain(9), {"channels": 9, "group": 1}),
    Why.NO_WEIGHT_BEFORE: Declined(fed_by_input, {"channels": 14, "by": "graph input"}),
    Why.NO_WEIGHT_BEHIND: Declined(no_reader, {"channels": 14}),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    after = align(case.proto())
    assert after.applied == 0
    remark = next(r for r in after.remarks if r.reason == why.value)
    assert {k: remark.facts[k] for k in case.facts} == case.facts


@pytest.mark.parametrize("op", ["Exp", "Reciprocal", "Log"])
def test_what_may_make_infinity_of_a_filler_ends_the_class(op: str) -> None:
    net = Net()
    y = net.same(net.layer("x", 14), op)
    after = align(net.finish(net.layer(y, 3)))
    assert after.applied == 0
    assert Why.NO_WEIGHT_BEHIND.value in after.reasons


def test_a_shuffle_of_a_concat_has_no_weights_before() -> None:
    net = Net()
    joined = net.concat(net.layer("x", 7), net.relu(net.layer("x", 7)))
    y = net.depthwise(net.shuffle(joined, 2))
    after = align(net.finish(net.layer(y, 3)))
    assert Why.NO_WEIGHT_BEFORE.value in after.reasons


def test_what_was_filled_up_before_is_left_alone() -> None:
    before = align(chain(36), "blocks-of-8").model
    assert align(before).applied == 0


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v3_large_decomposed", "shufflenet_v1", "shufflenet_v2_1_0x"]
)
def test_reference_networks(name: str) -> None:
    plain = harness.run_pass(Canonicalise(), models.build(name)).model
    before = harness.run_pass(FoldBatchNormalization(), plain).model
    after = align(before)
    assert after.applied > 10
    check(before, after.model)


@pytest.mark.zoo
def test_a_trained_network() -> None:
    before = zoo.trained("fastestdet_352.onnx")
    after = align(before)
    assert after.applied == 5
    check(before, after.model)


# -- properties ------------------------------------------------------------------------------------


def check_network(before: onnx.ModelProto) -> None:
    for variant in ("blocks-of-16", "blocks-of-8"):
        after = align(before, variant)
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
