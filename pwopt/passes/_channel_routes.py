"""Operators that compute nothing and only say which channel goes where.

Concat, Split, Slice and Gather along the channel axis, and channel shuffles: Reshape, Transpose,
Reshape, and perhaps a selection behind them. What a shuffle does is found by following the axes:
each axis of an inner value is a product of *factors*, which are whole axes of the image or parts of
its channel axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pwopt.graph import Dim, Facts, Node, Tensor

__all__ = ["Route", "Routes"]

Array = np.ndarray[Any, Any]

_LONGEST = 12
"""Nodes that one shuffle is written in."""


@dataclass(frozen=True, eq=False)
class Route:
    """Nodes that only move channels.

    Attributes:
        nodes: the nodes, none of whose inner values is read elsewhere.
        inputs: tensors ``[N, C, ...]``.
        widths: their numbers of channels.
        outputs: tensors of the same rank.
        origins: per output and channel, the input and the channel of it that stands there.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Tensor, ...]
    widths: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    origins: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def is_concat(self) -> bool:
        """Whether it only puts tensors side by side."""
        return self.nodes[0].op == "Concat"

    @property
    def permutation(self) -> tuple[int, ...] | None:
        """Where the output's channels come from, if they are the one input's in another order."""
        if len(self.inputs) != 1 or len(self.outputs) != 1 or self.is_concat:
            return None
        order = tuple(channel for _, channel in self.origins[0])
        return order if sorted(order) == list(range(self.widths[0])) else None


class Routes:
    """Finds routes; remembers what it found, for one look at a graph."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._found: dict[int, Route | None] = {}

    def at(self, node: Node | None) -> Route | None:
        """The route that *node* is part of."""
        if node is None or not self._facts.is_op(node, *_MOVERS, "Concat"):
            return None
        if id(node) not in self._found:
            route = _find(node, self._facts)
            for member in (node,) if route is None else route.nodes:
                self._found[id(member)] = route
        return self._found[id(node)]


def _find(node: Node, facts: Facts) -> Route | None:
    if node.op == "Concat":
        return _concat(node, facts)
    if node.op in ("Split", "Slice", "Gather"):
        route = _follow(node, facts)
        if route is not None:
            return route
    first = _first_of_shuffle(node, facts)
    route = None if first is None else _follow(first, facts)
    # A node beside the path is no part of it.
    return route if route is not None and any(n is node for n in route.nodes) else None


def _concat(node: Node, facts: Facts) -> Route | None:
    output = node.outputs[0]
    rank = facts.rank(output)
    if rank is None or rank < 3 or facts.attr_int(node, "axis", 1) % rank != 1:
        return None
    sizes = [facts.channels(t) for t in node.inputs]
    known = [s for s in sizes if s is not None]
    if len(known) < len(sizes) or any(facts.is_constant(t) for t in node.inputs):
        return None
    origins = tuple((i, c) for i, size in enumerate(known) for c in range(size))
    return Route((node,), tuple(node.inputs), tuple(known), (output,), (origins,))


def _first_of_shuffle(node: Node, facts: Facts) -> Node | None:
    """The Reshape that a shuffle with *node* in it begins with."""
    transpose = node if node.op == "Transpose" else None
    if node.op == "Reshape":
        below = facts.sole_consumer(node.outputs[0])
        transpose = below if facts.is_op(below, "Transpose") else None
    above = node
    for _ in range(_LONGEST if transpose is None else 0):
        producer = facts.producer(above.inputs[0])
        if producer is None or not facts.is_op(producer, *_MOVERS):
            return None
        above = producer
        if above.op == "Transpose":
            transpose = above
            break
    if transpose is None:
        return None
    first = facts.producer(transpose.inputs[0])
    is_reshape = facts.is_op(first, "Reshape") and facts.is_private(transpose.inputs[0])
    return first if is_reshape else None


# -- following axes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factor:
    """A factor of an axis.

    Attributes:
        size: how many elements.
        axis: the axis of the image that it is, if it is a whole one other than the channels'.
        channels: what each element adds to the number of a channel, if it is a part of those.
    """

    size: Dim
    axis: int = 1
    channels: tuple[int, ...] = ()


_Axis = tuple[_Factor, ...]


@dataclass(frozen=True)
class _Value:
    """A value inside of a route: its axes, and what the number of every channel begins at."""

    axes: tuple[_Axis, ...]
    first: int = 0


def _image(shape: Sequence[Dim], channels: int) -> _Value:
    axes = [() if d == 1 else (_Factor(d, axis),) for axis, d in enumerate(shape)]
    axes[1] = (_Factor(channels, 1, tuple(range(channels))),)
    return _Value(tuple(axes))


def _follow(first: Node, facts: Facts) -> Route | None:
    """From *first* down to where every value has the shape of an image again."""
    source = first.inputs[0]
    shape, channels = facts.shape(source), facts.channels(source)
    if shape is None or channels is None or len(shape) < 3 or facts.is_constant(source):
        return None
    start = _image(shape, channels)
    nodes: list[Node] = []
    outputs: list[Tensor] = []
    origins: list[tuple[tuple[int, int], ...]] = []
    pending = [(first, start)]
    while pending:
        node, value = pending.pop(0)
        nodes.append(node)
        results = _results(node, value, facts)
        if results is None or len(nodes) > _LONGEST:
            return None
        for tensor, result in zip(node.outputs, results, strict=True):
            found = _channels_of(result, start)
            if found is not None:
                outputs.append(tensor)
                origins.append(tuple((0, c) for c in found))
                continue
            readers = facts.consumers(tensor)
            if not readers or facts.is_seen_outside(tensor):
                return None
            pending += [(reader, result) for reader in readers]
    return Route(tuple(nodes), (source,), (channels,), tuple(outputs), tuple(origins))


def _results(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    if not facts.is_op(node, *_MOVERS) or any(t.is_empty() for t in node.outputs):
        return None
    results = _MOVERS[node.op](node, value, facts)
    return results if results is not None and len(results) == len(node.outputs) else None


def _channels_of(value: _Value, image: _Value) -> tuple[int, ...] | None:
    """Which channels of *image* these are, if it is nothing but channels in some order."""
    if len(value.axes) != len(image.axes) or value.axes[0] != image.axes[0]:
        return None
    if value.axes[2:] != image.axes[2:]:
        return None
    numbers = _joined(value.axes[1])
    return None if numbers is None else tuple(value.first + n for n in numbers)


def _joined(axis: _Axis) -> tuple[int, ...] | None:
    """What each element of an axis adds to the number of a channel, if it is of channels only."""
    numbers: Array = np.zeros(1, np.int64)
    for factor in axis:
        if not factor.channels:
            return None
        numbers = np.add.outer(numbers, np.array(factor.channels, np.int64)).reshape(-1)
    return tuple(numbers.tolist())


def _constant_ints(node: Node, index: int, facts: Facts) -> tuple[int, ...] | None:
    values = facts.constant(facts.input(node, index))
    return None if values is None else tuple(int(v) for v in values.reshape(-1))


# -- what nodes do to axes -------------------------------------------------------------------------


def _transpose(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    rank = len(value.axes)
    perm = facts.attr_ints(node, "perm", tuple(reversed(range(rank))))
    if len(perm) != rank:
        return None
    return [_Value(tuple(value.axes[a] for a in perm), value.first)]


def _reshape(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    target = _constant_ints(node, 1, facts) if facts.opset >= 5 else None
    if target is None or target.count(-1) > 1:
        return None
    copies = not facts.attr_int(node, "allowzero", 0)
    wanted = [value.axes[i] if t == 0 and copies else t for i, t in _places(target, value, copies)]
    if len(wanted) < len(target):
        return None
    cut = _Cut([factor for axis in value.axes for factor in axis])
    rest = wanted.index(-1) if -1 in wanted else len(wanted)
    before = [cut.take(w) for w in wanted[:rest]]
    behind = [cut.take(w, from_end=True) for w in reversed(wanted[rest + 1 :])]
    middle = [tuple(cut.left)] if rest < len(wanted) else []
    if cut.failed or (cut.left and not middle):
        return None
    return [_Value((*before, *middle, *reversed(behind)), value.first)]


def _places(target: Sequence[int], value: _Value, copies: bool) -> list[tuple[int, int]]:
    """Elements of a Reshape's target with their places, up to one that copies no axis."""
    places: list[tuple[int, int]] = []
    for index, size in enumerate(target):
        if size == 0 and (not copies or index >= len(value.axes)):
            break
        places.append((index, size))
    return places


@dataclass
class _Cut:
    """Factors in the order of memory, being dealt out to new axes from either end."""

    left: list[_Factor]
    failed: bool = field(default=False, init=False)

    def take(self, wanted: int | _Axis, *, from_end: bool = False) -> _Axis:
        """Factors for an axis of a size, or for one that equals another."""
        if isinstance(wanted, tuple):
            known = [f.size for f in wanted if isinstance(f.size, int)]
            if len(known) < len(wanted):
                return self._take_same(wanted, from_end)
            wanted = math.prod(known)
        taken: list[_Factor] = []
        missing = wanted
        while missing > 1 and not self.failed:
            factor = self.left.pop(-1 if from_end else 0) if self.left else _Factor(None)
            part = self._part(factor, missing, from_end)
            if part is None:
                self.failed = True
                break
            taken.append(part)
            assert isinstance(part.size, int)
            missing //= part.size
        self.failed |= missing != 1
        return tuple(reversed(taken)) if from_end else tuple(taken)

    def _take_same(self, wanted: _Axis, from_end: bool) -> _Axis:
        count = len(wanted)
        found = tuple(self.left[-count:] if from_end else self.left[:count])
        del self.left[-count if from_end else 0 : None if from_end else count]
        self.failed |= found != wanted
        return found

    def _part(self, factor: _Factor, missing: int, from_end: bool) -> _Factor | None:
        """As much of *factor* as fits; the rest of a part of the channels is left."""
        if not isinstance(factor.size, int):
            return None
        if missing % factor.size == 0:
            return factor
        if factor.size % missing or not factor.channels:
            return None
        inner = missing if from_end else factor.size // missing
        table = np.array(factor.channels, np.int64).reshape(-1, inner)
        outer_steps, inner_steps = table[:, 0], table[0] - table[0, 0]
        if not np.array_equal(table, np.add.outer(outer_steps, inner_steps)):
            return None
        outside = _Factor(len(outer_steps), 1, tuple(outer_steps.tolist()))
        inside = _Factor(inner, 1, tuple(inner_steps.tolist()))
        if from_end:
            self.left.append(outside)
            return inside
        self.left.insert(0, inside)
        return outside


def _selection(value: _Value, axis: int, parts: Sequence[Array]) -> list[_Value] | None:
    """*value* with the elements *parts* of one axis; a part without dimensions drops the axis."""
    numbers = _joined(value.axes[axis])
    if numbers is None:
        return None
    results: list[_Value] = []
    for part in parts:
        taken = np.array(numbers, np.int64)[part]
        before, behind = value.axes[:axis], value.axes[axis + 1 :]
        if taken.ndim == 0:
            results.append(_Value((*before, *behind), value.first + int(taken)))
            continue
        if not taken.size:
            return None
        kept: _Axis = (_Factor(taken.size, 1, tuple(taken.tolist())),)
        first = value.first
        if taken.size == 1:
            kept, first = (), first + int(taken[0])
        results.append(_Value((*before, kept, *behind), first))
    return results


def _size(value: _Value, axis: int) -> int | None:
    numbers = _joined(value.axes[axis])
    return None if numbers is None else len(numbers)


def _gather(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    indices = facts.constant(facts.input(node, 1))
    axis = facts.attr_int(node, "axis", 0) % len(value.axes)
    size = _size(value, axis)
    if indices is None or size is None or indices.ndim > 1 or not indices.size:
        return None
    if (indices < -size).any() or (indices >= size).any():
        return None
    return _selection(value, axis, [np.asarray(indices % size)])


def _slice(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    bounds = _slice_bounds(node, facts)
    if bounds is None:
        return None
    for start, end, axis, step in zip(*bounds, strict=True):
        place = axis % len(value.axes)
        size = _size(value, place)
        if size is None or step < 1:
            return None
        selected = _selection(value, place, [np.arange(size)[start:end:step]])
        if selected is None:
            return None
        (value,) = selected
    return [value]


def _slice_bounds(node: Node, facts: Facts) -> tuple[tuple[int, ...], ...] | None:
    """Starts, ends, axes and steps."""
    if facts.opset < 10:
        starts, ends = (facts.attr_ints(node, key, ()) for key in ("starts", "ends"))
        axes = facts.attr_ints(node, "axes", tuple(range(len(starts))))
        return starts, ends, axes, (1,) * len(starts)
    given = [_constant_ints(node, index, facts) for index in range(1, 5)]
    starts_, ends_, axes_, steps_ = given
    for index in (3, 4):
        if given[index - 1] is None and facts.input(node, index) is not None:
            return None
    if starts_ is None or ends_ is None:
        return None
    count = len(starts_)
    axes = tuple(range(count)) if axes_ is None else axes_
    return starts_, ends_, axes, (1,) * count if steps_ is None else steps_


def _split(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    axis = facts.attr_int(node, "axis", 0) % len(value.axes)
    size = _size(value, axis)
    sizes: tuple[int, ...] | None = facts.attr_ints(node, "split", ())
    if facts.input(node, 1) is not None:
        sizes = _constant_ints(node, 1, facts)
    if size is None or sizes is None:
        return None
    # Without sizes the parts are equal, but for a last one that may be smaller.
    count = len(node.outputs)
    ends = (
        np.cumsum(sizes) if sizes else np.minimum(np.arange(1, count + 1) * -(-size // count), size)
    )
    if ends[-1] != size:
        return None
    return _selection(value, axis, np.split(np.arange(size), ends[:-1]))


def _axes_of(node: Node, rank: int, facts: Facts) -> tuple[int, ...] | None:
    if "axes" in node.attrs:
        axes: tuple[int, ...] | None = facts.attr_ints(node, "axes", ())
    else:
        axes = _constant_ints(node, 1, facts)
    return None if axes is None else tuple(sorted(a % rank for a in axes))


def _squeeze(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    axes = _axes_of(node, len(value.axes), facts)
    if axes is None or any(value.axes[a] for a in axes):
        return None
    return [_Value(tuple(a for i, a in enumerate(value.axes) if i not in axes), value.first)]


def _unsqueeze(node: Node, value: _Value, facts: Facts) -> list[_Value] | None:
    given = _axes_of(node, 1, facts)
    count = len(value.axes) + len(given or ())
    axes = _axes_of(node, count, facts)
    if axes is None:
        return None
    rest = iter(value.axes)
    return [_Value(tuple(() if i in axes else next(rest) for i in range(count)), value.first)]


_MOVERS: Mapping[str, Callable[[Node, _Value, Facts], list[_Value] | None]] = {
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
