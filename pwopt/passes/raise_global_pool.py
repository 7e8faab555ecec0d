"""Raise a mean over all pixels to the pool that it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter
from pwopt.passes._emitter import Emitter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["RaiseGlobalPool", "RaiseGlobalPoolMatch"]

_RANKS = (4, 5)
_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


@dataclass(frozen=True, eq=False)
class RaiseGlobalPoolMatch(Match):
    """A mean over the axes of space.

    Attributes:
        keeps: whether the result has these axes still, with size 1.
    """

    keeps: bool


@dataclass(frozen=True)
class RaiseGlobalPool(Pass[RaiseGlobalPoolMatch]):
    """Raise ReduceMean over height and width to GlobalAveragePool.

    Rewrites:
        ``ReduceMean`` over all axes of space of ``[N, C, H, W]`` or ``[N, C, D, H, W]``, as
        exporters write a mean over pixels in classifiers and squeeze-excite blocks, into
        ``GlobalAveragePool``, with a ``Flatten`` behind it where the axes go.

    Algebra:
        Both are the mean over the pixels of a channel (Lin et al. 2013, section 3.2).

    Declines when:
        the axes are not constant, or others than those of space; there are fewer than two of
        space (a mean over the last of three axes belongs to a normalization more often than to a
        pool) or more than three; the element type is neither float16 nor float32.

    Exactness:
        ROUNDING: the order of a sum.

    When it pays:
        ONNX Runtime's CPU provider pools in its blocked layout and takes means outside of it, so
        the features are reordered for every mean. The other passes know pools: a Conv moves behind
        one, and lower-gate leaves nothing of a block outside of the layout where its pool is one.
        By itself it is within the noise on EfficientNet-B0 and MobileNetV3-Large written with
        means; together with lower-gate it gains 3%, where lower-gate alone gains nothing.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        AXES_NOT_CONSTANT = "axes-not-constant"
        NOT_OVER_SPACE = "not-over-space"
        RANK = "rank"
        ELEMENT_TYPE = "element-type"

    name: ClassVar[str] = "raise-global-pool"
    roots: ClassVar[tuple[str, ...]] = ("ReduceMean",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> RaiseGlobalPoolMatch | Decline:
        """See the class."""
        data = node.inputs[0]
        rank, dtype = facts.rank(data), facts.dtype(data)
        if rank not in _RANKS or rank is None:
            return Decline(self.Why.RANK, {"rank": rank})
        given = facts.input(node, 1)
        axes = facts.constant(given)
        if given is not None and axes is None:
            return Decline(self.Why.AXES_NOT_CONSTANT)
        found = facts.attr_ints(node, "axes", ()) if axes is None else axes.reshape(-1)
        normal = sorted(int(axis) % rank for axis in found)
        if normal != list(range(2, rank)):
            return Decline(self.Why.NOT_OVER_SPACE, {"axes": [*normal]})
        if dtype is None or dtype not in _DTYPES:
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(dtype)})
        keeps = bool(facts.attr_int(node, "keepdims", 1))
        return RaiseGlobalPoolMatch(node, (node,), keeps, facts={"keepdims": keeps})

    def rewrite(
        self,
        match: RaiseGlobalPoolMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        node = match.root
        data, output = node.inputs[0], node.outputs[0]
        rewriter.remove(node)
        emitter = Emitter(rewriter, node, data, output.name)
        shape = emitter.facts.shape(data) or ()
        y = emitter.emit("GlobalAveragePool", [data], (*shape[:2], *(1 for _ in shape[2:])))
        if not match.keeps:
            emitter.emit("Flatten", [y], shape[:2], {"axis": 1})
        emitter.finish(output)
