"""Estimates: what costs more than what. No figure here is a measured time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.cost import (
    Machine,
    estimate_seconds,
    model_cost,
    rewrite_seconds,
    window_seconds,
)
from pwopt.graph import Facts, Model, Node, Rewriter, parse
from tests.cost.graphs import Array, Shape, floats, model, node

PLAIN = Machine(channel_block=0)
MACHINES = [pytest.param(Machine(), id="blocked"), pytest.param(PLAIN, id="plain")]


def scalar(value: float) -> Array:
    return np.array(value, np.float32)


def loaded(
    nodes: Sequence[onnx.NodeProto],
    shape: Shape,
    weights: Mapping[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    **options: Any,
) -> Model:
    """A model with one input ``x`` of *shape*, with shapes inferred."""
    wrapped = parse(model(nodes, {"x": shape}, outputs, weights, **options))
    wrapped.infer_shapes()
    return wrapped


def named(wrapped: Model, *outputs: str) -> list[Node]:
    """The nodes that compute *outputs*."""
    by_output = {n.outputs[0].name: n for n in wrapped.nodes.values()}
    return [by_output[name] for name in outputs]


def seconds(wrapped: Model, *outputs: str, machine: Machine | None = None) -> float:
    """Estimate of the window that computes *outputs*; of all nodes if none are named."""
    nodes = named(wrapped, *outputs) if outputs else wrapped.sorted_nodes()
    estimate = window_seconds(nodes, Facts(wrapped), {}, machine)
    assert estimate is not None
    return estimate


# -- between convolutions --------------------------------------------------------------------------

SIDE = {"w": floats(64, 64, 1, 1)}
SHAPE = (1, 64, 56, 56)


def between_convs(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array] | None = None, **options: Any
) -> Model:
    """*nodes*, which compute ``b`` from ``a``, with a pointwise convolution on either side."""
    return loaded(
        [node("Conv", ["x", "w"], ["a"]), *nodes, node("Conv", ["b", "w"], ["y"])],
        SHAPE,
        {**SIDE, **(weights or {})},
        **options,
    )


HARD_SWISH = [
    node("Add", ["a", "three"], ["s"]),
    node("Clip", ["s", "zero", "six"], ["c"]),
    node("Mul", ["a", "c"], ["m"]),
    node("Div", ["m", "six"], ["b"]),
]
CONSTANTS = {"three": scalar(3), "zero": scalar(0), "six": scalar(6)}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_decomposed_activation_costs_more_than_the_operator(machine: Machine) -> None:
    decomposed = between_convs(HARD_SWISH, CONSTANTS)
    raised = between_convs([node("HardSwish", ["a"], ["b"])])
    before = seconds(decomposed, "s", "c", "m", "b", machine=machine)
    after = seconds(raised, "b", machine=machine)
    assert before > 2 * after


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("op", ["Relu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "LeakyRelu"])
def test_activations_behind_a_convolution_cost_nearly_nothing(op: str, machine: Machine) -> None:
    absorbed = seconds(between_convs([node(op, ["a"], ["b"])]), "b", machine=machine)
    alone = seconds(loaded([node(op, ["x"], ["y"])], SHAPE), machine=machine)
    assert 0 < absorbed < alone / 5


def test_a_convolution_absorbs_one_activation() -> None:
    conv, tanh = node("Conv", ["x", "w"], ["a"]), node("Tanh", ["a"], ["b"])
    second = loaded([conv, tanh, node("Relu", ["b"], ["y"])], SHAPE, SIDE)
    only = loaded([conv, node("Relu", ["a"], ["y"])], SHAPE, SIDE)
    assert seconds(second, "y", machine=PLAIN) > 5 * seconds(only, "y", machine=PLAIN)


@pytest.mark.parametrize(
    "second_reader",
    [
        pytest.param([node("Sqrt", ["a"], ["z"])], id="another-node"),
        pytest.param([], id="a-graph-output"),
    ],
)
def test_an_activation_is_not_absorbed_if_its_input_is_needed(
    second_reader: list[onnx.NodeProto],
) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    shared = loaded(
        [*nodes, *second_reader], SHAPE, SIDE, outputs=["y", "z" if second_reader else "a"]
    )
    assert seconds(shared, "y", machine=PLAIN) > 5 * seconds(
        loaded(nodes, SHAPE, SIDE), "y", machine=PLAIN
    )


def test_a_residual_and_its_activation_are_absorbed_together() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["s"]),
        node("Conv", ["s", "w"], ["a"]),
        node("Add", ["a", "s"], ["r"]),
        node("Relu", ["r"], ["b"]),
        node("Conv", ["b", "w"], ["y"]),
    ]
    wrapped = loaded(nodes, SHAPE, SIDE)
    residual = seconds(wrapped, "r", "b")
    alone = seconds(wrapped, "r", "b", machine=PLAIN)
    assert residual < alone / 3


@pytest.mark.parametrize("machine", MACHINES)
def test_folding_is_never_dearer(machine: Machine) -> None:
    channels = {name: floats(64) for name in ("scale", "shift", "mean", "var")}
    behind = between_convs(
        [node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"])], channels
    )
    assert seconds(behind, "b", machine=machine) > 0
    before_conv = loaded(
        [
            node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["a"]),
            node("Conv", ["a", "w"], ["y"]),
        ],
        SHAPE,
        {**SIDE, **channels},
    )
    folded = loaded([node("Conv", ["x", "w"], ["y"])], SHAPE, SIDE)
    overhead = Machine().node_overhead_us * 1e-6
    assert seconds(before_conv, machine=machine) > seconds(folded, machine=machine) + overhead


def test_a_scalar_operand_breaks_the_layout_and_a_channel_factor_does_not() -> None:
    channels = between_convs([node("Mul", ["a", "f"], ["b"])], {"f": floats(64, 1, 1)})
    lone = between_convs([node("Mul", ["a", "f"], ["b"])], {"f": scalar(2)})
    assert seconds(lone, "b") > 5 * seconds(channels, "b")


def test_prelu_costs_more_than_operators_that_keep_the_layout() -> None:
    prelu = between_convs([node("PRelu", ["a", "slope"], ["b"])], {"slope": floats(64, 1, 1)})
    nodes = [
        node("Relu", ["a"], ["p"]),
        node("Mul", ["a", "slope"], ["q"]),
        node("Mul", ["p", "rest"], ["r"]),
        node("Add", ["q", "r"], ["b"]),
    ]
    weights = {"slope": floats(64, 1, 1), "rest": floats(64, 1, 1)}
    apart = between_convs(nodes, weights)
    assert seconds(prelu, "b") > seconds(apart, "p", "q", "r", "b")


# -- pointwise convolutions as matrix products -----------------------------------------------------


def nhwc(shape: Sequence[int], cout: int) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "m"], ["u"]),
        node("Transpose", ["u"], ["y"], perm=[0, 3, 1, 2]),
    ]
    return nodes, {"m": floats(shape[1], cout)}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("shape", "cout"),
    [
        ((1, 64, 56, 56), 64),
        ((1, 256, 14, 14), 256),
        ((1, 512, 7, 7), 512),
        ((1, 256, 56, 56), 64),
        ((8, 32, 112, 112), 16),
    ],
)
def test_a_round_trip_to_nhwc_costs_more_than_the_convolution(
    shape: tuple[int, ...], cout: int, machine: Machine
) -> None:
    conv = loaded([node("Conv", ["x", "w"], ["y"])], shape, {"w": floats(cout, shape[1], 1, 1)})
    nodes, weights = nhwc(shape, cout)
    # The border is the same for both: what comes before and after is not blocked.
    assert seconds(loaded(nodes, shape, weights), machine=machine) > seconds(conv, machine=machine)


def test_transposes_that_cancel_are_worth_removing() -> None:
    nodes = [
        node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
        node("Transpose", ["t"], ["b"], perm=[0, 3, 1, 2]),
    ]
    assert seconds(between_convs(nodes), "t", "b") > 2 * Machine().node_overhead_us * 1e-6


def test_a_unit_transpose_costs_less_than_one_that_moves_elements() -> None:
    moved = loaded([node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], SHAPE)
    kept = loaded([node("Transpose", ["x"], ["y"], perm=[1, 0, 2, 3])], SHAPE)
    assert seconds(moved) > 1.5 * seconds(kept)


def test_a_view_costs_less_than_a_copy() -> None:
    view = loaded([node("Flatten", ["x"], ["y"])], SHAPE)
    copy = loaded([node("Pad", ["x", "p"], ["y"])], SHAPE, {"p": np.zeros(8, np.int64)})
    assert seconds(copy) > 5 * seconds(view) > 0


def test_the_activation_behind_a_lowered_convolution_is_charged() -> None:
    """A rewrite that was made: the Relu stays, and loses its convolution."""
    wrapped = loaded([node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])], SHAPE, SIDE)
    facts = Facts(wrapped)
    (conv,) = named(wrapped, "a")
    rewriter = Rewriter(wrapped)
    mark = rewriter.mark()
    rewriter.remove(conv)
    flat = rewriter.variable("flat", conv.inputs[0], (1, 64, 56 * 56))
    product = rewriter.variable("product", conv.inputs[0], (1, 64, 56 * 56))
    target = rewriter.constant("target", np.array([1, 64, -1], np.int64))
    back = rewriter.constant("back", np.array(SHAPE, np.int64))
    matrix = rewriter.constant("matrix", floats(64, 64))
    rewriter.add("Reshape", [conv.inputs[0], target], [flat], near=conv)
    rewriter.add("MatMul", [matrix, flat], [product], near=conv)
    rewriter.add("Reshape", [product, back], [conv.outputs[0]], near=conv)
    removed, added = rewriter.changes(mark)
    found = rewrite_seconds(removed, added, facts, {}, PLAIN)
    assert found is not None
    before, after = found
    relu = seconds(loaded([node("Relu", ["x"], ["y"])], SHAPE), machine=PLAIN)
    lowered = sum(
        estimate for n in added if (estimate := window_seconds([n], facts, {}, PLAIN)) is not None
    )
    assert after == pytest.approx(lowered)
    assert after > before + relu / 2


def test_what_replaces_a_window_is_not_its_neighbour() -> None:
    wrapped = between_convs([node("Relu", ["a"], ["b"])])
    before = seconds(wrapped, "b")
    facts = Facts(wrapped)
    (relu,) = named(wrapped, "b")
    rewriter = Rewriter(wrapped)
    mark = rewriter.mark()
    rewriter.remove(relu)
    middle = rewriter.variable("middle", relu.outputs[0])
    rewriter.add("Neg", [relu.inputs[0]], [middle], near=relu)
    rewriter.add("Neg", [middle], [relu.outputs[0]], near=relu)
    removed, added = rewriter.changes(mark)
    found = rewrite_seconds(removed, added, facts, {})
    assert found is not None
    assert found[0] == pytest.approx(before)
    assert found[1] > found[0]


def test_a_branch_that_leaves_the_layout_takes_the_residual_along() -> None:
    """One of two convolutions before an Add becomes a Gemm, which alone would be faster."""
    shape = (1, 64, 56, 56)
    wrapped = loaded(
        [
            node("Conv", ["x", "w"], ["s"]),
            node("Conv", ["s", "v"], ["a"]),
            node("Conv", ["s", "v"], ["b"]),
            node("Add", ["a", "b"], ["r"]),
            node("Relu", ["r"], ["t"]),
            node("Conv", ["t", "u"], ["y"]),
        ],
        shape,
        {**SIDE, "v": floats(256, 64, 1, 1), "u": floats(64, 256, 1, 1)},
    )
    facts = Facts(wrapped)
    (conv,) = named(wrapped, "a")
    rewriter = Rewriter(wrapped)
    mark = rewriter.mark()
    rewriter.remove(conv)
    flat = rewriter.variable("flat", conv.inputs[0], (64, 56 * 56))
    product = rewriter.variable("product", conv.inputs[0], (256, 56 * 56))
    matrix = rewriter.constant("matrix", floats(256, 64))
    target = rewriter.constant("target", np.array([64, -1], np.int64))
    back = rewriter.constant("back", np.array([1, 256, 56, 56], np.int64))
    rewriter.add("Reshape", [conv.inputs[0], target], [flat], near=conv)
    rewriter.add("Gemm", [matrix, flat], [product], near=conv)
    rewriter.add("Reshape", [product, back], [conv.outputs[0]], near=conv)
    found = rewrite_seconds(*rewriter.changes(mark), facts)
    assert found is not None
    before, after = found
    # Copies in and out of this branch, of the other one, and of what goes on; a residual read
    # and written, and a Relu.
    result = 4 * 256 * 56 * 56 / (Machine().gbytes_per_s * 1e9)
    assert after > before + 2 * result


def test_redirected_readers_are_charged_to_neither_side() -> None:
    wrapped = between_convs([node("Mul", ["a", "f"], ["b"])], {"f": scalar(2)})
    facts = Facts(wrapped)
    (scale,) = named(wrapped, "b")
    rewriter = Rewriter(wrapped)
    mark = rewriter.mark()
    assert rewriter.bypass(scale, scale.inputs[0])
    removed, added = rewriter.changes(mark)
    assert (removed, added) == ([scale], [])
    found = rewrite_seconds(removed, added, facts)
    assert found is not None
    assert found[0] > found[1] == 0.0


# -- the roofline ----------------------------------------------------------------------------------


def conv_seconds(cin: int, cout: int, kernel: int, size: int, group: int = 1) -> float:
    weights = {"w": floats(cout, cin // group, kernel, kernel)}
    nodes = [node("Conv", ["x", "w"], ["y"], group=group)]
    return seconds(loaded(nodes, (1, cin, size, size), weights))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 3, 5]), st.integers(6, 20))
def test_more_work_is_never_faster(cin: int, cout: int, kernel: int, size: int) -> None:
    base = conv_seconds(8 * cin, 8 * cout, kernel, size)
    assert conv_seconds(8 * cin + 8, 8 * cout, kernel, size) >= base
    assert conv_seconds(8 * cin, 8 * cout + 8, kernel, size) >= base
    assert conv_seconds(8 * cin, 8 * cout, kernel, size + 1) >= base
    if kernel > 1:
        assert conv_seconds(8 * cin, 8 * cout, kernel, size) >= conv_seconds(
            8 * cin, 8 * cout, kernel - 2, size - 2
        )


def test_composing_two_convolutions_pays_when_macs_fall() -> None:
    def chain(*channels: int) -> float:
        weights = {
            f"w{i}": floats(cout, cin, 1, 1)
            for i, (cin, cout) in enumerate(itertools.pairwise(channels))
        }
        names = ["x", *(f"a{i}" for i in range(len(weights) - 1)), "y"]
        nodes = [node("Conv", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(weights))]
        return seconds(loaded(nodes, (1, channels[0], 28, 28), weights))

    assert chain(64, 128) < chain(64, 256, 128)
    assert chain(256, 256) > chain(256, 16, 256)


def test_depthwise_costs_more_per_mac_than_dense() -> None:
    dense, depthwise = conv_seconds(64, 64, 3, 30), conv_seconds(64, 64, 3, 30, group=64)
    assert depthwise < dense < 64 * depthwise / 2


def test_narrow_groups_cost_more_than_wide_ones_of_the_same_macs() -> None:
    assert conv_seconds(128, 128, 3, 30, group=32) > conv_seconds(128, 128, 3, 30, group=16)


@pytest.mark.parametrize("field", ["gflops", "gbytes_per_s"])
def test_a_better_machine_is_faster(field: str) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"], pads=[1] * 4), node("Sqrt", ["a"], ["y"])]
    wrapped = loaded(nodes, SHAPE, {"w": floats(64, 64, 3, 3)})
    twice = dataclasses.replace(Machine(), **{field: 2 * getattr(Machine(), field)})
    assert seconds(wrapped) / 2 < seconds(wrapped, machine=twice) < seconds(wrapped)


def test_overhead_is_paid_by_every_node() -> None:
    nodes = [node("Sqrt", ["x"], ["a"]), node("Abs", ["a"], ["y"])]
    wrapped = loaded(nodes, (1, 2))
    free = Machine(node_overhead_us=0)
    dear = Machine(node_overhead_us=5)
    difference = seconds(wrapped, machine=dear) - seconds(wrapped, machine=free)
    assert difference == pytest.approx(10e-6)


def test_a_whole_model_is_the_window_of_all_its_nodes() -> None:
    wrapped = between_convs(HARD_SWISH, CONSTANTS)
    assert estimate_seconds(model_cost(wrapped).nodes) == pytest.approx(seconds(wrapped))


def test_a_long_chain_is_estimated_without_recursion() -> None:
    count = 1500
    names = ["x", *(f"a{i}" for i in range(count - 1)), "y"]
    nodes = [node("Relu", [names[i]], [names[i + 1]]) for i in range(count)]
    wrapped = loaded(nodes, (1, 8, 4, 4))
    costs = model_cost(wrapped).nodes
    assert estimate_seconds(costs) == pytest.approx(count * estimate_seconds(costs[:1]))
    assert estimate_seconds(reversed(costs)) == pytest.approx(estimate_seconds(costs))


# -- what cannot be estimated ----------------------------------------------------------------------


def test_an_unknown_shape_gives_no_estimate() -> None:
    wrapped = loaded([node("Relu", ["x"], ["y"])], ("N", 4, "H", 8))
    facts = Facts(wrapped)
    nodes = wrapped.sorted_nodes()
    assert window_seconds(nodes, facts) is None
    assert window_seconds(nodes, facts, {"N": 1}) is None
    assert rewrite_seconds([], nodes, facts, {"N": 1}) is None
    assert window_seconds(nodes, facts, {"N": 1, "H": 8}) == pytest.approx(
        seconds(loaded([node("Relu", ["x"], ["y"])], (1, 4, 8, 8)))
    )


def test_an_unknown_operator_gives_no_estimate() -> None:
    nodes = [node("Bend", ["x"], ["a"], domain="example"), node("Relu", ["a"], ["y"])]
    wrapped = loaded(nodes, (1, 4), domains={"example": 1})
    assert window_seconds(named(wrapped, "a"), Facts(wrapped)) is None


def test_an_unknown_neighbour_does_no_harm() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Bend", ["a"], ["y"], domain="example")]
    wrapped = loaded(nodes, (1, 4), domains={"example": 1})
    assert seconds(wrapped, "a") > 0


def test_an_empty_window_costs_nothing() -> None:
    wrapped = loaded([node("Relu", ["x"], ["y"])], (1, 4))
    assert window_seconds([], Facts(wrapped)) == 0.0
