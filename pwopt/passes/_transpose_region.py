"""Regions of operators that could work in either of two layouts, and the best choice for each.

Transposes by one permutation and by its inverse lead back and forth between two layouts. Around
them lie operators to which the layout is indifferent: elementwise ones, and those that only name
axes. What is the cheapest layout for each of these operators is a minimum s-t cut (Picard and
Ratliff 1975): an operator is a node, its layout the side it falls on, and a value that is needed
in both layouts costs one Transpose, however many operators read it. What a Transpose costs, and
what an operator costs more in one layout than in the other, is for the caller to say.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.numerics.minimum_cut import minimum_cut
from pwopt.passes._movable import Axes, Movable, inverse

__all__ = ["Classify", "FewestTransposes", "Plan", "Prices", "Region", "find_plan", "perm_of"]

_LARGEST_REGION = 400
"""Operators looked at around one Transpose; what lies beyond stays as it is."""


Classify = Callable[[Node, Axes], Movable | None]
"""Says whether a node could be moved out of its present layout by the given change."""


class Prices(Protocol):
    """What a choice of layouts costs, in whole units of any kind."""

    def transpose(self, tensor: Tensor) -> int:
        """A Transpose of *tensor*."""

    def beside(self, tensor: Tensor, node: Node) -> int:
        """The same, if nothing but operators like *node* need that layout of *tensor*.

        *node* keeps its layout, which is 0. No more than :meth:`transpose`.
        """

    def operator(self, moved: Movable, present: int, layout: int) -> int:
        """What *moved*, which works in the layout *present*, costs extra in *layout*."""

    def apart(self, first: Movable | Node, second: Movable) -> int:
        """What it costs to have *first*, but not *second*, in layout 0.

        Nothing but *second* reads what *first* computes; a node keeps its layout.
        """

    def pays(self, before: int, after: int) -> bool:
        """Whether a change from one sum of prices to another is worth making."""


class FewestTransposes:
    """Every Transpose costs the same, whatever it moves; ties go to fewer elements."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def transpose(self, tensor: Tensor) -> int:
        """One, and a little for each element."""
        return _ONE + elements(self.facts, tensor)

    def beside(self, tensor: Tensor, node: Node) -> int:
        """The same as anywhere."""
        del node
        return self.transpose(tensor)

    def operator(self, moved: Movable, present: int, layout: int) -> int:
        """Nothing."""
        del moved, present, layout
        return 0

    def apart(self, first: Movable | Node, second: Movable) -> int:
        """Nothing."""
        del first, second
        return 0

    def pays(self, before: int, after: int) -> bool:
        """Whether the number falls."""
        return after // _ONE < before // _ONE


_ONE = 1 << 60


def elements(facts: Facts, tensor: Tensor) -> int:
    """Elements of *tensor*, where dimensions that are not known count as one."""
    return math.prod(d for d in facts.shape(tensor) or () if isinstance(d, int))


@dataclass(frozen=True, eq=False)
class Plan:
    """A better choice of layouts for one region.

    Attributes:
        before, after: Transposes of the region, now and then.
        is_whole: whether the region ends where its operators do, and not at its largest size.
        nodes: the Transposes, and the operators that change their layout.
        moved: the operators that change their layout.
        sources: operators that keep their layout and write a value of the region.
    """

    before: int
    after: int
    is_whole: bool
    nodes: tuple[Node, ...]
    moved: tuple[Movable, ...]
    sources: tuple[Node, ...]
    _region: Region
    _labels: dict[int, int]

    def apply(self, rewriter: Rewriter) -> None:
        """Write the plan."""
        _Writer(self._region, self._labels, rewriter).write()


def find_plan(
    facts: Facts,
    seed: Tensor,
    layout: int,
    perm: Axes,
    classify: Classify,
    prices: Prices | None = None,
) -> Plan | tuple[str, ...]:
    """The cheapest choice of layouts around *seed*; operators whose change gains nothing stay.

    Args:
        facts: of the model.
        seed: a tensor of known rank.
        layout: 0 or 1; the layout *seed* is in.
        perm: what a Transpose from layout 1 to layout 0 has for its ``perm``.
        classify: which operators could move.
        prices: by default the fewest Transposes are the cheapest.

    Returns:
        The plan, or, where none pays, the operators that stand in the way.
    """
    region = Region(facts, perm, classify, prices)
    region.explore(seed, layout)
    if region.present_price() == 0:
        return region.obstacles()
    labels = region.without_idle_changes(region.best_labels())
    if not region.prices.pays(region.present_price(), region.price(labels)):
        return region.obstacles()
    after = sum(len(region.layouts(value, labels)) > 1 for value in region.values)
    before = sum(len(value.transposes) for value in region.values)
    moved = tuple(m for m in region.movables if labels[id(m)] != region.layout_of[id(m)])
    nodes = [t for value in region.values for t in value.transposes]
    nodes += [node for m in moved for node in m.nodes]
    is_whole = len(region.movables) < _LARGEST_REGION
    sources = region.sources()
    return Plan(before, after, is_whole, tuple(nodes), moved, sources, region, labels)


def perm_of(node: Node, facts: Facts) -> Axes | None:
    """The permutation of a Transpose; ``None`` if it reverses an unknown number of axes."""
    if "perm" in node.attrs:
        return facts.attr_ints(node, "perm", ())
    rank = facts.rank(node.inputs[0])
    return None if rank is None else tuple(reversed(range(rank)))


# -- finding a plan ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Value:
    """One value, in all the layouts in which it exists.

    Attributes:
        root: the tensor that no Transpose of the region computes.
        layout: the layout of *root*.
        members: all tensors that hold the value, with their layouts; *root* comes first.
        transposes: the region's Transposes between them.
        pinned: by layout, the tensor that must keep its name.
    """

    root: Tensor
    layout: int
    members: list[tuple[Tensor, int]] = field(default_factory=list)
    transposes: list[Node] = field(default_factory=list)
    pinned: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Ends:
    """Who writes or reads a value.

    A Transpose by another permutation is not among them: it reads and writes any layout at the
    same cost.

    Attributes:
        layouts: those in which operators do it that keep their layout, or in which it has a name.
        costly: those without the operators beside which a Transpose is cheap.
        movables: operators that could change their layout.
        transpose: what it costs to need the value in both layouts.
        rest: what it costs on top where *costly* ends, or movable ones, need both.
    """

    layouts: frozenset[int]
    costly: frozenset[int]
    movables: tuple[Movable, ...]
    transpose: int
    rest: int

    def terms(self) -> Iterator[tuple[int, frozenset[int]]]:
        """Prices, and the fixed layouts that together with the movables decide on each."""
        yield self.transpose, self.layouts
        if self.rest:
            yield self.rest, self.costly


class Region:
    """What lies around a tensor; layouts are 0 and 1."""

    def __init__(
        self, facts: Facts, perm: Axes, classify: Classify, prices: Prices | None = None
    ) -> None:
        self.facts = facts
        self.classify = classify
        self.prices = prices or FewestTransposes(facts)
        self.perm_into = (perm, inverse(perm))
        """By layout: the perm of a Transpose from the other layout into it."""
        self.axes_from = (perm, inverse(perm))
        """By layout: how axes are renamed on the way to the other layout."""
        self.values: list[_Value] = []
        self.movables: list[Movable] = []
        self.layout_of: dict[int, int] = {}
        self._value_of: dict[int, tuple[_Value, int]] = {}
        self._movable_of: dict[int, Movable] = {}
        self._fixed: dict[int, Node] = {}
        self._ends: dict[int, _Ends] = {}
        self._bonds: list[tuple[Movable | None, Movable, int]] = []
        """Who costs how much if the first, or what keeps its layout, is in layout 0 alone."""

    # -- exploring -----------------------------------------------------------------------------

    def explore(self, seed: Tensor, layout: int) -> None:
        """Collect values and movable operators that hang together with *seed*."""
        first, _ = self._value(seed, layout)
        queue = deque([first])
        seen = {id(first)}
        while queue:
            for node, at in self._neighbours(queue.popleft()):
                if id(node) in self._movable_of or id(node) in self._fixed:
                    continue
                admitted = self._admit(node, at)
                if admitted is None:
                    self._fixed[id(node)] = node
                    continue
                for tensor in (*admitted.inputs, *admitted.outputs):
                    value, _ = self._value(tensor, at)
                    if id(value) not in seen:
                        seen.add(id(value))
                        queue.append(value)
        # A node that was turned away may have brought in values that nothing movable touches.
        self.values = [value for value in self.values if id(value) in seen]
        self._ends = {id(value): self._ends_of(value) for value in self.values}
        self._bonds = [bond for value in self.values for bond in self._bonds_of(value)]

    def _value(self, tensor: Tensor, layout: int) -> tuple[_Value, int]:
        """The value that *tensor* holds and the layout it holds it in."""
        if id(tensor) not in self._value_of:
            root, at = tensor, layout
            while (source := self._transposed_from(root, at)) is not None:
                root, at = source, 1 - at
            if id(root) not in self._value_of:
                self._gather(root, at)
        if id(tensor) not in self._value_of:
            # Behind a Transpose that could not be taken in, because of its name.
            self._gather(tensor, layout)
        return self._value_of[id(tensor)]

    def _transposed_from(self, tensor: Tensor, layout: int) -> Tensor | None:
        producer = self.facts.producer(tensor)
        if producer is None or not self._leads_into(producer, layout):
            return None
        return producer.inputs[0]

    def _leads_into(self, node: Node, layout: int) -> bool:
        is_transpose = self.facts.is_op(node, "Transpose")
        return is_transpose and perm_of(node, self.facts) == self.perm_into[layout]

    def _gather(self, root: Tensor, layout: int) -> None:
        value = _Value(root, layout)
        self.values.append(value)
        if self._keeps_its_name(root) or self.facts.producer(root) is None:
            value.pinned[layout] = root
        stack = [(root, layout)]
        while stack:
            tensor, at = stack.pop()
            value.members.append((tensor, at))
            self._value_of[id(tensor)] = (value, at)
            for node in self.facts.consumers(tensor):
                if not self._leads_into(node, 1 - at):
                    continue
                result = node.outputs[0]
                if id(result) in self._value_of:
                    continue
                if self._keeps_its_name(result):
                    if 1 - at in value.pinned:
                        continue
                    value.pinned[1 - at] = result
                value.transposes.append(node)
                stack.append((result, 1 - at))

    def _keeps_its_name(self, tensor: Tensor) -> bool:
        return self.facts.is_output(tensor) or self.facts.is_captured(tensor)

    def _neighbours(self, value: _Value) -> Iterator[tuple[Node, int]]:
        """Operators that write or read *value*, with the layout they do it in."""
        own = {id(node) for node in value.transposes}
        producer = self.facts.producer(value.root)
        if producer is not None:
            yield producer, value.layout
        for tensor, at in value.members:
            for node in self.facts.consumers(tensor):
                if id(node) not in own:
                    yield node, at

    def _admit(self, node: Node, layout: int) -> Movable | None:
        if len(self.movables) >= _LARGEST_REGION:
            return None
        found = self.classify(node, self.axes_from[layout])
        if found is None:
            return None
        if any(id(n) in self._movable_of or id(n) in self._fixed for n in found.nodes):
            return None
        for tensor in (*found.inputs, *found.outputs):
            _, at = self._value(tensor, layout)
            if at != layout:
                return None
        self.movables.append(found)
        self.layout_of[id(found)] = layout
        for n in found.nodes:
            self._movable_of[id(n)] = found
        return found

    def movable_at(self, node: Node | None) -> Movable | None:
        """The movable operator that *node* belongs to."""
        return None if node is None else self._movable_of.get(id(node))

    def sources(self) -> tuple[Node, ...]:
        """Operators that keep their layout and write a value of the region."""
        producers = (self.facts.producer(value.root) for value in self.values)
        return tuple(n for n in producers if n is not None and self.movable_at(n) is None)

    def obstacles(self) -> tuple[str, ...]:
        """Types of the operators around the region that keep their layout."""
        types = {self.facts.op(node) for node in self._fixed.values()}
        return tuple(sorted(types - {"Transpose"}))

    # -- choosing ------------------------------------------------------------------------------

    def _ends_of(self, value: _Value) -> _Ends:
        layouts = set(value.pinned)
        costly = set(value.pinned)
        movables: dict[int, Movable] = {}
        transpose = self.prices.transpose(value.root)
        cheapest = transpose
        for node, at in self._neighbours(value):
            moves = self._movable_of.get(id(node))
            if moves is not None:
                movables[id(moves)] = moves
            elif not self.facts.is_op(node, "Transpose"):
                layouts.add(at)
                price = transpose if at else self.prices.beside(value.root, node)
                if price == transpose:
                    costly.add(at)
                cheapest = min(cheapest, price)
        ends = frozenset(layouts), frozenset(costly), tuple(movables.values())
        return _Ends(*ends, cheapest, transpose - cheapest)

    def _bonds_of(self, value: _Value) -> Iterator[tuple[Movable | None, Movable, int]]:
        producer = self.facts.producer(value.root)
        readers = [n for n, _ in self._neighbours(value) if n is not producer]
        if producer is None or len(readers) != 1 or value.pinned:
            return
        first, second = self.movable_at(producer), self.movable_at(readers[0])
        if second is None or (first is None and value.layout == 1):
            return
        price = self.prices.apart(first or producer, second)
        if price:
            yield first, second, price

    def layouts(self, value: _Value, labels: dict[int, int]) -> set[int]:
        """Layouts in which *value* is written or read under *labels*."""
        ends = self._ends[id(value)]
        return {*ends.layouts, *(labels[id(m)] for m in ends.movables)}

    def best_labels(self) -> dict[int, int]:
        """The layout of every movable operator, by ``id``, by a minimum cut."""
        source, sink = 0, 1
        number = {id(m): index + 2 for index, m in enumerate(self.movables)}
        fixed = (source, sink)
        edges: list[tuple[int, int, int]] = []
        for m in self.movables:
            # The side of the source pays at the sink, and the other way round.
            in_first, in_second = (self._operator_price(m, layout) for layout in fixed)
            if in_first != in_second:
                edges.append((number[id(m)], sink, in_first))
                edges.append((source, number[id(m)], in_second))
        for first, second, price in self._bonds:
            tail = source if first is None else number[id(first)]
            edges.append((tail, number[id(second)], price))
        count = len(self.movables) + 2
        terms = [(ends, *term) for ends in self._ends.values() for term in ends.terms()]
        unlimited = sum(price for _, price, _ in terms) + sum(price for _, _, price in edges) + 1
        for ends, price, layouts in terms:
            touching = [fixed[layout] for layout in layouts]
            touching += [number[id(m)] for m in ends.movables]
            if len(touching) < 2:
                continue
            # All on one side is free; a mixture pays once, on the edge between the two helpers.
            inlet, outlet = count, count + 1
            count += 2
            edges.append((inlet, outlet, price))
            for end in touching:
                edges.append((end, inlet, unlimited))
                edges.append((outlet, end, unlimited))
        _, at_sink = minimum_cut(count, edges, source, sink)
        return {id(m): int(at_sink[number[id(m)]]) for m in self.movables}

    def without_idle_changes(self, labels: dict[int, int]) -> dict[int, int]:
        """*labels*, but operators keep their layout where changing it together gains nothing."""
        touching: dict[int, list[_Value]] = {}
        for value in self.values:
            for m in self._ends[id(value)].movables:
                touching.setdefault(id(m), []).append(value)
        result = dict(labels)
        seen: set[int] = set()
        for first in self.movables:
            group: dict[int, Movable] = {}
            values: dict[int, _Value] = {}
            stack = [first]
            while stack:
                moved = stack.pop()
                key = id(moved)
                if key in seen or labels[key] == self.layout_of[key]:
                    continue
                seen.add(key)
                group[key] = moved
                for value in touching.get(key, ()):
                    values[id(value)] = value
                    stack += self._ends[id(value)].movables
            if not group:
                continue
            reverted = {**result, **{key: self.layout_of[key] for key in group}}
            before, after = (
                self._price(values.values(), group.values(), choice)
                for choice in (reverted, result)
            )
            if before <= after:
                result = reverted
        return result

    def price(self, labels: dict[int, int]) -> int:
        """What *labels* cost."""
        return self._price(self.values, self.movables, labels)

    def present_price(self) -> int:
        """What the region costs as it stands, with Transposes that are there more than once."""
        return self.price(self.layout_of) + sum(
            self.prices.transpose(value.root)
            * (len(value.transposes) - (len(self.layouts(value, self.layout_of)) > 1))
            for value in self.values
        )

    def _price(
        self, values: Iterable[_Value], movables: Iterable[Movable], labels: dict[int, int]
    ) -> int:
        total = sum(self._operator_price(m, labels[id(m)]) for m in movables)
        total += sum(
            price
            for first, second, price in self._bonds
            if labels[id(second)] == 1 and (first is None or labels[id(first)] == 0)
        )
        for value in values:
            ends = self._ends[id(value)]
            chosen = {labels[id(m)] for m in ends.movables}
            total += sum(price for price, at in ends.terms() if len(chosen | at) > 1)
        return total

    def _operator_price(self, moved: Movable, layout: int) -> int:
        return self.prices.operator(moved, self.layout_of[id(moved)], layout)


# -- writing a plan ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Route:
    """How one value is to be held: written in layout *at*, and in the other one too if *both*.

    Attributes:
        readers: operators that read the value, the tensor they read, and its layout.
        tensors: by layout, the tensor that will hold it.
    """

    value: _Value
    at: int
    both: bool
    producer: Node | None
    readers: list[tuple[Node, Tensor, int]]
    tensors: dict[int, Tensor] = field(default_factory=dict)


class _Writer:
    """Writes the labels of a region into the graph."""

    def __init__(self, region: Region, labels: dict[int, int], rewriter: Rewriter) -> None:
        self.region = region
        self.labels = labels
        self.rewriter = rewriter
        self.facts = region.facts

    def write(self) -> None:
        routes = [self.route(value) for value in self.region.values]
        kept = [self.clear(route) for route in routes]
        for route, transpose in zip(routes, kept, strict=True):
            self.connect_producer(route)
            if route.both and transpose is None:
                self.add_transpose(route)
        for route in routes:
            self.connect_readers(route)
        for moved in self.region.movables:
            layout = self.region.layout_of[id(moved)]
            if self.labels[id(moved)] != layout:
                moved.transform(self.rewriter, self.region.axes_from[layout])

    def route(self, value: _Value) -> _Route:
        layouts = self.region.layouts(value, self.labels)
        producer = self.facts.producer(value.root)
        at = value.layout
        moves = self.region.movable_at(producer)
        if moves is not None:
            at = self.labels[id(moves)]
        elif len(layouts) == 1:
            # A fixed producer's layout is among them; a foreign Transpose writes what is wanted.
            (at,) = layouts
        own = {id(node) for node in value.transposes}
        readers = [
            (node, tensor, layout)
            for tensor, layout in value.members
            for node in self.facts.consumers(tensor)
            if id(node) not in own
        ]
        return _Route(value, at, len(layouts) > 1, producer, readers)

    def clear(self, route: _Route) -> Node | None:
        """Remove the Transposes of a value but for one that already does what is wanted."""
        kept: Node | None = None
        for node in route.value.transposes:
            serves = (
                kept is None
                and route.both
                and node.inputs[0] is self.tensor(route, route.at)
                and node.outputs[0] is self.tensor(route, 1 - route.at)
            )
            if serves:
                kept = node
                self.rewriter.revisit(node)
            else:
                self.rewriter.remove(node)
        return kept

    def connect_producer(self, route: _Route) -> None:
        producer, root = route.producer, route.value.root
        if producer is None:
            return
        target = self.tensor(route, route.at)
        if target is not root:
            index = next(i for i, t in enumerate(producer.outputs) if t is root)
            self.rewriter.set_output(producer, index, target)
        if route.at == route.value.layout or self.region.movable_at(producer) is not None:
            return
        axes = self.region.axes_from[route.value.layout]
        perm = perm_of(producer, self.facts) or ()
        moved = [perm[axis] for axis in inverse(axes)]
        self.rewriter.set_attribute(producer, "perm", moved)

    def add_transpose(self, route: _Route) -> None:
        value, at = route.value, route.at
        near = value.transposes[0] if value.transposes else route.producer
        self.rewriter.add(
            "Transpose",
            [self.tensor(route, at)],
            [self.tensor(route, 1 - at)],
            {"perm": list(self.region.perm_into[1 - at])},
            near=near or route.readers[0][0],
        )

    def connect_readers(self, route: _Route) -> None:
        for node, old, layout in route.readers:
            moves = self.region.movable_at(node)
            if moves is not None:
                wanted = self.labels[id(moves)]
            elif self.facts.is_op(node, "Transpose") and not route.both:
                wanted = route.at
            else:
                wanted = layout
            new = self.tensor(route, wanted)
            for index, tensor in enumerate(list(node.inputs)):
                if tensor is old and new is not old:
                    self.rewriter.set_input(node, index, new)
            if moves is None and wanted != layout:
                axes = self.region.axes_from[layout]
                perm = perm_of(node, self.facts) or ()
                self.rewriter.set_attribute(node, "perm", [axes[axis] for axis in perm])

    def tensor(self, route: _Route, layout: int) -> Tensor:
        """The tensor that is to hold a value in *layout*."""
        if layout in route.tensors:
            return route.tensors[layout]
        value = route.value
        existing = [value.pinned[layout]] if layout in value.pinned else []
        existing += [tensor for tensor, at in value.members if at == layout]
        if existing:
            tensor = existing[0]
        else:
            shape = self.facts.shape(value.root)
            if shape is not None:
                axes = self.region.axes_from[value.layout]
                shape = tuple(shape[axis] for axis in inverse(axes))
            hint = f"{value.root.name}/transposed"
            tensor = self.rewriter.variable(hint, value.root, shape)
        route.tensors[layout] = tensor
        return tensor
