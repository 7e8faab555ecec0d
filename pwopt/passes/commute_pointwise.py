"""Move a pointwise convolution to the side of a pool or an upsampling with fewer positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, Shape, Tensor
from pwopt.passes._scale_factors import scale_factors
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["CommutePointwise", "CommutePointwiseMatch"]

Array = np.ndarray[Any, Any]

_POOLS = ("AveragePool", "GlobalAveragePool")
_UPSAMPLINGS = ("Resize", "Upsample")
_MODES = ("bilinear", "linear", "nearest")


@dataclass(frozen=True, eq=False)
class CommutePointwiseMatch(Match):
    """A pointwise Conv (the root) and the pool behind it or the upsampling before it.

    Attributes:
        partner: that node.
        is_behind: whether the partner reads the Conv.
        sizes: the partner's sizes input for the Conv's output channels, where it has one.
    """

    partner: Node
    is_behind: bool
    sizes: Array | None


@dataclass(frozen=True)
class CommutePointwise(Pass[CommutePointwiseMatch]):
    """Let a pointwise Conv work where there are fewer positions.

    Rewrites:
        ``Conv -> AveragePool`` and ``Conv -> GlobalAveragePool`` into the pool, then the Conv;
        ``Resize -> Conv`` and ``Upsample -> Conv`` (nearest or linear, by constant factors of at
        least 1) into the Conv, then the upsampling. The Conv has a kernel and strides of 1 and no
        pads, any groups, and weights of any origin.

    Algebra:
        Pooling by averages and interpolating are linear maps over positions, the same for every
        channel, and a pointwise Conv is one over channels, the same at every position: they
        commute. ``sum over p of a_p (W x_p + b) = W (sum of a_p x_p) + b``, as the coefficients
        a_p sum to one: in a window without padding, between neighbours, and for a copy.

    Declines when:
        neither stands next to the Conv; the Conv is not pointwise with unit strides and no pads;
        what lies between is a graph output or read elsewhere; the pool is padded (its border
        averages do not keep the bias), rounds its size up, or has pads that are not known; the
        upsampling is of another mode, crops or smooths, scales batch or channels, shrinks, or is
        not by constant factors (or constant sizes of a known shape); the multiply-accumulates
        of the two do not fall, or are not known to.

    Exactness:
        ROUNDING: the same products, summed in another order.

    When it pays:
        By MACs: a quarter of the Conv's behind a 2x2 pool or before a doubling. The transitions
        of DenseNet are 8 % of its MACs; decoders that upsample, then halve the channels, gained
        1.13 to 1.18 times per block. The pool or upsampling then works on the Conv's other side,
        with more or fewer channels, which is counted.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        WEIGHT_SHAPE_UNKNOWN = "weight-shape-unknown"
        NO_PARTNER = "no-pool-or-upsampling"
        NOT_POINTWISE = "not-pointwise"
        STRIDED = "strided"
        PADDED_CONV = "padded-conv"
        GRAPH_OUTPUT = "graph-output"
        OTHER_READERS = "other-readers"
        PADDED_POOL = "padded-pool"
        PADS_UNKNOWN = "pads-unknown"
        ROUNDS_UP = "rounds-up"
        MODE = "mode"
        FACTORS_UNKNOWN = "factors-unknown"
        NOT_UPSAMPLING = "not-upsampling"
        MORE_MACS = "more-macs"
        SIZE_UNKNOWN = "size-unknown"

    name: ClassVar[str] = "commute-pointwise"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> CommutePointwiseMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_SHAPE_UNKNOWN)
        behind = next((n for n in facts.consumers(conv.output) if facts.is_op(n, *_POOLS)), None)
        before = facts.producer(conv.input)
        if before is not None and not facts.is_op(before, *_UPSAMPLINGS):
            before = None
        if behind is None and before is None:
            return Decline(self.Why.NO_PARTNER)
        why = self._not_plain(conv)
        if why is not None:
            return Decline(why)
        declined: Decline | None = None
        if behind is not None:
            result = self._behind(conv, behind, facts)
            if not isinstance(result, Decline):
                return result
            declined = result
        if before is not None:
            return self._before(conv, before, facts)
        assert declined is not None
        return declined

    def _not_plain(self, conv: ConvFacts) -> Why | None:
        if not conv.is_pointwise:
            return self.Why.NOT_POINTWISE
        if not conv.is_unit_stride:
            return self.Why.STRIDED
        return None if conv.is_unpadded else self.Why.PADDED_CONV

    def _behind(self, conv: ConvFacts, pool: Node, facts: Facts) -> CommutePointwiseMatch | Decline:
        """The Conv and the pool that reads it."""
        if facts.is_output(conv.output):
            return Decline(self.Why.GRAPH_OUTPUT)
        if not facts.is_private(conv.output):
            return Decline(self.Why.OTHER_READERS)
        window = self._window(conv, pool, facts)
        if isinstance(window, self.Why):
            return Decline(window)
        taps, at_least, at_most = window
        outer = conv.cout * conv.cin // conv.group

        def saved(ratio: float) -> float:
            return outer * ratio + conv.cout * taps - outer - conv.cin * taps

        if saved(at_least) <= 0:
            rises = saved(at_most) <= 0
            return Decline(self.Why.MORE_MACS if rises else self.Why.SIZE_UNKNOWN)
        return CommutePointwiseMatch(
            conv.node,
            (conv.node, pool),
            pool,
            True,
            None,
            facts={"with": facts.site(pool), "positions": round(at_least, 2)},
        )

    def _window(
        self, conv: ConvFacts, pool: Node, facts: Facts
    ) -> tuple[float, float, float] | Why:
        """Taps per window, and input positions per output position between two bounds."""
        counts = [_positions(facts.shape(t)) for t in (conv.output, pool.outputs[0])]
        if pool.op == "GlobalAveragePool":
            # With sizes unknown there is no more to say than that there is one position.
            return (counts[0],) * 3 if counts[0] else self.Why.SIZE_UNKNOWN
        rank = conv.spatial_rank
        ones = (1,) * rank
        kernel = facts.attr_ints(pool, "kernel_shape", ones)
        strides = facts.attr_ints(pool, "strides", ones)
        dilations = facts.attr_ints(pool, "dilations", ones)
        if facts.attr_int(pool, "ceil_mode", 0):
            return self.Why.ROUNDS_UP
        pads = facts.window_pads(pool, kernel, strides, dilations)
        if pads is None:
            return self.Why.PADS_UNKNOWN
        if any(pads):
            return self.Why.PADDED_POOL
        taps = math.prod(kernel)
        if all(counts):
            return taps, counts[0] / counts[1], counts[0] / counts[1]
        # Of n = stride (m - 1) + reach + rest positions come m, with a rest below the stride, so
        # n / m is near the stride for many of them and reach + rest for one.
        reaches = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        axes = list(zip(reaches, strides, strict=True))
        low = math.prod(min(r, s) for r, s in axes)
        high = math.prod(r + s - 1 for r, s in axes)
        return taps, low, high

    def _before(
        self, conv: ConvFacts, upsampling: Node, facts: Facts
    ) -> CommutePointwiseMatch | Decline:
        """The Conv and the upsampling that it reads."""
        if facts.is_output(conv.input):
            return Decline(self.Why.GRAPH_OUTPUT)
        if not facts.is_private(conv.input):
            return Decline(self.Why.OTHER_READERS)
        mode = facts.attr_str(upsampling, "mode", "nearest")
        coordinates = facts.attr_str(upsampling, "coordinate_transformation_mode", "half_pixel")
        smooths = facts.attr_int(upsampling, "antialias", 0)
        if mode not in _MODES or coordinates == "tf_crop_and_resize" or smooths:
            return Decline(self.Why.MODE, {"mode": mode, "coordinates": coordinates})
        factors = scale_factors(upsampling, conv.spatial_rank + 2, facts)
        if factors is None:
            return Decline(self.Why.FACTORS_UNKNOWN)
        if factors[:2] != [1.0, 1.0] or min(factors) < 1 or max(factors) == 1:
            return Decline(self.Why.NOT_UPSAMPLING, {"factors": list(factors)})
        ratio = math.prod(factors)
        taps = 1 if mode == "nearest" else 2**conv.spatial_rank
        inner = conv.cout * conv.cin // conv.group
        if inner * (ratio - 1) + (conv.cin - conv.cout) * taps * ratio <= 0:
            return Decline(self.Why.MORE_MACS)
        return CommutePointwiseMatch(
            conv.node,
            (upsampling, conv.node),
            upsampling,
            False,
            _new_sizes(upsampling, conv, facts),
            facts={"with": facts.site(upsampling), "positions": round(ratio, 2)},
        )

    def rewrite(
        self,
        match: CommutePointwiseMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        first, second = (
            (match.partner, match.root) if match.is_behind else (match.root, match.partner)
        )
        # What comes second now came first: its data is the input, the other one's the output.
        source, output = second.inputs[0], first.outputs[0]
        operands = {id(n): list(n.inputs[1:]) for n in (first, second)}
        if match.sizes is not None:
            sizes = rewriter.constant(f"{output.name}/sizes", match.sizes)
            operands[id(match.partner)][-1] = sizes
        rewriter.remove(first)
        rewriter.remove(second)
        # Its positions are the fewer ones, its channels the partner's new ones.
        fewer = output if match.is_behind else source
        channels = source if match.is_behind else output
        space = len(match.root.inputs[1].shape) - 2
        shape = (*_dims(source, 0, 1), *_dims(channels, 1, 1), *_dims(fewer, 2, space))
        between = rewriter.variable(f"{output.name}/{first.op.lower()}", source, shape)
        for node, x, y in ((first, source, between), (second, between, output)):
            inputs = [x, *operands[id(node)]]
            rewriter.add(node.op, inputs, [y], dict(node.attrs), near=node)


def _positions(shape: Shape | None) -> int:
    """How many positions of space there are; 0 if that is not known."""
    sizes = [d for d in (shape or ())[2:] if isinstance(d, int)]
    return math.prod(sizes) if shape is not None and len(sizes) == len(shape) - 2 else 0


def _dims(tensor: Tensor, first: int, count: int) -> Shape:
    """Dimensions of *tensor* from *first* on, unknown ones if its shape is not known."""
    return (None,) * count if tensor.shape is None else tuple(tensor.shape[first : first + count])


def _new_sizes(node: Node, conv: ConvFacts, facts: Facts) -> Array | None:
    """The sizes input of a Resize, if it has one, with the channels of the Conv's output."""
    sizes = facts.constant(facts.input(node, 3)) if node.op == "Resize" else None
    if sizes is None:
        return None
    rank = conv.spatial_rank + 2
    places = [a % rank for a in facts.attr_ints(node, "axes", tuple(range(rank)))]
    changed = [conv.cout if a == 1 else int(s) for a, s in zip(places, sizes, strict=True)]
    return np.array(changed, sizes.dtype)
