"""lower-conv-winograd: spatial convolutions by minimal filtering."""

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

from pwopt import models
from pwopt.errors import UsageError
from pwopt.passes import parse_spec
from pwopt.passes.lower_conv_winograd import LowerConvWinograd
from pwopt.remark import Kind
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

Why = LowerConvWinograd.Why
SQUARE = ("2d-f4", "1d-f4", "2d-bands-f4", "2d-f2", "1d-f6")
OPSETS = (8, 9, 10, 11, 13, 17, 18, 21, 22, 23)
ERROR_GROWTH = 10
"""The pass's promise: at most so many times the direct convolution's own error."""


@dataclass(frozen=True)
class Spec:
    """A spatial convolution; a string among the dims is a symbol."""

    dims: tuple[int | str | None, ...] = (1, 16, 9, 10)
    cout: int = 16
    kernel: tuple[int, ...] = (3, 3)
    pads: tuple[int, ...] | None = (1, 1, 1, 1)
    auto_pad: str | None = None
    strides: tuple[int, ...] | None = None
    dilations: tuple[int, ...] | None = None
    group: int = 1
    bias: bool = True
    activation: str | None = None
    opset: int = 17
    dtype: Any = np.float32

    def weights(self, seed: int = 0) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        cin = self.dims[1]
        assert isinstance(cin, int)
        shape = (self.cout, cin // self.group, *self.kernel)
        weights = {"w": rng.standard_normal(shape).astype(self.dtype)}
        if self.bias:
            weights["b"] = rng.standard_normal(self.cout).astype(self.dtype)
        return weights

    def build(self) -> onnx.ModelProto:
        attributes: dict[str, Any] = {"kernel_shape": list(self.kernel)}
        for key in ("strides", "pads", "dilations"):
            if getattr(self, key):
                attributes[key] = list(getattr(self, key))
        if self.auto_pad:
            attributes |= {"auto_pad": self.auto_pad}
            attributes.pop("pads", None)
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


def lower(spec: Spec, variant: str, weights: str = "file") -> Outcome:
    form, tile = variant.split("-f")
    return run_pass(LowerConvWinograd(form, int(tile), weights), spec.build())


def run_optimized(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """The output with all of the runtime's optimizations: folded weights, blocked layout."""
    return np.asarray(open_optimized(proto).run(["y"], feeds)[0])


def open_optimized(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def optimized(proto: onnx.ModelProto, path: Any, level: str) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path / "optimized.onnx")


def correlated(spec: Spec, x: Array, pads: tuple[int, ...]) -> Array:
    """The convolution in float64."""
    weights = {k: v.astype(np.float64) for k, v in spec.weights().items()}
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spec.kernel, (2, 3))
    result = np.einsum("nchwkl,ockl->nohw", windows, weights["w"], optimize=True)
    result = result + weights["b"][:, None, None] if spec.bias else result
    return np.asarray(np.maximum(result, 0) if spec.activation == "Relu" else result)


# -- golden --------------------------------------------------------------------------------------


def test_two_axes() -> None:
    out = lower(Spec(activation="Relu", dims=(1, 16, 8, 12)), "2d-f4")
    tail = ["Conv", "Reshape", "Gemm", "Relu", "Reshape", "DepthToSpace"]
    assert out.ops == [*["Conv"] * 6, "Concat", *["Conv"] * 6, "Concat", *tail]
    groups = [helper.get_node_attr_value(n, "group") for n in convs(out)]
    assert groups == [*[16] * 6, *[96] * 6, 36]


def test_one_axis() -> None:
    out = lower(Spec(activation="Relu", dims=(1, 16, 8, 12)), "1d-f4")
    tail = ["Conv", "Reshape", "Gemm", "Relu", "Reshape", "Transpose", "Reshape"]
    assert out.ops == [*["Conv"] * 6, "Concat", *tail]
    product = convs(out)[-1]
    assert helper.get_node_attr_value(product, "group") == 6
    assert helper.get_node_attr_value(product, "kernel_shape") == [1, 3]
    assert helper.get_node_attr_value(product, "pads") == [0, 1, 0, 1]


def test_bands() -> None:
    out = lower(Spec(activation="Relu", dims=(1, 16, 8, 12)), "2d-bands-f4")
    band = [*["Conv"] * 7, "Concat", "Conv", "Reshape", "Gemm", "Reshape"]
    tail = ["Concat", "Gemm", "Relu", "Reshape", "Transpose", "Reshape"]
    assert out.ops == [*band * 6, *tail]
    biased = [n for n in convs(out) if len(n.input) == 3]
    assert len(biased) == 5  # none at the point at infinity


def test_one_axis_along_the_width_needs_no_transposition() -> None:
    out = lower(Spec(activation="Relu", dims=(1, 16, 8, 12), kernel=(1, 3)), "1d-f4")
    assert out.ops == [*["Conv"] * 6, "Concat", "Conv", "Reshape", "Gemm", "Relu", "Reshape"]


def test_partial_tiles_are_cut_off() -> None:
    assert lower(Spec(), "2d-f4").ops[-1] == "Slice"
    assert lower(Spec(), "1d-f6").ops[-1] == "Slice"
    assert lower(Spec(dims=(1, 16, 8, 12)), "2d-f4").ops[-1] == "DepthToSpace"


def test_more_than_one_image_takes_matmul() -> None:
    for batch in (2, "N"):
        out = lower(Spec(dims=(batch, 16, 8, 8), activation="Relu"), "2d-f4")
        assert "Gemm" not in out.ops
        assert out.ops[-4:] == ["MatMul", "Relu", "Reshape", "DepthToSpace"]


def test_zero_ends_of_the_transform_are_skipped() -> None:
    out = lower(Spec(dims=(1, 16, 8, 8)), "1d-f4")
    lengths = [helper.get_node_attr_value(n, "kernel_shape")[0] for n in convs(out)[:6]]
    assert lengths == [5, 4, 4, 4, 4, 5]


def test_the_bias_goes_to_taps_that_a_t_makes_ones_of() -> None:
    out = lower(Spec(dims=(1, 16, 8, 8)), "2d-f4")
    constants = {t.name: numpy_helper.to_array(t) for t in out.model.graph.initializer}
    spread = constants[convs(out)[-1].input[2]].reshape(36, 16)
    gemm = next(n for n in out.model.graph.node if n.op_type == "Gemm")
    bias = np.broadcast_to(Spec().weights()["b"], (16, 16))
    np.testing.assert_allclose(constants[gemm.input[0]] @ spread, bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", SQUARE)
def test_session_weights_stay_as_they_are_in_the_file(variant: str) -> None:
    spec = Spec(dims=(1, 64, 8, 8), cout=64)
    out = lower(spec, variant, "session")
    constants = {t.name: numpy_helper.to_array(t) for t in out.model.graph.initializer}
    np.testing.assert_array_equal(constants["w"], spec.weights()["w"])
    assert out.model.ByteSize() < 1.25 * spec.build().ByteSize()


@pytest.mark.parametrize("variant", SQUARE)
def test_the_runtime_folds_session_weights_at_its_basic_level(variant: str, tmp_path: Any) -> None:
    spec = Spec(dims=(1, 16, 8, 8))
    folded = optimized(lower(spec, variant, "session").model, tmp_path, "ORT_ENABLE_BASIC")
    stored = lower(spec, variant, "file")
    assert [n.op_type for n in folded.graph.node] == stored.ops
    sizes = {tuple(t.dims) for t in folded.graph.initializer}
    assert tuple(spec.weights()["w"].shape) not in sizes


@pytest.mark.parametrize("variant", SQUARE)
def test_the_runtime_keeps_all_convolutions_blocked(variant: str, tmp_path: Any) -> None:
    spec = Spec(dims=(1, 32, 8, 8), cout=32, activation="Relu")
    graph = optimized(lower(spec, variant, "session").model, tmp_path, "ORT_ENABLE_ALL").graph
    kinds = {n.domain for n in graph.node if n.op_type == "Conv"}
    if "com.microsoft.nchwc" not in kinds:
        pytest.skip("this machine has no blocked layout")
    assert kinds == {"com.microsoft.nchwc"}
    exits = 6 if "bands" in variant else 1
    assert sum(n.op_type.startswith("Reorder") for n in graph.node) == 1 + exits
    assert "FusedGemm" in [n.op_type for n in graph.node]


def convs(outcome: Outcome) -> list[onnx.NodeProto]:
    return [n for n in outcome.model.graph.node if n.op_type == "Conv"]


# -- sizes that are not known --------------------------------------------------------------------

OPEN_DIMS: tuple[tuple[int | str, ...], ...] = (
    (1, 16, "H", 11),
    (1, 16, 10, "W"),
    (1, 16, "H", "W"),
    ("N", 16, 10, 11),
    ("N", 16, "H", 11),
    (2, 16, 10, "W"),
    ("N", 16, "H", "W"),
)
RUNS = ({"N": 2, "H": 12, "W": 24}, {"N": 1, "H": 13, "W": 5}, {"N": 3, "H": 3, "W": 2})
"""Whole tiles of 4 and 6, parts of tiles, less than a tile."""


@pytest.mark.parametrize("opset", [10, 14, 15, 22])
@pytest.mark.parametrize("dims", OPEN_DIMS)
@pytest.mark.parametrize("variant", SQUARE)
def test_sizes_that_are_not_known(variant: str, dims: tuple[int | str, ...], opset: int) -> None:
    check(Spec(dims=dims, opset=opset, activation="Relu"), variant, "session", *RUNS)


@pytest.mark.parametrize("variant", SQUARE)
def test_open_sizes_with_pads_of_every_width(variant: str) -> None:
    for pads in [None, (2, 0, 1, 3), (0, 4, 5, 0), (5, 0, 7, 4)]:
        spec = Spec(dims=(1, 16, "H", "W"), pads=pads)
        check(spec, variant, "file", *RUNS[:2], {"H": 3, "W": 4})


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ((1, 3), "1d-f4"),
        ((3, 1), "1d-f6"),
        ((3, 1), "1d-f4"),
        ((1, 7), "1d-f2"),
        ((5, 5), "2d-f2"),
        ((3, 5), "1d-f4"),
        ((2, 2), "2d-f4"),
    ],
)
@pytest.mark.parametrize("dims", OPEN_DIMS)
def test_open_sizes_of_other_kernels(
    kernel: tuple[int, int], variant: str, dims: tuple[int | str, ...]
) -> None:
    runs = [{"N": n, "H": h, "W": w} for n, h, w in ((2, 12, 24), (1, 9, 7), (1, 7, 13))]
    check(Spec(dims=dims, kernel=kernel, pads=(0, 1, 2, 3)), variant, "session", *runs)


def _shapeless(**attributes: Any) -> onnx.ModelProto:
    """A convolution of something of which not even the number of dimensions is known."""
    return model(
        [node("Squeeze", ["x"], ["s"]), node("Conv", ["s", "w", "b"], ["y"], **attributes)],
        {"x": [1, "N", 16, "H", "W"]},
        {"y": [None] * 4},
        Spec().weights(),
    )


@pytest.mark.parametrize("variant", SQUARE)
def test_an_input_of_unknown_shape(variant: str) -> None:
    form, tile = variant.split("-f")
    proto = _shapeless(pads=[1, 1, 1, 1])
    out = run_pass(LowerConvWinograd(form, int(tile)), proto)
    assert out.applied == 1
    for sizes in ({"N": 2, "H": 8, "W": 9}, {"N": 3, "H": 3, "W": 17}):
        rng = np.random.default_rng(2)
        assert_same_outputs(proto, out.model, rng, factor=3, **sizes)


def test_shapes_are_computed_where_they_have_to_be() -> None:
    """Where -1 is enough, or pads leave the size as it is, nothing is added."""
    arithmetic = {"Shape", "Slice", "Concat", "Add", "Mul", "Reshape"}

    def tail(variant: str, *dims: int | str, **more: Any) -> list[str]:
        out = lower(Spec(dims=dims, **more), variant)
        return [op for op in out.ops if op in arithmetic]

    assert tail("2d-f4", "N", 16, 8, 12) == ["Concat"] * 2 + ["Reshape"] * 2
    shape_of_input = ["Shape"]
    taps = ["Concat"] * 2
    for dims in ((1, 16, "H", 12), (1, 16, 8, "W"), ("N", 16, "H", 12)):
        found = tail("2d-f4", *dims)
        assert found == [*shape_of_input, *taps, "Reshape", "Reshape", "Slice"]
    both = tail("2d-f4", 1, 16, "H", "W")
    assert both == ["Shape", *taps, "Shape", "Reshape", "Concat", "Reshape", "Slice"]
    assert tail("2d-f4", 1, 16, "H", "W", pads=None)[:2] == ["Shape", "Add"]
    old = tail("2d-f4", 1, 16, "H", "W", opset=13)
    assert old[:2] == ["Shape", "Slice"]
    width = tail("1d-f4", 1, 16, 8, "W")
    assert "Shape" not in width
    assert width[-1] == "Reshape"


def test_the_size_of_the_input_is_read_before_the_input_is_used() -> None:
    out = lower(Spec(dims=(1, 16, "H", "W")), "2d-bands-f4")
    assert out.ops[0] == "Shape"


# -- options and variants ------------------------------------------------------------------------


def offered(spec: Spec, pass_: LowerConvWinograd) -> list[str]:
    remark = run_pass(pass_, spec.build()).remarks[0]
    names = remark.facts.get("variants", [])
    assert isinstance(names, list)
    return [str(name) for name in names]


def test_variants_by_kernel() -> None:
    assert offered(Spec(), LowerConvWinograd()) == list(SQUARE)
    assert offered(Spec(kernel=(5, 5)), LowerConvWinograd()) == [
        "2d-f2",
        "1d-f4",
        "1d-f2",
    ]
    assert offered(Spec(kernel=(1, 3)), LowerConvWinograd()) == ["1d-f4", "1d-f6"]
    assert lower(Spec(kernel=(7, 1)), "1d-f2").applied == 1


def test_options_restrict_the_variants() -> None:
    assert run_pass(LowerConvWinograd(form="2d"), Spec().build()).applied == 1
    assert offered(Spec(), LowerConvWinograd(form="1d")) == ["1d-f4", "1d-f6"]
    assert offered(Spec(), LowerConvWinograd(tile=4)) == ["2d-f4", "1d-f4", "2d-bands-f4"]
    assert run_pass(LowerConvWinograd(form="2d-bands"), Spec().build()).applied == 1
    assert LowerConvWinograd(tile=4).spec() == "lower-conv-winograd:tile=4"
    assert LowerConvWinograd(form="1d") == LowerConvWinograd("1d", 0, "session")


def test_an_unknown_option_value_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="2d, 2d-bands, 1d, any"):
        LowerConvWinograd(form="3d")
    with pytest.raises(UsageError, match="session, file"):
        LowerConvWinograd(weights="cloud")
    with pytest.raises(UsageError, match="0, 2, 4, 6"):
        LowerConvWinograd(tile=5)
    with pytest.raises(UsageError, match="above 0"):
        LowerConvWinograd(amplification=0.0)


def test_the_order_of_variants_follows_the_shape() -> None:
    few = offered(Spec(dims=(1, 512, 7, 7), cout=16), LowerConvWinograd())
    assert few[:2] == ["2d-f2", "1d-f4"]
    large = offered(Spec(dims=(1, 128, 56, 56)), LowerConvWinograd())
    assert large[:2] == ["2d-bands-f4", "1d-f6"]
    assert sorted(few) == sorted(large) == sorted(SQUARE)
    for size in ((160, 160), ("H", "W"), ("H", 160)):
        narrow = offered(Spec(dims=(1, 64, *size)), LowerConvWinograd())
        assert narrow[:2] == ["1d-f6", "2d-bands-f4"]


def test_larger_errors_allow_larger_tiles() -> None:
    pass_ = LowerConvWinograd()
    assert pass_.allowing(1e-6) == pass_
    loose = pass_.allowing(1e-3)
    assert set(offered(Spec(), loose)) - set(SQUARE) == {"2d-f6", "2d-bands-f6"}
    assert "2d-f4" in offered(Spec(kernel=(5, 5)), loose)
    assert loose.spec() == "lower-conv-winograd:amplification=1000.0"
    assert parse_spec(loose.spec()) == loose
    proto = Spec(dims=(1, 32, 13, 14)).build()
    for form in ("2d", "2d-bands"):
        out = run_pass(replace(loose, form=form, tile=6), proto)
        assert out.applied == 1
        assert_same_outputs(proto, out.model, np.random.default_rng(0), factor=30)


# -- declines ------------------------------------------------------------------------------------


def declined(proto: onnx.ModelProto, **options: Any) -> set[str]:
    outcome = run_pass(LowerConvWinograd(**options), proto)
    assert outcome.applied == 0
    return outcome.reasons


def _computed_weight() -> set[str]:
    proto = model(
        [node("Abs", ["v"], ["w"]), node("Conv", ["x", "w"], ["y"])],
        {"x": [1, 16, 5, 5], "v": [16, 16, 3, 3]},
        {"y": [None] * 4},
    )
    return declined(proto)


def _computed_bias() -> set[str]:
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"])],
        {"x": [1, 16, 5, 5], "b": [16]},
        {"y": [None] * 4},
        {"w": np.ones((16, 16, 3, 3), np.float32)},
    )
    return declined(proto)


def _too_few_channels() -> set[str]:
    return declined(Spec(cout=8).build()) | declined(Spec(dims=(1, 3, 9, 9)).build())


def _unknown_size() -> set[str]:
    return declined(_shapeless(auto_pad="SAME_UPPER"))


def _too_old() -> set[str]:
    sizes: list[tuple[int | str, int | str]] = [(9, "W"), ("H", 9), ("H", "W")]
    reasons = [declined(Spec(dims=(1, 16, *size), opset=9).build()) for size in sizes]
    return declined(Spec(opset=7).build()).union(*reasons)


DECLINES: dict[Any, Callable[[], set[str]]] = {
    Why.NOT_TWO_DIMENSIONAL: lambda: declined(
        Spec(dims=(1, 16, 9), kernel=(3,), pads=(1, 1)).build()
    ),
    Why.POINTWISE: lambda: declined(Spec(kernel=(1, 1), pads=None).build()),
    Why.STRIDED: lambda: declined(Spec(strides=(2, 1)).build()),
    Why.DILATED: lambda: declined(Spec(dilations=(1, 2)).build()),
    Why.GROUPED: lambda: declined(Spec(dims=(1, 32, 9, 9), cout=32, group=2).build()),
    Why.TOO_FEW_CHANNELS: _too_few_channels,
    Why.WEIGHT_NOT_CONSTANT: _computed_weight,
    Why.BIAS_NOT_CONSTANT: _computed_bias,
    Why.UNSUPPORTED_DTYPE: lambda: declined(Spec(dtype=np.float16).build()),
    Why.UNKNOWN_SPATIAL_SIZE: _unknown_size,
    Why.EMPTY_DIMENSION: lambda: declined(Spec(dims=(1, 16, 2, 9), pads=None).build()),
    Why.OPSET_TOO_OLD: _too_old,
    Why.NO_SUCH_FORM: lambda: (
        declined(Spec(kernel=(9, 9)).build())
        | declined(Spec(kernel=(1, 3)).build(), form="2d")
        | declined(Spec(kernel=(5, 5)).build(), tile=6)
    ),
}


@pytest.mark.parametrize("why", Why)
def test_declines(why: Any) -> None:
    assert DECLINES[why]() == {why.value}


# -- traps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["session", "file"])
def test_a_shared_weight_stays_with_the_other_node(weights: str) -> None:
    kernel = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    proto = model(
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["c", "w"], ["d"], strides=[2, 2]),
            node("Conv", ["d", "w"], ["y"]),
        ],
        {"x": [1, 16, 16, 16]},
        {"y": [None] * 4},
        {"w": kernel},
    )
    out = run_pass(LowerConvWinograd(weights=weights), proto)
    assert out.applied == 2
    assert "w" in {t.name for t in out.model.graph.initializer}
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=3)


@pytest.mark.parametrize("variant", SQUARE)
def test_an_intermediate_output_keeps_its_name_and_its_activation(variant: str) -> None:
    form, tile = variant.split("-f")
    proto = model(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["y"])],
        {"x": [1, 16, 9, 9]},
        {"c": [None] * 4, "y": [None] * 4},
        Spec().weights(),
    )
    out = run_pass(LowerConvWinograd(form, int(tile)), proto)
    assert out.ops[-1] == "Relu"
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=3)


def test_a_reader_between_convolution_and_activation_keeps_the_activation() -> None:
    proto = model(
        [
            node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("Add", ["c", "r"], ["y"]),
        ],
        {"x": [1, 16, 8, 8]},
        {"y": [None] * 4},
        Spec().weights(),
    )
    out = run_pass(LowerConvWinograd(), proto)
    assert out.ops[-3:] == ["DepthToSpace", "Relu", "Add"]
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=3)


def _normalised(*behind: str, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    """A convolution, a BatchNormalization and operators in a chain behind them."""
    rng = np.random.default_rng(9)
    names = ["c", "n", *(f"t{i}" for i in range(len(behind)))]
    names[-1] = "y"
    parameters = {k: rng.uniform(0.5, 2, 16).astype(np.float32) for k in ("s", "o", "m", "v")}
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", *parameters], [names[1]]),
        *(node(op, [names[i + 1]], [names[i + 2]]) for i, op in enumerate(behind)),
    ]
    weights = {"w": Spec().weights()["w"], **parameters}
    return model(nodes, {"x": [1, 16, "H", 9]}, {k: [None] * 4 for k in outputs}, weights)


@pytest.mark.parametrize("variant", SQUARE)
@pytest.mark.parametrize("behind", [(), ("Relu",), ("Neg", "Relu")])
def test_a_normalisation_behind_is_folded(behind: tuple[str, ...], variant: str) -> None:
    form, tile = variant.split("-f")
    proto = _normalised(*behind)
    out = run_pass(LowerConvWinograd(form, int(tile)), proto)
    assert out.applied == 1
    assert "BatchNormalization" not in out.ops
    if behind == ("Relu",):
        assert out.ops[out.ops.index("Relu") - 1] == "Gemm"
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=4, H=11)


def test_a_normalisation_that_cannot_be_folded_stays() -> None:
    proto = _normalised("Relu", outputs=("c", "y"))
    out = run_pass(LowerConvWinograd(), proto)
    assert out.applied == 1
    assert out.ops[-2:] == ["BatchNormalization", "Relu"]
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=4, H=11)


def test_an_overridable_weight_is_no_constant() -> None:
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"])],
        {"x": [1, 16, 8, 8]},
        {"y": [None] * 4},
        Spec().weights(),
        ir=3,
    )
    outcome = run_pass(LowerConvWinograd(), proto, overridable=True)
    assert outcome.reasons == {Why.WEIGHT_NOT_CONSTANT.value}
    assert run_pass(LowerConvWinograd(), proto).applied == 1


@pytest.mark.parametrize("variant", SQUARE)
def test_pads_wider_than_the_kernel(variant: str) -> None:
    spec = Spec(dims=(1, 16, 3, 4), pads=(5, 0, 7, 4))
    check(spec, variant, "session")


@pytest.mark.parametrize("variant", SQUARE)
def test_a_tile_larger_than_the_image(variant: str) -> None:
    check(Spec(dims=(1, 16, 1, 2)), variant, "session")
    check(Spec(dims=(1, 16, 3, 3), pads=None), variant, "session")


# -- properties ----------------------------------------------------------------------------------


KERNELS = [
    *[((3, 3), SQUARE)] * 4,
    ((5, 5), ("2d-f2", "1d-f4", "1d-f2")),
    ((2, 2), ("2d-f4",)),
    ((1, 3), ("1d-f4", "1d-f6")),
    ((3, 1), ("1d-f4", "1d-f6")),
    ((1, 5), ("1d-f4", "1d-f2")),
    ((7, 1), ("1d-f2",)),
    ((3, 5), ("2d-f2", "1d-f4", "1d-f6")),
]


Drawn = tuple[Spec, str, str, dict[str, int], dict[str, int]]


@st.composite
def specs(draw: st.DrawFn) -> Drawn:
    kernel, variants = draw(st.sampled_from(KERNELS))
    padding = draw(st.sampled_from(["pads", "pads", "same", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    pads = (kernel[0] // 2, kernel[1] // 2) * 2
    if padding == "pads":
        pads = tuple(draw(st.integers(0, 4)) for _ in range(4))  # type: ignore[assignment]
    runs = [
        {"N": draw(st.sampled_from([1, 1, 2]))}
        | {axis: draw(st.integers(k, 18)) for axis, k in zip("HW", kernel, strict=True)}
        for _ in range(2)
    ]
    opset = draw(st.sampled_from(OPSETS))
    symbols = draw(st.sampled_from(["", "", "N", "H", "W", "HW", "NH", "NW", "NHW"]))
    symbols = symbols if opset >= 10 else symbols.strip("HW")
    batch, height, width = (axis if axis in symbols else runs[0][axis] for axis in "NHW")
    spec = Spec(
        dims=(batch, draw(st.integers(16, 40)), height, width),
        cout=draw(st.sampled_from([16, 17, 24, 32])),
        kernel=kernel,
        pads=pads,
        auto_pad=padding if padding.isupper() else None,
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "Relu", "LeakyRelu", "Neg"])),
        opset=opset,
    )
    weights = draw(st.sampled_from(["session", "file"]))
    return spec, draw(st.sampled_from(variants)), weights, runs[0], runs[1]


def check(spec: Spec, variant: str, weights: str, *runs: dict[str, int]) -> None:
    """Equal within a few roundings, under either level of optimization, at the sizes of *runs*."""
    proto = spec.build()
    out = lower(spec, variant, weights)
    assert out.applied == 1
    optimized_too = open_optimized(out.model)
    for sizes in runs or ({},):
        feeds = random_feeds(proto, np.random.default_rng(3), **sizes)
        expected = run_unoptimized(proto, feeds)["y"]
        scale = max(float(np.abs(expected).max()), 1e-3)
        both = run_unoptimized(out.model, feeds)["y"], optimized_too.run(["y"], feeds)[0]
        for actual in both:
            assert actual.shape == expected.shape
            assert float(np.abs(actual - expected).max()) <= 1.5e-5 * scale


@settings(max_examples=50, deadline=None)
@given(specs())
def test_it_computes_the_same(drawn: Drawn) -> None:
    check(*drawn)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(specs())
def test_it_computes_the_same_at_length(drawn: Drawn) -> None:
    check(*drawn)


def error_growth(spec: Spec, variant: str, weights: str) -> float:
    """Root mean square error against float64, relative to the runtime's own convolution."""
    proto = spec.build()
    feeds = random_feeds(proto, np.random.default_rng(4))
    assert spec.pads is not None
    exact = correlated(spec, feeds["x"], spec.pads)

    def error(values: Array) -> float:
        return float(np.sqrt(((values - exact) ** 2).mean()))

    lowered = lower(spec, variant, weights).model
    return error(run_optimized(lowered, feeds)) / error(run_optimized(proto, feeds))


@pytest.mark.parametrize("weights", ["session", "file"])
@pytest.mark.parametrize("variant", SQUARE)
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_the_error_grows_at_most_tenfold(channels: int, variant: str, weights: str) -> None:
    spec = Spec(dims=(1, channels, 14, 14), cout=channels, activation="Relu")
    assert error_growth(spec, variant, weights) <= ERROR_GROWTH


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [((5, 5), "2d-f2"), ((5, 5), "1d-f4"), ((1, 7), "1d-f2"), ((3, 1), "1d-f6")],
)
def test_the_error_of_other_kernels(kernel: tuple[int, int], variant: str) -> None:
    pads = (kernel[0] // 2, kernel[1] // 2) * 2
    spec = Spec(dims=(1, 64, 14, 14), cout=64, kernel=kernel, pads=pads)
    assert error_growth(spec, variant, "session") <= ERROR_GROWTH


@settings(max_examples=15, deadline=None)
@given(
    scale=st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]),
    variant=st.sampled_from(SQUARE),
)
def test_powers_of_two_pass_through_unrounded(scale: float, variant: str) -> None:
    proto = lower(Spec(bias=False), variant).model
    feeds = random_feeds(proto, np.random.default_rng(5))
    plain = run_unoptimized(proto, feeds)["y"]
    scaled = run_unoptimized(proto, {"x": feeds["x"] * np.float32(scale)})["y"]
    np.testing.assert_array_equal(scaled, plain * np.float32(scale))


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["2d-f4", "1d-f4"])
@pytest.mark.parametrize(("name", "expected"), [("resnet18", 13), ("vgg16", 12)])
def test_every_spatial_conv_of_a_network(name: str, expected: int, variant: str) -> None:
    proto = models.build(name)
    form, tile = variant.split("-f")
    out = run_pass(LowerConvWinograd(form, int(tile)), proto)
    assert out.applied == expected
    assert out.model.ByteSize() < 1.1 * proto.ByteSize()
    assert_same_outputs(proto, out.model, np.random.default_rng(8), factor=10)


@pytest.mark.parametrize(("height", "width"), [(12, 13), ("H", "W")])
def test_a_residual_block(height: int | str, width: int | str) -> None:
    rng = np.random.default_rng(6)
    weights = {
        name: (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32) for name in ("w1", "w2")
    }
    proto = model(
        [
            node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
            node("Add", ["c2", "x"], ["s"]),
            node("Relu", ["s"], ["y"]),
        ],
        {"x": ["N", 16, height, width]},
        {"y": ["N", 16, height, width]},
        weights,
    )
    for variant in SQUARE:
        form, tile = variant.split("-f")
        out = run_pass(LowerConvWinograd(form, int(tile)), proto)
        assert out.applied == 2
        assert_same_outputs(proto, out.model, rng, N=3, H=9, W=14, factor=3)


def test_equal_layers_of_open_size_are_one_group() -> None:
    """They are timed once; ONNX's inference gives each layer's sizes names of their own."""
    weights = {k: Spec().weights()["w"] for k in ("w1", "w2", "w3")}
    chain = ["x", "a", "b", "y"]
    nodes = [
        node("Conv", [chain[i], f"w{i + 1}"], [chain[i + 1]], pads=[1, 1, 1, 1]) for i in range(3)
    ]
    proto = model(nodes, {"x": [1, 16, "H", "W"]}, {"y": [None] * 4}, weights)
    outcome = run_pass(LowerConvWinograd(), proto)
    applied = [r for r in outcome.remarks if r.kind is Kind.APPLIED]
    assert len(applied) == 3
    # What a model declares of its output is left alone.
    assert len({r.facts["signature"] for r in applied[:2]}) == 1


def test_replacing_the_pads_changes_the_border_only() -> None:
    valid = lower(replace(Spec(), pads=None), "2d-f4").model
    padded = lower(Spec(), "2d-f4").model
    feeds = random_feeds(valid, np.random.default_rng(7))
    inner = run_unoptimized(valid, feeds)["y"]
    whole = run_unoptimized(padded, feeds)["y"]
    np.testing.assert_allclose(whole[:, :, 1:-1, 1:-1], inner, rtol=0, atol=2e-4)
