"""What becomes of channels between convolutions that only routes lie between.

Around a route, all routes that hang together make a region. Channels come into it from *sources*
and leave it at *sinks*. If a source is a convolution, its output channels need not be made
together: it can be cut into *pieces*, by who reads them. A sink then is a Concat of pieces, and if
it leads into convolutions, their columns stand in the order of the Concat. What splits, slices,
gathers and shuffles did is done by weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor, ValuesView
from pwopt.numerics import arrangement as arrangements
from pwopt.numerics.arrangement import PADDING, Arrangement
from pwopt.passes._channel_class import (
    ChannelClass,
    PerChannel,
    carrier,
    channel_class,
    dense_or_grouped,
    rearrange,
)
from pwopt.passes._channel_routes import Route, Routes

__all__ = ["Plan", "Region"]

_LARGEST_REGION = 200
"""Routes; what hangs together with more is left alone."""
_SMALLEST_PIECE = 6
"""Channels that are worth a convolution of their own, rather than be read by all with others."""

Origin = tuple[int, int]
"""A source, by its number, and one of its channels."""


@dataclass(frozen=True, eq=False)
class _Source:
    """A tensor from outside of the region.

    Attributes:
        chain: if its channels can be made separately, the convolution they come from, first, and
            what works channel by channel behind it; else empty.
    """

    tensor: Tensor
    channels: int
    chain: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class _Sink:
    """A tensor that leaves the region.

    Attributes:
        origins: what its channels are.
        takes_any: what can read any arrangement of it, if all that reads it can.
        readers: operators that keep it as it is, if not.
    """

    tensor: Tensor
    origins: tuple[Origin, ...]
    takes_any: ChannelClass | None
    readers: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """Channels of one source that are made together; fillers among them."""

    source: int
    arrangement: Arrangement


@dataclass(frozen=True, eq=False)
class _Layout:
    """A sink as pieces side by side.

    Attributes:
        pieces: by number.
        arrangement: which of the sink's channels stand where; others are fillers to it.
        is_gathered: whether a Gather has to take the sink's channels out.
    """

    sink: _Sink
    pieces: tuple[int, ...]
    arrangement: Arrangement
    is_gathered: bool


class Region:
    """Routes that hang together with one route."""

    def __init__(self, first: Route, routes: Routes, facts: Facts) -> None:
        self.facts = facts
        self.routes = list(_connected(first, routes, facts))
        self.sources: list[_Source] = []
        self.sinks: list[_Sink] = []
        if not self.is_too_large:
            self._collect()

    @property
    def is_too_large(self) -> bool:
        """Whether there are more routes than are looked at."""
        return len(self.routes) > _LARGEST_REGION

    @property
    def movers(self) -> int:
        """Routes that are more than a Concat."""
        return sum(not route.is_concat for route in self.routes)

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes of all routes."""
        return (node for route in self.routes for node in route.nodes)

    # -- exploring -----------------------------------------------------------------------------

    def _collect(self) -> None:
        made = {id(t) for route in self.routes for t in route.outputs}
        own = {id(node) for node in self.nodes}
        numbers: dict[int, int] = {}
        origins: dict[int, tuple[Origin, ...]] = {}
        for route in self._in_order(made):
            for tensor in route.inputs:
                if id(tensor) in made or id(tensor) in numbers:
                    continue
                numbers[id(tensor)] = len(self.sources)
                self.sources.append(self._source(tensor, own))
                channels = range(self.sources[-1].channels)
                origins[id(tensor)] = tuple((numbers[id(tensor)], c) for c in channels)
            for tensor, found in zip(route.outputs, route.origins, strict=True):
                through = [origins[id(t)] for t in route.inputs]
                origins[id(tensor)] = tuple(through[i][c] for i, c in found)
                sink = self._sink(tensor, origins[id(tensor)], own)
                if sink is not None:
                    self.sinks.append(sink)

    def _in_order(self, made: set[int]) -> Iterator[Route]:
        """Routes, each behind those it reads from."""
        waiting: dict[int, int] = {}
        readers: dict[int, list[Route]] = {}
        for route in self.routes:
            inner = {id(t) for t in route.inputs} & made
            waiting[id(route)] = len(inner)
            for key in inner:
                readers.setdefault(key, []).append(route)
        ready = deque(r for r in self.routes if not waiting[id(r)])
        while ready:
            route = ready.popleft()
            yield route
            for tensor in route.outputs:
                for reader in readers.get(id(tensor), ()):
                    waiting[id(reader)] -= 1
                    if not waiting[id(reader)]:
                        ready.append(reader)

    def _source(self, tensor: Tensor, own: set[int]) -> _Source:
        channels = self.facts.channels(tensor)
        assert channels is not None
        is_private = not self.facts.is_seen_outside(tensor) and all(
            id(node) in own for node in self.facts.consumers(tensor)
        )
        chain = self._chain(tensor, channels) if is_private else ()
        return _Source(tensor, channels, chain)

    def _chain(self, tensor: Tensor, channels: int) -> tuple[Node, ...]:
        """From the convolution that makes the channels of *tensor* down to it."""
        chain: list[Node] = []
        node = self.facts.producer(tensor)
        while node is not None:
            chain.insert(0, node)
            conv = dense_or_grouped(node, self.facts)
            if conv is not None and conv.group == 1:
                return tuple(chain)
            works = carrier(node, channels, self.facts)
            if works is None or len(works.members) != 2:
                return ()
            data = works.members[0]
            if not self.facts.is_private(data):
                return ()
            node = self.facts.producer(data)
        return ()

    def _sink(self, tensor: Tensor, origins: tuple[Origin, ...], own: set[int]) -> _Sink | None:
        readers = [n for n in self.facts.consumers(tensor) if id(n) not in own]
        is_named = self.facts.is_seen_outside(tensor)
        if not readers and not is_named:
            return None
        takes_any = None
        if not is_named and len(set(origins)) == len(origins):
            takes_any = self._taker(tensor, own)
        ops = tuple(sorted({self.facts.op(node) for node in readers}))
        return _Sink(tensor, origins, takes_any, ops if readers else ("graph output",))

    def _taker(self, tensor: Tensor, own: set[int]) -> ChannelClass | None:
        found = channel_class(self.facts, tensor)
        if found is None or found.has_products or found.group != 1:
            return None
        for end in found.ends:
            if end.tensor is not tensor or end.node is None or id(end.node) not in own:
                return None
        return found

    # -- planning ------------------------------------------------------------------------------

    def plan(self, block: int) -> Plan:
        """How to do without routes other than Concat, with pieces of multiples of *block*."""
        ordered = {i for i, sink in enumerate(self.sinks) if sink.takes_any is None}
        while True:
            pieces = self._pieces(block, ordered)
            layouts = [self._layout(sink, pieces) for sink in self.sinks]
            failed = {i for i in ordered if layouts[i].is_gathered}
            if not failed:
                return Plan(self, tuple(pieces), tuple(layouts))
            ordered -= failed

    def _pieces(self, block: int, ordered: set[int]) -> list[_Piece]:
        readers: list[dict[int, list[int]]] = [{} for _ in self.sources]
        for index, sink in enumerate(self.sinks):
            for start, channel in sink.origins:
                who = readers[start].setdefault(channel, [])
                if index not in who:
                    who.append(index)
        pieces: list[_Piece] = []
        for number, source in enumerate(self.sources):
            if not source.chain:
                pieces.append(_Piece(number, arrangements.identity(source.channels)))
                continue
            groups: dict[tuple[int, ...], list[int]] = {}
            for channel in sorted(readers[number]):
                groups.setdefault(tuple(readers[number][channel]), []).append(channel)
            pieces += self._cut(number, groups, block, ordered)
        return pieces

    def _cut(
        self,
        source: int,
        groups: Mapping[tuple[int, ...], list[int]],
        block: int,
        ordered: set[int],
    ) -> Iterator[_Piece]:
        """Pieces of one source: what some reader wants in order, large pieces, and the rest."""
        fewest = max(_SMALLEST_PIECE, 3 * block // 4)
        rest: list[int] = []
        for who, channels in groups.items():
            keeping = [i for i in who if i in ordered]
            if keeping:
                wanted = set(channels)
                origins = self.sinks[keeping[0]].origins
                yield _Piece(source, tuple(c for s, c in origins if s == source and c in wanted))
            elif len(channels) < fewest:
                rest += channels
            else:
                yield _Piece(source, _filled(channels, block))
        if rest:
            yield _Piece(source, _filled(sorted(rest), block))

    def _layout(self, sink: _Sink, pieces: Sequence[_Piece]) -> _Layout:
        places = {origin: index for index, origin in enumerate(sink.origins)}
        chosen: dict[int, None] = {}
        holder = {
            (piece.source, c): index
            for index, piece in enumerate(pieces)
            for c in piece.arrangement
            if c != PADDING
        }
        for origin in sink.origins:
            chosen.setdefault(holder[origin])
        arrangement = tuple(
            places.get((pieces[index].source, c), PADDING)
            for index in chosen
            for c in pieces[index].arrangement
        )
        is_kept = arrangements.is_identity(arrangement, len(sink.origins))
        return _Layout(sink, tuple(chosen), arrangement, sink.takes_any is None and not is_kept)


def _filled(channels: Sequence[int], block: int) -> Arrangement:
    return tuple(channels) + (PADDING,) * (-len(channels) % block)


def _connected(first: Route, routes: Routes, facts: Facts) -> Iterator[Route]:
    seen = {id(first)}
    queue = deque([first])
    count = 0
    while queue and count <= _LARGEST_REGION:
        route = queue.popleft()
        count += 1
        yield route
        before = (facts.producer(t) for t in route.inputs)
        behind = (n for t in route.outputs for n in facts.consumers(t))
        for node in (*before, *behind):
            found = routes.at(node)
            if found is not None and id(found) not in seen:
                seen.add(id(found))
                queue.append(found)


# -- a plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """How a region does without its routes."""

    region: Region
    pieces: tuple[_Piece, ...]
    layouts: tuple[_Layout, ...]

    @property
    def movers(self) -> int:
        """Routes left that are more than a Concat."""
        return sum(layout.is_gathered for layout in self.layouts)

    @property
    def convs(self) -> int:
        """Convolutions that the sources are cut into, beyond those they are."""
        cut = [p for p in self.pieces if self.region.sources[p.source].chain]
        return len(cut) - len({p.source for p in cut})

    @property
    def kept_by(self) -> tuple[str, ...]:
        """Operators that need channels in an order that no Concat of pieces has."""
        names = {op for layout in self.layouts if layout.is_gathered for op in layout.sink.readers}
        return tuple(sorted(names))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Everything that is rewritten, each once."""
        nodes = list(self.region.nodes)
        for source in self.region.sources:
            nodes += source.chain
        for sink in self.region.sinks:
            if sink.takes_any is not None:
                nodes += sink.takes_any.carriers
                nodes += [conv.node for conv in (*sink.takes_any.readers, *sink.takes_any.writers)]
        return tuple({id(node): node for node in nodes}.values())

    @property
    def around(self) -> tuple[Tensor, ...]:
        """Tensors that stay, beyond which other routes may lie."""
        sources = [s.tensor for s in self.region.sources if not s.chain]
        sinks = [s.tensor for s in self.region.sinks if s.takes_any is None]
        return (*sources, *sinks)

    def weights(self) -> tuple[int, int]:
        """Weights of the convolutions concerned, before and after."""
        facts = self.region.facts
        sizes: dict[int, list[float]] = {}
        for number, source in enumerate(self.region.sources):
            if source.chain:
                made = sum(len(p.arrangement) for p in self.pieces if p.source == number)
                _scale(sizes, source.chain[0], made / source.channels, facts)
        for layout in self.layouts:
            found = layout.sink.takes_any
            for conv in () if found is None else (*found.readers, *found.writers):
                _scale(sizes, conv.node, len(layout.arrangement) / len(layout.sink.origins), facts)
        return round(sum(s[0] for s in sizes.values())), round(sum(s[1] for s in sizes.values()))

    def apply(self, rewriter: Rewriter) -> None:
        """Write the plan."""
        _Writer(self, rewriter).write()


def _scale(sizes: dict[int, list[float]], node: Node, factor: float, facts: Facts) -> None:
    size = float(np.prod(facts.static_shape(node.inputs[1]) or (0,)))
    entry = sizes.setdefault(id(node), [size, size])
    entry[1] *= factor


class _Writer:
    """Writes a plan: sinks first, since sources may read what sinks hold."""

    def __init__(self, plan: Plan, rewriter: Rewriter) -> None:
        self.plan = plan
        self.region = plan.region
        self.rewriter = rewriter
        self.facts = Facts(rewriter.model)
        self.tensors = [self._tensor(piece) for piece in plan.pieces]
        self.joined: dict[tuple[int, ...], Tensor] = {}

    def write(self) -> None:
        makers = {id(t): r.nodes[-1] for r in self.region.routes for t in r.outputs}
        for node in self.region.nodes:
            self.rewriter.remove(node)
        for layout in self.plan.layouts:
            self._write_sink(layout, makers[id(layout.sink.tensor)])
        for number, source in enumerate(self.region.sources):
            if source.chain:
                self._write_source(number, source)

    def _is_untouched(self, piece: _Piece) -> bool:
        source = self.region.sources[piece.source]
        return arrangements.is_identity(piece.arrangement, source.channels)

    def _tensor(self, piece: _Piece) -> Tensor:
        source = self.region.sources[piece.source].tensor
        if self._is_untouched(piece):
            return source
        return self._variable(source, len(piece.arrangement), f"{source.name}/piece")

    def _variable(self, like: Tensor, channels: int, hint: str) -> Tensor:
        shape = self.facts.shape(like)
        assert shape is not None
        return self.rewriter.variable(hint, like, (shape[0], channels, *shape[2:]))

    def _write_sink(self, layout: _Layout, near: Node) -> None:
        sink = layout.sink.tensor
        if layout.is_gathered:
            joined = self._joined(layout, near)
            indices = np.array([layout.arrangement.index(i) for i in self._places(layout)])
            operand = self.rewriter.constant(f"{sink.name}/channels", indices.astype(np.int64))
            self.rewriter.add("Gather", [joined, operand], [sink], {"axis": 1}, near=near)
            return
        is_kept = arrangements.is_identity(layout.arrangement, len(layout.sink.origins))
        if layout.sink.takes_any is not None and not is_kept:
            rearrange(self.rewriter, layout.sink.takes_any, layout.arrangement, sink)
        elif self.facts.is_seen_outside(sink):
            parts = [self.tensors[p] for p in layout.pieces]
            if len(parts) == 1:
                self.rewriter.add("Identity", parts, [sink], near=near)
            else:
                self.rewriter.add("Concat", parts, [sink], {"axis": 1}, near=near)
            return
        self.rewriter.redirect(sink, self._joined(layout, near))

    def _places(self, layout: _Layout) -> Iterator[int]:
        """For each channel of a gathered sink, the number that its first equal one has."""
        last: dict[Origin, int] = {o: i for i, o in enumerate(layout.sink.origins)}
        return (last[origin] for origin in layout.sink.origins)

    def _joined(self, layout: _Layout, near: Node) -> Tensor:
        """The pieces of a sink in one tensor."""
        parts = [self.tensors[p] for p in layout.pieces]
        if len(parts) == 1:
            return parts[0]
        if layout.pieces not in self.joined:
            name = f"{layout.sink.tensor.name}/channels"
            joined = self._variable(layout.sink.tensor, len(layout.arrangement), name)
            self.rewriter.add("Concat", parts, [joined], {"axis": 1}, near=near)
            self.joined[layout.pieces] = joined
        return self.joined[layout.pieces]

    # -- sources -------------------------------------------------------------------------------

    def _write_source(self, number: int, source: _Source) -> None:
        """Replace the chain of a source by one per piece."""
        pieces = [
            (piece, tensor)
            for piece, tensor in zip(self.plan.pieces, self.tensors, strict=True)
            if piece.source == number
        ]
        if len(pieces) == 1 and self._is_untouched(pieces[0][0]):
            return
        links = [self._link(node, source.channels) for node in source.chain]
        for link in reversed(links):
            self.rewriter.remove(link.node)
        for piece, result in pieces:
            data = links[0].inputs[0]
            for link in links:
                is_last = link is links[-1]
                target = result if is_last else self._like(link.output, piece)
                self._copy(link, piece.arrangement, data, target)
                data = target

    def _link(self, node: Node, channels: int) -> _Link:
        conv = dense_or_grouped(node, self.facts)
        if conv is not None and conv.group == 1:
            rows = 1 if node.op == "ConvTranspose" else 0
            constants = (PerChannel(1, rows), PerChannel(2))[: 1 if conv.bias is None else 2]
            return _Link(node, 0, constants, self.facts)
        works = carrier(node, channels, self.facts)
        assert works is not None
        data = next(i for i, t in enumerate(node.inputs) if t is works.members[0])
        return _Link(node, data, works.constants, self.facts)

    def _copy(self, link: _Link, arrangement: Arrangement, data: Tensor, target: Tensor) -> None:
        """What *link* computes for the channels of one piece."""
        operands: list[Tensor | None] = [None if t.is_empty() else t for t in link.inputs]
        operands[link.data] = data
        for constant, values in link.constants:
            taken = constant.taken(values, arrangement)
            operands[constant.index] = self.rewriter.constant(
                link.inputs[constant.index].name, taken
            )
        attributes = dict(link.attributes)
        if link.is_depthwise:
            attributes["group"] = len(arrangement)
        self.rewriter.add(link.node.op, operands, [target], attributes, near=link.node)

    def _like(self, tensor: Tensor, piece: _Piece) -> Tensor:
        return self._variable(tensor, len(piece.arrangement), tensor.name)


class _Link:
    """A node of a chain, as it was before it was taken out."""

    def __init__(
        self, node: Node, data: int, constants: Sequence[PerChannel], facts: Facts
    ) -> None:
        self.node = node
        self.data = data
        self.inputs = list(node.inputs)
        self.output = node.outputs[0]
        self.attributes = node.attrs
        self.is_depthwise = node.op == "Conv" and facts.attr_int(node, "group", 1) > 1
        self.constants = [(c, _values(facts, node.inputs[c.index])) for c in constants]


def _values(facts: Facts, tensor: Tensor) -> ValuesView:
    values = facts.constant(tensor)
    assert values is not None
    return values
