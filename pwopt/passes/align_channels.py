"""Fill odd numbers of channels up to the width of the runtime's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.numerics import arrangement as arrangements
from pwopt.numerics.arrangement import PADDING, Arrangement
from pwopt.passes._channel_class import ChannelClass, End, channel_class, rearrange
from pwopt.passes._channel_routes import Route, Routes
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["AlignChannels", "AlignChannelsMatch"]

_BLOCKS = {"blocks-of-16": 16, "blocks-of-8": 8}
_GROWTH = 1.35
"""What the number of channels may grow by."""


@dataclass(frozen=True, eq=False)
class _Bundle:
    """Classes of tensors that permutations lead between.

    Attributes:
        classes: each with an arrangement of its own.
        routes: the permutations, those that lead elsewhere included.
        trimmed: where fillers have to be cut off again.
    """

    classes: tuple[ChannelClass, ...]
    routes: tuple[Route, ...]
    trimmed: tuple[End, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Everything that is rewritten, each once."""
        nodes: list[Node] = []
        for found in self.classes:
            nodes += [conv.node for conv in (*found.writers, *found.readers)]
            nodes += found.carriers
        nodes += [node for route in self.routes for node in route.nodes]
        return tuple({id(node): node for node in nodes}.values())

    def holds(self, tensor: Tensor) -> bool:
        """Whether *tensor* gets fillers."""
        return any(t is tensor for found in self.classes for t in found.tensors)

    def arrangements(self, block: int) -> tuple[Arrangement, ...]:
        """One per class, all with equally many places if groups allow it.

        Then the permutations between them stay permutations.
        """
        places = [arrangements.aligned(f.channels, block, group=f.group) for f in self.classes]
        most = max(places)
        shared = [p if most % f.group else most for p, f in zip(places, self.classes, strict=True)]
        return tuple(
            arrangements.spread(f.channels, p, group=f.group)
            for p, f in zip(shared, self.classes, strict=True)
        )


@dataclass(frozen=True, eq=False)
class AlignChannelsMatch(Match):
    """Tensors whose channels could be filled up, and by variant what would stand where."""

    bundle: _Bundle
    ways: Mapping[str, tuple[Arrangement, ...]]


@dataclass(frozen=True)
class AlignChannels(Pass[AlignChannelsMatch]):
    """Fill channels up with zeros to a multiple of 16 or 8.

    Rewrites:
        ``Conv -> ... -> Conv``, with operators between that work channel by channel (activations,
        depthwise convolutions, pools, sums and products of equal shape, constants per channel),
        into the same with more channels: the first convolution has rows of zeros and no bias for
        them, the operators between have neutral constants, and the last has columns of zeros. With
        grouped convolutions each group is filled up. A shuffle among these operators becomes a
        Gather; other readers, such as a Concat, read a Slice.

    Algebra:
        ``W2 f(W1 x) = [W2 0] f([W1; 0] x)`` for any f that works channel by channel and makes
        something finite of a zero: whatever it is, the zero columns take it out.

    Declines when:
        the number of channels is unknown, or is a multiple of the block already, or was filled up
        before; it would grow by more than 35%; the channels come from something else than
        constant convolutions, or no constant convolution reads them; more than 400 tensors share
        them.

    Exactness:
        ROUNDING. Only zeros are added, but kernels may sum in another order.

    When it pays:
        ONNX Runtime's CPU provider keeps images in blocks of 8 channels (AVX2) or 16 (AVX-512).
        Depthwise and dense convolutions accept any multiple of 4; pools, Concat and grouped
        convolutions leave the blocks unless channels (per group) are a multiple of the block. 1.1
        to 1.2 on ShuffleNets, 1 to 2% on MobileNetV3.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        CHANNELS_UNKNOWN = "channels-unknown"
        TOO_LARGE = "too-large"
        ALIGNED = "aligned"
        TOO_MUCH_PADDING = "too-much-padding"
        NO_WEIGHT_BEFORE = "no-weight-before"
        NO_WEIGHT_BEHIND = "no-weight-behind"

    name: ClassVar[str] = "align-channels"
    roots: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> AlignChannelsMatch | Decline:
        """See the class."""
        output = node.outputs[0]
        channels = facts.channels(output)
        if channels is None or (facts.rank(output) or 0) < 3:
            return Decline(self.Why.CHANNELS_UNKNOWN)
        if channels < 2:
            return Decline(self.Why.TOO_MUCH_PADDING, {"channels": channels})
        found = channel_class(facts, output)
        if found is None:
            return Decline(self.Why.TOO_LARGE, {"channels": channels})
        fed_by = _fed_by(found, Routes(facts), facts)
        if fed_by is not None:
            return Decline(self.Why.NO_WEIGHT_BEFORE, {"channels": channels, "by": fed_by})
        bundle = _bundle(found, facts)
        for route in bundle.routes:
            if not bundle.holds(route.inputs[0]):
                by = (
                    "graph input"
                    if (maker := facts.producer(route.inputs[0])) is None
                    else maker.op
                )
                return Decline(self.Why.NO_WEIGHT_BEFORE, {"channels": channels, "by": by})
        ways = self._ways(bundle, facts)
        if isinstance(ways, Decline):
            return ways
        if not any(found.readers for found in bundle.classes):
            return Decline(self.Why.NO_WEIGHT_BEHIND, {"channels": channels})
        nodes = (node, *(n for n in bundle.nodes if n is not node))
        places = len(next(iter(ways.values()))[0])
        return AlignChannelsMatch(node, nodes, bundle, ways, facts={"channels": (channels, places)})

    def _ways(
        self, bundle: _Bundle, facts: Facts
    ) -> Mapping[str, tuple[Arrangement, ...]] | Decline:
        first = bundle.classes[0]
        figures = {"channels": first.channels, "group": first.group}
        wider = {name: bundle.arrangements(block) for name, block in _BLOCKS.items()}
        wider = {name: a for name, a in wider.items() if any(PADDING in one for one in a)}
        if not wider or any(_has_fillers(found, facts) for found in bundle.classes):
            return Decline(self.Why.ALIGNED, figures)
        ways: dict[str, tuple[Arrangement, ...]] = {}
        for name, way in wider.items():
            if len(way[0]) <= _GROWTH * first.channels and way not in ways.values():
                ways[name] = way
        return ways or Decline(self.Why.TOO_MUCH_PADDING, figures)

    def variants(self, match: AlignChannelsMatch) -> tuple[Variant, ...]:
        """Wider blocks first: they are multiples of the others too."""
        return tuple(Variant(name) for name in match.ways)

    def rewrite(self, match: AlignChannelsMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        _Writer(match.bundle, match.ways[variant.name], rewriter).write()


def _fed_by(found: ChannelClass, routes: Routes, facts: Facts) -> str | None:
    """What else than constant convolutions and permutations channels come from."""
    for end in found.ends:
        if end.node is None and facts.producer(end.tensor) is None:
            return "graph input"
        if end.node is not None and not end.reads and _permutation(end.node, routes) is None:
            return facts.op(end.node)
    return None


def _permutation(node: Node | None, routes: Routes) -> Route | None:
    route = routes.at(node)
    return None if route is None or route.permutation is None else route


def _bundle(first: ChannelClass, facts: Facts) -> _Bundle:
    """*first* and what permutations connect it with."""
    finder = Routes(facts)
    classes: list[ChannelClass] = []
    routes: dict[int, Route] = {}
    trimmed: list[End] = []
    members: set[int] = set()
    queue = [first]
    while queue:
        found = queue.pop(0)
        if id(found.tensors[0]) in members:
            continue
        classes.append(found)
        members.update(id(t) for t in found.tensors)
        for end in found.ends:
            route = _permutation(end.node, finder)
            if route is None:
                trimmed.append(end)
                continue
            routes[id(route)] = route
            other = route.outputs[0] if end.reads else route.inputs[0]
            beyond = None if id(other) in members else channel_class(facts, other)
            if beyond is not None and _fed_by(beyond, finder, facts) is None:
                queue.append(beyond)
    return _Bundle(tuple(classes), tuple(routes.values()), tuple(trimmed))


def _has_fillers(found: ChannelClass, facts: Facts) -> bool:
    """Whether the last channel is zero at all its convolutions."""
    for conv in found.writers:
        weight, bias = facts.constant(conv.weight), facts.constant(conv.bias)
        assert weight is not None
        last = weight[:, -1] if conv.node.op == "ConvTranspose" else weight[-1]
        if last.any() or (bias is not None and bias[-1]):
            return False
    return bool(found.writers)


class _Writer:
    """Writes one match."""

    def __init__(
        self, bundle: _Bundle, chosen: tuple[Arrangement, ...], rewriter: Rewriter
    ) -> None:
        self.bundle = bundle
        self.rewriter = rewriter
        self.facts = Facts(rewriter.model)
        self.arrangement_of: dict[int, Arrangement] = {}
        self.classes = [(found, list(found.tensors)) for found in bundle.classes]
        for (_, tensors), arrangement in zip(self.classes, chosen, strict=True):
            self.arrangement_of.update((id(t), arrangement) for t in tensors)
        self.chosen = chosen
        self.trims: list[tuple[Tensor, Tensor, Node]] = []
        self.makers = {id(r.outputs[0]): r.nodes[-1] for r in bundle.routes}
        self.renamed: dict[int, Tensor] = {}

    def write(self) -> None:
        for route in self.bundle.routes:
            for node in route.nodes:
                self.rewriter.remove(node)
        for end in self.bundle.trimmed:
            if end.node is None:
                self._let_go(end.tensor)
        narrow: dict[int, Tensor] = {}
        for end in self.bundle.trimmed:
            if end.node is not None:
                self._detach(end.tensor, end.node, narrow)
        resized: dict[int, Tensor] = {}
        for (found, tensors), arrangement in zip(self.classes, self.chosen, strict=True):
            resized |= rearrange(self.rewriter, replace(found, tensors=tensors), arrangement)
        for wide, original, near in self.trims:
            self._trim(wide, resized.get(id(wide), wide), original, near)
        for route in self.bundle.routes:
            self._permute(route, resized)

    def _let_go(self, tensor: Tensor) -> None:
        """Let the class have a tensor of its own for *tensor*, which goes by its name."""
        inner = self.rewriter.variable(f"{tensor.name}/aligned", like=tensor)
        producer = self.facts.producer(tensor)
        if producer is not None:
            place = next(i for i, t in enumerate(producer.outputs) if t is tensor)
            self.rewriter.set_output(producer, place, inner)
        outside = {id(e.node) for e in self.bundle.trimmed if e.tensor is tensor}
        for node in self.facts.consumers(tensor):
            if id(node) not in outside:
                self._reconnect(node, tensor, inner)
        for _, tensors in self.classes:
            tensors[:] = [inner if t is tensor else t for t in tensors]
        self.arrangement_of[id(inner)] = self.arrangement_of[id(tensor)]
        self.trims.append((inner, tensor, producer or self.makers[id(tensor)]))
        self.renamed[id(tensor)] = inner

    def _detach(self, tensor: Tensor, node: Node, narrow: dict[int, Tensor]) -> None:
        """Let *node*, which cannot take fillers, read a tensor without."""
        if self.facts.is_seen_outside(tensor):
            return  # It reads the named tensor already.
        if id(tensor) not in narrow:
            narrow[id(tensor)] = self.rewriter.variable(f"{tensor.name}/trimmed", like=tensor)
            self.trims.append((tensor, narrow[id(tensor)], node))
        self._reconnect(node, tensor, narrow[id(tensor)])

    def _reconnect(self, node: Node, old: Tensor, new: Tensor) -> None:
        for index, tensor in enumerate(list(node.inputs)):
            if tensor is old:
                self.rewriter.set_input(node, index, new)

    def _trim(self, member: Tensor, wide: Tensor, narrow: Tensor, near: Node) -> None:
        """Let *narrow* be the channels of *wide*, which has taken the place of *member*."""
        arrangement = self.arrangement_of[id(member)]
        channels = sum(c != PADDING for c in arrangement)
        if not arrangements.is_identity(arrangement[:channels], channels):
            places = [arrangement.index(channel) for channel in range(channels)]
            self._gather(wide, narrow, places, near)
        elif self.facts.has_op("Slice", since=10):
            bounds = (("starts", 0), ("ends", channels), ("axes", 1))
            operands = [self._integers(f"{narrow.name}/{key}", value) for key, value in bounds]
            self.rewriter.add("Slice", [wide, *operands], [narrow], near=near)
        else:
            attributes = {"starts": [0], "ends": [channels], "axes": [1]}
            self.rewriter.add("Slice", [wide], [narrow], attributes, near=near)

    def _permute(self, route: Route, resized: Mapping[int, Tensor]) -> None:
        """A permutation between tensors that have fillers, or one of which has."""
        order = route.permutation
        assert order is not None
        source = self.renamed.get(id(route.inputs[0]), route.inputs[0])
        target = self.renamed.get(id(route.outputs[0]), route.outputs[0])
        before = self.arrangement_of.get(id(source), arrangements.identity(len(order)))
        behind = self.arrangement_of.get(id(target), arrangements.identity(len(order)))
        place = {channel: i for i, channel in enumerate(before) if channel != PADDING}
        # Any channel does for a filler; its own keep the permutation one.
        fillers = [i for i, channel in enumerate(before) if channel == PADDING]
        spare = iter([*fillers, *[0] * len(behind)])
        indices = [next(spare) if c == PADDING else place[order[c]] for c in behind]
        source = resized.get(id(source), source)
        self._gather(source, resized.get(id(target), target), indices, route.nodes[-1])

    def _gather(self, source: Tensor, target: Tensor, indices: list[int], near: Node) -> None:
        operand = self._integers(f"{target.name}/channels", *indices)
        self.rewriter.add("Gather", [source, operand], [target], {"axis": 1}, near=near)

    def _integers(self, name: str, *values: int) -> Tensor:
        array: np.ndarray[Any, Any] = np.array(values, np.int64)
        return self.rewriter.constant(name, array)
