"""Raise a parameter-free shortcut, rows and columns left out and channels added, to a Conv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.passes._strided_slices import Sampling, sampling
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["RaiseShortcut", "RaiseShortcutMatch"]


@dataclass(frozen=True, eq=False)
class RaiseShortcutMatch(Match):
    """A Pad of channels behind strided Slices.

    Attributes:
        source: what is sliced, ``[N, C, *spatial]``.
        channels: C.
        dtype: of the data.
        steps: per axis of space.
        added: channels of zeros before and behind.
    """

    source: Tensor
    channels: int
    dtype: np.dtype[Any]
    steps: tuple[int, ...]
    added: tuple[int, int]


@dataclass(frozen=True)
class RaiseShortcut(Pass[RaiseShortcutMatch]):
    """Raise Slice and Pad of a residual shortcut to a pointwise Conv.

    Rewrites:
        ``Slice`` of every n-th row and column (one or several), then ``Pad`` of the channels with
        zeros, into one ``Conv`` with a kernel of 1, the steps as strides and weights of 0 and 1.

    Algebra:
        The identity shortcut with extra zero channels (option A of He et al. 2015, section 4.1)
        is linear, alike at every pixel kept, so a pointwise convolution: ``W = [0; I; 0]``.
        ``x[::s]`` has ``ceil(n / s)`` positions, and a kernel of 1 with stride s and no pads
        has as many.

    Declines when:
        no strided Slice stands before; its first position is not the first one (an offset would
        take negative pads); the Pad pads other axes or cuts channels off, does not pad by a
        constant zero, or is not constant; what lies between is a graph output or read elsewhere
        (it would be computed anyway); the number of channels or dimensions is not known; the
        element type is neither float16 nor float32.

    Exactness:
        ROUNDING, and for finite numbers equal: products by 1 and sums with 0 are exact, but a
        ``-0.0`` may become ``0.0``. Where one channel of a pixel is NaN or Inf, all of them
        become NaN, since 0 times it is not 0.

    When it pays:
        ONNX Runtime's CPU provider keeps a residual Add, and every Relu and Add behind it, in
        its blocked layout only if both operands are there; Slice and Pad are not, so each block
        of the stage pays for reordering. Cheap convolutions repair the whole stage: 4 to 9 % on
        CIFAR ResNets with 20 and 56 layers. With hundreds of channels the zeros cost as much as
        the reordering (nothing gained on an 18-layer ImageNet ResNet), so measure.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NO_STRIDED_SLICE = "no-strided-slice"
        OFFSET = "offset"
        PADS_NOT_CONSTANT = "pads-not-constant"
        NOT_CHANNELS_ONLY = "not-channels-only"
        NOT_ZEROS = "not-zeros"
        GRAPH_OUTPUT = "graph-output"
        OTHER_READERS = "other-readers"
        SHAPE_UNKNOWN = "shape-unknown"
        ELEMENT_TYPE = "element-type"

    name: ClassVar[str] = "raise-shortcut"
    roots: ClassVar[tuple[str, ...]] = ("Pad",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> RaiseShortcutMatch | Decline:
        """See the class."""
        data = node.inputs[0]
        if not facts.is_op(facts.producer(data), "Slice"):
            return Decline(self.Why.NO_STRIDED_SLICE)
        rank, channels = facts.rank(data), facts.channels(data)
        if rank is None or rank < 3 or not channels:
            return Decline(self.Why.SHAPE_UNKNOWN)
        found = sampling(data, rank, facts)
        if max(found.steps) == 1:
            return Decline(self.Why.NO_STRIDED_SLICE)
        if any(found.offsets):
            return Decline(self.Why.OFFSET, {"offsets": list(found.offsets)})
        dtype = facts.dtype(data)
        if dtype not in (np.dtype(np.float16), np.dtype(np.float32)) or dtype is None:
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(dtype)})
        seen = self._seen(found, facts)
        if seen is not None:
            return Decline(seen)
        added = self._added(node, rank, facts)
        if isinstance(added, self.Why):
            return Decline(added)
        return RaiseShortcutMatch(
            node,
            (*found.nodes, node),
            found.source,
            channels,
            dtype,
            found.steps,
            added,
            facts={"steps": list(found.steps), "channels": channels, "added": sum(added)},
        )

    def _seen(self, found: Sampling, facts: Facts) -> Why | None:
        """Who else sees what lies between, if anybody does."""
        for between in (n.outputs[0] for n in found.nodes):
            if facts.is_output(between):
                return self.Why.GRAPH_OUTPUT
            if not facts.is_private(between):
                return self.Why.OTHER_READERS
        return None

    def _added(self, node: Node, rank: int, facts: Facts) -> tuple[int, int] | Why:
        """Channels of zeros before and behind."""
        pads = _pads(node, rank, facts)
        if pads is None:
            return self.Why.PADS_NOT_CONSTANT
        before, behind = pads[1], pads[rank + 1]
        if sum(map(abs, pads)) != before + behind or min(before, behind) < 0:
            return self.Why.NOT_CHANNELS_ONLY
        if facts.attr_str(node, "mode", "constant") != "constant" or not _is_zero(node, facts):
            return self.Why.NOT_ZEROS
        return before, behind

    def rewrite(
        self,
        match: RaiseShortcutMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        node, space = match.root, len(match.steps)
        output = node.outputs[0]
        before, behind = match.added
        for old in reversed(match.nodes):
            rewriter.remove(old)
        rows = before + match.channels + behind
        identity = np.eye(rows, match.channels, -before, match.dtype)
        weight = rewriter.constant(
            f"{output.name}/shortcut", identity.reshape(*identity.shape, *(1,) * space)
        )
        attributes: dict[str, int | list[int]] = {
            "dilations": [1] * space,
            "group": 1,
            "kernel_shape": [1] * space,
            "pads": [0] * (2 * space),
            "strides": list(match.steps),
        }
        rewriter.add("Conv", [match.source, weight], [output], attributes, near=node)


def _pads(node: Node, rank: int, facts: Facts) -> tuple[int, ...] | None:
    """The pads of all axes, begins first."""
    if facts.opset < 11:
        return facts.attr_ints(node, "pads", (0,) * (2 * rank))
    values, axes = (facts.constant(facts.input(node, index)) for index in (1, 3))
    if values is None or (axes is None and facts.input(node, 3) is not None):
        return None
    given = [int(v) for v in values]
    places = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    return (
        *_spread(given[: len(places)], places, rank),
        *_spread(given[len(places) :], places, rank),
    )


def _spread(values: Sequence[int], places: Sequence[int], rank: int) -> list[int]:
    spread = [0] * rank
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def _is_zero(node: Node, facts: Facts) -> bool:
    if facts.opset < 11:
        return facts.attr_float(node, "value", 0.0) == 0.0
    value = facts.input(node, 2)
    return value is None or facts.scalar(value) == 0.0
