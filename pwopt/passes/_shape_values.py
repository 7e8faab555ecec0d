"""Integers that a graph computes shapes with, as far as they are known before it runs.

An element is known (an ``int``), equal to a symbolic dimension (its name), or unknown (``None``).
So ``Concat(Unsqueeze(Gather(Shape(x), 0)), [-1])`` is ``("N", -1)`` where x is ``[N, 3, 8, 8]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pwopt.graph import Dim, Facts, Node, Tensor

__all__ = ["Elements", "elements", "is_shape_arithmetic"]

_MAX_ELEMENTS = 64
_MAX_DEPTH = 12
_MAX_NODES = 128
"""Longer chains than exporters write are cut off, so that a visit costs bounded time."""

_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


@dataclass(frozen=True)
class Elements:
    """The elements of an integer tensor with at most one dimension."""

    values: tuple[Dim, ...]
    rank: int

    @property
    def known(self) -> tuple[int, ...] | None:
        """All elements, if each is known."""
        known = tuple(v for v in self.values if isinstance(v, int))
        return known if len(known) == len(self.values) else None

    def stretched(self, count: int) -> tuple[Dim, ...]:
        """The elements, a single one repeated *count* times."""
        return self.values if len(self.values) == count else self.values * count


class _Walk:
    """One walk up the graph, which ends when its budget is spent."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._nodes_left = _MAX_NODES

    def elements(self, tensor: Tensor | None, depth: int) -> Elements | None:
        self._nodes_left -= 1
        if tensor is None or depth > _MAX_DEPTH or self._nodes_left < 0:
            return None
        if self.facts.dtype(tensor) not in _INTEGERS or (self.facts.rank(tensor) or 0) > 1:
            return None
        if self.facts.is_constant(tensor):
            return self._of_constant(tensor)
        node = self.facts.producer(tensor)
        if node is not None and is_shape_arithmetic(node, self.facts):
            found = _EVALUATORS[node.op](_View(node, self, depth))
            if found is not None:
                return found if len(found.values) <= _MAX_ELEMENTS else None
        count = self._count(tensor)
        return None if count is None else Elements((None,) * count, len(tensor.shape))

    def _of_constant(self, tensor: Tensor) -> Elements | None:
        if self._count(tensor) is None:
            return None
        values = self.facts.constant(tensor)
        if values is None:
            return None
        return Elements(tuple(int(v) for v in values.reshape(-1)), values.ndim)

    def _count(self, tensor: Tensor) -> int | None:
        """Number of elements of *tensor*, if it is a short list of integers."""
        shape = self.facts.static_shape(tensor)
        if shape is None or len(shape) > 1:
            return None
        count = shape[0] if shape else 1
        return count if count <= _MAX_ELEMENTS else None


@dataclass(frozen=True)
class _View:
    """A node as an evaluator sees it."""

    node: Node
    walk: _Walk
    depth: int

    @property
    def facts(self) -> Facts:
        return self.walk.facts

    def read(self, index: int) -> Elements | None:
        return self.walk.elements(self.facts.input(self.node, index), self.depth + 1)

    def known(self, index: int) -> tuple[int, ...] | None:
        found = self.read(index)
        return None if found is None else found.known


def is_shape_arithmetic(node: Node, facts: Facts) -> bool:
    """Whether :func:`elements` can look through *node*."""
    return facts.is_op(node, *_EVALUATORS)


def elements(tensor: Tensor | None, facts: Facts) -> Elements | None:
    """What is known of *tensor*'s elements; ``None`` if it is no short list of integers."""
    return _Walk(facts).elements(tensor, 0)


def _shape(view: _View) -> Elements | None:
    shape = view.facts.shape(view.node.inputs[0])
    if shape is None:
        return None
    start = view.facts.attr_int(view.node, "start", 0)
    end = view.facts.attr_int(view.node, "end", len(shape))
    return Elements(tuple(None if d == "" else d for d in shape[start:end]), 1)


def _size(view: _View) -> Elements | None:
    shape = view.facts.static_shape(view.node.inputs[0])
    return None if shape is None else Elements((int(np.prod(shape, dtype=np.int64)),), 0)


def _identity(view: _View) -> Elements | None:
    return view.read(0)


def _cast(view: _View) -> Elements | None:
    found = view.read(0)
    dtype = view.facts.dtype(view.node.outputs[0])
    if found is None or dtype is None:
        return None
    limit = np.iinfo(dtype)
    fits = all(limit.min <= v <= limit.max for v in found.values if isinstance(v, int))
    return found if fits else None


def _gather(view: _View) -> Elements | None:
    data, index = view.read(0), view.read(1)
    if data is None or index is None or index.known is None or data.rank != 1:
        return None
    count = len(data.values)
    if not all(-count <= i < count for i in index.known):
        return None
    return Elements(tuple(data.values[i] for i in index.known), index.rank)


def _slice(view: _View) -> Elements | None:
    data = view.read(0)
    if data is None or data.rank != 1:
        return None
    bounds = _slice_bounds(view)
    if bounds is None or any(len(b) != 1 for b in bounds):
        return None
    (start,), (end,), (step,) = bounds
    return Elements(data.values[start:end:step], 1) if step else None


def _slice_bounds(view: _View) -> tuple[tuple[int, ...], ...] | None:
    if view.facts.opset < 10:
        attributes = (view.facts.attr_ints(view.node, key, ()) for key in ("starts", "ends"))
        return (*attributes, (1,))
    starts, ends = view.known(1), view.known(2)
    steps = (1,) if view.facts.input(view.node, 4) is None else view.known(4)
    return None if starts is None or ends is None or steps is None else (starts, ends, steps)


def _concat(view: _View) -> Elements | None:
    values: list[Dim] = []
    for index in range(len(view.node.inputs)):
        part = view.read(index)
        if part is None or part.rank != 1:
            return None
        values.extend(part.values)
    return Elements(tuple(values), 1)


def _rerank(view: _View) -> Elements | None:
    """Squeeze and Unsqueeze of a single element."""
    found, rank = view.read(0), view.facts.rank(view.node.outputs[0])
    if found is None or rank is None or rank > 1 or len(found.values) != 1:
        return None
    return Elements(found.values, rank)


def _reshape(view: _View) -> Elements | None:
    found, target = view.read(0), view.read(1)
    if found is None or target is None or len(target.values) > 1:
        return None
    if not target.values and len(found.values) != 1:
        return None
    return Elements(found.values, len(target.values))


def _arithmetic(apply: Callable[[int, int], int]) -> Callable[[_View], Elements | None]:
    def evaluate(view: _View) -> Elements | None:
        left, right = view.read(0), view.read(1)
        if left is None or right is None or view.facts.opset < 7:
            return None
        counts = {len(left.values), len(right.values)} - {1}
        if len(counts) > 1:
            return None
        count = counts.pop() if counts else 1
        pairs = zip(left.stretched(count), right.stretched(count), strict=True)
        values = tuple(_combine(apply, a, b) for a, b in pairs)
        return Elements(values, max(left.rank, right.rank))

    return evaluate


def _combine(apply: Callable[[int, int], int], a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        # ONNX truncates where Python floors; the two agree on sizes.
        return None if apply is operator.floordiv and (a < 0 or b <= 0) else apply(a, b)
    neutral = _NEUTRAL[apply]
    if isinstance(a, str) and b == neutral:
        return a
    return b if isinstance(b, str) and a == neutral and apply in _COMMUTATIVE else None


_NEUTRAL: Mapping[Callable[[int, int], int], int] = {
    operator.add: 0,
    operator.sub: 0,
    operator.mul: 1,
    operator.floordiv: 1,
}
_COMMUTATIVE = (operator.add, operator.mul)

_EVALUATORS: Mapping[str, Callable[[_View], Elements | None]] = {
    "Add": _arithmetic(operator.add),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _arithmetic(operator.floordiv),
    "Gather": _gather,
    "Identity": _identity,
    "Mul": _arithmetic(operator.mul),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _rerank,
    "Sub": _arithmetic(operator.sub),
    "Unsqueeze": _rerank,
}
