"""raise-pointwise-matmul: products over the last axis become 1x1 Convs where Transposes go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt import models
from pwopt.passes.eliminate_transpose import EliminateTranspose
from pwopt.passes.lower_pointwise_conv import LowerPointwiseConv
from pwopt.passes.raise_pointwise_matmul import RaisePointwiseMatmul
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

Why = RaisePointwiseMatmul.Why
TO_LAST = [0, 2, 3, 1]
TO_FIRST = [0, 3, 1, 2]
OPSETS = (7, 8, 9, 11, 12, 13, 17, 18, 21, 23)
Dims = Sequence[int | str | None]


def transpose(source: str, result: str, perm: Sequence[int]) -> onnx.NodeProto:
    return node("Transpose", [source], [result], perm=list(perm))


def floats(*shape: int, seed: int = 0) -> Array:
    fan = float(np.sqrt(shape[0])) if len(shape) > 1 else 1.0
    return (np.random.default_rng(seed).standard_normal(shape) / fan).astype(np.float32)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Dims],
    weights: Mapping[str, Array],
    outputs: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> onnx.ModelProto:
    """A model whose outputs are given with their ranks."""
    ranks = outputs or {"y": 4}
    return model(nodes, inputs, {k: [None] * r for k, r in ranks.items()}, weights, **kwargs)


def raised(proto: onnx.ModelProto, *, factor: float = 1.0, **dims: int) -> Outcome:
    """Run the pass, once at least, and compare outputs."""
    out = run_pass(RaisePointwiseMatmul(), proto)
    before = [n.op_type for n in proto.graph.node].count("Transpose")
    assert out.applied > 0
    assert out.ops.count("Transpose") < before
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=factor, **dims)
    return out


# -- golden --------------------------------------------------------------------------------------


def test_two_layers_between_transposes_become_two_convs() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("MatMul", ["t", "w1"], ["m"]),
            node("Add", ["b1", "m"], ["a"]),
            node("Relu", ["a"], ["r"]),
            node("MatMul", ["r", "w2"], ["n"]),
            node("Add", ["n", "b2"], ["c"]),
            transpose("c", "y", TO_FIRST),
        ],
        {"x": ["N", 3, "H", "W"]},
        {"w1": floats(3, 8), "b1": floats(8), "w2": floats(8, 5), "b2": floats(1, 1, 5)},
    )
    out = raised(proto)
    assert out.ops == ["Conv", "Relu", "Conv"]
    sizes = {t.name: list(t.dims) for t in out.model.graph.initializer}
    assert [sizes[n] for n in out.model.graph.node[0].input[1:]] == [[8, 3, 1, 1], [8]]
    assert out.model.graph.node[-1].output[0] == "y"


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("form", ["nhwc-matmul", "nhwc-gemm"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_was_lowered_comes_back(rank: int, form: str, bias: bool) -> None:
    shape = [2, 3, 4, 5, 2][:rank]
    weights = {"w": floats(6, 3).reshape(6, 3, *[1] * (rank - 2)), "b": floats(6)}
    conv = node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["c"])
    proto = build([conv, node("Relu", ["c"], ["y"])], {"x": shape}, weights, {"y": rank})
    layout, op = form.split("-")
    lowered = run_pass(LowerPointwiseConv(layout, op), proto).model
    out = raised(lowered)
    assert out.ops == ["Conv", "Relu"]
    assert len(out.model.graph.node[0].input) == (3 if bias else 2)
    assert_same_outputs(proto, out.model, np.random.default_rng(2))


def layer_norm(x: str, prefix: str, axes: Sequence[int], opset: int) -> list[onnx.NodeProto]:
    """Over *axes*, in its parts; writes ``{prefix}y``."""

    def mean(source: str, result: str) -> onnx.NodeProto:
        if opset >= 18:
            return node("ReduceMean", [source, "axes"], [result])
        return node("ReduceMean", [source], [result], axes=list(axes))

    p = prefix
    return [
        mean(x, f"{p}m"),
        node("Sub", [x, f"{p}m"], [f"{p}d"]),
        node("Pow", [f"{p}d", "two"], [f"{p}q"]),
        mean(f"{p}q", f"{p}v"),
        node("Add", [f"{p}v", "eps"], [f"{p}e"]),
        node("Sqrt", [f"{p}e"], [f"{p}s"]),
        node("Div", [f"{p}d", f"{p}s"], [f"{p}n"]),
        node("Mul", [f"{p}n", "gamma"], [f"{p}g"]),
        node("Add", [f"{p}g", "beta"], [f"{p}y"]),
    ]


@pytest.mark.parametrize("opset", [13, 18])
def test_a_convnext_block_loses_both_transposes(opset: int) -> None:
    nodes = [
        node("Conv", ["x", "dw"], ["c"], group=6, pads=[3, 3, 3, 3]),
        transpose("c", "t", TO_LAST),
        *layer_norm("t", "l", [-1], opset),
        node("MatMul", ["ly", "w1"], ["m1"]),
        node("Add", ["m1", "b1"], ["a1"]),
        node("Div", ["a1", "root2"], ["g1"]),
        node("Erf", ["g1"], ["g2"]),
        node("Add", ["g2", "one"], ["g3"]),
        node("Mul", ["a1", "g3"], ["g4"]),
        node("MatMul", ["g4", "w2"], ["m2"]),
        node("Mul", ["scale", "m2"], ["s"]),
        transpose("s", "u", TO_FIRST),
        node("Add", ["x", "u"], ["y"]),
    ]
    weights = {
        "dw": floats(6, 1, 7, 7) / 7,
        "w1": floats(6, 24),
        "b1": floats(24),
        "w2": floats(24, 6),
        "gamma": floats(6),
        "beta": floats(6),
        "scale": floats(6),
        "axes": np.array([-1]),
        **{
            key: np.array(value, np.float32)
            for key, value in {"two": 2, "eps": 1e-5, "root2": 1.41421356, "one": 1}.items()
        },
    }
    out = raised(build(nodes, {"x": [1, 6, 8, 8]}, weights, opset=opset), factor=4)
    assert "Transpose" not in out.ops
    assert out.ops.count("Conv") == 3
    assert run_pass(EliminateTranspose(), out.model).applied == 0


def test_a_flattened_product_keeps_the_operators_inside_it() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Reshape", ["t", "rows"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Add", ["m", "b"], ["a"]),
            node("Sigmoid", ["a"], ["g"]),
            node("Mul", ["half", "g"], ["h"]),
            node("Reshape", ["h", "image"], ["i"]),
            transpose("i", "y", TO_FIRST),
        ],
        {"x": ["N", 3, 4, 5]},
        {
            "w": floats(3, 6),
            "b": floats(1, 6),
            "half": np.array([[0.5]], np.float32),
            "rows": np.array([-1, 3]),
            "image": np.array([-1, 4, 5, 6]),
        },
    )
    assert raised(proto, N=3).ops == ["Conv", "Sigmoid", "Mul"]


def test_gemm_factors_go_into_the_weights() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Reshape", ["t", "rows"], ["f"]),
            node("Gemm", ["f", "w", "b"], ["g"], alpha=0.5, beta=3.0, transB=1),
            node("Reshape", ["g", "image"], ["i"]),
            transpose("i", "y", TO_FIRST),
        ],
        {"x": [2, 3, 4, 5]},
        {
            "w": floats(6, 3),
            "b": np.array([0.25], np.float32),
            "rows": np.array([40, 3]),
            "image": np.array([2, 4, 5, 6]),
        },
    )
    assert raised(proto).ops == ["Conv"]


def test_a_transpose_with_other_readers_stays_for_them() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("GlobalMaxPool", ["t"], ["z"]),
            node("MatMul", ["t", "w"], ["m"]),
            transpose("m", "y", TO_FIRST),
        ],
        {"x": [2, 3, 4, 5]},
        {"w": floats(3, 6)},
        {"y": 4, "z": 4},
    )
    assert sorted(raised(proto).ops) == ["Conv", "GlobalMaxPool", "Transpose"]


def test_products_of_both_axes_of_a_mixer() -> None:
    # Tokens are channels to the first product, features to the second.
    proto = build(
        [
            transpose("x", "t", [0, 2, 1]),
            node("MatMul", ["t", "w1"], ["m"]),
            transpose("m", "u", [0, 2, 1]),
            node("MatMul", ["u", "w2"], ["y"]),
        ],
        {"x": [2, 7, 5]},
        {"w1": floats(7, 9), "w2": floats(5, 4)},
        {"y": 3},
    )
    assert raised(proto).ops == ["Conv", "MatMul"]


# -- declines ------------------------------------------------------------------------------------


def around(
    operands: Sequence[str],
    inputs: Mapping[str, Dims],
    weights: Mapping[str, Array],
    **kwargs: Any,
) -> onnx.ModelProto:
    """A MatMul between two Transposes of rank 4."""
    nodes = [
        transpose("x", "t", TO_LAST),
        node("MatMul", operands, ["m"]),
        transpose("m", "y", TO_FIRST),
    ]
    return build(nodes, inputs, weights, **kwargs)


def _computed_weight() -> onnx.ModelProto:
    return around(["t", "v"], {"x": [1, 3, 4, 5], "v": [3, 6]}, {})


def _weight_on_the_left() -> onnx.ModelProto:
    return around(["w", "t"], {"x": [1, 3, 4, 5]}, {"w": floats(6, 5)})


def _float64() -> onnx.ModelProto:
    weights = {"w": floats(3, 6).astype(np.float64)}
    return around(["t", "w"], {"x": [1, 3, 4, 5]}, weights, dtype=np.float64)


def _classifier() -> onnx.ModelProto:
    nodes = [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"])]
    return build(nodes, {"x": [2, 3, 1, 1]}, {"w": floats(3, 6), "b": floats(6)}, {"y": 2})


def _bias_per_pixel() -> onnx.ModelProto:
    return build(
        [
            transpose("x", "t", TO_LAST),
            node("Reshape", ["t", "rows"], ["f"]),
            node("Gemm", ["f", "w", "b"], ["g"]),
            node("Reshape", ["g", "image"], ["i"]),
            transpose("i", "y", TO_FIRST),
        ],
        {"x": [1, 3, 2, 2]},
        {
            "w": floats(3, 6),
            "b": floats(4, 1),
            "rows": np.array([4, 3]),
            "image": np.array([1, 2, 2, 6]),
        },
    )


def _no_transpose() -> onnx.ModelProto:
    return build([node("MatMul", ["x", "w"], ["y"])], {"x": [1, 4, 5, 3]}, {"w": floats(3, 6)})


DECLINES: dict[Any, Callable[[], onnx.ModelProto]] = {
    Why.WEIGHT_NOT_CONSTANT: _computed_weight,
    Why.NOT_OVER_LAST_AXIS: _weight_on_the_left,
    Why.UNSUPPORTED_DTYPE: _float64,
    Why.NO_SPATIAL_AXES: _classifier,
    Why.BIAS_NOT_PER_CHANNEL: _bias_per_pixel,
    Why.NO_TRANSPOSE_SAVED: _no_transpose,
}


@pytest.mark.parametrize("why", Why)
def test_declines(why: Any) -> None:
    outcome = run_pass(RaisePointwiseMatmul(), DECLINES[why]())
    assert outcome.applied == 0
    assert outcome.reasons == {why.value}


def test_a_layer_normalization_in_one_piece_holds_the_layout() -> None:
    # One Transpose is needed before it and one behind, with a Conv or with a MatMul.
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("LayerNormalization", ["t", "g"], ["l"], axis=-1),
            node("MatMul", ["l", "w"], ["m"]),
            transpose("m", "y", TO_FIRST),
        ],
        {"x": [1, 3, 4, 5]},
        {"g": floats(3), "w": floats(3, 6)},
    )
    outcome = run_pass(RaisePointwiseMatmul(), proto)
    assert outcome.reasons == {Why.NO_TRANSPOSE_SAVED.value}
    assert outcome.remarks[0].facts["blocked_by"] == ("LayerNormalization",)


@pytest.mark.parametrize("image", [[2, 4, 3, 6], [2, 12, 1, 6], [3, 2, 4, 6]])
def test_a_reshape_that_moves_the_leading_axes_is_no_way_back(image: list[int]) -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Reshape", ["t", "rows"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Reshape", ["m", "image"], ["i"]),
            transpose("i", "y", TO_FIRST),
        ],
        {"x": [2, 3, 3, 4]},
        {"w": floats(3, 6), "rows": np.array([-1, 3]), "image": np.array(image)},
    )
    outcome = run_pass(RaisePointwiseMatmul(), proto)
    assert outcome.reasons == {Why.NO_SPATIAL_AXES.value}


def test_the_width_of_an_image_is_not_its_channels() -> None:
    # A product over the last axis of NCHW data, between Transposes that lead to NHWC and back.
    proto = build(
        [
            transpose("x", "t", TO_FIRST),
            node("MatMul", ["t", "w"], ["m"]),
            transpose("m", "y", TO_LAST),
        ],
        {"x": [1, 4, 5, 3]},
        {"w": floats(5, 6)},
    )
    assert run_pass(RaisePointwiseMatmul(), proto).reasons == {Why.NO_TRANSPOSE_SAVED.value}


# -- traps ---------------------------------------------------------------------------------------


def test_a_shared_weight_stays_with_the_other_node() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("MatMul", ["t", "w"], ["m"]),
            transpose("m", "y", TO_FIRST),
            node("MatMul", ["z", "w"], ["v"]),
        ],
        {"x": [1, 3, 4, 5], "z": [2, 3]},
        {"w": floats(3, 6)},
        {"y": 4, "v": 2},
    )
    out = raised(proto)
    assert "w" in {t.name for t in out.model.graph.initializer}


def test_an_intermediate_output_is_still_written() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("MatMul", ["t", "w"], ["m"]),
            node("Add", ["m", "b"], ["a"]),
            transpose("a", "u", TO_FIRST),
            node("Relu", ["u"], ["y"]),
        ],
        {"x": [1, 3, 4, 5]},
        {"w": floats(3, 6), "b": floats(6)},
        {"m": 4, "y": 4},
    )
    out = raised(proto)
    assert out.ops.count("Transpose") == 1
    assert {o.name for o in out.model.graph.output} == {"m", "y"}


def test_an_overridable_weight_is_no_constant() -> None:
    proto = around(["t", "w"], {"x": [1, 3, 4, 5]}, {"w": floats(3, 6)}, ir=3)
    kept = run_pass(RaisePointwiseMatmul(), proto, overridable=True)
    assert kept.reasons == {Why.WEIGHT_NOT_CONSTANT.value}
    assert run_pass(RaisePointwiseMatmul(), proto).ops == ["Conv"]


def test_raising_leaves_nothing_for_eliminate_transpose_and_the_reverse() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Relu", ["t"], ["r"]),
            node("MatMul", ["r", "w"], ["m"]),
            transpose("m", "y", TO_FIRST),
        ],
        {"x": [1, 3, 4, 5]},
        {"w": floats(3, 6)},
    )
    once = run_pass(EliminateTranspose(), proto)
    assert once.applied == 0
    assert run_pass(EliminateTranspose(), raised(proto).model).applied == 0


# -- properties ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One product over the last axis, and what stands around it."""

    cout: int
    form: str
    bias: str
    activation: str | None
    residual: bool


@dataclass(frozen=True)
class Net:
    """Layers between a Transpose to channels last and one back."""

    dims: tuple[int | str, ...]
    layers: tuple[Layer, ...]
    opset: int
    dtype: Any
    second_output: int | None

    def build(self) -> onnx.ModelProto:
        rank = len(self.dims)
        last, first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        nodes = [transpose("x", "v0", last)]
        weights: dict[str, Array] = {}
        width = self.dims[1]
        assert isinstance(width, int)
        lead = [d if isinstance(d, int) else -1 for d in (self.dims[0], *self.dims[2:])]
        for i, layer in enumerate(self.layers):
            cout = width if layer.residual else layer.cout
            weights[f"w{i}"] = floats(width, cout, seed=i).astype(self.dtype)
            weights[f"b{i}"] = floats(cout, seed=9).astype(self.dtype)
            flat = layer.form != "matmul"
            source = f"v{i}"
            if flat:
                weights[f"r{i}"] = np.array([-1, width])
                weights[f"s{i}"] = np.array([*lead, cout])
                nodes.append(node("Reshape", [source, f"r{i}"], [f"f{i}"]))
                source = f"f{i}"
            if layer.form == "gemm":
                nodes.append(node("Gemm", [source, f"w{i}", f"b{i}"], [f"p{i}"]))
            else:
                nodes.append(node("MatMul", [source, f"w{i}"], [f"p{i}"]))
            value = f"p{i}"
            if layer.form != "gemm" and layer.bias != "none":
                operands = [value, f"b{i}"]
                if layer.bias == "first":
                    operands.reverse()
                nodes.append(node("Add", operands, [f"q{i}"]))
                value = f"q{i}"
            if layer.activation:
                nodes.append(node(layer.activation, [value], [f"a{i}"]))
                value = f"a{i}"
            if flat:
                nodes.append(node("Reshape", [value, f"s{i}"], [f"u{i}"]))
                value = f"u{i}"
            if layer.residual:
                nodes.append(node("Add", [value, f"v{i}"], [f"v{i + 1}"]))
            else:
                nodes.append(node("Identity", [value], [f"v{i + 1}"]))
            width = cout
        nodes.append(transpose(f"v{len(self.layers)}", "y", first))
        outputs = {"y": rank}
        if self.second_output is not None:
            outputs[f"v{self.second_output}"] = rank
        return build(nodes, {"x": self.dims}, weights, outputs, opset=self.opset, dtype=self.dtype)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    rank = draw(st.sampled_from([3, 4, 4, 5]))
    forms = ["matmul"]
    symbols = draw(st.sampled_from(["none", "batch", "height", "all"]))
    dims: list[int | str] = [draw(st.integers(1, 4)) for _ in range(rank)]
    if symbols == "all":
        dims = [d if i == 1 else f"D{i}" for i, d in enumerate(dims)]
    else:
        forms += ["flat", "gemm"]
        dims[0] = "D0" if symbols == "batch" else dims[0]
        dims[2] = "D2" if symbols == "height" else dims[2]
    layers = draw(
        st.lists(
            st.builds(
                Layer,
                cout=st.integers(1, 5),
                form=st.sampled_from(forms),
                bias=st.sampled_from(["none", "first", "second"]),
                activation=st.sampled_from([None, "Relu", "Sigmoid", "Neg"]),
                residual=st.booleans(),
            ),
            min_size=1,
            max_size=3,
        )
    )
    return Net(
        tuple(dims),
        tuple(layers),
        draw(st.sampled_from(OPSETS)),
        draw(st.sampled_from([np.float32, np.float32, np.float16])),
        draw(st.sampled_from([None, None, *range(1, len(layers) + 1)])),
    )


def check_net(net: Net) -> None:
    proto = net.build()
    out = run_pass(RaisePointwiseMatmul(), proto)
    assert out.ops.count("Transpose") <= 2 - (out.applied > 0)
    if net.second_output is None:
        assert "Transpose" not in out.ops
        assert out.ops.count("Conv") == len(net.layers)
    sizes = {"D0": 2, "D2": 3, "D3": 2, "D4": 3}
    assert_same_outputs(proto, out.model, np.random.default_rng(3), factor=4, **sizes)


@settings(max_examples=50, deadline=None)
@given(nets())
def test_any_net_computes_the_same(net: Net) -> None:
    check_net(net)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(nets())
def test_any_net_computes_the_same_at_length(net: Net) -> None:
    check_net(net)


@settings(max_examples=10, deadline=None)
@given(shift=st.tuples(st.integers(0, 5), st.integers(0, 4)), gemm=st.booleans())
def test_a_shifted_input_gives_a_shifted_output(shift: tuple[int, int], gemm: bool) -> None:
    layers = (
        Layer(7, "gemm" if gemm else "matmul", "second", "Relu", residual=False),
        Layer(7, "matmul", "first", "Sigmoid", residual=True),
    )
    out = raised(Net((1, 4, 6, 5), layers, 17, np.float32, None).build())
    feeds = random_feeds(out.model, np.random.default_rng(4))
    plain = run_unoptimized(out.model, feeds)["y"]
    rolled = run_unoptimized(out.model, {"x": np.roll(feeds["x"], shift, (2, 3))})["y"]
    np.testing.assert_allclose(rolled, np.roll(plain, shift, (2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_convnext_in_parts_loses_every_transpose() -> None:
    proto = models.build("convnext_tiny", opset=13)
    ops = [n.op_type for n in proto.graph.node]
    assert (ops.count("Transpose"), ops.count("MatMul")) == (36, 36)
    out = run_pass(RaisePointwiseMatmul(), proto)
    assert "Transpose" not in out.ops
    assert "MatMul" not in out.ops
    assert_same_outputs(proto, out.model, np.random.default_rng(5), factor=10)


@pytest.mark.slow
def test_convnext_with_layer_normalization_is_left_alone() -> None:
    outcome = run_pass(RaisePointwiseMatmul(), models.build("convnext_tiny", opset=17))
    assert outcome.applied == 0
    reasons = [r.reason for r in outcome.remarks if r.site.endswith(("MatMul", "MatMul_1"))]
    assert reasons == [Why.NO_TRANSPOSE_SAVED.value] * 36
