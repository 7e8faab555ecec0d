"""Merge the groups of a convolution into fewer, wider ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import ConvFacts, Facts, Node, Rewriter
from pwopt.numerics import channel_algebra
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["MergeGroups", "MergeGroupsMatch"]

Array = np.ndarray[Any, Any]

_WIDTHS = (16, 8, 32)
"""Channels per group to arrive at, as variants; the one that suits most machines first."""
_MOST = 16
"""What weights, and so multiply-accumulates, may be multiplied by."""


@dataclass(frozen=True, eq=False)
class MergeGroupsMatch(Match):
    """A grouped convolution, and by variant the number of groups it could have."""

    conv: ConvFacts
    ways: Mapping[str, int]


@dataclass(frozen=True)
class MergeGroups(Pass[MergeGroupsMatch]):
    """Merge groups of few channels into wider groups with block-diagonal weights.

    Rewrites:
        ``Conv(group=g)`` into ``Conv(group=g/f)``, where every f groups become one whose weights
        are zero between them. The variants ``16-wide``, ``8-wide`` and ``32-wide`` merge as few
        groups as make the channels per group, in and out, a multiple of that; where no number of
        groups does, all of them.

    Algebra:
        A grouped convolution is a dense one with block-diagonal weights, and blocks along the
        diagonal can be fenced in together: ``diag(A, B, C, D) = diag(diag(A, B), diag(C, D))``.

    Declines when:
        the Conv has one group, or is depthwise; weights are not constant floats; groups have 16
        channels or more, in and out, or are merged already (zeros stand between parts of every
        group); there would be more than 16 times the multiply-accumulates.

    Exactness:
        ROUNDING. Sums get addends of zero.

    When it pays:
        ONNX Runtime's CPU provider keeps a grouped convolution in its blocked layout only if each
        group has a multiple of the block (8 or 16) of channels, in and out; else every group is a
        small matrix product of its own, behind a copy of its patches. ResNeXt-50 has 4 channels per
        group at first, then 8: 1.1 times faster as a whole. The file grows as the weights do.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        ONE_GROUP = "one-group"
        DEPTHWISE = "depthwise"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        NOT_FLOAT = "not-float"
        WIDE_ENOUGH = "wide-enough"
        MERGED = "merged"
        MORE_MACS = "more-macs"

    name: ClassVar[str] = "merge-groups"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> MergeGroupsMatch | Decline:
        """See the class."""
        if facts.attr_int(node, "group", 1) == 1:
            return Decline(self.Why.ONE_GROUP)
        conv = facts.conv(node)
        weight = None if conv is None else facts.constant(conv.weight)
        if conv is None or weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.is_depthwise:
            return Decline(self.Why.DEPTHWISE)
        if not facts.is_float(conv.weight):
            return Decline(self.Why.NOT_FLOAT)
        figures: dict[str, Fact] = {
            "groups": conv.group,
            "width": (conv.cin // conv.group, conv.cout // conv.group),
        }
        factors = {f"{width}-wide": _factor(conv, width) for width in _WIDTHS}
        if _factor(conv, _WIDTHS[0]) == 1:
            return Decline(self.Why.WIDE_ENOUGH, figures)
        if _is_merged(weight, conv.group):
            return Decline(self.Why.MERGED, figures)
        ways: dict[str, int] = {}
        for name, factor in factors.items():
            if 1 < factor <= _MOST and conv.group // factor not in ways.values():
                ways[name] = conv.group // factor
        if not ways:
            return Decline(
                self.Why.MORE_MACS, {**figures, "times": min(f for f in factors.values() if f > 1)}
            )
        return MergeGroupsMatch(node, (node,), conv, ways, facts=figures)

    def variants(self, match: MergeGroupsMatch) -> tuple[Variant, ...]:
        """The width that suits most machines first."""
        return tuple(Variant(name) for name in match.ways)

    def rewrite(self, match: MergeGroupsMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        to = match.ways[variant.name]
        weight = Facts(rewriter.model).constant(match.conv.weight)
        assert weight is not None
        merged = channel_algebra.regroup(weight, match.conv.group, to)
        rewriter.set_weight(match.root, 1, merged.astype(weight.dtype))
        rewriter.set_attribute(match.root, "group", to)


def _factor(conv: ConvFacts, width: int) -> int:
    """How many groups to merge so that each has a multiple of *width* channels.

    Groups of more channels than that are wide enough: a matrix product each.
    """
    widths = (conv.cin // conv.group, conv.cout // conv.group)
    if min(widths) >= width:
        return 1
    fitting = (f for f in _divisors(conv.group) if all(w * f % width == 0 for w in widths))
    return next(fitting, conv.group)


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(1, number + 1) if number % d == 0)


def _is_merged(weight: Array, group: int) -> bool:
    """Whether every group falls into parts between which all weights are zero."""
    rows, columns = weight.shape[0] // group, weight.shape[1]
    blocks = weight.reshape(group, rows, columns, -1).any(axis=3)
    for parts in _divisors(np.gcd(rows, columns)):
        if parts == 1:
            continue
        fences = np.kron(
            np.eye(parts, dtype=bool), np.ones((rows // parts, columns // parts), bool)
        )
        if not (blocks & ~fences).any():
            return True
    return False
