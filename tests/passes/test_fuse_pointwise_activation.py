"""Activations and residual sums into ONNX Runtime's fused operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes.fuse_pointwise_activation import FusePointwiseActivation, GemmForm
from tests.passes import harness

Why = FusePointwiseActivation.Why
ANY = FusePointwiseActivation(relu_only=False, gemm=GemmForm.FUSED_GEMM)
AS_CONV = FusePointwiseActivation(gemm=GemmForm.FUSED_CONV)
Dims = tuple[int | str | None, ...]
ACTIVATIONS: dict[str, dict[str, float]] = {
    "Relu": {},
    "Sigmoid": {},
    "Tanh": {},
    "LeakyRelu": {"alpha": 0.3},
    "HardSigmoid": {"alpha": 0.4, "beta": 0.6},
    "Elu": {"alpha": 0.7},
    "Clip": {"min": -0.5, "max": 0.75},
}


@dataclass
class Draft:
    """Conv or Gemm, a sum perhaps, and an activation."""

    root: str = "Conv"
    activation: str | None = "Relu"
    attrs: dict[str, float] = field(default_factory=dict)
    bias: bool = True
    residual: Dims | None = None
    residual_first: bool = False
    opset: int = 17
    dtype: Any = np.float32
    shape: Dims = (2, 3, 6, 6)
    outputs: tuple[str, ...] = ()
    ir: int = 8
    conv: dict[str, Any] = field(default_factory=lambda: {"pads": [1] * 4})
    domains: dict[str, int] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        shape = (2, 5) if self.root == "Gemm" else self.shape
        result: Dims = (shape[0], 4, *shape[2:])
        kernel = (5, 4) if self.root == "Gemm" else (4, 3, *(3,) * (len(shape) - 2))
        weights: dict[str, Any] = {"w": rng.standard_normal(kernel)}
        inputs = {"x": shape}
        attrs = {"alpha": 0.5, "beta": 2.0} if self.root == "Gemm" else self.conv
        nodes = [harness.node(self.root, ["x", "w"], ["c"], **attrs)]
        if self.bias:
            weights["b"] = rng.standard_normal(4)
            nodes[0].input.append("b")
        last = "c"
        if self.residual is not None:
            inputs["z"] = self.residual
            operands = ["z", "c"] if self.residual_first else ["c", "z"]
            nodes.append(harness.node("Add", operands, ["s"]))
            last = "s"
        if self.activation is not None:
            nodes.append(self.activate(last, weights))
        names = {"y": result, **dict.fromkeys(self.outputs, result)}
        nodes[-1].output[0] = "y"
        return harness.model(
            nodes,
            inputs,
            names,
            {k: np.asarray(v, self.dtype) for k, v in weights.items()},
            opset=self.opset,
            dtype=self.dtype,
            ir=self.ir,
            domains=self.domains,
        )

    def activate(self, value: str, weights: dict[str, Any]) -> onnx.NodeProto:
        assert self.activation is not None
        if self.activation != "Clip" or self.opset < 11:
            return harness.node(self.activation, [value], ["y"], **self.attrs)
        names = []
        for key in ("min", "max"):
            names.append(key if key in self.attrs else "")
            if key in self.attrs:
                weights[key] = self.attrs[key]
        while names and not names[-1]:
            names.pop()
        return harness.node("Clip", [value, *names], ["y"])


def fuse(
    proto: onnx.ModelProto, pass_: FusePointwiseActivation = ANY, **options: Any
) -> harness.Outcome:
    return harness.run_pass(pass_, proto, **options)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    harness.assert_same_outputs(before, after, np.random.default_rng(0), **dims)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# -- golden ----------------------------------------------------------------------------------------


def test_convolution_and_relu() -> None:
    before = Draft().model()
    after = fuse(before, FusePointwiseActivation())
    (node,) = after.model.graph.node
    assert (node.op_type, node.domain) == ("FusedConv", "com.microsoft")
    assert list(node.input) == ["x", "w", "b"]
    assert list(node.output) == ["y"]
    assert attributes(node) == {"pads": [1] * 4, "activation": b"Relu"}
    imports = {e.domain: e.version for e in after.model.opset_import}
    assert imports == {"": 17, "com.microsoft": 1}
    check(before, after.model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_residual_sum(first: bool, bias: bool) -> None:
    before = Draft(residual=(2, 4, 6, 6), residual_first=first, bias=bias).model()
    after = fuse(before, FusePointwiseActivation())
    (node,) = after.model.graph.node
    assert [*node.input[:2], node.input[3]] == ["x", "w", "z"]
    check(before, after.model)


def test_a_residual_brings_a_bias_along() -> None:
    # The CUDA kernel reads the bias, and adds Z, only if there is one (nn/conv.cc).
    after = fuse(Draft(residual=(2, 4, 6, 6), bias=False).model(), FusePointwiseActivation())
    (node,) = after.model.graph.node
    (bias,) = [t for t in after.model.graph.initializer if t.name == node.input[2]]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(bias), np.zeros(4, np.float32))
    after = fuse(Draft(bias=False).model(), FusePointwiseActivation())
    assert list(after.model.graph.node[0].input) == ["x", "w"]


@pytest.mark.parametrize("name", ["Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"])
@pytest.mark.parametrize("opset", [10, 17])
def test_activations_of_convolutions(name: str, opset: int) -> None:
    for attrs in ({}, ACTIVATIONS[name]):
        before = Draft(activation=name, attrs=attrs, opset=opset).model()
        after = fuse(before)
        assert after.ops == ["FusedConv"]
        check(before, after.model)


@pytest.mark.parametrize("name", ["Elu", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"])
@pytest.mark.parametrize("opset", [7, 9, 17])
def test_activations_of_gemm(name: str, opset: int) -> None:
    for attrs in ({}, ACTIVATIONS[name]):
        before = Draft("Gemm", activation=name, attrs=attrs, opset=opset).model()
        after = fuse(before)
        assert after.ops == ["FusedGemm"]
        check(before, after.model)


@pytest.mark.parametrize("bound", ["min", "max"])
def test_a_clip_with_one_bound(bound: str) -> None:
    before = Draft(activation="Clip", attrs={bound: 0.25}).model()
    after = fuse(before)
    check(before, after.model)
    assert len(attributes(after.model.graph.node[0])["activation_params"]) == 2


def test_two_convolutions_in_one_sum() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        harness.node("Conv", ["x", "w1"], ["a"]),
        harness.node("Conv", ["x", "w2"], ["b"]),
        harness.node("Add", ["a", "b"], ["s"]),
        harness.node("Relu", ["s"], ["y"]),
    ]
    weights = {k: rng.standard_normal((4, 3, 1, 1)).astype(np.float32) for k in ("w1", "w2")}
    before = harness.model(nodes, {"x": ("N", 3, 5, 5)}, {"y": ("N", 4, 5, 5)}, weights)
    after = fuse(before)
    assert sorted(after.ops) == ["Conv", "FusedConv"]
    check(before, after.model, N=3)


def test_a_domain_that_is_there_is_not_imported_again() -> None:
    after = fuse(Draft(domains={"com.microsoft": 1}).model())
    assert [e.domain for e in after.model.opset_import] == ["", "com.microsoft"]


def test_it_is_off_unless_asked_for() -> None:
    assert not FusePointwiseActivation.by_default
    assert FusePointwiseActivation().spec() == "fuse-pointwise-activation"


# -- Gemm as a convolution -------------------------------------------------------------------------


def dense(
    *,
    bias: tuple[int, ...] | None = (4,),
    trans_a: bool = False,
    trans_b: bool = False,
    rows: int | str = 3,
    opset: int = 17,
    variable: bool = False,
    activation: str = "Relu",
) -> onnx.ModelProto:
    """Gemm -> Relu."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 5) if trans_b else (5, 4)).astype(np.float32)}
    operands = ["x", "w"]
    if bias is not None:
        weights["b"] = rng.standard_normal(bias).astype(np.float32)
        operands.append("b")
    attrs = {"alpha": 0.5, "beta": 2.0, "transA": int(trans_a), "transB": int(trans_b)}
    nodes = [
        harness.node("Gemm", operands, ["g"], **attrs),
        harness.node(activation, ["g"], ["y"]),
    ]
    inputs: dict[str, Dims] = {"x": (5, rows) if trans_a else (rows, 5)}
    if variable:
        inputs["w"] = weights.pop("w").shape
    return harness.model(nodes, inputs, {"y": (rows, 4)}, weights, opset=opset)


@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (1,), ()], ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
def test_gemm_as_a_convolution_of_one_pixel(bias: tuple[int, ...] | None, trans_b: bool) -> None:
    before = dense(bias=bias, trans_b=trans_b, opset=11)
    after = fuse(before, AS_CONV)
    assert after.ops == ["Reshape", "FusedConv", "Reshape"]
    assert attributes(after.model.graph.node[1]) == {"activation": b"Relu", "kernel_shape": [1, 1]}
    check(before, after.model)


@pytest.mark.parametrize("opset", [7, 9, 13, 22])
def test_gemm_of_any_number_of_rows(opset: int) -> None:
    before = dense(rows="N", opset=opset)
    after = fuse(before, AS_CONV)
    assert after.ops == ["Reshape", "FusedConv", "Reshape"]
    for rows in (1, 7):
        check(before, after.model, N=rows)


@pytest.mark.parametrize("case", [{"variable": True}, {"bias": (3, 4)}, {"bias": (3, 1)}], ids=str)
def test_gemm_that_is_no_convolution_declines(case: dict[str, Any]) -> None:
    assert fuse(dense(**case), AS_CONV).reasons == {Why.GEMM_IS_NO_CONV.value}


def test_gemm_as_a_convolution_takes_what_the_convolution_takes() -> None:
    case = dense(activation="Elu")
    assert fuse(case, AS_CONV).reasons == {Why.ACTIVATION_NOT_FUSABLE.value}
    case = dense(activation="Sigmoid")
    assert fuse(case, AS_CONV).reasons == {Why.ACTIVATION_NOT_FUSABLE.value}
    any_ = FusePointwiseActivation(relu_only=False, gemm=GemmForm.FUSED_CONV)
    check(case, fuse(case, any_).model)
    clipped = Draft("Gemm", activation="LeakyRelu", attrs={"alpha": 0.3}).model()
    check(clipped, fuse(clipped, any_).model)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)
    overridable: bool = False
    options: dict[str, Any] = field(
        default_factory=lambda: {"relu_only": False, "gemm": GemmForm.FUSED_GEMM}
    )


def two_readers() -> onnx.ModelProto:
    nodes = [
        harness.node("Conv", ["x", "w"], ["c"]),
        harness.node("Relu", ["c"], ["y"]),
        harness.node("Abs", ["c"], ["z"]),
    ]
    weights = {"w": np.ones((4, 3, 1, 1), np.float32)}
    shape = (1, 4, 5, 5)
    return harness.model(nodes, {"x": (1, 3, 5, 5)}, {"y": shape, "z": shape}, weights)


DECLINED = {
    Why.NO_ACTIVATION: Declined(lambda: Draft(activation="Abs").model(), {"after": "Abs"}),
    Why.ACTIVATION_NOT_FUSABLE: Declined(
        lambda: Draft(activation="Elu").model(), {"activation": "Elu"}
    ),
    Why.OTHER_READERS: Declined(two_readers, {"value": "c"}),
    Why.GRAPH_OUTPUT: Declined(lambda: Draft(outputs=("c",)).model(), {"value": "c"}),
    Why.BOUNDS_NOT_CONSTANT: Declined(
        lambda: Draft(activation="Clip", attrs=ACTIVATIONS["Clip"], opset=11, ir=3).model(),
        overridable=True,
    ),
    Why.RESIDUAL_SHAPE: Declined(
        lambda: Draft(residual=(1, 4, 6, 6)).model(), {"residual": (1, 4, 6, 6)}
    ),
    Why.ELEMENT_TYPE: Declined(lambda: Draft(dtype=np.float16).model(), {"dtype": "float16"}),
    Why.NOT_ASKED_FOR: Declined(lambda: Draft("Gemm").model(), {"option": "gemm"}, options={}),
    Why.GEMM_IS_NO_CONV: Declined(
        lambda: dense(trans_a=True), options={"gemm": GemmForm.FUSED_CONV}
    ),
    Why.OP_NOT_IN_OPSET: Declined(lambda: Draft(opset=6).model(), {"since": 7, "opset": 6}),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    after = fuse(
        case.proto(), FusePointwiseActivation(**case.options), overridable=case.overridable
    )
    (remark,) = after.remarks
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


@pytest.mark.parametrize("name", ["Clip", "HardSigmoid", "LeakyRelu", "Sigmoid", "Tanh"])
def test_only_relu_unless_told(name: str) -> None:
    after = fuse(Draft(activation=name).model(), FusePointwiseActivation())
    assert after.reasons == {Why.ACTIVATION_NOT_FUSABLE.value}


@pytest.mark.parametrize(
    "residual", [(4, 1, 1), (2, 1, 6, 6), ("N", 4, 6, 6), (2, 4, None, 6)], ids=str
)
def test_a_residual_that_may_broadcast_declines(residual: Dims) -> None:
    after = fuse(Draft(residual=residual).model())
    assert after.reasons == {Why.RESIDUAL_SHAPE.value}


def test_a_residual_of_the_same_unknown_size_is_fused() -> None:
    conv = {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}
    before = Draft(shape=("N", 3, 6, 6), residual=("N", 4, 6, 6), conv=conv).model()
    after = fuse(before)
    assert after.ops == ["FusedConv"]
    check(before, after.model, N=3)


def test_sums_that_others_see_decline() -> None:
    assert fuse(Draft(residual=(2, 4, 6, 6), outputs=("s",)).model()).reasons == {
        Why.GRAPH_OUTPUT.value
    }
    nodes = [
        harness.node("Conv", ["x", "w"], ["c"]),
        harness.node("Add", ["c", "c"], ["s"]),
        harness.node("Relu", ["s"], ["y"]),
    ]
    weights = {"w": np.ones((4, 3, 1, 1), np.float32)}
    twice = harness.model(nodes, {"x": (1, 3, 5, 5)}, {"y": (1, 4, 5, 5)}, weights)
    assert fuse(twice).reasons == {Why.OTHER_READERS.value}


# -- properties ------------------------------------------------------------------------------------


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    rank = draw(st.integers(3, 5))
    shape = (draw(st.integers(1, 3)), 3, *(draw(st.integers(3, 7)) for _ in range(rank - 2)))
    name = draw(st.sampled_from(sorted(ACTIVATIONS.keys() - {"Elu"})))
    attrs = {k: v for k, v in ACTIVATIONS[name].items() if draw(st.booleans())}
    strides = [draw(st.integers(1, 2)) for _ in shape[2:]]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * (rank - 2))]
    begins, ends = pads[: rank - 2], pads[rank - 2 :]
    sizes = [
        (d + b + e - 3) // s + 1
        for d, b, e, s in zip(shape[2:], begins, ends, strides, strict=True)
    ]
    return Draft(
        activation=name,
        attrs=attrs,
        bias=draw(st.booleans()),
        residual=(shape[0], 4, *sizes) if draw(st.booleans()) else None,
        residual_first=draw(st.booleans()),
        opset=draw(st.sampled_from([7, 9, 11, 13, 17, 21, 22, harness.NEWEST_OPSET])),
        shape=shape,
        conv={"pads": pads, "strides": strides},
    )


def check_draft(draft: Draft) -> None:
    proto = draft.model()
    del proto.graph.output[0].type.tensor_type.shape.dim[2:]
    strides = draft.conv["strides"]
    assert len(strides) == len(draft.shape) - 2
    for _ in strides:
        proto.graph.output[0].type.tensor_type.shape.dim.add()
    after = fuse(proto)
    assert after.ops == ["FusedConv"]
    check(proto, after.model)


@settings(max_examples=50, deadline=None)
@given(drafts())
def test_any_geometry_activation_and_residual(draft: Draft) -> None:
    check_draft(draft)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(drafts())
def test_any_geometry_activation_and_residual_at_length(draft: Draft) -> None:
    check_draft(draft)


@pytest.mark.cuda
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="no CUDA provider"
)
@pytest.mark.parametrize("residual", [None, (2, 4, 6, 6)])
def test_the_defaults_run_on_cuda(residual: Dims | None) -> None:
    before = Draft(residual=residual).model()
    after = fuse(before, FusePointwiseActivation()).model
    session = ort.InferenceSession(
        after.SerializeToString(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    feeds = harness.random_feeds(before, np.random.default_rng(0))
    expected = harness.run_unoptimized(before, feeds)["y"]
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-2, atol=1e-2)
