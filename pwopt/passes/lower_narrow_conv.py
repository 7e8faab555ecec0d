"""Lower a convolution with few output channels to a strided one with a block of pixels each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np

from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor, ValuesView
from pwopt.numerics.sub_pixel import packed_weight
from pwopt.passes._emitter import Attributes, Emitter
from pwopt.passes._interleave import Arrangement, activation_behind, arrangements, interleave
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerNarrowConv", "LowerNarrowConvMatch"]

_WIDTHS = (8, 16)
"""Channels that a vector of the blocked layout holds, by machine."""

_MOST_CHANNELS = 8
"""A Conv with more fills the narrower vectors."""

_BLOCKS = ((2, 1), (4, 1), (2, 2), (4, 2), (4, 4))
"""Rows and columns of pixels that may become channels."""

_WORTH = 0.9
"""What a block may cost at most, in vectors of products, next to the Conv as it is."""


@dataclass(frozen=True, eq=False)
class LowerNarrowConvMatch(Match):
    """A Conv with few output channels, and the activation that is its only reader.

    Attributes:
        size: output height and width, where they are known; else they are the input's.
        ways: block and arrangement by variant.
    """

    conv: ConvFacts
    weight: ValuesView
    bias: ValuesView | None
    size: tuple[int | None, int | None]
    activation: Node | None
    ways: dict[Variant, tuple[tuple[int, int], Arrangement]]


@dataclass(frozen=True)
class LowerNarrowConv(Pass[LowerNarrowConvMatch]):
    """Lower a Conv with few output channels to a strided Conv that computes blocks of pixels.

    Rewrites:
        ``Conv`` with at most 8 output channels into a ``Conv`` with sh sw times as many, strides
        (sh, sw) times its own, and kernels larger by (sh - 1, sw - 1) strides; then
        ``DepthToSpace`` or Reshapes and ``Transpose`` put the pixels of each block into place, and
        ``Slice`` cuts what the last blocks have too many. An activation that is the only reader
        moves to the Conv. Variants are the blocks and the rearrangements.

    Algebra:
        The output ``s q + r`` reads inputs ``s q + r + k``. Shifted by r within a kernel of size
        ``K + s - 1``, the same weights compute it at position q of a Conv with stride s: the
        sub-pixel convolution of Shi et al. 2016 ("Real-Time Single Image and Video
        Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network"), whose
        kernels here are copies of one.

    Declines when:
        there are not two spatial axes; the Conv is pointwise, grouped or dilated, or has more than
        8 output channels; weight or bias are not constant; the type is no float; the pads are not
        known; a size is not known, unless it is the input's (as of a padded Conv with unit
        stride; with opset 10); no block of pixels is cheaper or fits the image.

    Exactness:
        ROUNDING: the same products and zeros, summed in another order.

    When it pays:
        ONNX Runtime's CPU provider computes 8 or 16 channels in one vector, however few there
        are; with 3 of 16 used, a block of 2x2 pixels has 1.2 times the products of a 9x9 kernel
        in a quarter of the vectors. 2.9 times on the last convolution of a style transfer net
        (9x9, 16 to 3 channels), 1.2 to 2 times on 3x3 ones.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NOT_TWO_DIMENSIONAL = "not-two-dimensional"
        POINTWISE = "pointwise"
        GROUPED = "grouped"
        DILATED = "dilated"
        MANY_CHANNELS = "many-channels"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        BIAS_NOT_CONSTANT = "bias-not-constant"
        ELEMENT_TYPE = "element-type"
        PADS_UNKNOWN = "pads-unknown"
        SIZE_UNKNOWN = "size-unknown"
        NO_BLOCK = "no-block"

    name: ClassVar[str] = "lower-narrow-conv"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> LowerNarrowConvMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        refusal = self._not_suited(conv)
        if refusal is not None:
            return refusal
        weight, bias = facts.constant(conv.weight), facts.constant(conv.bias)
        if weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.bias is not None and bias is None:
            return Decline(self.Why.BIAS_NOT_CONSTANT)
        if not facts.is_float(conv.weight):
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(facts.dtype(conv.weight))})
        if conv.pads is None:
            return Decline(self.Why.PADS_UNKNOWN)
        size = _output_size(conv, facts)
        if size is None:
            return Decline(self.Why.SIZE_UNKNOWN)
        ways = _ways(conv, size)
        if not ways:
            return Decline(self.Why.NO_BLOCK, {"kernel": list(conv.kernel), "size": list(size)})
        activation = activation_behind(conv.output, facts)
        return LowerNarrowConvMatch(
            node,
            (node,) if activation is None else (node, activation),
            conv,
            weight,
            bias,
            size,
            activation,
            ways,
            facts={"cin": conv.cin, "cout": conv.cout, "kernel": list(conv.kernel)},
        )

    def _not_suited(self, conv: ConvFacts) -> Decline | None:
        why = self.Why
        if conv.spatial_rank != 2:
            return Decline(why.NOT_TWO_DIMENSIONAL, {"axes": conv.spatial_rank})
        if conv.is_pointwise:
            return Decline(why.POINTWISE)
        if conv.group != 1:
            return Decline(why.GROUPED, {"group": conv.group})
        if any(d > 1 and k > 1 for d, k in zip(conv.dilations, conv.kernel, strict=True)):
            return Decline(why.DILATED, {"dilations": list(conv.dilations)})
        if conv.cout > _MOST_CHANNELS:
            return Decline(why.MANY_CHANNELS, {"cout": conv.cout, "most": _MOST_CHANNELS})
        return None

    def variants(self, match: LowerNarrowConvMatch) -> tuple[Variant, ...]:
        """The cheaper blocks first."""
        return tuple(match.ways)

    def rewrite(self, match: LowerNarrowConvMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        conv, activation = match.conv, match.activation
        steps, arrangement = match.ways[variant]
        result = conv.output if activation is None else activation.outputs[0]
        rewriter.remove(conv.node)
        if activation is not None:
            rewriter.remove(activation)
        emitter = Emitter(rewriter, conv.node, conv.weight, conv.output.name)
        surplus = [-(size or 0) % s for size, s in zip(match.size, steps, strict=True)]
        y = _strided(match, emitter, steps, surplus)
        if activation is not None:
            y = emitter.again(activation, y)
        y = interleave(emitter, y, steps, arrangement, surplus)
        unknown = [a for a, size in enumerate(match.size) if size is None and steps[a] > 1]
        if unknown:
            _cut_to(conv.input, y, unknown, emitter)
        emitter.finish(result)


def _output_size(conv: ConvFacts, facts: Facts) -> tuple[int | None, int | None] | None:
    """Height and width; ``None`` for one that equals the input's, or for all if one is unknown."""
    assert conv.pads is not None
    shape = facts.shape(conv.input)
    dims: tuple[Dim, ...] = (None, None) if shape is None or len(shape) != 4 else shape[2:]
    found: list[int | None] = []
    for axis, dim in enumerate(dims):
        kernel, stride = conv.kernel[axis], conv.strides[axis]
        slack = conv.pads[axis] + conv.pads[axis + 2] - kernel
        if isinstance(dim, int):
            found.append((dim + slack) // stride + 1)
        elif stride == 1 and slack == -1 and facts.has_op("Slice", since=10):
            found.append(None)
        else:
            return None
    return found[0], found[1]


def _ways(
    conv: ConvFacts, size: tuple[int | None, int | None]
) -> dict[Variant, tuple[tuple[int, int], Arrangement]]:
    """Per width of vectors the two cheapest blocks, by all rearrangements."""
    forms = {
        # Few channels make short runs of memory.
        block: [f for f in arrangements(block, size[1]) if f is not Arrangement.CHANNELS_LAST]
        for block in _BLOCKS
    }
    fitting = [
        block
        for block in _BLOCKS
        if forms[block]
        and math.prod(block) * conv.cout > _MOST_CHANNELS
        and all(n is None or s <= n for s, n in zip(block, size, strict=True))
    ]
    chosen: dict[tuple[int, int], None] = {}
    for width in reversed(_WIDTHS):
        costs = {block: _cost(conv, block, width) for block in fitting}
        worth = [b for b in fitting if costs[b] <= _WORTH * _cost(conv, (1, 1), width)]
        chosen.update(dict.fromkeys(sorted(worth, key=costs.__getitem__)[:2]))
    return {
        Variant(f"{block[0]}x{block[1]}-{form.value}"): (block, form)
        for block in chosen
        for form in forms[block]
    }


def _cost(conv: ConvFacts, block: tuple[int, int], width: int) -> float:
    """Vectors of products per output pixel and input channel."""
    pixels = math.prod(block)
    return math.prod(_kernel(conv, block)) * math.ceil(pixels * conv.cout / width) / pixels


def _kernel(conv: ConvFacts, block: tuple[int, int]) -> list[int]:
    axes = zip(conv.kernel, block, conv.strides, strict=True)
    return [k + t * (s - 1) for k, s, t in axes]


def _strided(
    match: LowerNarrowConvMatch, emitter: Emitter, steps: tuple[int, int], surplus: list[int]
) -> Tensor:
    """The Conv whose channels are the pixels of a block: ``[N, sh * sw * Cout, H, W]``."""
    conv, name = match.conv, match.conv.output.name
    assert conv.pads is not None
    weight = packed_weight(match.weight, steps, conv.strides)
    operands = [conv.input, emitter.rewriter.constant(f"{name}/weight", weight)]
    if match.bias is not None:
        bias = np.tile(match.bias, math.prod(steps))
        operands.append(emitter.rewriter.constant(f"{name}/bias", bias))
    # Of a size that is not known, any rest may have to be filled up.
    more = [s - 1 if n is None else c for s, n, c in zip(steps, match.size, surplus, strict=True)]
    ends = [p + t * c for p, t, c in zip(conv.pads[2:], conv.strides, more, strict=True)]
    attributes: Attributes = {
        "kernel_shape": list(weight.shape[2:]),
        "pads": [*conv.pads[:2], *ends],
        "strides": [t * s for t, s in zip(conv.strides, steps, strict=True)],
    }
    batch = (emitter.facts.shape(conv.input) or (None,))[0]
    size = [None if n is None else -(-n // s) for n, s in zip(match.size, steps, strict=True)]
    return emitter.emit("Conv", operands, (batch, len(weight), *size), attributes)


def _cut_to(source: Tensor, y: Tensor, axes: list[int], emitter: Emitter) -> Tensor:
    """*y* without what it has more than *source* along *axes* of space."""
    places = [axis + 2 for axis in axes]
    index = emitter.integers("axes", places)
    sizes = emitter.emit("Shape", [source], (4,), like=index)
    ends = emitter.emit("Gather", [sizes, index], (len(places),), {"axis": 0}, like=index)
    starts = emitter.integers("starts", [0] * len(places))
    shape = emitter.facts.shape(source) or (None,) * 4
    known = [shape[a] if a in places else d for a, d in enumerate(y.shape)]
    return emitter.emit("Slice", [y, starts, ends, index], known)
