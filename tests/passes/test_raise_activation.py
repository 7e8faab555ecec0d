"""Activations that an exporter took apart."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pwopt.passes.raise_activation import RaiseActivation
from tests.passes import harness
from tests.passes.expressions import SHAPE, Expression, Style, X, apply, clip, write

Why = RaiseActivation.Why
OPSETS = (7, 8, 9, 11, 13, 14, 17, 18, 20, 21, 22)


def relu6(value: Expression) -> Expression:
    return clip(value, 0.0, 6.0)


def relu(value: Expression) -> Expression:
    return apply("Relu", value)


def low_high(value: Expression, low: float, high: float) -> Expression:
    return apply("Min", apply("Max", value, low), high)


def high_low(value: Expression, low: float, high: float) -> Expression:
    return apply("Max", apply("Min", value, high), low)


def sigmoid_arithmetic(value: Expression) -> Expression:
    return 1.0 / (apply("Exp", -value) + 1.0)


def log_softplus(value: Expression) -> Expression:
    return apply("Log", apply("Exp", value) + 1.0)


def erf_gate(argument: Expression) -> Expression:
    return apply("Erf", argument) + 1.0


def tanh_gate(argument: Expression) -> Expression:
    return apply("Tanh", argument) + 1.0


ROOT2 = math.sqrt(2.0)
SLOPE = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715
CUBE = X**3.0
INNER = (X + CUBE * CUBIC) * SLOPE


@dataclass(frozen=True)
class Case:
    """A form in which an activation is found."""

    activation: str
    expression: Expression
    opset: int = 7


CASES = {
    # x * relu6(x + 3) / 6
    "hard-swish/div-last": Case("hard-swish", X * relu6(X + 3.0) / 6.0),
    "hard-swish/div-gate": Case("hard-swish", X * (relu6(X + 3.0) / 6.0)),
    "hard-swish/mul-gate": Case("hard-swish", X * (relu6(X + 3.0) * (1 / 6))),
    "hard-swish/mul-last": Case("hard-swish", X * relu6(X + 3.0) * (1 / 6)),
    "hard-swish/mul-first": Case("hard-swish", (X * (1 / 6)) * relu6(X + 3.0)),
    "hard-swish/div-first": Case("hard-swish", (X / 6.0) * relu6(X + 3.0)),
    "hard-swish/min-max": Case("hard-swish", X * low_high(X + 3.0, 0.0, 6.0) / 6.0, 8),
    "hard-swish/max-min": Case("hard-swish", X * (high_low(X + 3.0, 0.0, 6.0) / 6.0), 8),
    "hard-swish/relu-min": Case("hard-swish", X * apply("Min", relu(X + 3.0), 6.0) / 6.0, 8),
    "hard-swish/centred": Case("hard-swish", X * ((clip(X, -3.0, 3.0) + 3.0) / 6.0)),
    "hard-swish/unit": Case("hard-swish", X * clip(X * (1 / 6) + 0.5, 0.0, 1.0)),
    "hard-swish/unit-div": Case("hard-swish", clip(X / 6.0 + 0.5, 0.0, 1.0) * X),
    "hard-swish/minus": Case("hard-swish", X * relu6(X - -3.0) / 6.0),
    "hard-swish/operator": Case(
        "hard-swish", X * apply("HardSigmoid", X, alpha=1 / 6, beta=0.5), 14
    ),
    "gated": Case("gated-hard-sigmoid", X * clip(X * 0.25 + 0.5, 0.0, 1.0)),
    "hard-sigmoid/relu6": Case("hard-sigmoid", relu6(X + 3.0) / 6.0),
    "hard-sigmoid/keras": Case("hard-sigmoid", clip(X * 0.2 + 0.5, 0.0, 1.0)),
    "hard-sigmoid/min-max": Case("hard-sigmoid", low_high(X / 6.0 + 0.5, 0.0, 1.0), 8),
    "hard-sigmoid/centred": Case("hard-sigmoid", clip(X / 6.0, -0.5, 0.5) + 0.5),
    "hard-sigmoid/minus": Case("hard-sigmoid", clip(X * 0.25, -0.5, 0.5) - -0.5),
    "relu/max": Case("relu", apply("Max", X, 0.0), 8),
    "relu/clip": Case("relu", clip(X, 0.0, None)),
    "clip/min-max": Case("clip", low_high(X, -1.0, 2.5), 8),
    "clip/max-min": Case("clip", high_low(X, 0.0, 6.0), 8),
    "clip/min": Case("clip", apply("Min", X, 6.0), 8),
    "clip/max": Case("clip", apply("Max", X, -1.0), 8),
    "clip/relu": Case("clip", apply("Min", relu(X), 6.0), 8),
    "clip/twice": Case("clip", clip(clip(X, -3.0, 5.0), 0.0, 7.0)),
    "clip/below-zero": Case("clip", X - relu(X)),
    "leaky-relu/max": Case("leaky-relu", apply("Max", X, X * 0.125), 8),
    "leaky-relu/min": Case("leaky-relu", apply("Min", X, X * 1.5), 8),
    "leaky-relu/two": Case("leaky-relu", relu(X) - relu(-X) * 0.25),
    "sigmoid/div": Case("sigmoid", sigmoid_arithmetic(X)),
    "sigmoid/reciprocal": Case("sigmoid", apply("Reciprocal", apply("Exp", -X) + 1.0)),
    "sigmoid/minus-one": Case("sigmoid", 1.0 / (apply("Exp", X * -1.0) + 1.0)),
    "sigmoid/scaled": Case("sigmoid-scaled", 1.0 / (apply("Exp", X * -1.5) + 1.0)),
    "silu/div": Case("swish", X / (apply("Exp", -X) + 1.0)),
    "silu/mul": Case("swish", X * sigmoid_arithmetic(X)),
    "swish/scaled": Case("swish-scaled", X / (apply("Exp", X * -1.5) + 1.0)),
    "mish/softplus": Case("mish", X * apply("Tanh", apply("Softplus", X))),
    "mish/log": Case("mish", X * apply("Tanh", log_softplus(X))),
    "softplus": Case("softplus", log_softplus(X)),
    "gelu/mul-root": Case("gelu", X * erf_gate(X * (1 / ROOT2)) * 0.5, 9),
    "gelu/half-first": Case("gelu", (X * 0.5) * erf_gate(X * (1 / ROOT2)), 9),
    "gelu/half-gate": Case("gelu", X * (erf_gate(X / ROOT2) * 0.5), 9),
    "gelu/spread": Case("gelu", X * (apply("Erf", X / ROOT2) * 0.5 + 0.5), 9),
    "gelu-tanh/half-last": Case("gelu-tanh", X * tanh_gate(INNER) * 0.5),
    "gelu-tanh/half-gate": Case("gelu-tanh", X * (tanh_gate(INNER) * 0.5)),
    "gelu-tanh/product": Case(
        "gelu-tanh", (X * 0.5) * tanh_gate((X + (X * X) * X * CUBIC) * SLOPE)
    ),
    "gelu-tanh/square": Case(
        "gelu-tanh", X * tanh_gate((X * SLOPE) * ((X * X) * CUBIC + 1.0)) * 0.5
    ),
    "gelu-tanh/sigmoid": Case(
        "gelu-tanh", X * apply("Sigmoid", X * ((X * X) * (2 * SLOPE * CUBIC) + 2 * SLOPE))
    ),
}


def expected(activation: str, opset: int) -> list[str]:
    """The operators that a pass over *activation* must end in."""
    gelu = ["Gelu"]
    match activation:
        case "hard-swish":
            return ["HardSwish"] if opset >= 14 else ["HardSigmoid", "Mul"]
        case "gelu":
            return gelu if opset >= 20 else ["Div", "Erf", "Add", "Mul", "Mul"]
        case "gelu-tanh":
            old = ["Mul", "Mul", "Add", "Mul", "Mul", "Tanh", "Add", "Mul", "Mul"]
            return gelu if opset >= 20 else sorted(old)
        case "mish":
            return ["Clip", "Exp", "Add", "Mul", "Add", "Div", "Mul"]
    return {
        "clip": ["Clip"],
        "gated-hard-sigmoid": ["HardSigmoid", "Mul"],
        "hard-sigmoid": ["HardSigmoid"],
        "leaky-relu": ["LeakyRelu"],
        "relu": ["Relu"],
        "sigmoid": ["Sigmoid"],
        "sigmoid-scaled": ["Mul", "Sigmoid"],
        "softplus": ["Softplus"],
        "swish": ["Sigmoid", "Mul"],
        "swish-scaled": ["Mul", "Sigmoid", "Mul"],
    }[activation]


def raised(proto: onnx.ModelProto, **options: Any) -> harness.Outcome:
    return harness.run_pass(RaiseActivation(softplus=True), proto, **options)


# -- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_raised(name: str) -> None:
    case = CASES[name]
    for opset in (case.opset, 22):
        before = write(case.expression, Style(opset=opset))
        after = raised(before)
        assert sorted(after.ops) == sorted(["Sum", *expected(case.activation, opset)])
        assert after.applied >= 1
        harness.assert_same_outputs(before, after.model, np.random.default_rng(0))


def test_hard_swish_between_convolutions() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        harness.node("Conv", ["input", "w1"], ["a"]),
        harness.node("Add", ["a", "three"], ["b"]),
        harness.node("Clip", ["b", "zero", "six"], ["c"]),
        harness.node("Mul", ["a", "c"], ["d"]),
        harness.node("Div", ["d", "six"], ["e"]),
        harness.node("Conv", ["e", "w2"], ["y"]),
    ]
    weights = {
        "w1": rng.standard_normal((8, 3, 1, 1)).astype(np.float32),
        "w2": rng.standard_normal((4, 8, 1, 1)).astype(np.float32),
        **{k: np.asarray(v, np.float32) for k, v in (("zero", 0), ("three", 3), ("six", 6))},
    }
    shapes = {"input": ("N", 3, "H", "W")}, {"y": ("N", 4, "H", "W")}
    before = harness.model(nodes, *shapes, weights, opset=17)
    after = raised(before)
    assert after.ops == ["Conv", "HardSwish", "Conv"]
    assert [t.name for t in after.model.graph.initializer] == ["w1", "w2"]
    (middle,) = (n for n in after.model.graph.node if n.op_type == "HardSwish")
    assert (list(middle.input), list(middle.output)) == (["a"], ["e"])
    (remark,) = (r for r in after.remarks if r.kind == "applied")
    assert remark.site == "n_e"
    assert remark.facts["activation"] == "hard-swish"
    assert remark.facts["nodes"] == 4
    harness.assert_same_outputs(before, after.model, rng, N=2, H=5, W=7)

    old = raised(harness.model(nodes, *shapes, weights, opset=13))
    assert old.ops == ["Conv", "HardSigmoid", "Mul", "Conv"]
    gate = old.model.graph.node[1]
    assert {a.name: round(a.f, 6) for a in gate.attribute} == {"alpha": 0.166667, "beta": 0.5}
    harness.assert_same_outputs(before, old.model, rng, N=1, H=4, W=4)


def test_bounds_and_slopes_are_kept() -> None:
    after = raised(write(CASES["clip/min-max"].expression, Style(opset=13)))
    values = {t.name: onnx.numpy_helper.to_array(t) for t in after.model.graph.initializer}
    assert [v.item() for v in values.values()] == [-1.0, 2.5]
    assert all(v.shape == () for v in values.values())
    after = raised(write(CASES["clip/min-max"].expression, Style(opset=10)))
    assert {a.name: a.f for a in after.model.graph.node[1].attribute} == {"min": -1, "max": 2.5}
    after = raised(write(CASES["leaky-relu/max"].expression, Style()))
    assert [a.f for a in after.model.graph.node[1].attribute] == [0.125]


def test_mish_can_be_written_as_an_operator() -> None:
    before = write(CASES["mish/log"].expression, Style(opset=18))
    after = raised(before, variant="mish")
    assert after.ops == ["Sum", "Mish"]
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0))


@pytest.mark.parametrize("opset", [8, 13])
def test_mish_by_arithmetic_does_not_overflow(opset: int) -> None:
    before = write(CASES["mish/softplus"].expression, Style(opset=opset))
    after = raised(before)
    x = np.zeros(SHAPE, np.float32)
    x.flat[:8] = [1e3, 30.0, 5.0, -5.0, -30.0, -1e3, 1e30, -1e30]
    expected_, actual = (
        harness.run_unoptimized(m, {"input": x})["y"] for m in (before, after.model)
    )
    np.testing.assert_allclose(actual, expected_, rtol=4e-6, atol=1e-30)


def test_one_activation_feeding_another() -> None:
    inner = apply("Max", X, 0.0)
    before = write(inner * relu6(inner + 3.0) / 6.0, Style())
    after = raised(before)
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0))
    assert after.ops.count("Div") == 0


def test_values_shared_inside_the_expression_are_no_obstacle() -> None:
    nodes = [
        harness.node("Mul", ["x", "x"], ["square"]),
        harness.node("Mul", ["square", "x"], ["cube"]),
        harness.node("Sigmoid", ["x"], ["s"]),
        harness.node("Exp", ["m"], ["e"]),
        harness.node("Neg", ["x"], ["m"]),
        harness.node("Add", ["e", "one"], ["d"]),
        harness.node("Div", ["one", "d"], ["q"]),
        harness.node("Mul", ["q", "x"], ["y"]),
    ]
    nodes = [nodes[4], nodes[3], *nodes[5:]]
    shapes = {"x": SHAPE}, {"y": SHAPE}
    before = harness.model(nodes, *shapes, {"one": np.ones(1, np.float32)})
    assert raised(before).ops == ["Sigmoid", "Mul"]


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    overridable: bool = False
    applied: int = 0


HARD_SWISH = CASES["hard-swish/div-last"].expression


def without_rank(constant_shape: tuple[int, ...]) -> onnx.ModelProto:
    """Squeeze takes away nobody knows how many dimensions."""
    nodes = [
        harness.node("Squeeze", ["input"], ["x"]),
        harness.node("Max", ["x", "zero"], ["y"]),
    ]
    weights = {"zero": np.zeros(constant_shape, np.float32)}
    return harness.model(nodes, {"input": ("N", "C", 3)}, {"y": ("A", "B")}, weights)


def higher_rank() -> onnx.ModelProto:
    nodes = [harness.node("Max", ["x", "zero"], ["y"])]
    weights = {"zero": np.zeros((1, 1, 1), np.float32)}
    return harness.model(nodes, {"x": (4, 5)}, {"y": (1, 4, 5)}, weights)


def listed_constants() -> onnx.ModelProto:
    return write(CASES["hard-swish/div-last"].expression, Style(opset=9, ir=3))


def whole_numbers() -> onnx.ModelProto:
    nodes = [harness.node("Max", ["x", "zero"], ["y"])]
    weights = {"zero": np.zeros((), np.int32)}
    return harness.model(nodes, {"x": (4, 5)}, {"y": (4, 5)}, weights, dtype=np.int32)


DECLINED = {
    Why.NO_ACTIVATION: Declined(lambda: write(X * 2.0 + 1.0, Style())),
    Why.OTHER_CONSTANT: Declined(
        lambda: write(X * relu6(X + 3.0) / 6.01, Style()),
        {"activation": "hard-swish", "alpha": pytest.approx(1 / 6)},
    ),
    Why.NOT_CONSTANT: Declined(listed_constants, overridable=True),
    Why.CONSTANT_RANK: Declined(higher_rank, {"activation": "relu", "constant": 3, "x": 2}),
    Why.SHARED_INNER_VALUE: Declined(
        lambda: write(HARD_SWISH, Style(), outputs=("Add",)),
        {"activation": "hard-swish", "value": "t3"},
    ),
    Why.PART_OF_LARGER: Declined(
        lambda: write(X * (relu6(X + 3.0) / 6.0), Style()),
        {"activation": "hard-swish", "site": "n_y"},
        applied=1,
    ),
    Why.ALREADY_BEST: Declined(
        lambda: write(X * apply("Sigmoid", X), Style(opset=22)), {"activation": "swish"}
    ),
    Why.OP_NOT_IN_OPSET: Declined(
        lambda: write(X * erf_gate(X / ROOT2) * 0.5, Style(opset=17)),
        {"activation": "gelu", "op": "Gelu", "since": 20, "opset": 17},
    ),
    Why.ELEMENT_TYPE: Declined(whole_numbers, {"activation": "relu", "dtype": "int32"}),
    Why.SINGLE_PRECISION_ONLY: Declined(
        lambda: write(relu6(X + 3.0) / 6.0, Style(dtype=np.float64)),
        {"activation": "hard-sigmoid"},
    ),
    Why.NOT_ASKED_FOR: Declined(
        lambda: write(log_softplus(X), Style()), {"activation": "softplus", "option": "softplus"}
    ),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    before = case.proto()
    after = harness.run_pass(RaiseActivation(), before, overridable=case.overridable)
    assert after.applied == case.applied
    facts = [r.facts for r in after.remarks if r.reason == why.value]
    assert facts
    if case.facts:
        assert any(all(f.get(k) == v for k, v in case.facts.items()) for f in facts)


@pytest.mark.parametrize("op", ["Add", "Clip", "Mul"])
def test_a_graph_output_inside_declines(op: str) -> None:
    before = write(HARD_SWISH, Style(), outputs=(op,))
    after = raised(before)
    assert after.applied == 0
    assert Why.SHARED_INNER_VALUE.value in after.reasons


def test_another_reader_inside_declines() -> None:
    nodes = [
        harness.node("Add", ["x", "three"], ["a"]),
        harness.node("Clip", ["a", "zero", "six"], ["b"]),
        harness.node("Mul", ["x", "b"], ["c"]),
        harness.node("Div", ["c", "six"], ["y"]),
        harness.node("Abs", ["b"], ["z"]),
    ]
    weights = {k: np.asarray(v, np.float32) for k, v in (("zero", 0), ("three", 3), ("six", 6))}
    shapes = {"x": SHAPE}, {"y": SHAPE, "z": SHAPE}
    after = raised(harness.model(nodes, *shapes, weights))
    assert after.applied == 0
    assert Why.SHARED_INNER_VALUE.value in after.reasons


def test_a_reader_in_a_subgraph_declines() -> None:
    branch = onnx.helper.make_graph(
        [harness.node("Abs", ["a"], ["r"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("r", harness.FLOAT, None)],
    )
    nodes = [
        harness.node("Add", ["x", "three"], ["a"]),
        harness.node("Clip", ["a", "zero", "six"], ["b"]),
        harness.node("Mul", ["x", "b"], ["c"]),
        harness.node("Div", ["c", "six"], ["y"]),
        harness.node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
    ]
    weights = {k: np.asarray(v, np.float32) for k, v in (("zero", 0), ("three", 3), ("six", 6))}
    weights["yes"] = np.asarray(True)
    after = raised(harness.model(nodes, {"x": SHAPE}, {"y": SHAPE, "z": SHAPE}, weights))
    assert after.applied == 0


def test_constants_that_are_listed_as_inputs_are_constants_unless_overridable() -> None:
    assert raised(listed_constants()).ops == ["Sum", "HardSigmoid", "Mul"]
    assert raised(listed_constants(), overridable=True).applied == 0


def test_unknown_rank_allows_true_scalars_only() -> None:
    declined = raised(without_rank((1,)))
    assert declined.applied == 0
    assert declined.reasons == {Why.CONSTANT_RANK.value}
    before = without_rank(())
    after = raised(before)
    assert after.ops == ["Squeeze", "Relu"]
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), N=1, C=2)


def test_a_constant_per_channel_is_no_scalar() -> None:
    nodes = [harness.node("Max", ["x", "zero"], ["y"])]
    weights = {"zero": np.zeros((3, 1, 1), np.float32)}
    after = raised(harness.model(nodes, {"x": SHAPE}, {"y": SHAPE}, weights))
    assert after.reasons == {Why.NO_ACTIVATION.value}


@pytest.mark.parametrize("dims", [("N", 3, 8, 8), ("N", "C", "H", "W"), (None, None, None, None)])
def test_dynamic_dimensions(dims: tuple[int | str | None, ...]) -> None:
    before = write(HARD_SWISH, Style(shape=dims, constant_shape=(1, 1)))
    after = raised(before)
    assert after.ops == ["Sum", "HardSwish"]
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), N=2, C=3, H=4, W=5)


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (0.0, 0.0)])
@pytest.mark.parametrize("form", [low_high, high_low])
def test_empty_ranges_are_not_merged(
    form: Callable[[Expression, float, float], Expression], bounds: tuple[float, float]
) -> None:
    before = write(form(X, *bounds), Style())
    after = raised(before)
    assert len(after.ops) == 3
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0))


@pytest.mark.parametrize("slope", [1.0, 1.5])
def test_a_maximum_with_a_steeper_line_is_no_leaky_relu(slope: float) -> None:
    assert raised(write(apply("Max", X, X * slope), Style())).applied == 0


def test_opsets_without_numpy_broadcasting_are_left_alone() -> None:
    before = write(clip(X, 0.0, None), Style(opset=6))
    after = raised(before)
    assert after.applied == 0
    assert after.reasons == {Why.OP_NOT_IN_OPSET.value}


@pytest.mark.parametrize("opset", [11, 13])
def test_a_gate_that_is_an_operator_waits_for_opset_14(opset: int) -> None:
    before = write(CASES["hard-swish/operator"].expression, Style(opset=opset))
    after = raised(before)
    assert after.applied == 0
    (facts,) = (r.facts for r in after.remarks if r.reason == Why.OP_NOT_IN_OPSET.value)
    assert facts["op"] == "HardSwish"
    assert facts["since"] == 14


FUSED = {
    "erf": X * erf_gate(X / ROOT2) * 0.5,
    "erf-half-first": (X * 0.5) * erf_gate(X / ROOT2),
    "tanh": (X * 0.5) * tanh_gate(INNER),
    "tanh-square": (X * 0.5) * tanh_gate((X * SLOPE) * ((X * CUBIC) * X + 1.0)),
}


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("name", FUSED)
def test_orders_that_the_runtime_fuses_stay_until_there_is_gelu(name: str, opset: int) -> None:
    before = write(FUSED[name], Style(opset=opset, swaps=random.Random(1)))
    after = raised(before)
    assert after.applied == (opset >= 20)


# -- properties ------------------------------------------------------------------------------------

DTYPES = (np.float32, np.float32, np.float64, np.float16)


@st.composite
def styles(draw: st.DrawFn) -> Style:
    return Style(
        opset=draw(st.sampled_from(OPSETS)),
        dtype=draw(st.sampled_from(DTYPES)),
        constant_shape=draw(st.sampled_from([(), (1,), (1, 1, 1), (1, 1, 1, 1)])),
        swaps=random.Random(draw(st.integers(0, 2**16))),
    )


def runs(proto: onnx.ModelProto) -> bool:
    try:
        harness.run_unoptimized(proto, harness.random_feeds(proto, np.random.default_rng(0)))
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        return False
    return True


def check_equal(before: onnx.ModelProto, after: onnx.ModelProto, style: Style) -> None:
    factor = 4.0 if style.dtype == np.float16 else 1.0
    harness.assert_same_outputs(before, after, np.random.default_rng(1), factor=factor)


def check_form(name: str, style: Style) -> None:
    case = CASES[name]
    style = replace(style, opset=max(style.opset, case.opset))
    before = write(case.expression, style)
    after = raised(before)
    if style.dtype is np.float64:
        assume(runs(before))
    else:
        assert sorted(after.ops) == sorted(["Sum", *expected(case.activation, style.opset)])
    check_equal(before, after.model, style)


def perturbed(expression: Expression, index: list[int], factor: float) -> Expression:
    """*expression* with one of its constants, or attributes, multiplied by *factor*."""

    def hit() -> bool:
        index[0] -= 1
        return index[0] == -1

    args = tuple(
        perturbed(a, index, factor)
        if isinstance(a, Expression)
        else (a * factor + (a == 0.0) * (factor - 1.0) if a is not None and hit() else a)
        for a in expression.args
    )
    attrs = {k: v * factor if hit() else v for k, v in expression.attrs.items()}
    return replace(expression, args=args, attrs=attrs)


def count_constants(expression: Expression) -> int:
    """Constants and attributes that :func:`perturbed` can hit."""
    enough = 1000
    left = [enough]
    perturbed(expression, left, 1.0)
    return enough - left[0]


def check_near_miss(name: str, style: Style, index: int, factor: float) -> None:
    """With a constant slightly off, the pass may find another function, but no other value."""
    case = CASES[name]
    # Made to fit rather than filtered: too much of what is drawn would be thrown away.
    style = replace(style, opset=max(style.opset, case.opset), dtype=np.float32)
    constants = count_constants(case.expression)
    assume(constants)
    expression = perturbed(case.expression, [index % constants], factor)
    before = write(expression, style)
    feeds = harness.random_feeds(before, np.random.default_rng(1))
    assume(np.isfinite(harness.run_unoptimized(before, feeds)["y"]).all())
    check_equal(before, raised(before).model, style)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(CASES)), styles())
def test_any_order_constant_opset_and_type(name: str, style: Style) -> None:
    check_form(name, style)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    styles(),
    st.integers(0, 6),
    st.sampled_from([0.5, 0.99, 0.999, 1.0001, 1.001, 1.01, 2.0, -1.0]),
)
def test_near_misses_keep_their_value(name: str, style: Style, index: int, factor: float) -> None:
    check_near_miss(name, style, index, factor)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(CASES)), styles())
def test_any_order_constant_opset_and_type_at_length(name: str, style: Style) -> None:
    check_form(name, style)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    styles(),
    st.integers(0, 6),
    st.floats(0.5, 2.0).filter(lambda f: abs(f - 1.0) > 1e-5),
)
def test_near_misses_keep_their_value_at_length(
    name: str, style: Style, index: int, factor: float
) -> None:
    check_near_miss(name, style, index, factor)


EXACT = {
    "hard-swish/div-last": 4,
    "hard-swish/mul-gate": 4,
    "gelu/mul-root": 3,
    "gelu-tanh/half-last": 5,
    "mish/log": 1,
}
"""Forms, and how many constants they have."""


@pytest.mark.parametrize("factor", [0.999, 1.00001, 1.01])
@pytest.mark.parametrize("name", EXACT)
def test_no_constant_may_be_off(name: str, factor: float) -> None:
    for index in range(EXACT[name]):
        left = [index]
        expression = perturbed(CASES[name].expression, left, factor)
        assert left[0] < 0
        after = raised(write(expression, Style(opset=20)))
        assert not set(after.ops) & {"HardSwish", "Gelu", "Mish"}
