"""lower-pointwise-conv: every 1x1 Conv, in four forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pwopt import models
from pwopt.errors import UsageError
from pwopt.passes.lower_pointwise_conv import Form, LowerPointwiseConv
from tests.passes.harness import (
    Array,
    Outcome,
    assert_same_outputs,
    model,
    node,
    random_feeds,
    run_pass,
    run_unoptimized,
)
from tests.passes.linear_models import assert_agree

Why = LowerPointwiseConv.Why
FORMS = [form.value for form in Form]
OPSETS = (7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 21, 22, 23)
ACTIVATIONS = (
    "Relu",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Sigmoid",
    "HardSigmoid",
    "Tanh",
    "Softplus",
    "Softsign",
)


@dataclass(frozen=True)
class Spec:
    """A pointwise convolution; strings among the dims are symbols."""

    dims: tuple[int | str | None, ...] = (1, 3, 5, 4)
    cout: int = 6
    group: int = 1
    strides: tuple[int, ...] | None = None
    pads: tuple[int, ...] | None = None
    auto_pad: str | None = None
    bias: bool = True
    activation: str | None = None
    opset: int = 17
    dtype: Any = np.float32

    @property
    def cin(self) -> int:
        cin = self.dims[1]
        assert isinstance(cin, int)
        return cin

    @property
    def rank(self) -> int:
        return len(self.dims) - 2

    def weights(self, seed: int = 0) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        shape = (self.cout, self.cin // self.group) + (1,) * self.rank
        weights = {"w": rng.standard_normal(shape).astype(self.dtype)}
        if self.bias:
            weights["b"] = rng.standard_normal(self.cout).astype(self.dtype)
        return weights

    def build(self) -> onnx.ModelProto:
        attributes: dict[str, Any] = {"kernel_shape": [1] * self.rank}
        if self.strides:
            attributes["strides"] = list(self.strides)
        if self.pads:
            attributes["pads"] = list(self.pads)
        if self.auto_pad:
            attributes["auto_pad"] = self.auto_pad
        if self.group > 1:
            attributes["group"] = self.group
        operands = ["x", "w", "b"] if self.bias else ["x", "w"]
        last = "c" if self.activation else "y"
        nodes = [node("Conv", operands, [last], **attributes)]
        if self.activation:
            nodes.append(node(self.activation, ["c"], ["y"]))
        return model(
            nodes,
            {"x": self.dims},
            {"y": [None] * len(self.dims)},
            self.weights(),
            opset=self.opset,
            dtype=self.dtype,
        )


def lower(spec: Spec, form: str) -> Outcome:
    layout, op = form.split("-")
    return run_pass(LowerPointwiseConv(layout, op), spec.build())


def shapes(outcome: Outcome) -> list[list[int]]:
    """The constants that the Reshapes read, in order."""
    constants = {t.name: numpy_helper.to_array(t) for t in outcome.model.graph.initializer}
    reshapes = [n for n in outcome.model.graph.node if n.op_type == "Reshape"]
    return [constants[n.input[1]].tolist() for n in reshapes]


def perms(outcome: Outcome) -> list[list[int]]:
    transposes = [n for n in outcome.model.graph.node if n.op_type == "Transpose"]
    return [list(helper.get_node_attr_value(n, "perm")) for n in transposes]


# -- golden --------------------------------------------------------------------------------------


def test_nhwc_matmul_keeps_the_rank_and_needs_no_reshape() -> None:
    out = lower(Spec(dims=("N", 3, "H", "W"), activation="Relu"), "nhwc-matmul")
    assert out.ops == ["Transpose", "MatMul", "Add", "Relu", "Transpose"]
    assert perms(out) == [[0, 2, 3, 1], [0, 3, 1, 2]]


def test_nhwc_gemm_has_the_activation_between_gemm_and_reshape() -> None:
    out = lower(Spec(activation="Relu"), "nhwc-gemm")
    assert out.ops == ["Transpose", "Reshape", "Gemm", "Relu", "Reshape", "Transpose"]
    assert shapes(out) == [[-1, 3], [-1, 5, 4, 6]]


def test_nchw_matmul_needs_no_transpose() -> None:
    out = lower(Spec(dims=("N", 3, 5, 4), activation="Relu"), "nchw-matmul")
    assert out.ops == ["Reshape", "MatMul", "Add", "Relu", "Reshape"]
    assert shapes(out) == [[0, 3, 20], [0, 6, 5, 4]]


def test_nchw_gemm_puts_the_weight_first() -> None:
    out = lower(Spec(activation="Sigmoid"), "nchw-gemm")
    assert out.ops == ["Reshape", "Gemm", "Sigmoid", "Reshape"]
    assert shapes(out) == [[3, 20], [1, 6, 5, 4]]
    gemm = out.model.graph.node[1]
    sizes = {t.name: list(t.dims) for t in out.model.graph.initializer}
    assert [sizes[name] for name in (gemm.input[0], gemm.input[2])] == [[6, 3], [6, 1]]


def test_one_spatial_axis_is_a_matmul_as_it_stands() -> None:
    out = lower(Spec(dims=("N", 3, "L"), bias=False), "nchw-matmul")
    assert out.ops == ["MatMul"]


def test_groups_become_a_batch_axis() -> None:
    spec = Spec(dims=(2, 4, 3, 3), group=2, activation="Relu")
    assert lower(spec, "nchw-matmul").ops == ["Reshape", "MatMul", "Add", "Relu", "Reshape"]
    out = lower(spec, "nhwc-matmul")
    assert perms(out) == [[0, 1, 3, 2], [0, 1, 3, 2]]
    assert shapes(out)[0] == [0, 2, 2, 9]


def test_strides_and_pads() -> None:
    spec = Spec(strides=(2, 1), pads=(1, 0, 0, 2))
    assert lower(spec, "nhwc-matmul").ops[:3] == ["Pad", "Slice", "Transpose"]
    old = replace(spec, opset=9)
    assert lower(old, "nhwc-matmul").ops[:3] == ["Pad", "AveragePool", "Transpose"]


def test_one_dynamic_size_is_left_to_reshape_and_several_are_read() -> None:
    one = lower(Spec(dims=(1, 3, "H", 4)), "nchw-gemm")
    assert shapes(one) == [[3, -1], [1, 6, -1, 4]]
    two = lower(Spec(dims=(1, 3, "H", "W")), "nchw-gemm")
    assert two.ops == ["Reshape", "Gemm", "Shape", "Slice", "Concat", "Reshape"]


def test_intermediate_shapes_are_written_for_later_passes() -> None:
    out = lower(Spec(dims=("N", 3, "H", 4), strides=(1, 2)), "nhwc-matmul")
    inferred = onnx.shape_inference.infer_shapes(out.model, data_prop=True)
    known = {v.name: v.type.tensor_type.shape for v in inferred.graph.value_info}
    product = next(n for n in out.model.graph.node if n.op_type == "MatMul")
    dims = [d.dim_value or d.dim_param for d in known[product.output[0]].dim]
    assert dims == ["N", "H", 2, 6]


@pytest.mark.parametrize("form", ["nhwc-gemm", "nchw-gemm"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "ThresholdedRelu"])
def test_the_runtime_fuses_the_activation_into_gemm(
    form: str, activation: str, tmp_path: Any
) -> None:
    out = lower(Spec(activation=activation), form)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(out.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "FusedGemm" in ops
    assert activation not in ops


# -- options -------------------------------------------------------------------------------------


def test_options_restrict_the_variants() -> None:
    spec = Spec()
    expected = {
        LowerPointwiseConv(): set(FORMS),
        LowerPointwiseConv(layout="nhwc"): {"nhwc-matmul", "nhwc-gemm"},
        LowerPointwiseConv(op="gemm"): {"nchw-gemm", "nhwc-gemm"},
        LowerPointwiseConv("nchw", "matmul"): {"nchw-matmul"},
    }
    for pass_, names in expected.items():
        for name in names:
            assert run_pass(pass_, spec.build(), name).applied == 1
        for name in set(FORMS) - names:
            with pytest.raises(StopIteration):
                run_pass(pass_, spec.build(), name)
    assert LowerPointwiseConv(layout="nhwc").spec() == "lower-pointwise-conv:layout=nhwc"
    assert LowerPointwiseConv(layout="nhwc") == LowerPointwiseConv("nhwc", "any")


def test_an_unknown_option_value_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="nhwc, nchw, any"):
        LowerPointwiseConv(layout="chwn")
    with pytest.raises(UsageError, match="matmul, gemm, any"):
        LowerPointwiseConv(op="einsum")


def test_forms_without_shape_arithmetic_come_first() -> None:
    def first(dims: tuple[int | str | None, ...]) -> list[str]:
        return run_pass(LowerPointwiseConv(), Spec(dims=dims).build()).ops

    assert first((1, 3, 5, 4))[0] == "Reshape"
    assert "Shape" not in first(("N", 3, "H", "W"))
    assert "Shape" not in first((1, 3, "H", "W"))


# -- declines ------------------------------------------------------------------------------------


def declined(proto: onnx.ModelProto, pass_: LowerPointwiseConv, **kwargs: Any) -> set[str]:
    outcome = run_pass(pass_, proto, **kwargs)
    assert outcome.applied == 0
    return outcome.reasons


def _large_kernel() -> set[str]:
    weights = {"w": np.ones((2, 3, 1, 3), np.float32)}
    proto = model(
        [node("Conv", ["x", "w"], ["y"])], {"x": [1, 3, 5, 5]}, {"y": [None] * 4}, weights
    )
    return declined(proto, LowerPointwiseConv())


def _same_padding_over_the_end() -> set[str]:
    return declined(Spec(strides=(1, 4), auto_pad="SAME_UPPER").build(), LowerPointwiseConv())


def _computed_weight() -> set[str]:
    proto = model(
        [node("Abs", ["v"], ["w"]), node("Conv", ["x", "w"], ["y"])],
        {"x": [1, 3, 5, 5], "v": [2, 3, 1, 1]},
        {"y": [None] * 4},
    )
    return declined(proto, LowerPointwiseConv())


def _computed_bias() -> set[str]:
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"])],
        {"x": [1, 3, 5, 5], "b": [2]},
        {"y": [None] * 4},
        {"w": np.ones((2, 3, 1, 1), np.float32)},
    )
    return declined(proto, LowerPointwiseConv())


def _bfloat16() -> set[str]:
    bfloat16 = onnx.TensorProto.BFLOAT16
    weight = helper.make_tensor("w", bfloat16, [1, 1, 1, 1], [1.0])
    graph = helper.make_graph(
        [node("Conv", ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", bfloat16, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", bfloat16, [1, 1, 2, 2])],
        [weight],
    )
    imports = [helper.make_opsetid("", 22)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return declined(proto, LowerPointwiseConv())


def _empty() -> set[str]:
    return declined(Spec(dims=(1, 3, 0, 4)).build(), LowerPointwiseConv())


def _old() -> set[str]:
    return declined(Spec(opset=6).build(), LowerPointwiseConv())


def _groups() -> set[str]:
    return declined(Spec(dims=(1, 4, 5, 5), group=2).build(), LowerPointwiseConv(op="gemm"))


def _batch() -> set[str]:
    pass_ = LowerPointwiseConv("nchw", "gemm")
    dynamic = declined(Spec(dims=("N", 3, 5, 5)).build(), pass_)
    return dynamic | declined(Spec(dims=(2, 3, 5, 5)).build(), pass_)


DECLINES: dict[Any, Callable[[], set[str]]] = {
    Why.NOT_POINTWISE: _large_kernel,
    Why.UNKNOWN_PADS: _same_padding_over_the_end,
    Why.WEIGHT_NOT_CONSTANT: _computed_weight,
    Why.BIAS_NOT_CONSTANT: _computed_bias,
    Why.UNSUPPORTED_DTYPE: _bfloat16,
    Why.EMPTY_DIMENSION: _empty,
    Why.OPSET_TOO_OLD: _old,
    Why.GROUPS_NEED_MATMUL: _groups,
    Why.NCHW_GEMM_NEEDS_BATCH_ONE: _batch,
}


@pytest.mark.parametrize("why", Why)
def test_declines(why: Any) -> None:
    assert DECLINES[why]() == {why.value}


def test_the_decline_of_grouped_gemm_names_the_matmul_forms() -> None:
    proto = Spec(dims=(1, 4, 5, 5), group=2).build()
    remark = run_pass(LowerPointwiseConv(op="gemm"), proto).remarks[0]
    assert remark.facts["forms"] == ("nchw-matmul", "nhwc-matmul")


# -- traps ---------------------------------------------------------------------------------------


def test_a_shared_weight_stays_with_the_other_node() -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)}
    proto = model(
        [node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "w"], ["y"])],
        {"x": [1, 3, 4, 4]},
        {"y": [None] * 4},
        weights,
    )
    out = run_pass(LowerPointwiseConv("nhwc", "gemm"), proto)
    assert out.applied == 1
    assert "w" in {t.name for t in out.model.graph.initializer}
    assert_same_outputs(proto, out.model, np.random.default_rng(1))


@pytest.mark.parametrize("form", FORMS)
def test_an_intermediate_output_keeps_its_name_and_its_activation(form: str) -> None:
    weights = Spec().weights()
    proto = model(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["y"])],
        {"x": [1, 3, 4, 4]},
        {"c": [None] * 4, "y": [None] * 4},
        weights,
    )
    layout, op = form.split("-")
    out = run_pass(LowerPointwiseConv(layout, op), proto)
    assert out.ops[-1] == "Relu"
    assert_same_outputs(proto, out.model, np.random.default_rng(1))


def test_an_overridable_weight_is_no_constant() -> None:
    weights = Spec().weights()
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"])],
        {"x": [1, 3, 4, 4]},
        {"y": [None] * 4},
        weights,
        ir=3,
    )
    outcome = run_pass(LowerPointwiseConv(), proto, overridable=True)
    assert outcome.reasons == {Why.WEIGHT_NOT_CONSTANT.value}
    assert run_pass(LowerPointwiseConv(), proto).applied == 1


@pytest.mark.parametrize("form", [f for f in FORMS if f != "nchw-gemm"])
def test_an_unknown_input_rank(form: str) -> None:
    weights = Spec().weights()
    graph = helper.make_graph(
        [node("Reshape", ["x", "shape"], ["r"]), node("Conv", ["r", "w", "b"], ["y"])],
        "test",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [60]),
            helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, ["R"]),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * 4)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    layout, op = form.split("-")
    out = run_pass(LowerPointwiseConv(layout, op), proto)
    assert out.applied == 1
    x = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    feeds = {"x": x, "shape": np.array([2, 3, 5, 2])}
    expected, actual = run_unoptimized(proto, feeds), run_unoptimized(out.model, feeds)
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_float64_against_the_reference_implementation(form: str, strides: tuple[int, ...]) -> None:
    # ONNX Runtime has no Conv for float64.
    proto = Spec(dtype=np.float64, strides=strides, activation="Relu").build()
    layout, op = form.split("-")
    out = run_pass(LowerPointwiseConv(layout, op), proto)
    feeds = random_feeds(proto, np.random.default_rng(2))
    results = ReferenceEvaluator(proto).run(None, feeds)
    expected = np.asarray(next(iter(results)))
    np.testing.assert_allclose(run_unoptimized(out.model, feeds)["y"], expected, rtol=1e-13)


# -- properties ----------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    rank = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 1, 2, 3]))
    sizes = [draw(st.integers(1, 5)) for _ in range(rank)]
    dynamic = draw(st.sampled_from(["none", "batch", "spatial", "all"]))
    batch: int | str = "N" if dynamic in ("batch", "all") else draw(st.sampled_from([1, 1, 3]))
    spatial = [
        f"S{i}x{size}" if dynamic in ("spatial", "all") and draw(st.booleans()) else size
        for i, size in enumerate(sizes)
    ]
    padding = draw(st.sampled_from(["none", "none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    return Spec(
        dims=(batch, group * draw(st.integers(1, 4)), *spatial),
        cout=group * draw(st.integers(1, 4)),
        group=group,
        strides=tuple(draw(st.integers(1, 3)) for _ in range(rank))
        if draw(st.booleans())
        else None,
        pads=tuple(draw(st.integers(0, 2)) for _ in range(2 * rank)) if padding == "pads" else None,
        auto_pad=padding if padding.isupper() else None,
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, None, *ACTIVATIONS, "Neg"])),
        opset=draw(st.sampled_from(OPSETS)),
        dtype=draw(st.sampled_from([np.float32, np.float32, np.float16, np.float64])),
    )


def sizes_of(spec: Spec) -> dict[str, int]:
    """Values for the symbols, which carry them in their names."""
    symbols = [d for d in spec.dims if isinstance(d, str) and d != "N"]
    return {"N": 2, **{s: int(s.split("x")[1]) for s in symbols}}


def has_known_pads(spec: Spec) -> bool:
    """Whether SAME padding adds nothing for certain: the last window does not end early."""
    if spec.auto_pad not in ("SAME_UPPER", "SAME_LOWER") or spec.strides is None:
        return True
    pairs = list(zip(spec.dims[2:], spec.strides, strict=True))
    return all(s <= 2 if isinstance(d, str) else (int(d or 0) - 1) % s <= 1 for d, s in pairs)


def check_every_form(spec: Spec) -> None:
    proto = spec.build()
    for form in FORMS:
        out = lower(spec, form)
        legal = has_known_pads(spec) and (spec.group == 1 or form.endswith("matmul"))
        legal = legal and (form != "nchw-gemm" or spec.dims[0] == 1)
        assert out.applied == legal
        assert ("Conv" in out.ops) != legal
        if legal:
            rng = np.random.default_rng(3)
            assert_agree(proto, out.model, rng, factor=1.0, **sizes_of(spec))


@settings(max_examples=50, deadline=None)
@given(specs())
def test_every_form_computes_the_same(spec: Spec) -> None:
    check_every_form(spec)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(specs())
def test_every_form_computes_the_same_at_length(spec: Spec) -> None:
    check_every_form(spec)


def pointwise_net(activation: str = "Relu") -> onnx.ModelProto:
    """Two pointwise layers with a residual: everything in it commutes with spatial shifts."""
    rng = np.random.default_rng(4)

    def weight(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return model(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"]),
            node(activation, ["c1"], ["a1"]),
            node("Conv", ["a1", "w2"], ["c2"], group=2),
            node("Add", ["c2", "x"], ["s"]),
            node(activation, ["s"], ["y"]),
        ],
        {"x": [1, 4, 6, 5]},
        {"y": [None] * 4},
        {"w1": weight(8, 4, 1, 1), "b1": weight(8), "w2": weight(4, 4, 1, 1)},
    )


@settings(max_examples=10, deadline=None)
@given(
    shift=st.tuples(st.integers(0, 5), st.integers(0, 4)),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(["nhwc", "nchw"]),
)
def test_a_shifted_input_gives_a_shifted_output(
    shift: tuple[int, int], activation: str, layout: str
) -> None:
    out = run_pass(LowerPointwiseConv(layout), pointwise_net(activation))
    assert out.applied == 2
    feeds = random_feeds(out.model, np.random.default_rng(5))
    plain = run_unoptimized(out.model, feeds)["y"]
    shifted = run_unoptimized(out.model, {"x": np.roll(feeds["x"], shift, (2, 3))})["y"]
    np.testing.assert_allclose(shifted, np.roll(plain, shift, (2, 3)), rtol=1e-5, atol=1e-6)


# -- networks ------------------------------------------------------------------------------------


def bottleneck(stride: int = 2) -> onnx.ModelProto:
    """A ResNet bottleneck of the original form, with its projection shortcut."""
    rng = np.random.default_rng(6)

    def weight(*shape: int) -> Array:
        fan = float(np.sqrt(np.prod(shape[1:])))
        return (rng.standard_normal(shape) / fan).astype(np.float32)

    weights = {
        "w1": weight(4, 8, 1, 1),
        "w2": weight(4, 4, 3, 3),
        "w3": weight(16, 4, 1, 1),
        "wp": weight(16, 8, 1, 1),
        **{f"b{i}": weight(n) for i, n in (("1", 4), ("2", 4), ("3", 16), ("p", 16))},
    }
    strides = [stride, stride]
    return model(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], strides=strides),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
            node("Relu", ["c2"], ["r2"]),
            node("Conv", ["r2", "w3", "b3"], ["c3"]),
            node("Conv", ["x", "wp", "bp"], ["cp"], strides=strides),
            node("Add", ["c3", "cp"], ["s"]),
            node("Relu", ["s"], ["y"]),
        ],
        {"x": [1, 8, 9, 9]},
        {"y": [None] * 4},
        weights,
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_pointwise_conv_of_a_bottleneck(form: str) -> None:
    proto = bottleneck()
    layout, op = form.split("-")
    out = run_pass(LowerPointwiseConv(layout, op), proto)
    assert out.applied == 3
    assert out.ops.count("Conv") == 1
    assert_same_outputs(proto, out.model, np.random.default_rng(7))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["resnet50", "resnet50_original"])
def test_every_pointwise_conv_of_resnet50(form: str, name: str) -> None:
    proto = models.build(name)
    kernels: dict[str, tuple[int, ...]] = {
        t.name: tuple(t.dims[2:]) for t in proto.graph.initializer
    }
    convs = [n for n in proto.graph.node if n.op_type == "Conv"]
    pointwise = sum(kernels[n.input[1]] == (1, 1) for n in convs)
    layout, op = form.split("-")
    out = run_pass(LowerPointwiseConv(layout, op), proto)
    assert pointwise == 36
    assert out.applied == pointwise
    assert out.ops.count("Conv") == len(convs) - pointwise
    assert_same_outputs(proto, out.model, np.random.default_rng(8), factor=10)
