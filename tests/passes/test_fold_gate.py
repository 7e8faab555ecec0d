"""Gates of squeeze-excite blocks, folded into the weights of the convolution behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes.fold_gate import FoldGate
from tests.passes import harness
from tests.passes.linear_models import (
    BATCH,
    DTYPES,
    OPSETS,
    Draft,
    Geometry,
    assert_agree,
    geometries,
)

Why = FoldGate.Why
POINT = Geometry.plain(1)
GATED = "t2"  # the gate, as long as nothing is pooled over the batch
CONV, MATMUL = "conv", "matmul"


@dataclass
class Block:
    """Features of three channels, their gates, and the Conv behind both."""

    batch: int | str = 1
    size: tuple[int | str, ...] = (5, 7)
    geometry: Geometry = POINT
    cout: int = 4
    group: int = 1
    bias: bool = True
    gate_first: bool = False
    pooled: bool = False  # over the batch too: one gate for all of it
    dtype: Any = np.float32
    opset: int = 17
    seed: int = 0
    draft: Draft = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.draft = Draft(rng, (self.batch, 3, *self.size), self.dtype, self.opset)

    def gate(self) -> str:
        d, rank = self.draft, len(self.size)
        y = d.add("GlobalAveragePool", ["x"])
        if self.pooled:
            y = d.add("ReduceMean", [y], axes=[0], keepdims=1)
        return d.add("Sigmoid", [d.conv(y, 3, 3, Geometry.plain(1, rank))])

    def product(self) -> str:
        gate = self.gate()
        return self.draft.add("Mul", [gate, "x"] if self.gate_first else ["x", gate])

    def conv(self, x: str, geometry: Geometry | None = None) -> str:
        where = self.geometry if geometry is None else geometry
        return self.draft.conv(x, 3, self.cout, where, group=self.group, bias=self.bias)

    def model(self) -> onnx.ModelProto:
        return self.draft.finish(self.conv(self.product()))


def fold(proto: onnx.ModelProto, variant: str | None = None) -> harness.Outcome:
    return harness.run_pass(FoldGate(), proto, variant)


def offered(proto: onnx.ModelProto) -> list[str]:
    """The variants at the last Conv, if it applies there."""
    return harness.offered(FoldGate(), proto) if fold(proto).applied else []


def assert_every_variant(proto: onnx.ModelProto, **dims: int) -> list[str]:
    names = offered(proto)
    for name in names:
        assert_agree(proto, fold(proto, name).model, np.random.default_rng(0), **dims)
    return names


# -- golden ----------------------------------------------------------------------------------------

GATE = ["GlobalAveragePool", "Conv", "Sigmoid"]


@pytest.mark.parametrize("first", [True, False])
def test_into_the_weights_of_a_conv(first: bool) -> None:
    before = Block(gate_first=first).model()
    after = fold(before)
    assert after.ops == [*GATE, "Mul", "Conv"]
    product, conv = after.model.graph.node[-2:]
    assert list(product.input) == ["w2", GATED]
    assert list(conv.input) == ["x", product.output[0], "b3"]
    assert_agree(before, after.model, np.random.default_rng(0))


def test_into_a_batched_product() -> None:
    before = Block(batch=2).model()
    after = fold(before)
    assert after.ops == [*GATE, "Reshape", "Mul", "Reshape", "MatMul", "Add", "Reshape"]
    assert_agree(before, after.model, np.random.default_rng(0))


def test_any_kernel_with_pads_and_strides() -> None:
    before = Block(geometry=Geometry((3, 2), (2, 1), (1, 2), (1, 0, 2, 1))).model()
    assert assert_every_variant(before) == [CONV]


def test_one_gate_for_a_batch() -> None:
    before = Block(batch=3, pooled=True).model()
    assert assert_every_variant(before) == [CONV, MATMUL]


def test_dynamic_batch() -> None:
    before = Block(batch="N").model()
    assert assert_every_variant(before, N=3) == [MATMUL]


def test_one_unknown_size() -> None:
    before = Block(batch=2, size=("H", 4)).model()
    assert assert_every_variant(before, H=3) == [MATMUL]


def test_unknown_sizes() -> None:
    before = Block(size=("H", "W")).model()
    assert assert_every_variant(before, H=3, W=4) == [CONV]


def test_a_shared_weight_stays_as_it_is() -> None:
    block = Block()
    one = block.conv(block.product())
    two = block.conv("x")
    block.draft.nodes[-1].input[1] = block.draft.nodes[-2].input[1]
    before = block.draft.finish(one, two)
    assert assert_every_variant(before) == [CONV, MATMUL]


def test_the_gate_may_be_an_output_and_read_elsewhere() -> None:
    block = Block()
    y = block.conv(block.product())
    before = block.draft.finish(y, GATED, block.draft.add("Abs", [GATED]))
    assert assert_every_variant(before) == [CONV, MATMUL]


def test_every_product_folds_into_its_own_conv() -> None:
    block = Block()
    gate = block.gate()
    ends = [block.conv(block.draft.add("Mul", ["x", gate])) for _ in range(2)]
    before = block.draft.finish(block.draft.add("Add", ends))
    after = fold(before)
    assert after.applied == 2
    assert_agree(before, after.model, np.random.default_rng(0))


def test_a_computed_bias() -> None:
    block = Block()
    y = block.conv(block.product())
    bias = block.draft.nodes[-1].input[2]
    block.draft.nodes.insert(0, harness.node("Exp", [bias], ["computed"]))
    block.draft.nodes[-1].input[2] = "computed"
    before = block.draft.finish(y)
    assert assert_every_variant(before) == [CONV, MATMUL]


def test_overridable_initializers_are_not_constant() -> None:
    block = Block(opset=7)
    proto = block.draft.finish(block.conv(block.product()), ir=3)
    assert fold(proto).applied == 1
    after = harness.run_pass(FoldGate(), proto, overridable=True)
    assert Why.WEIGHT_NOT_CONSTANT.value in after.reasons
    assert not after.applied


# -- reasons to decline ----------------------------------------------------------------------------


def constant_gate() -> onnx.ModelProto:
    block = Block()
    d = block.draft
    return d.finish(block.conv(d.add("Mul", ["x", d.weight("g", d.signed(1, 3, 1, 1))])))


def shared_product() -> onnx.ModelProto:
    block = Block()
    product = block.product()
    return block.draft.finish(block.conv(product), block.draft.add("Abs", [product]))


def computed_weight() -> onnx.ModelProto:
    block = Block()
    y = block.conv(block.product())
    block.draft.nodes.insert(0, harness.node("Exp", [block.draft.nodes[-1].input[1]], ["w"]))
    block.draft.nodes[-1].input[1] = "w"
    return block.draft.finish(y)


@dataclass(frozen=True)
class Declined:
    """A model at whose last Conv the pass must decline."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


DECLINED = {
    Why.NO_GATE: Declined(lambda: Block(size=(1, 1)).model()),
    Why.CONSTANT_GATE: Declined(constant_gate),
    Why.PRODUCT_SHARED: Declined(shared_product),
    Why.WEIGHT_NOT_CONSTANT: Declined(computed_weight),
    Why.GROUPED: Declined(lambda: Block(group=3, cout=3).model(), {"group": 3}),
    Why.GATE_PER_IMAGE: Declined(
        lambda: Block(batch="N", geometry=Geometry.plain(3)).model(),
        {"batch": "N", "kernel": (3, 3)},
    ),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    after = fold(case.proto())
    assert not after.applied
    remark = after.remarks[-1]
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


@pytest.mark.parametrize("geometry", [Geometry.plain(1, stride=2), Geometry.plain(1, pad=1)])
def test_a_strided_or_padded_conv_with_a_gate_per_image(geometry: Geometry) -> None:
    after = fold(Block(batch=2, geometry=geometry).model())
    assert after.reasons == {Why.NO_GATE.value, Why.GATE_PER_IMAGE.value}


@pytest.mark.parametrize("other", [(1, 3, 5, 7), (1, 3, 1, 7), (1, 1, 1, 1), (3, 1, 1)])
def test_other_products_are_left_alone(other: tuple[int, ...]) -> None:
    weights = {"w": np.ones((4, 3, 1, 1), np.float32)}
    nodes = [harness.node("Mul", ["x", "g"], ["p"]), harness.node("Conv", ["p", "w"], ["y"])]
    shapes = {"x": (1, 3, 5, 7), "g": other}
    after = fold(harness.model(nodes, shapes, {"y": (1, 4, 5, 7)}, weights))
    assert after.reasons == {Why.NO_GATE.value}


# -- properties ------------------------------------------------------------------------------------


@st.composite
def blocks(draw: st.DrawFn) -> onnx.ModelProto:
    """A gate and what is behind it, at times with the weight shared or the inside seen."""
    rank = draw(st.integers(1, 3))
    size = tuple(draw(st.lists(st.integers(5, 7), min_size=rank, max_size=rank)))
    opset = draw(st.sampled_from(OPSETS))
    block = Block(
        batch=draw(BATCH),
        size=draw(st.sampled_from([size, ("size", *size[1:]), ("size",) * rank])),
        geometry=draw(st.one_of(st.just(Geometry.plain(1, rank)), geometries(rank))),
        cout=draw(st.integers(1, 4)),
        bias=draw(st.booleans()),
        gate_first=draw(st.booleans()),
        pooled=opset < 18 and draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES if rank == 2 else DTYPES[:2])),
        opset=opset,
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    product = block.product()
    y = block.conv(product)
    extra = draw(st.lists(st.sampled_from([GATED, product]), max_size=1))
    if draw(st.booleans()):
        extra.append(block.conv("x"))
        block.draft.nodes[-1].input[1] = block.draft.nodes[-2].input[1]
    return block.draft.finish(y, *extra)


def check(before: onnx.ModelProto) -> None:
    names = assert_every_variant(before, size=6)
    assert names or {r.reason for r in fold(before).remarks} > {Why.NO_GATE.value}


@settings(max_examples=50, deadline=None)
@given(blocks())
def test_any_block(before: onnx.ModelProto) -> None:
    check(before)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(blocks())
def test_any_block_at_length(before: onnx.ModelProto) -> None:
    check(before)
