"""Raise matrix products over the last axis to pointwise convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Dim, Facts, Node, Rewriter, Tensor
from pwopt.passes._movable import ELEMENTWISE, Axes, Movable, inverse, movable
from pwopt.passes._transpose_region import Plan, find_plan
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["RaisePointwiseMatmul", "RaisePointwiseMatmulMatch"]

_RANKS = (3, 4, 5)
_CONV_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


@dataclass(frozen=True, eq=False)
class RaisePointwiseMatmulMatch(Match):
    """A matrix product whose region has fewer Transposes with channels in front."""

    plan: Plan


@dataclass(frozen=True, eq=False)
class _Product:
    """``y = f(x W + b)`` over the last axis of *source*, for a chain f of elementwise operators.

    Attributes:
        core: the MatMul or Gemm.
        nodes: all of it; the core alone, or from the Reshape to two axes to the one back.
        source, result: tensors of full rank, channels last.
        bias: the constant that is added, and its factor.
        maps: the elementwise operators between the core and the Reshape back.
    """

    core: Node
    nodes: tuple[Node, ...]
    source: Tensor
    result: Tensor
    rank: int
    bias: tuple[Tensor, float] | None = None
    maps: tuple[Node, ...] = ()


@dataclass(frozen=True)
class RaisePointwiseMatmul(Pass[RaisePointwiseMatmulMatch]):
    """Raise MatMul or Gemm over the last axis to a 1x1 Conv where that takes Transposes away.

    Rewrites:
        ``Transpose(0,2,3,1) -> MatMul -> Add -> ... -> Transpose(0,3,1,2)`` into ``Conv -> ...``
        with kernel 1x1, and likewise for one and three spatial axes. Anything layout-indifferent
        may stand around the product (see eliminate-transpose): further products, activations in
        one piece or many, a LayerNormalization in its parts, residual Adds. A product of matrices
        between two Reshapes that keep the leading axes, ``Reshape[-1,Cin] -> Gemm -> Relu ->
        Reshape[N,H,W,Cout]``, counts as one over the last axis. A bias behind becomes the Conv's.

    Algebra:
        The product over the last axis of ``X[n,p,:]`` is one matrix over channels, applied alike
        at every pixel p, and that is a 1x1 convolution (Lin, Chen and Yan 2013, "Network in
        Network"): ``P (X W) = Conv(P X, W^T)`` for the Transpose P that brings the channels to
        axis 1. What becomes of each product in a region is decided together, by the minimum cut
        that eliminate-transpose uses, with products as operators that work in either layout.

    Declines when:
        the weight is not a constant matrix on the right, or is transposed data (``transA``); the
        type is not float16 or float32 (runtimes have no Conv for others); the input has fewer
        than 3 axes or more than 5, and is not flattened and restored by Reshapes around; the bias
        of a Gemm is not one constant per channel; no Transpose would be saved.

    Exactness:
        ROUNDING. The products are the same; their sums may be taken in another order.

    When it pays:
        Where the runtime's convolutions keep a blocked layout, as on x86, and the Transposes cost
        more than the product gains by its layout. The reverse of lower-pointwise-conv, which it
        never meets: this one runs in the rounds of simplifying passes, where the number of
        Transposes only falls; lowering is tried once, on what they leave, and no pipeline runs
        both directions to a fixed point.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        NOT_OVER_LAST_AXIS = "not-over-last-axis"
        UNSUPPORTED_DTYPE = "unsupported-dtype"
        NO_SPATIAL_AXES = "no-spatial-axes"
        BIAS_NOT_PER_CHANNEL = "bias-not-per-channel"
        NO_TRANSPOSE_SAVED = "no-transpose-saved"

    name: ClassVar[str] = "raise-pointwise-matmul"
    roots: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> RaisePointwiseMatmulMatch | Decline:
        """See the class."""
        product = self._read(node, facts)
        if isinstance(product, Decline):
            return product
        to_first = (0, product.rank - 1, *range(1, product.rank - 1))

        def classify(other: Node, axes: Axes) -> Movable | None:
            if axes == inverse(to_first):
                found = self._product_at(other, facts)
                if found is not None and found.rank == product.rank:
                    return _as_movable(found)
            return movable(other, axes, facts)

        plan = find_plan(facts, product.source, 1, to_first, classify)
        if not isinstance(plan, Plan):
            return Decline(self.Why.NO_TRANSPOSE_SAVED, {"blocked_by": plan})
        moved = [n for m in plan.moved for n in m.nodes]
        if not any(n is node for n in moved):
            return Decline(self.Why.NO_TRANSPOSE_SAVED)
        figures: Mapping[str, Fact] = {
            "transposes": (plan.before, plan.after),
            "products": sum(n.op in self.roots for n in moved),
        }
        nodes = (node, *(n for n in plan.nodes if n is not node))
        return RaisePointwiseMatmulMatch(node, nodes, plan, facts=figures)

    def rewrite(
        self, match: RaisePointwiseMatmulMatch, variant: Variant, rewriter: Rewriter
    ) -> None:
        """See the class."""
        del variant
        mark = rewriter.mark()
        match.plan.apply(rewriter)
        _, added = rewriter.changes(mark)
        for node in added:
            if node.op == "Conv":
                _take_in_bias(node, rewriter)

    # -- reading -------------------------------------------------------------------------------

    def _product_at(self, node: Node, facts: Facts) -> _Product | None:
        """The product that *node* is, or that it flattens for or restores."""
        core: Node | None = node
        if facts.is_op(node, "Reshape"):
            core = facts.sole_consumer(node.outputs[0])
            if not facts.is_op(core, *self.roots):
                core = _core_before(node, facts)
        if core is None or not facts.is_op(core, *self.roots):
            return None
        product = self._read(core, facts)
        if isinstance(product, Decline) or not any(n is node for n in product.nodes):
            return None
        return product

    def _read(self, core: Node, facts: Facts) -> _Product | Decline:
        source, weight = core.inputs[0], core.inputs[1]
        if facts.is_constant(source) or facts.attr_int(core, "transA", 0):
            return Decline(self.Why.NOT_OVER_LAST_AXIS)
        if not facts.is_constant(weight):
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if facts.rank(weight) != 2:
            return Decline(self.Why.NOT_OVER_LAST_AXIS)
        if facts.dtype(weight) not in _CONV_DTYPES:
            return Decline(self.Why.UNSUPPORTED_DTYPE, {"dtype": str(facts.dtype(weight))})
        rank = facts.rank(source)
        if rank in _RANKS:
            return _Product(core, (core,), source, core.outputs[0], rank)
        if rank != 2:
            return Decline(self.Why.NO_SPATIAL_AXES, {"rank": rank})
        return self._read_flattened(core, facts)

    def _read_flattened(self, core: Node, facts: Facts) -> _Product | Decline:
        """A product of matrices, if Reshapes around it flatten and restore the leading axes."""
        no_axes = Decline(self.Why.NO_SPATIAL_AXES, {"rank": 2})
        flatten = facts.producer(core.inputs[0])
        chain = _up_to_reshape(core, facts)
        if not facts.is_op(flatten, "Reshape") or not facts.is_private(core.inputs[0]) or not chain:
            return no_axes
        assert flatten is not None
        source, result = flatten.inputs[0], chain[-1].outputs[0]
        shape = facts.shape(source)
        if shape is None or len(shape) not in _RANKS or not _keeps_leading(source, result, facts):
            return no_axes
        maps = chain[:-1]
        bias = facts.input(core, 2)
        factor = facts.attr_float(core, "beta", 1.0)
        added = _constant_operand(maps[0], facts) if maps and facts.is_op(maps[0], "Add") else None
        if bias is None and added is not None:
            bias, factor, maps = added, 1.0, maps[1:]
        width = facts.shape(result)
        if bias is not None and not _is_per_channel(bias, (width or (None,))[-1], facts):
            return Decline(self.Why.BIAS_NOT_PER_CHANNEL, {"shape": facts.shape(bias)})
        if not all(_is_scalar_map(node, facts) for node in maps):
            return no_axes
        return _Product(
            core,
            (flatten, core, *chain),
            source,
            result,
            len(shape),
            None if bias is None else (bias, factor),
            tuple(maps),
        )


def _as_movable(product: _Product) -> Movable:
    def transform(rewriter: Rewriter, _: Axes) -> None:
        _write_conv(product, rewriter)

    return Movable(product.nodes, (product.source,), (product.result,), transform)


def _write_conv(product: _Product, rewriter: Rewriter) -> None:
    """Put a Conv in place of *product*, whose ends already hold tensors with channels in front."""
    facts = Facts(rewriter.model)
    core = product.core
    source, result = product.nodes[0].inputs[0], product.nodes[-1].outputs[0]
    weight = core.inputs[1]
    matrix = facts.constant(weight)
    assert matrix is not None
    if not facts.attr_int(core, "transB", 0):
        matrix = matrix.T
    matrix = matrix * matrix.dtype.type(facts.attr_float(core, "alpha", 1.0))
    cout, cin = matrix.shape
    ones = (1,) * (product.rank - 2)
    hint = f"{weight.name}/conv"
    operands = [
        source,
        rewriter.constant(hint, np.array(matrix, order="C").reshape(cout, cin, *ones)),
    ]
    if product.bias is not None:
        tensor, factor = product.bias
        values = facts.constant(tensor)
        assert values is not None
        scaled = values.reshape(-1) * values.dtype.type(factor)
        operands.append(rewriter.constant(f"{tensor.name}/conv", _per_channel(scaled, cout)))
    inner = [core.outputs[0], *(node.outputs[0] for node in product.maps)]
    for node in product.nodes:
        if not any(node is kept for kept in product.maps):
            rewriter.remove(node)
    shape = facts.shape(result)
    written = [rewriter.variable(f"{t.name}/conv", result, shape) for t in inner[:-1]] + [result]
    rewriter.add("Conv", operands, written[:1], {"kernel_shape": list(ones)}, near=core)
    # The first map may read the bias Add, which is gone, instead of the core.
    for node, before, after in zip(product.maps, written[:-1], written[1:], strict=True):
        index = next(i for i, t in enumerate(node.inputs) if not facts.is_constant(t))
        rewriter.set_input(node, index, before)
        rewriter.set_output(node, 0, after)


def _take_in_bias(conv: Node, rewriter: Rewriter) -> None:
    """Let *conv* add what an Add behind it adds to each channel."""
    facts = Facts(rewriter.model)
    add = facts.sole_consumer(conv.outputs[0])
    if len(conv.inputs) > 2 or add is None or not facts.is_op(add, "Add"):
        return
    bias = _constant_operand(add, facts)
    values = facts.constant(bias)
    weight = facts.static_shape(conv.inputs[1])
    if values is None or weight is None or values.ndim > len(weight):
        return
    full = (1,) * (len(weight) - values.ndim) + values.shape
    if values.size != 1 and full != (1, weight[0], *weight[2:]):
        return
    hint = bias.name if bias is not None else conv.name
    vector = rewriter.constant(f"{hint}/conv", _per_channel(values.reshape(-1), weight[0]))
    result = add.outputs[0]
    rewriter.set_inputs(conv, [*conv.inputs, vector])
    rewriter.remove(add)
    rewriter.set_output(conv, 0, result)


def _per_channel(values: np.ndarray[Any, Any], channels: int) -> np.ndarray[Any, Any]:
    return np.array(np.broadcast_to(values, (channels,)), order="C")


def _up_to_reshape(core: Node, facts: Facts) -> tuple[Node, ...]:
    """Elementwise operators behind *core*, one after the other, and the Reshape that ends them."""
    chain: list[Node] = []
    last = core
    while not chain or facts.is_op(last, *ELEMENTWISE):
        reader = facts.sole_consumer(last.outputs[0])
        if reader is None:
            return ()
        chain.append(reader)
        last = reader
    return tuple(chain) if facts.is_op(last, "Reshape") else ()


def _core_before(node: Node, facts: Facts) -> Node | None:
    """What stands in front of elementwise operators in front of *node*."""
    tensor = node.inputs[0]
    producer = facts.producer(tensor)
    while facts.is_op(producer, *ELEMENTWISE):
        assert producer is not None
        variables = [t for t in producer.inputs if not (t.is_empty() or facts.is_constant(t))]
        if len(variables) != 1:
            return None
        producer = facts.producer(variables[0])
    return producer


def _keeps_leading(source: Tensor, result: Tensor, facts: Facts) -> bool:
    """Whether both have the same axes but for the last; one may be left to the element count."""
    before, after = facts.shape(source), facts.shape(result)
    if before is None or after is None or len(before) != len(after) or 0 in (*before, *after):
        return False
    if not isinstance(before[-1], int) or not isinstance(after[-1], int):
        return False
    differing = [
        (a, b) for a, b in zip(before[:-1], after[:-1], strict=True) if a != b or a is None
    ]
    is_known = any(isinstance(a, int) and isinstance(b, int) for a, b in differing)
    return len(differing) <= 1 and not is_known


def _constant_operand(node: Node, facts: Facts) -> Tensor | None:
    """The constant among the operands of a binary operator, if it has just one."""
    constants = [t for t in node.inputs if facts.is_constant(t)]
    return constants[0] if len(constants) == 1 else None


def _is_per_channel(tensor: Tensor, channels: Dim, facts: Facts) -> bool:
    """Whether *tensor* is a constant that broadcasts along the rows of a matrix."""
    values = facts.constant(tensor)
    if values is None or values.ndim > 2:
        return False
    return values.size == 1 or values.size == channels == values.shape[-1]


def _is_scalar_map(node: Node, facts: Facts) -> bool:
    """Whether *node* maps one tensor element by element, with scalars beside it at most."""
    others = [t for t in node.inputs if facts.is_constant(t)]
    tensors = [t for t in node.inputs if not (t.is_empty() or facts.is_constant(t))]
    is_single = len(tensors) == 1 and len(node.outputs) == 1
    return is_single and all(facts.scalar(t) is not None for t in others)
