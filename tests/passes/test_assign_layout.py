"""assign-layout: the cheapest layouts for a whole region, by a minimum cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pwopt import models
from pwopt.errors import UsageError
from pwopt.graph import Facts, parse
from pwopt.passes._transpose_region import Region
from pwopt.passes.assign_layout import AssignLayout, _classify, _Prices, _to_first
from pwopt.passes.eliminate_transpose import EliminateTranspose
from pwopt.remark import Decline
from tests.passes.harness import Array, Outcome, assert_same_outputs, model, node, run_pass

Why = AssignLayout.Why
TO_LAST = [0, 2, 3, 1]
TO_FIRST = [0, 3, 1, 2]
OPSETS = (7, 9, 11, 13, 17, 18, 21, 23)
PLAIN = AssignLayout(product=0.0)
"""Products cost the same in both layouts."""
TO_CONV = AssignLayout()
TO_MATMUL = AssignLayout(product=4.0)
Dims = Sequence[int | str | None]


def transpose(source: str, result: str, perm: Sequence[int]) -> onnx.NodeProto:
    return node("Transpose", [source], [result], perm=list(perm))


def floats(*shape: int, seed: int = 0) -> Array:
    fan = float(np.sqrt(shape[0])) if len(shape) > 1 else 1.0
    return (np.random.default_rng(seed).standard_normal(shape) / fan).astype(np.float32)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Dims],
    weights: Mapping[str, Array] | None = None,
    outputs: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> onnx.ModelProto:
    """A model whose outputs are given with their ranks."""
    ranks = outputs or {"y": 4}
    return model(nodes, inputs, {k: [None] * r for k, r in ranks.items()}, weights, **kwargs)


def assign(pass_: AssignLayout, proto: onnx.ModelProto, **dims: int) -> Outcome:
    """Run the pass, once at least, and compare outputs."""
    out = run_pass(pass_, proto)
    assert out.applied > 0
    assert_same_outputs(proto, out.model, np.random.default_rng(1), factor=4, **dims)
    return out


def only(outcome: Outcome, op: str) -> onnx.NodeProto:
    (found,) = [n for n in outcome.model.graph.node if n.op_type == op]
    return found


def weight_of(outcome: Outcome, found: onnx.NodeProto, index: int) -> Array:
    weights = {t.name: t for t in outcome.model.graph.initializer}
    return numpy_helper.to_array(weights[found.input[index]])


# -- golden --------------------------------------------------------------------------------------


def block(*, opset: int = 17, dims: Dims = (1, 8, 6, 5), blocks: int = 2) -> onnx.ModelProto:
    """Residual blocks whose products stand behind a LayerNormalization."""
    weights: dict[str, Array] = {"c0": floats(8, 8, 2, 2)}
    nodes = [node("Conv", ["x", "c0"], ["s0"], strides=[1, 1])]
    for i in range(blocks):
        weights |= {f"d{i}": floats(8, 1, 3, 3, seed=i), f"g{i}": floats(8, seed=i)}
        weights |= {f"u{i}": floats(8, 32, seed=i), f"v{i}": floats(32, 8, seed=i)}
        weights |= {f"b{i}": floats(32, seed=i)}
        nodes += [
            node("Conv", [f"s{i}", f"d{i}"], [f"e{i}"], group=8, pads=[1, 1, 1, 1]),
            transpose(f"e{i}", f"f{i}", TO_LAST),
            node("LayerNormalization", [f"f{i}", f"g{i}"], [f"h{i}"], axis=-1),
            node("MatMul", [f"h{i}", f"u{i}"], [f"j{i}"]),
            node("Add", [f"b{i}", f"j{i}"], [f"k{i}"]),
            node("Sigmoid", [f"k{i}"], [f"l{i}"]),
            node("MatMul", [f"l{i}", f"v{i}"], [f"m{i}"]),
            transpose(f"m{i}", f"n{i}", TO_FIRST),
            node("Add", [f"s{i}", f"n{i}"], [f"s{i + 1}"]),
        ]
    weights["c1"] = floats(4, 8, 2, 2)
    nodes.append(node("Conv", [f"s{blocks}", "c1"], ["y"]))
    return build(nodes, {"x": dims}, weights, opset=opset)


def test_the_products_of_a_block_become_convs_and_its_norm_stays() -> None:
    out = assign(TO_CONV, block())
    assert out.ops.count("MatMul") == 0
    # The depthwise one, and two for the products, in each block; one at each end.
    assert out.ops.count("Conv") == 2 * 3 + 2
    assert out.ops.count("Transpose") == 4
    first = next(i for i, op in enumerate(out.ops) if op == "LayerNormalization")
    assert out.ops[first - 1 : first + 2] == ["Transpose", "LayerNormalization", "Transpose"]
    assert sum(len(n.input) == 3 for n in out.model.graph.node if n.op_type == "Conv") == 2
    assert out.remarks[0].facts["transposes"] == (2, 3) or out.applied


def test_where_products_cost_the_same_the_residual_goes_to_the_last_axis() -> None:
    proto = block()
    out = assign(PLAIN, proto)
    assert out.ops.count("MatMul") == 4
    adds = [n for n in out.model.graph.node if n.op_type == "Add"]
    makers = {name: n.op_type for n in out.model.graph.node for name in n.output}
    # No Transpose but beside a Conv.
    for found in adds:
        assert "MatMul" in {makers.get(name) for name in found.input}
    for moved in (n for n in out.model.graph.node if n.op_type == "Transpose"):
        readers = {n.op_type for n in out.model.graph.node if moved.output[0] in n.input}
        assert makers[moved.input[0]] == "Conv" or readers == {"Conv"}
    # Eliminating Transposes alone finds nothing to save.
    assert run_pass(EliminateTranspose(), proto).applied == 0


def test_convs_become_products_where_these_are_cheaper() -> None:
    weight = floats(6, 3, 1, 1)
    proto = build(
        [
            transpose("x", "t", TO_FIRST),
            node("Conv", ["t", "w", "b"], ["c"], kernel_shape=[1, 1]),
            node("Softplus", ["c"], ["r"]),
            node("Conv", ["r", "v"], ["d"]),
            transpose("d", "y", TO_LAST),
        ],
        {"x": [1, 4, 5, 3]},
        {"w": weight, "b": floats(6), "v": floats(2, 6, 1, 1)},
    )
    out = assign(TO_MATMUL, proto)
    assert out.ops == ["MatMul", "Add", "Softplus", "MatMul"]
    np.testing.assert_array_equal(
        weight_of(out, out.model.graph.node[0], 1), weight.reshape(6, 3).T
    )
    # The reverse direction costs Transposes and gains little.
    assert run_pass(AssignLayout(product=-0.1), out.model).applied == 0


def test_dear_products_bring_transposes_with_them() -> None:
    proto = build(
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["c", "v"], ["d"]),
            node("GlobalMaxPool", ["d"], ["y"]),
        ],
        {"x": [1, 3, 4, 5]},
        {"w": floats(6, 3, 1, 1), "v": floats(4, 6, 1, 1)},
    )
    out = assign(TO_MATMUL, proto)
    assert out.ops == ["Transpose", "MatMul", "MatMul", "Transpose", "GlobalMaxPool"]
    assert run_pass(PLAIN, proto).applied == 0


def norm_in_parts(weights: dict[str, Array], x: str, y: str, opset: int) -> list[onnx.NodeProto]:
    """Over axis 1, as exporters spell it out."""
    weights |= {"two": np.array(2, np.float32), "eps": np.array(1e-6, np.float32)}
    weights |= {"scale": floats(8, 1, 1), "shift": floats(8, 1, 1), "one": np.array([1])}
    by: dict[str, Any] = {"axes": [1]} if opset < 18 else {}
    axes = [] if by else ["one"]
    return [
        node("ReduceMean", [x, *axes], ["mean"], **by),
        node("Sub", [x, "mean"], ["centred"]),
        node("Pow", ["centred", "two"], ["square"]),
        node("ReduceMean", ["square", *axes], ["variance"], **by),
        node("Add", ["variance", "eps"], ["sum"]),
        node("Sqrt", ["sum"], ["deviation"]),
        node("Div", ["centred", "deviation"], ["normal"]),
        node("Mul", ["normal", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], [y]),
    ]


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_a_norm_in_parts_moves_to_the_last_axis(opset: int) -> None:
    weights = {"c": floats(8, 8, 2, 2), "d": floats(4, 8, 2, 2)}
    nodes = [
        node("Conv", ["x", "c"], ["e"]),
        *norm_in_parts(weights, "e", "f", opset),
        node("Conv", ["f", "d"], ["y"]),
    ]
    proto = build(nodes, {"x": ["N", 8, "H", "W"]}, weights, opset=opset)
    out = assign(TO_CONV, proto, N=2, H=5, W=6)
    assert out.ops[:2] == ["Conv", "Transpose"]
    assert out.ops[-2:] == ["Transpose", "Conv"]
    assert out.ops.count("Transpose") == 2
    assert weight_of(out, only(out, "Mul"), 1).shape == (8,)
    assert run_pass(AssignLayout(over_channels=0.0), proto).applied == 0


def test_what_a_conv_takes_in_stays_behind_it() -> None:
    # Were it not for the Relu, moving the Transpose up would cost less: it would stand at a Conv.
    def proto(op: str) -> onnx.ModelProto:
        return build(
            [
                node("Conv", ["x", "c"], ["e"]),
                node(op, ["e"], ["f"]),
                transpose("f", "t", TO_LAST),
                node("LayerNormalization", ["t", "g"], ["y"], axis=-1),
            ],
            {"x": [1, 3, 4, 5]},
            {"c": floats(8, 3, 2, 2), "g": floats(8)},
        )

    assert assign(TO_CONV, proto("Softplus")).ops[:2] == ["Conv", "Transpose"]
    beside = AssignLayout(beside_conv=0.75)
    assert run_pass(beside, proto("Relu")).applied == 0
    assert run_pass(beside, proto("Softplus")).applied == 1


def test_rows_of_a_matrix_between_reshapes_become_a_conv() -> None:
    proto = build(
        [
            transpose("x", "t", TO_LAST),
            node("Reshape", ["t", "rows"], ["f"]),
            node("Gemm", ["f", "w", "b"], ["m"]),
            node("Reshape", ["m", "image"], ["i"]),
            node("LayerNormalization", ["i", "g"], ["y"], axis=-1),
        ],
        {"x": [2, 3, 4, 4]},
        {
            "w": floats(3, 6),
            "b": floats(6),
            "g": floats(6),
            "rows": np.array([-1, 3]),
            "image": np.array([2, 4, 4, 6]),
        },
    )
    out = assign(AssignLayout(product=-2.0), proto)
    assert out.ops == ["Conv", "Transpose", "LayerNormalization"]


def test_the_channels_of_three_and_five_axes() -> None:
    for rank in (3, 5):
        lead = [1, 3, *(4 for _ in range(rank - 2))]
        last, first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        proto = build(
            [
                transpose("x", "t", last),
                node("MatMul", ["t", "w"], ["m"]),
                node("Add", ["m", "b"], ["a"]),
                transpose("a", "y", first),
            ],
            {"x": lead},
            {"w": floats(3, 6), "b": floats(6)},
            {"y": rank},
        )
        assert assign(TO_CONV, proto).ops == ["Conv"]
        # No Conv over them is blocked, so that nothing is gained but by Transposes that go.
        lone = build(
            [node("MatMul", ["x", "w"], ["y"])],
            {"x": [*lead[:-1], 3]},
            {"w": floats(3, 6)},
            {"y": rank},
        )
        assert run_pass(AssignLayout(product=-9.0), lone).applied == 0


# -- declines ------------------------------------------------------------------------------------


def _conv(**attributes: Any) -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], ["y"], **attributes)]
    return build(
        nodes, {"x": [1, 4, 5, 6]}, {"w": floats(4, 4 // attributes.get("group", 1), 1, 1)}
    )


def _between_others() -> onnx.ModelProto:
    return build([transpose("x", "y", [0, 1, 3, 2])], {"x": [1, 3, 4, 5]})


def _variable_weight() -> onnx.ModelProto:
    return build([node("MatMul", ["x", "z"], ["y"])], {"x": [1, 2, 3, 4], "z": [4, 5]})


def _unknown_rank() -> onnx.ModelProto:
    nodes = [node("Squeeze", [name], [f"s{name}"]) for name in ("x", "w")]
    nodes += [node("Conv", ["sx", "sw"], ["c"]), node("Flatten", ["c"], ["y"])]
    return build(nodes, {"x": ["N", 4, 5, "W"], "w": [4, "C", "K", 1]}, outputs={"y": 2})


DECLINES: dict[Any, Callable[[], onnx.ModelProto]] = {
    Why.NO_PRODUCT: _variable_weight,
    Why.UNKNOWN_RANK: _unknown_rank,
    Why.NOT_BETWEEN_LAYOUTS: _between_others,
    Why.BEST_ALREADY: _conv,
}


@pytest.mark.parametrize("why", DECLINES)
def test_declines(why: Any) -> None:
    outcome = run_pass(TO_CONV, DECLINES[why]())
    assert outcome.applied == 0
    assert outcome.reasons == {why.value}


def test_every_reason_has_a_test() -> None:
    assert {*DECLINES, Why.PART_OF_REGION} == set(Why)


@pytest.mark.parametrize("attributes", [{"group": 2}, {"pads": [0, 1, 0, 0]}, {"strides": [1, 2]}])
def test_other_convs_stay(attributes: dict[str, Any]) -> None:
    assert run_pass(TO_MATMUL, _conv(**attributes)).reasons == {Why.BEST_ALREADY.value}


def test_a_region_has_one_turn() -> None:
    wrapped = parse(block())
    wrapped.infer_shapes()
    facts = Facts(wrapped)
    results: dict[str, Any] = {}
    for found in wrapped.nodes.values():
        if found.op in TO_CONV.roots:
            results[found.outputs[0].name] = TO_CONV.match(found, facts)
    turns = [k for k, v in results.items() if not isinstance(v, Decline)]
    others = [
        v.facts["turn"]
        for v in results.values()
        if isinstance(v, Decline) and v.why is Why.PART_OF_REGION
    ]
    assert len(turns) == 1
    assert set(others) == {f"n_{turns[0]}"}
    # Three more products, the Transposes behind the blocks, and the Conv before them.
    assert len(others) == 6


def test_a_product_that_is_none_says_why() -> None:
    remark = run_pass(TO_CONV, _variable_weight()).remarks[0]
    assert remark.facts["because"] == "weight-not-constant"


@pytest.mark.parametrize(
    "options", [{"beside_conv": 1.5}, {"over_channels": -1.0}, {"product": float("nan")}]
)
def test_prices_without_a_meaning(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        AssignLayout(**options)


# -- traps ---------------------------------------------------------------------------------------


def between(nodes: Sequence[onnx.NodeProto], **kwargs: Any) -> onnx.ModelProto:
    """*nodes* from "t" to "m", with channels last between Transposes."""
    weights = {"w": floats(3, 6), "b": floats(6)}
    proto = [transpose("x", "t", TO_LAST), *nodes, transpose("m", "y", TO_FIRST)]
    return build(proto, {"x": [1, 3, 4, 5]}, weights, **kwargs)


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
    out = assign(TO_CONV, proto)
    assert "w" in {t.name for t in out.model.graph.initializer}


def test_a_product_whose_sum_is_an_output_keeps_its_bias_apart() -> None:
    nodes = [node("MatMul", ["t", "w"], ["p"]), node("Add", ["p", "b"], ["m"])]
    proto = between(nodes, outputs={"p": 4, "y": 4})
    out = assign(TO_CONV, proto)
    assert {o.name for o in out.model.graph.output} == {"p", "y"}
    assert sorted(out.ops) == ["Add", "Conv", "Transpose"]


def test_a_bias_that_is_no_vector_of_channels_stays_an_add() -> None:
    nodes = [node("MatMul", ["t", "w"], ["p"]), node("Add", ["p", "z"], ["m"])]
    proto = [transpose("x", "t", TO_LAST), *nodes, transpose("m", "y", TO_FIRST)]
    weights = {"w": floats(3, 6), "z": floats(4, 5, 6)}
    out = assign(TO_CONV, build(proto, {"x": [1, 3, 4, 5]}, weights))
    assert out.ops == ["Conv", "Add"]


def test_an_overridable_weight_is_no_constant() -> None:
    proto = between([node("MatMul", ["t", "w"], ["m"])], ir=3, opset=11)
    kept = run_pass(TO_CONV, proto, overridable=True)
    assert kept.applied == 0
    assert run_pass(TO_CONV, proto).ops == ["Conv"]


def test_double_precision_has_no_conv_and_keeps_its_product() -> None:
    weights = {"w": floats(3, 6).astype(np.float64)}
    nodes = [
        transpose("x", "t", TO_LAST),
        node("MatMul", ["t", "w"], ["m"]),
        transpose("m", "y", TO_FIRST),
    ]
    proto = build(nodes, {"x": [1, 3, 4, 5]}, weights, dtype=np.float64)
    assert run_pass(TO_CONV, proto).applied == 0


def test_a_value_that_a_subgraph_reads_keeps_its_name_and_layout() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        return helper.make_graph([node(op, ["m"], [name])], name, [], [result])

    nodes = [
        node("MatMul", ["t", "w"], ["m"]),
        helper.make_node(
            "If", ["c"], ["z"], then_branch=branch("p", "Relu"), else_branch=branch("q", "Neg")
        ),
    ]
    proto = build(
        [transpose("x", "t", TO_LAST), *nodes, transpose("m", "y", TO_FIRST)],
        {"x": [1, 3, 4, 5]},
        {"w": floats(3, 6), "c": np.array(True)},
        {"y": 4, "z": 4},
    )
    out = run_pass(AssignLayout(product=-2.0), proto)
    assert_same_outputs(proto, out.model, np.random.default_rng(0))


def test_a_region_whose_conv_stays_has_its_turn_there() -> None:
    nodes = [
        node("ReduceMean", ["x"], ["r"], axes=[1]),
        node("Add", ["x", "r"], ["a"]),
        node("Conv", ["r", "w"], ["c"]),
        node("Identity", ["c"], ["y"]),
    ]
    proto = build(nodes, {"x": [2, 3, 2, 4]}, {"w": floats(6, 1, 1, 1)}, {"a": 4, "y": 4})
    out = assign(AssignLayout(over_channels=9.0), proto)
    assert [r.site for r in out.remarks if r.reason == "kept"] == ["n_c"]


# -- the best of all choices ---------------------------------------------------------------------


class Nets:
    """Draws small networks of operators that care for their layout more or less."""

    def __init__(self, draw: st.DrawFn, steps: int) -> None:
        self.draw = draw
        self.opset: int = draw(st.sampled_from(OPSETS))
        self.dtype = draw(st.sampled_from([np.float32, np.float32, np.float16, np.float64]))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        batches: list[int | str] = [1, 2, "N"]
        batch = draw(st.sampled_from(batches))
        self.dims: tuple[int | str, ...] = (batch, 3, draw(st.integers(1, 4)), 4)
        # Name, channels, whether they come last.
        self.values: list[tuple[str, int, bool]] = [("x", 3, False)]
        for _ in range(draw(st.integers(2, steps))):
            self.step()
        name, channels, last = self.values[-1]
        self.emit("Identity", [name], channels, last)

    def floats(self, *shape: int) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = floats(*shape, seed=len(self.weights)).astype(self.dtype)
        return name

    def emit(self, op: str, inputs: Sequence[str], channels: int, last: bool, **attrs: Any) -> None:
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op, inputs, [name], **attrs))
        self.values.append((name, channels, last))

    def pick(self) -> tuple[str, int, bool]:
        is_chain = self.draw(st.integers(0, 3)) > 0
        return self.values[-1] if is_chain else self.draw(st.sampled_from(self.values))

    def step(self) -> None:
        name, channels, last = self.pick()
        kinds = ["transpose", "product", "product", "map", "constant", "add", "concat", "reduce"]
        kinds += ["fixed"]
        kind = self.draw(st.sampled_from(kinds))
        shape = [1, 1, channels] if last else [channels, 1, 1]
        if kind == "transpose":
            perm = TO_FIRST if last else TO_LAST
            self.emit("Transpose", [name], channels, not last, perm=perm)
        elif kind == "product":
            self.product(name, channels, last)
        elif kind == "map":
            op = self.draw(st.sampled_from(["Relu", "Tanh", "Abs", "Sigmoid"]))
            self.emit(op, [name], channels, last)
        elif kind == "constant":
            op = self.draw(st.sampled_from(["Add", "Mul", "Sub"]))
            self.emit(op, [name, self.floats(*shape)], channels, last)
        elif kind == "add":
            others = [v for v in self.values if v[1:] == (channels, last)]
            other, _, _ = self.draw(st.sampled_from(others))
            self.emit("Add", [name, other], channels, last)
        elif kind == "concat" and channels < 8:
            self.emit("Concat", [name, name], 2 * channels, last, axis=3 if last else 1)
        elif kind == "reduce" and self.opset < 18:
            axis = 3 if last else 1
            self.emit("ReduceMean", [name], 1, last, axes=[axis])
            # A difference would leave nothing but rounding for the next mean.
            self.emit("Add", [name, self.values[-1][0]], channels, last)
        elif kind == "fixed" and not last and self.dtype != np.float64:
            self.emit("GlobalAveragePool", [name], channels, last)
            self.emit("Mul", [name, self.values[-1][0]], channels, last)

    def product(self, name: str, channels: int, last: bool) -> None:
        cout = self.draw(st.integers(1, 6))
        has_bias = self.draw(st.booleans())
        if last:
            self.emit("MatMul", [name, self.floats(channels, cout)], cout, last)
            if has_bias:
                self.emit("Add", [self.floats(cout), self.values[-1][0]], cout, last)
            return
        operands = [name, self.floats(cout, channels, 1, 1)]
        if self.dtype == np.float64:
            self.emit("Abs", [name], channels, last)
            return
        self.emit("Conv", operands + [self.floats(cout)] * has_bias, cout, last)

    def build(self) -> onnx.ModelProto:
        named = self.draw(st.integers(0, len(self.nodes) - 1))
        names = {self.nodes[-1].output[0], self.nodes[named].output[0]}
        return model(
            self.nodes,
            {"x": self.dims},
            {name: [None] * 4 for name in sorted(names)},
            self.weights,
            opset=self.opset,
            dtype=self.dtype,
        )


@st.composite
def nets(draw: st.DrawFn, steps: int = 12) -> onnx.ModelProto:
    return Nets(draw, steps).build()


@st.composite
def prices(draw: st.DrawFn) -> AssignLayout:
    return AssignLayout(
        product=draw(st.sampled_from([-8.0, -1.0, 0.0, 0.3, 8.0])),
        beside_conv=draw(st.sampled_from([0.0, 0.25, 1.0])),
        over_channels=draw(st.sampled_from([0.0, 1.5, 9.0])),
    )


def regions(proto: onnx.ModelProto, pass_: AssignLayout | None) -> list[Region]:
    """Regions around every node of *proto* that tells its layout."""
    wrapped = parse(proto)
    wrapped.infer_shapes()
    facts = Facts(wrapped)
    to_first = _to_first(4)
    found: list[Region] = []
    for root in wrapped.nodes.values():
        if root.op not in TO_CONV.roots:
            continue
        start = TO_CONV._start(root, facts)
        if isinstance(start, Decline):
            continue
        classify = partial(_classify, to_first=to_first, facts=facts)
        region = Region(facts, to_first, classify, _Prices(pass_, facts, 4) if pass_ else None)
        region.explore(*start[:2])
        found.append(region)
    return found


def check_best(proto: onnx.ModelProto, pass_: AssignLayout | None) -> None:
    for region in regions(proto, pass_):
        if len(region.movables) > 8:
            continue
        keys = [id(m) for m in region.movables]
        every = [
            dict(zip(keys, labels, strict=True))
            for labels in itertools.product([0, 1], repeat=len(keys))
        ]
        best = region.best_labels()
        assert region.price(best) == min(region.price(labels) for labels in every)
        assert region.price(region.without_idle_changes(best)) == region.price(best)


@settings(max_examples=50, deadline=None)
@given(nets(8), st.one_of(st.none(), prices()))
def test_no_choice_is_cheaper(proto: onnx.ModelProto, pass_: AssignLayout | None) -> None:
    check_best(proto, pass_)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(nets(8), st.one_of(st.none(), prices()))
def test_no_choice_is_cheaper_at_length(proto: onnx.ModelProto, pass_: AssignLayout | None) -> None:
    check_best(proto, pass_)


def check_net(proto: onnx.ModelProto, pass_: AssignLayout) -> None:
    out = run_pass(pass_, proto)
    assert_same_outputs(proto, out.model, np.random.default_rng(2), factor=16, N=2)
    before, after = (sum(_prices_of(p, pass_)) for p in (proto, out.model))
    assert after < before or not out.applied


def _prices_of(proto: onnx.ModelProto, pass_: AssignLayout) -> list[int]:
    """Of each region once."""
    seen: set[frozenset[str]] = set()
    found: list[int] = []
    for region in regions(proto, pass_):
        key = frozenset(n.name for m in region.movables for n in m.nodes)
        if key not in seen:
            seen.add(key)
            found.append(region.present_price())
    return found


@settings(max_examples=50, deadline=None)
@given(nets(), prices())
def test_any_net_at_any_price(proto: onnx.ModelProto, pass_: AssignLayout) -> None:
    check_net(proto, pass_)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(nets(20), prices())
def test_any_net_at_any_price_at_length(proto: onnx.ModelProto, pass_: AssignLayout) -> None:
    check_net(proto, pass_)


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_convnext() -> None:
    proto = models.build("convnext_tiny")
    out = run_pass(TO_CONV, proto)
    assert out.applied == 4
    assert "MatMul" not in out.ops
    assert out.ops.count("Transpose") == 44
    assert_same_outputs(proto, out.model, np.random.default_rng(0), factor=10)


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1", "shufflenet_v2_1_0x"])
def test_networks_with_their_channels_in_front_stay(name: str) -> None:
    assert run_pass(TO_CONV, models.build(name)).applied == 0
