"""Compose a pointwise convolution with the convolution before or behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pwopt.graph import ConvFacts, Facts, Node, Rewriter
from pwopt.numerics import channel_algebra
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["ComposePointwise", "ComposePointwiseMatch"]

Array = np.ndarray[Any, Any]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Window:
    """The geometry of one convolution that does what two did."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ComposePointwiseMatch(Match):
    """Two convolutions in a row, and the parameters of the one that replaces them."""

    first: Node
    window: _Window
    group: int
    weight: Array
    bias: Array | None


@dataclass(frozen=True)
class ComposePointwise(Pass[ComposePointwiseMatch]):
    """Compose a pointwise Conv with its neighbour where MACs fall.

    Rewrites:
        ``Conv -> Conv``, at least one of them with a kernel of 1, into one ``Conv`` with the
        kernel of the other, its strides multiplied, and ``gcd(group1, group2)`` groups.

    Algebra:
        A pointwise convolution is a matrix over channels, so tap by tap of the other's kernel
        ``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``. A stride s1 in the first one makes
        the second one's taps and steps s1 times longer: strides multiply, a pointwise first one
        multiplies the dilations of the second by s1 and its pads too.

    Declines when:
        no Conv stands before, or something non-linear stands between (that is what makes two
        pointwise layers more than one); the value between is read elsewhere or is a graph output;
        neither is pointwise; weights are of a type without NumPy arithmetic (bfloat16), or weights
        or biases are not constant; the second one pads, which puts zeros where the first one would
        have put its bias or its own partial windows; MACs would not fall (a bottleneck of two thin
        convolutions is cheaper than their product), or might not for all that is known of the
        shapes; composed weights would leave the range of their type.

    Exactness:
        ROUNDING. The product is computed in float64 and rounded once.

    When it pays:
        By the MACs saved, and by one operator and one pass over memory.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NO_CONV_BEFORE = "no-conv-before"
        NON_LINEAR_BETWEEN = "non-linear-between"
        GRAPH_OUTPUT = "graph-output"
        OTHER_READERS = "other-readers"
        NOT_POINTWISE = "not-pointwise"
        NOT_FLOAT = "not-float"
        PADS_UNKNOWN = "pads-unknown"
        PADDING_BETWEEN = "padding-between"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        BIAS_MEETS_PADDING = "bias-meets-padding"
        MORE_MACS = "more-macs"
        SIZE_UNKNOWN = "size-unknown"
        OUT_OF_RANGE = "out-of-range"

    name: ClassVar[str] = "compose-pointwise"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> ComposePointwiseMatch | Decline:
        """See the class."""
        pair = self._pair(node, facts)
        if isinstance(pair, Decline):
            return pair
        first, second = pair
        window = self._window(first, second)
        if isinstance(window, self.Why):
            return Decline(window)
        macs = _Macs.of(first, second, facts)
        if not macs.surely_fall:
            why = self.Why.SIZE_UNKNOWN if macs.may_fall else self.Why.MORE_MACS
            return Decline(why, macs.facts)
        return self._compose(first, second, window, facts, macs)

    def _pair(self, node: Node, facts: Facts) -> tuple[ConvFacts, ConvFacts] | Decline:
        """The two convolutions, with nothing between them but each other."""
        second = facts.conv(node)
        if second is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        producer = facts.producer(second.input)
        if producer is None or not facts.is_op(producer, "Conv"):
            if producer is not None and _bends(producer, facts):
                return Decline(self.Why.NON_LINEAR_BETWEEN, {"op": producer.op})
            return Decline(self.Why.NO_CONV_BEFORE)
        if facts.is_output(second.input):
            return Decline(self.Why.GRAPH_OUTPUT)
        if not facts.is_private(second.input):
            return Decline(self.Why.OTHER_READERS)
        first = facts.conv(producer)
        if first is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if not first.is_pointwise and not second.is_pointwise:
            return Decline(self.Why.NOT_POINTWISE)
        if not (facts.is_float(first.weight) and facts.is_float(second.weight)):
            return Decline(self.Why.NOT_FLOAT)
        return first, second

    def _window(self, first: ConvFacts, second: ConvFacts) -> _Window | Why:
        """The geometry of the two together."""
        if first.pads is None or second.pads is None:
            return self.Why.PADS_UNKNOWN
        strides = _times(first.strides, second.strides)
        if first.is_pointwise:
            dilations = _times(first.strides, second.dilations)
            stretched = _times(first.strides * 2, second.pads)
            pads = tuple(p + q for p, q in zip(first.pads, stretched, strict=True))
            return _Window(second.kernel, strides, dilations, pads)
        if not second.is_unpadded:
            return self.Why.PADDING_BETWEEN
        return _Window(first.kernel, strides, first.dilations, first.pads)

    def _compose(
        self, first: ConvFacts, second: ConvFacts, window: _Window, facts: Facts, macs: _Macs
    ) -> ComposePointwiseMatch | Decline:
        inner, outer = facts.constant(first.weight), facts.constant(second.weight)
        biases = [facts.constant(b) for b in (first.bias, second.bias) if b is not None]
        if inner is None or outer is None or any(b is None for b in biases):
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        passed_on = _bias(first, facts)
        if passed_on.any() and not second.is_unpadded:
            return Decline(self.Why.BIAS_MEETS_PADDING)
        product, group = channel_algebra.compose(
            inner, outer, first_group=first.group, second_group=second.group
        )
        weight = channel_algebra.cast(product, inner.dtype)
        response = channel_algebra.constant_response(outer, passed_on, group=second.group)
        bias = channel_algebra.cast(_bias(second, facts) + response, inner.dtype, may_vanish=True)
        if weight is None or bias is None:
            return Decline(self.Why.OUT_OF_RANGE)
        return ComposePointwiseMatch(
            second.node,
            (first.node, second.node),
            first.node,
            window,
            group,
            weight,
            bias if biases else None,
            facts={"with": facts.site(first.node), **macs.facts},
        )

    def rewrite(
        self,
        match: ComposePointwiseMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        node, window = match.root, match.window
        data = match.first.inputs[0]
        rewriter.set_input(node, 0, data)
        rewriter.remove(match.first)
        rewriter.set_weight(node, 1, match.weight)
        if match.bias is not None:
            rewriter.set_weight(node, 2, match.bias)
        if "auto_pad" in node.attrs:
            rewriter.set_attribute(node, "auto_pad", None)
        rewriter.set_attribute(node, "group", match.group)
        rewriter.set_attribute(node, "kernel_shape", list(window.kernel))
        rewriter.set_attribute(node, "strides", list(window.strides))
        rewriter.set_attribute(node, "dilations", list(window.dilations))
        rewriter.set_attribute(node, "pads", list(window.pads))


@dataclass(frozen=True)
class _Macs:
    """Multiply-accumulates per output position of the pair, and of the two composed.

    The first convolution may compute more positions than the second one; where sizes are not
    known, how many more is known between two bounds only.
    """

    before_at_least: float
    before_at_most: float
    after: int

    @classmethod
    def of(cls, first: ConvFacts, second: ConvFacts, facts: Facts) -> _Macs:
        group = math.gcd(first.group, second.group)
        taps = math.prod(first.kernel) * math.prod(second.kernel)
        inner = first.cout * first.cin // first.group * math.prod(first.kernel)
        outer = second.cout * second.cin // second.group * math.prod(second.kernel)
        low, high = _positions(second, facts)
        return cls(
            outer + low * inner, outer + high * inner, second.cout * first.cin // group * taps
        )

    @property
    def facts(self) -> dict[str, Fact]:
        """Figures for the remark."""
        return {
            "macs_per_position_before": round(self.before_at_least, 1),
            "macs_per_position_after": self.after,
        }

    @property
    def surely_fall(self) -> bool:
        return self.after < self.before_at_least

    @property
    def may_fall(self) -> bool:
        return self.after < self.before_at_most


def _positions(conv: ConvFacts, facts: Facts) -> tuple[float, float]:
    """Input positions of *conv* per output position, between two bounds."""
    low = high = 1.0
    sizes = [facts.shape(t) for t in (conv.input, conv.output)]
    assert conv.pads is not None
    for axis in range(conv.spatial_rank):
        stride = conv.strides[axis]
        reach = (conv.kernel[axis] - 1) * conv.dilations[axis] + 1
        surplus = conv.pads[axis] + conv.pads[conv.spatial_rank + axis] - (reach - 1)
        before, behind = (s[axis + 2] if s is not None else None for s in sizes)
        if isinstance(before, int) and isinstance(behind, int) and behind > 0:
            low *= before / behind
            high *= before / behind
            continue
        # Of n input positions come floor((n - 1 + surplus) / stride) + 1 output ones, and n >= 1.
        low /= 1 + max(surplus, 0)
        high *= stride * (1 + max(-surplus, 0))
    return low, high


_BENDING = (
    "Abs",
    "Celu",
    "Clip",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "LRN",
    "LeakyRelu",
    "Max",
    "MaxPool",
    "Min",
    "Mish",
    "PRelu",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
)
"""Operators that are not linear, and so keep two convolutions from being one."""


def _bends(node: Node, facts: Facts) -> bool:
    """Whether *node* is what makes a Conv before it and one behind it more than one."""
    product = node.op == "Mul" and not any(facts.is_constant(t) for t in node.inputs)
    if not (product or facts.is_op(node, *_BENDING)):
        return False
    return any(facts.is_op(facts.producer(t), "Conv") for t in node.inputs)


def _bias(conv: ConvFacts, facts: Facts) -> Float64:
    values = facts.constant(conv.bias)
    return np.zeros(conv.cout) if values is None else values.astype(np.float64)


def _times(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(p * q for p, q in zip(a, b, strict=True))
