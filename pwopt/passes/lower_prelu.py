"""Lower PRelu to operators that stay in the channel-blocked layout."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, ValuesView
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerPrelu", "LowerPreluMatch"]

_RELU = Variant("relu")
_LEAKY_RELU = Variant("leaky-relu")
_SCALED_RELU = Variant("scaled-relu")
_TWO_SLOPES = Variant("two-slopes")


@dataclass(frozen=True, eq=False)
class LowerPreluMatch(Match):
    """A PRelu with constant slopes.

    Attributes:
        slope: as the model has it: one element, ``[C, 1, ...]`` or ``[1, C, 1, ...]``.
        ways: the variants that are exact for these slopes.
    """

    slope: ValuesView
    ways: tuple[Variant, ...]


@dataclass(frozen=True)
class LowerPrelu(Pass[LowerPreluMatch]):
    """Lower PRelu with constant slopes to Relu and products per channel, or to LeakyRelu.

    Rewrites:
        ``PRelu(x, a)`` into ``LeakyRelu(x)`` if all slopes are equal (``Relu(x)`` if they are
        zero); else, in the variant ``scaled-relu``, into
        ``Add(Mul(x, a), Relu(Mul(x, 1 - a)))``, and in the variant ``two-slopes`` into
        ``Add(Mul(x, a), Mul(Relu(x), 1 - a))``.

    Algebra:
        ``prelu(x) = max(x, 0) + a min(x, 0) = a x + (1 - a) relu(x)`` (He et al. 2015), and
        ``(1 - a) relu(x) = relu((1 - a) x)`` where ``a <= 1``: ``scaled-relu`` is offered only if
        that holds in every channel.

    Declines when:
        the slopes are not constant, are neither per channel nor all equal (a slope per pixel
        keeps no layout), or are not finite; the number of dimensions is not known; the element
        type is not a float; a LeakyRelu would need more than single precision: its attribute has
        no more, nor has its kernel before opset 16; opset before 7, where slopes did not
        broadcast.

    Exactness:
        ROUNDING: ``a x + (1 - a) x`` for positive x. LeakyRelu and Relu are the same to the bit.

    When it pays:
        ONNX Runtime's CPU provider leaves its blocked layout for PRelu and runs it element by
        element; products with a constant per channel become depthwise convolutions in the layout,
        Relu joins the first of them and the sum the second. LeakyRelu and Relu become part of the
        convolution before. 2 to 3 times on a convolution with its activation, a fifth of the
        time of a super-resolution net of dense 3x3 convolutions.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        SLOPE_NOT_CONSTANT = "slope-not-constant"
        SLOPE_NOT_PER_CHANNEL = "slope-not-per-channel"
        SLOPE_NOT_FINITE = "slope-not-finite"
        RANK_UNKNOWN = "rank-unknown"
        ELEMENT_TYPE = "element-type"
        SINGLE_PRECISION_ONLY = "single-precision-only"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "lower-prelu"
    roots: ClassVar[tuple[str, ...]] = ("PRelu",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> LowerPreluMatch | Decline:
        """See the class."""
        if facts.opset < 7:
            return Decline(
                self.Why.OP_NOT_IN_OPSET, {"op": "PRelu", "since": 7, "opset": facts.opset}
            )
        x, slope_tensor = node.inputs
        if not facts.is_float(x):
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(facts.dtype(x))})
        slope = facts.constant(slope_tensor)
        if slope is None:
            return Decline(self.Why.SLOPE_NOT_CONSTANT)
        if not np.isfinite(slope).all():
            return Decline(self.Why.SLOPE_NOT_FINITE)
        if slope.size and (slope == slope.flat[0]).all():
            return self._uniform(node, slope, facts)
        rank = facts.rank(x)
        if rank is None:
            return Decline(self.Why.RANK_UNKNOWN)
        if not _is_per_channel(slope.shape, rank):
            return Decline(
                self.Why.SLOPE_NOT_PER_CHANNEL, {"slope": list(slope.shape), "rank": rank}
            )
        ways = (_SCALED_RELU, _TWO_SLOPES) if (slope <= 1).all() else (_TWO_SLOPES,)
        figures = {"smallest": float(slope.min()), "largest": float(slope.max())}
        return LowerPreluMatch(node, (node,), slope, ways, facts=figures)

    def _uniform(self, node: Node, slope: ValuesView, facts: Facts) -> LowerPreluMatch | Decline:
        value = float(slope.flat[0])
        if value == 0.0:
            return LowerPreluMatch(node, (node,), slope, (_RELU,), facts={"slope": value})
        if slope.dtype == np.float64 and (
            float(np.float32(value)) != value or not facts.has_op("LeakyRelu", since=16)
        ):
            return Decline(self.Why.SINGLE_PRECISION_ONLY, {"slope": value})
        return LowerPreluMatch(node, (node,), slope, (_LEAKY_RELU,), facts={"slope": value})

    def variants(self, match: LowerPreluMatch) -> tuple[Variant, ...]:
        """The cheapest first."""
        return match.ways

    def rewrite(self, match: LowerPreluMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        node = match.root
        x, y = node.inputs[0], node.outputs[0]
        rewriter.remove(node)
        if variant == _RELU:
            rewriter.add("Relu", [x], [y], near=node)
            return
        if variant == _LEAKY_RELU:
            alpha = float(match.slope.flat[0])
            rewriter.add("LeakyRelu", [x], [y], {"alpha": alpha}, near=node)
            return
        complement = (1.0 - match.slope.astype(np.float64)).astype(match.slope.dtype)
        below = rewriter.constant(f"{y.name}/slope", np.array(match.slope))
        rest = rewriter.constant(f"{y.name}/rest", complement)
        linear = rewriter.variable(f"{y.name}/linear", like=x)
        inner = rewriter.variable(f"{y.name}/inner", like=x)
        hinge = rewriter.variable(f"{y.name}/hinge", like=x)
        rewriter.add("Mul", [x, below], [linear], near=node)
        steps = ("Mul", "Relu") if variant == _SCALED_RELU else ("Relu", "Mul")
        for op, source, target in zip(steps, (x, inner), (inner, hinge), strict=True):
            operands = [source, rest] if op == "Mul" else [source]
            rewriter.add(op, operands, [target], near=node)
        rewriter.add("Add", [linear, hinge], [y], near=node)


def _is_per_channel(shape: tuple[int, ...], rank: int) -> bool:
    """Whether only axis 1 of a tensor of *rank* dimensions has slopes of its own."""
    if rank < 3 or not rank - 1 <= len(shape) <= rank:
        return False
    padded = (1,) * (rank - len(shape)) + shape
    return all(size == 1 for axis, size in enumerate(padded) if axis != 1)
