"""Give every operator that could work in either of two layouts the one that is cheapest in all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import ClassVar

from pwopt.errors import UsageError
from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.passes._movable import Axes, Movable, inverse, movable, reduced_axes
from pwopt.passes._pointwise_products import (
    OPS,
    as_conv,
    as_matmul,
    find_biased_product,
    find_conv,
    read_product,
)
from pwopt.passes._transpose_region import Plan, elements, find_plan, perm_of
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["AssignLayout", "AssignLayoutMatch"]

_RANKS = (3, 4, 5)
_UNIT = 64
"""The price of a Transpose per element; other prices are rounded to whole numbers beside it."""
_FUSED = 0.5
"""A pass over a tensor, in Transposes: what it costs not to be fused into the Conv before."""
_SCATTERED = 0.5
"""What it costs to cut or join along the last axis instead of along whole channels."""

# fmt: off
_BLOCKED = frozenset({
    "AveragePool", "BatchNormalization", "Conv", "GlobalAveragePool", "GlobalMaxPool", "MaxPool",
})
_FUSABLE = frozenset({
    "Add", "Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh",
})
_ALONG_AXIS = frozenset({"Hardmax", "LogSoftmax", "Softmax"})
_CUTTING = {"Concat": 1, "Split": 0}
"""With the default of their attribute ``axis``."""
# fmt: on


@dataclass(frozen=True, eq=False)
class AssignLayoutMatch(Match):
    """A region whose operators have a cheaper choice of layouts."""

    plan: Plan


@dataclass(frozen=True)
class AssignLayout(Pass[AssignLayoutMatch]):
    """Choose, for all operators of a region at once, between channels in front and channels last.

    Rewrites:
        A region of operators that could work in either layout: products over the channels, which
        are a 1x1 ``Conv`` (one group, no stride, no pads) with channels in front and ``MatMul ->
        Add``, or ``Reshape -> Gemm -> Reshape``, with channels last; elementwise operators,
        Concat, Split, Slice, Pad, reductions and Softmax (see eliminate-transpose). Each gets the
        layout that makes the sum of prices smallest; what changes its layout is rewritten,
        Transposes go where they are no longer needed and come where the layouts meet. Of a branch
        ``Conv 7x7 -> Transpose -> LayerNormalization -> MatMul -> Gelu -> MatMul -> Transpose ->
        Add``, say, the LayerNormalization alone keeps the channels last, and the products become
        Convs; and a LayerNormalization in its parts over axis 1 becomes one over the last axis,
        in which the runtime recognises it.

    Algebra:
        A product over the channels is one matrix, applied alike at every pixel, and that is a 1x1
        convolution (Lin, Chen and Yan 2013, "Network in Network"); the rest commutes with a
        Transpose once its axes are renamed. With a label per operator the prices are of three
        kinds: of an operator in a layout; of a value that is needed in both, one Transpose
        whoever reads it; and of two operators that the runtime makes one only if both have their
        channels in front. All three are submodular, so that a minimum s-t cut is the best choice
        of all (Picard and Ratliff 1975; Kolmogorov and Zabih 2004).

        The unit of price is a Transpose of one element. A Transpose costs its elements; beside a
        Conv or a pool, ``beside_conv`` times as much, since a runtime with a blocked layout
        reorders there anyway and takes the Transpose in. A reduction or a Softmax along the
        channels costs ``over_channels`` times its elements if they stand in front. A product
        over images of two spatial axes costs ``product`` times the elements of its result with
        the channels in front, or, if that is negative, as much with the channels last: a blocked
        Conv is faster than a MatMul, and takes in its bias, the scale and the residual behind it.
        An elementwise operator or an Add that a Conv would take in costs half its elements with
        the channels last, and so do a Concat and a Split of channels.

        Every rewrite lowers the sum, which depends on the layouts alone, so the pass ends.

    Declines when:
        the node tells no layout: a MatMul or Gemm is no such product, the rank of a Conv is not
        known, a Transpose brings the channels neither to the end nor to the front; no choice is
        cheaper than the present one (the remark names the operators around the region that fix
        their layout); the region has its turn at another node.

    Exactness:
        ROUNDING. The products are the same, but their sums, and those of a reduction or a
        Softmax, may be taken in another order.

    When it pays:
        In networks with both kinds of operators: depthwise or spatial convolutions between
        LayerNormalization and products over the last axis (ConvNeXt-T 1.16x on one thread of an
        AVX-512 machine). The prices are those of ONNX Runtime on x86, in rough figures; whether a
        choice pays is for the clock to say.
        eliminate-transpose and raise-pointwise-matmul are the special case of equal Transposes at
        no other price. They run in the rounds of simplifying passes, to which this one, where it
        trades a dear Transpose for two cheap ones, must not belong.

    Attributes:
        product: what a product costs more as a Conv than as a MatMul, in Transposes of its
            result; negative where the Conv is cheaper.
        beside_conv: what a Transpose beside a Conv or a pool costs, in Transposes elsewhere.
        over_channels: what a reduction over the channels costs more with these in front, in
            Transposes of what it reads.
    """

    product: float = -1.0
    beside_conv: float = 0.25
    over_channels: float = 1.5

    class Why(StrEnum):
        """Reasons to decline."""

        NO_PRODUCT = "no-product"
        UNKNOWN_RANK = "unknown-rank"
        NOT_BETWEEN_LAYOUTS = "not-between-layouts"
        BEST_ALREADY = "best-already"
        PART_OF_REGION = "part-of-region"

    name: ClassVar[str] = "assign-layout"
    roots: ClassVar[tuple[str, ...]] = ("Conv", *OPS, "Transpose")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: a price that has no meaning.
        """
        if not 0 <= self.beside_conv <= 1:
            raise UsageError("assign-layout:beside_conv is a share, from 0 to 1")
        if not 0 <= self.over_channels < float("inf"):
            raise UsageError("assign-layout:over_channels is a number from 0")
        if not abs(self.product) < float("inf"):
            raise UsageError("assign-layout:product is a finite number")

    def match(self, node: Node, facts: Facts) -> AssignLayoutMatch | Decline:
        """See the class."""
        start = self._start(node, facts)
        if isinstance(start, Decline):
            return start
        seed, layout, rank = start
        to_first = _to_first(rank)
        classify = partial(_classify, to_first=to_first, facts=facts)
        plan = find_plan(facts, seed, layout, to_first, classify, _Prices(self, facts, rank))
        if not isinstance(plan, Plan):
            return Decline(self.Why.BEST_ALREADY, {"blocked_by": plan})
        first = self._first(plan, facts, node) if plan.is_whole else node
        if first is not node:
            return Decline(self.Why.PART_OF_REGION, {"turn": facts.site(first)})
        return AssignLayoutMatch(
            node,
            (node, *(n for n in plan.nodes if n is not node)),
            plan,
            facts={
                "transposes": (plan.before, plan.after),
                "moved": tuple(sorted({n.op for moved in plan.moved for n in moved.nodes})),
            },
        )

    def rewrite(self, match: AssignLayoutMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        del variant
        match.plan.apply(rewriter)

    def _first(self, plan: Plan, facts: Facts, node: Node) -> Node:
        """The node at which a region has its turn, wherever one came from.

        A region that neither holds nor follows any has it at *node*, which reads from it.
        """
        for among in (plan.nodes, plan.sources):
            starts = [n for n in among if self._can_start(n, facts)]
            if starts:
                return min(starts, key=facts.position)
        return node

    def _can_start(self, node: Node, facts: Facts) -> bool:
        is_root = facts.is_op(node, *self.roots)
        return is_root and not isinstance(self._start(node, facts), Decline)

    def _start(self, node: Node, facts: Facts) -> tuple[Tensor, int, int] | Decline:
        """A tensor at *node*, its layout (1 is channels last) and its rank."""
        if facts.is_op(node, "Transpose"):
            perm = perm_of(node, facts) or ()
            rank = len(perm)
            # With three axes both are one permutation, and which layout is which is not certain.
            if rank not in _RANKS[1:] or perm not in (_to_first(rank), inverse(_to_first(rank))):
                return Decline(self.Why.NOT_BETWEEN_LAYOUTS, {"perm": perm})
            return node.inputs[0], int(perm == _to_first(rank)), rank
        if facts.is_op(node, "Conv"):
            conv = find_conv(node, facts)
            tensor = node.outputs[0] if conv is None else conv.input
            known = facts.rank(tensor)
            if known not in _RANKS:
                return Decline(self.Why.UNKNOWN_RANK, {"rank": known})
            return tensor, 0, known
        product = read_product(node, facts)
        if isinstance(product, Decline):
            return Decline(self.Why.NO_PRODUCT, {"because": str(product.why.value)})
        return product.source, 1, product.rank


def _to_first(rank: int) -> Axes:
    """The perm of a Transpose that brings the channels to the front."""
    return (0, rank - 1, *range(1, rank - 1))


def _classify(node: Node, axes: Axes, *, to_first: Axes, facts: Facts) -> Movable | None:
    """How *node* can leave the layout that *axes* lead out of."""
    rank = len(to_first)
    if axes == inverse(to_first):
        product = find_biased_product(node, facts)
        if product is not None and product.rank == rank:
            return as_conv(product)
    if axes == to_first:
        conv = find_conv(node, facts)
        if conv is not None and conv.spatial_rank + 2 == rank:
            return as_matmul(conv)
    return movable(node, axes, facts)


class _Prices:
    """What the options say, in whole numbers."""

    def __init__(self, options: AssignLayout, facts: Facts, rank: int) -> None:
        self.options = options
        self.facts = facts
        self.channels = (1, rank - 1)
        """By layout: the axis of the channels."""

    def transpose(self, tensor: Tensor) -> int:
        return self._times(1.0, tensor)

    def beside(self, tensor: Tensor, node: Node) -> int:
        is_blocked = self.facts.is_op(node, *_BLOCKED)
        return self._times(self.options.beside_conv if is_blocked else 1.0, tensor)

    def operator(self, moved: Movable, present: int, layout: int) -> int:
        if _is_product(moved):
            factor = self.options.product if layout == 0 else -self.options.product
            is_image = self.channels[1] == 3
            return self._times(max(factor, 0.0), moved.outputs[0]) if is_image else 0
        node = moved.nodes[0]
        if layout == 0 and self._sums_up(node, self.channels[present]):
            return self._times(self.options.over_channels, moved.inputs[0])
        if layout == 1 and self._cuts_or_joins(node, self.channels[present]):
            return sum(self._times(_SCATTERED, tensor) for tensor in moved.outputs)
        return 0

    def apart(self, first: Movable | Node, second: Movable) -> int:
        if isinstance(first, Movable):
            is_conv = _is_product(first)
        else:
            is_conv = self.facts.is_op(first, "Conv")
        node = second.nodes[0]
        is_fusable = self.facts.is_op(node, *_FUSABLE) or (
            self.facts.is_op(node, "Mul") and len(second.inputs) == 1
        )
        return self._times(_FUSED, second.outputs[0]) if is_conv and is_fusable else 0

    def pays(self, before: int, after: int) -> bool:
        return after < before

    def _sums_up(self, node: Node, channels: int) -> bool:
        """Whether *node* makes one value out of all channels of a pixel, or all values of all."""
        rank = self.channels[1] + 1
        if node.op in _ALONG_AXIS:
            return self.facts.attr_int(node, "axis", -1) % rank == channels
        if node.op.startswith(("Arg", "Reduce")):
            return reduced_axes(node, rank, self.facts) == (channels,)
        return False

    def _cuts_or_joins(self, node: Node, channels: int) -> bool:
        """Whether *node* is a Concat or a Split of channels."""
        if node.op not in _CUTTING:
            return False
        rank = self.channels[1] + 1
        return self.facts.attr_int(node, "axis", _CUTTING[node.op]) % rank == channels

    def _times(self, factor: float, tensor: Tensor) -> int:
        return round(factor * _UNIT) * elements(self.facts, tensor)


def _is_product(moved: Movable) -> bool:
    """Nothing else that can move holds one of these operators."""
    return any(node.op in ("Conv", *OPS) for node in moved.nodes)
