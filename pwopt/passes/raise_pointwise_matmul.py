"""Raise matrix products over the last axis to pointwise convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pwopt.graph import Facts, Node, Rewriter
from pwopt.passes._movable import Axes, Movable, inverse, movable
from pwopt.passes._pointwise_products import (
    OPS,
    Obstacle,
    as_conv,
    find_product,
    read_product,
    take_in_bias,
)
from pwopt.passes._transpose_region import Plan, find_plan
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["RaisePointwiseMatmul", "RaisePointwiseMatmulMatch"]


@dataclass(frozen=True, eq=False)
class RaisePointwiseMatmulMatch(Match):
    """A matrix product whose region has fewer Transposes with channels in front."""

    plan: Plan


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

        WEIGHT_NOT_CONSTANT = Obstacle.WEIGHT_NOT_CONSTANT.value
        NOT_OVER_LAST_AXIS = Obstacle.NOT_OVER_LAST_AXIS.value
        UNSUPPORTED_DTYPE = Obstacle.UNSUPPORTED_DTYPE.value
        NO_SPATIAL_AXES = Obstacle.NO_SPATIAL_AXES.value
        BIAS_NOT_PER_CHANNEL = Obstacle.BIAS_NOT_PER_CHANNEL.value
        NO_TRANSPOSE_SAVED = "no-transpose-saved"

    name: ClassVar[str] = "raise-pointwise-matmul"
    roots: ClassVar[tuple[str, ...]] = OPS
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> RaisePointwiseMatmulMatch | Decline:
        """See the class."""
        product = read_product(node, facts)
        if isinstance(product, Decline):
            return Decline(self.Why(product.why.value), product.facts)
        to_first = (0, product.rank - 1, *range(1, product.rank - 1))

        def classify(other: Node, axes: Axes) -> Movable | None:
            if axes == inverse(to_first):
                found = find_product(other, facts)
                if found is not None and found.rank == product.rank:
                    return as_conv(found)
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
                take_in_bias(node, rewriter)
