"""Lower a convolution on disjoint patches to a rearrangement and a pointwise convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, ValuesView
from pwopt.passes._emitter import Attributes, Emitter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerPatchify", "LowerPatchifyMatch"]

_SPACE_TO_DEPTH = Variant("space-to-depth")
_CHANNELS_LAST = Variant("channels-last")


@dataclass(frozen=True, eq=False)
class LowerPatchifyMatch(Match):
    """A Conv whose kernel is its stride.

    Attributes:
        grid: rows and columns of patches.
    """

    conv: ConvFacts
    weight: ValuesView
    grid: tuple[int, int]


@dataclass(frozen=True)
class LowerPatchify(Pass[LowerPatchifyMatch]):
    """Lower a Conv whose kernel is as large as its stride to patches and a pointwise Conv.

    Rewrites:
        ``Conv`` with ``kernel_shape`` equal to ``strides`` and no pads into a pointwise ``Conv`` on
        patches, each of which becomes one pixel with all its values as channels. The patches are
        made by ``SpaceToDepth`` (*space-to-depth*, for square ones), or by Reshapes and
        Transposes that move runs of channels (*channels-last*).

    Algebra:
        With kernel = stride no two outputs read the same input, so the sum over taps and channels
        is one over the channels of the patch (the patch embedding of Dosovitskiy et al. 2021; the
        inverse of what compose-space-to-depth does).

    Declines when:
        there are not two spatial axes; the kernel is 1x1 or differs from the stride; the Conv is
        grouped, dilated or padded, or its pads are not known; the weight is not constant; height
        or width are not known, or leave a rest that belongs to no patch.

    Exactness:
        ROUNDING: the same products, summed in another order.

    When it pays:
        Seldom on CPUs: ONNX Runtime's blocked layout convolves patches well, and the rearrangement
        leaves it. 0.4 to 1.0 times on the stems and downsampling layers of ConvNeXt and ViT, up to
        1.1 times with a thousand channels on few pixels. It hands such layers to passes and
        providers that want matrix products, so it is off by default.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NOT_TWO_DIMENSIONAL = "not-two-dimensional"
        NO_PATCHES = "no-patches"
        GROUPED = "grouped"
        DILATED = "dilated"
        PADDED = "padded"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        SIZE_UNKNOWN = "size-unknown"
        REST = "rest"

    name: ClassVar[str] = "lower-patchify"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    by_default: ClassVar[bool] = False

    def match(self, node: Node, facts: Facts) -> LowerPatchifyMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        weight = None if conv is None else facts.constant(conv.weight)
        if conv is None or weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.spatial_rank != 2:
            return Decline(self.Why.NOT_TWO_DIMENSIONAL, {"axes": conv.spatial_rank})
        if conv.is_pointwise or conv.kernel != conv.strides:
            geometry = {"kernel": conv.kernel, "strides": conv.strides}
            return Decline(self.Why.NO_PATCHES, geometry)
        if conv.group != 1:
            return Decline(self.Why.GROUPED, {"group": conv.group})
        if any(d > 1 and k > 1 for d, k in zip(conv.dilations, conv.kernel, strict=True)):
            return Decline(self.Why.DILATED, {"dilations": list(conv.dilations)})
        if not conv.is_unpadded:
            return Decline(self.Why.PADDED)
        shape = facts.shape(conv.input)
        size = [d for d in (shape or ())[2:] if isinstance(d, int)]
        if len(size) != 2:
            return Decline(self.Why.SIZE_UNKNOWN)
        if any(n % k for n, k in zip(size, conv.kernel, strict=True)):
            return Decline(self.Why.REST, {"size": [*size], "kernel": conv.kernel})
        grid = size[0] // conv.kernel[0], size[1] // conv.kernel[1]
        return LowerPatchifyMatch(
            node,
            (node,),
            conv,
            weight,
            grid,
            facts={"cin": conv.cin, "cout": conv.cout, "kernel": conv.kernel},
        )

    def variants(self, match: LowerPatchifyMatch) -> tuple[Variant, ...]:
        """SpaceToDepth, which knows square patches only, comes first."""
        rows, columns = match.conv.kernel
        return (_SPACE_TO_DEPTH, _CHANNELS_LAST) if rows == columns else (_CHANNELS_LAST,)

    def rewrite(self, match: LowerPatchifyMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        conv, (height, width) = match.conv, match.grid
        rows, columns = conv.kernel
        rewriter.remove(conv.node)
        emitter = Emitter(rewriter, conv.node, conv.weight, conv.output.name)
        batch = (emitter.facts.shape(conv.input) or (None,))[0]
        depth = math.prod(conv.kernel) * conv.cin
        if variant == _SPACE_TO_DEPTH:
            shape = (batch, depth, height, width)
            y = emitter.emit("SpaceToDepth", [conv.input], shape, {"blocksize": rows})
        else:
            y = emitter.transpose(conv.input, 0, 2, 3, 1)
            split = (height, rows, width, columns * conv.cin)
            y = emitter.reshape(y, (0, *split), (batch, *split))
            y = emitter.transpose(y, 0, 1, 3, 2, 4)
            pixels = (height, width, depth)
            y = emitter.reshape(y, (0, *pixels), (batch, *pixels))
            y = emitter.transpose(y, 0, 3, 1, 2)
        # Channels of a patch: its pixels row by row, each with all channels.
        weight = match.weight.transpose(0, 2, 3, 1).reshape(conv.cout, depth, 1, 1)
        values = rewriter.constant(f"{conv.output.name}/weight", weight.copy())
        attributes: Attributes = {"kernel_shape": [1, 1]}
        operands = [y, values, *conv.node.inputs[2:]]
        emitter.emit("Conv", operands, (batch, conv.cout, height, width), attributes)
        emitter.finish(conv.output)
