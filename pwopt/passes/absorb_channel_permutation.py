"""Let weights do what channel shuffles, splits and gathers do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.passes._channel_class import carrier, channel_class
from pwopt.passes._channel_paths import Plan, Region
from pwopt.passes._channel_routes import Route, Routes
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["AbsorbChannelPermutation", "AbsorbChannelPermutationMatch"]

_BLOCKS = {"blocks-of-16": 16, "blocks-of-8": 8, "as-they-come": 1}
"""Variants: what numbers of channels are filled up to a multiple of."""
_BEHIND = "behind"
_GROWTH = 1.5
"""What weights, and so multiply-accumulates, may grow by."""


@dataclass(frozen=True, eq=False)
class _Step:
    """Operators that a permutation moves behind, since they leave fewer elements.

    Attributes:
        route: the permutation.
        nodes: the operators, in order; the last one makes the tensor smaller.
    """

    route: Route
    nodes: tuple[Node, ...]

    @property
    def around(self) -> tuple[Tensor, ...]:
        """What other routes may lie beyond."""
        return self.route.inputs

    def apply(self, rewriter: Rewriter) -> None:
        """Let the operators work on what the permutation reads."""
        facts = Facts(rewriter.model)
        order = self.route.permutation
        assert order is not None
        back = tuple(int(i) for i in np.argsort(order))
        data, permuted = self.route.inputs[0], self.route.outputs[0]
        result = self.nodes[-1].outputs[0]
        for node in self.nodes:
            works = carrier(node, len(order), facts)
            assert works is not None
            for constant in works.constants:
                values = facts.constant(node.inputs[constant.index])
                assert values is not None
                rewriter.set_weight(node, constant.index, constant.taken(values, back))
        for node in self.route.nodes:
            rewriter.remove(node)
        rewriter.redirect(permuted, data)
        inner = rewriter.variable(f"{result.name}/unpermuted", like=result)
        rewriter.set_output(self.nodes[-1], 0, inner)
        indices = rewriter.constant(f"{result.name}/channels", np.array(order, np.int64))
        rewriter.add("Gather", [inner, indices], [result], {"axis": 1}, near=self.nodes[-1])


@dataclass(frozen=True, eq=False)
class AbsorbChannelPermutationMatch(Match):
    """Routes of channels, and how to do without them, by variant."""

    ways: Mapping[str, Plan | _Step]


@dataclass(frozen=True)
class AbsorbChannelPermutation(Pass[AbsorbChannelPermutationMatch]):
    """Let weights do what channel shuffles, splits, slices and gathers do.

    Rewrites:
        Concat, Split, Slice and Gather along the channel axis, and shuffles written as Reshape,
        Transpose, Reshape (with or without a selection behind them), are traced back to the
        tensors that channels come from and on to those that read them. A convolution whose
        channels go different ways becomes several, one for each way. Behind it, readers get a
        Concat of those, and the weights that read it get their columns in its order, zero where
        the Concat holds channels that they do not read. Where a permutation has no other side than
        an operator that needs its order, the rows of the convolution before it change places, and
        if a reader needs an order that no Concat of such pieces has, one Gather is left for it.

        A permutation that has to stay between two grouped convolutions moves behind a depthwise
        convolution or pool with a stride, as a Gather, where it has fewer elements to move.

        Pieces are filled with zero rows up to a multiple of 16 (variant ``blocks-of-16``), of 8
        (``blocks-of-8``), or not (``as-they-come``); very small ones are read together.

    Algebra:
        A selection of channels is a matrix S with a single one per row: ``S (W x + b) = (S W) x +
        S b``, and ``W (S x) = (W S) x``. What works channel by channel (activations, depthwise
        convolutions, pools, constants per channel) commutes with S if its constants are selected
        too. ``Concat(W1 x, W2 x) = [W1; W2] x``, read from right to left, cuts a convolution by
        its rows. ShuffleNet (Zhang et al. 2018; Ma et al. 2018) mixes by such selections.

    Declines when:
        the node moves something else than channels, or sizes are not known; another node of the
        same region stands for it, the first in the file; operators around the
        region need at least as many orders that no Concat of pieces has as there are routes now
        (grouped convolutions, sums of differently permuted values, graph outputs); weights would
        grow by more than half, which happens where a convolution would read much that it has no
        use for; the region has more than 200 routes.

    Exactness:
        ROUNDING. Weights are only moved; sums are taken in another order, with zeros in between.

    When it pays:
        ONNX Runtime's CPU provider leaves its blocked layout to move channels, and each move is a
        pass over memory. It pays where what stands between has whole blocks of channels, which
        align-channels sees to: ShuffleNet v2 is 1.2 times faster with that pass, 1.25 to 1.3 times
        with both; ShuffleNet v1, where permutations only move behind strides, 1.03 with this one
        and 1.15 with both.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NOT_CHANNELS = "not-channels"
        LED_BY_ANOTHER = "led-by-another"
        ORDER_NEEDED = "order-needed"
        MORE_MACS = "more-macs"
        TOO_LARGE = "too-large"

    name: ClassVar[str] = "absorb-channel-permutation"
    roots: ClassVar[tuple[str, ...]] = ("Gather", "Slice", "Split", "Transpose")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> AbsorbChannelPermutationMatch | Decline:
        """See the class."""
        routes = Routes(facts)
        route = routes.at(node)
        if route is None:
            return Decline(self.Why.NOT_CHANNELS)
        region = Region(route, routes, facts)
        if region.is_too_large:
            return Decline(self.Why.TOO_LARGE, {"routes": len(region.routes)})
        plans = {name: region.plan(block) for name, block in _BLOCKS.items()}
        plain = plans["as-they-come"]
        if plain.movers >= region.movers:
            step = _shrinking(route, facts)
            if step is None:
                return Decline(self.Why.ORDER_NEEDED, {"by": plain.kept_by})
            nodes = (node, *(n for n in (*route.nodes, *step.nodes) if n is not node))
            return AbsorbChannelPermutationMatch(
                node, nodes, {_BEHIND: step}, facts={"behind": [n.op for n in step.nodes]}
            )
        leader = min((n for n in region.nodes if facts.is_op(n, *self.roots)), key=facts.position)
        if leader is not node:
            return Decline(self.Why.LED_BY_ANOTHER, {"by": facts.site(leader)})
        return self._absorb(node, region, plans)

    def _absorb(
        self, node: Node, region: Region, plans: Mapping[str, Plan]
    ) -> AbsorbChannelPermutationMatch | Decline:
        ways: dict[str, Plan | _Step] = {}
        before = after = 0
        for name, plan in plans.items():
            before, after = plan.weights()
            is_new = not any(isinstance(p, Plan) and p.pieces == plan.pieces for p in ways.values())
            if after <= _GROWTH * before and is_new:
                ways[name] = plan
        if not ways:
            return Decline(self.Why.MORE_MACS, {"weights": (before, after)})
        plan = plans["as-they-come"]
        figures: dict[str, Fact] = {
            "routes": (region.movers, plan.movers),
            "more_convolutions": plan.convs,
        }
        nodes = (node, *(n for n in plan.nodes if n is not node))
        return AbsorbChannelPermutationMatch(node, nodes, ways, facts=figures)

    def variants(self, match: AbsorbChannelPermutationMatch) -> tuple[Variant, ...]:
        """Those that fill up first: they suit the runtime's blocks."""
        return tuple(Variant(name) for name in match.ways)

    def rewrite(
        self, match: AbsorbChannelPermutationMatch, variant: Variant, rewriter: Rewriter
    ) -> None:
        """See the class."""
        way = match.ways[variant.name]
        way.apply(rewriter)
        _revisit(way.around, rewriter)


def _revisit(tensors: Iterable[Tensor], rewriter: Rewriter) -> None:
    """Have routes looked at again that now reach weights through what works per channel."""
    facts = Facts(rewriter.model)
    routes = Routes(facts)
    for tensor in tensors:
        found = channel_class(facts, tensor)
        for end in () if found is None else found.ends:
            route = routes.at(end.node)
            for node in () if route is None else route.nodes:
                rewriter.revisit(node)


def _shrinking(route: Route, facts: Facts) -> _Step | None:
    """The operators behind a permutation up to the first that leaves fewer elements."""
    order = route.permutation
    if order is None:
        return None
    nodes: list[Node] = []
    tensor = route.outputs[0]
    while True:
        node = facts.sole_consumer(tensor)
        works = None if node is None else carrier(node, len(order), facts)
        if node is None or works is None or len(works.members) != 2:
            return None
        nodes.append(node)
        result = node.outputs[0]
        if _elements(result, facts) < _elements(tensor, facts):
            return _Step(route, tuple(nodes))
        tensor = result


def _elements(tensor: Tensor, facts: Facts) -> int:
    """Positions per channel of one sample; without known sizes they count as one."""
    shape = facts.shape(tensor) or ()
    sizes = [d for d in shape[2:] if isinstance(d, int)]
    return math.prod(sizes) if len(sizes) == len(shape) - 2 else 1
