"""Common subexpressions: nodes that compute the same from the same, found by hashing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.passes._steps import Step

__all__ = ["merge_equal"]

_RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
_MAX_COMPARED = 64
"""Constants up to this many elements are compared by value, larger ones by identity."""


def merge_equal(node: Node, facts: Facts) -> Step | None:
    """Merge equal nodes among those that read what *node* computes.

    Equal nodes read the same tensor first, so they are found where it is produced; nodes that read
    a graph input are looked at by the first of them. Each node is hashed once per visit, at the
    first of its inputs that is not constant.
    """
    groups = [
        group
        for tensor in _tensors(node, facts)
        if len(tensor.outputs) > 1
        for group in _groups(tensor, facts)
    ]
    if not groups:
        return None

    def apply(rewriter: Rewriter) -> None:
        for kept, *others in groups:
            for other in others:
                _merge(kept, other, rewriter)

    return Step("merge-equal", apply)


def _tensors(node: Node, facts: Facts) -> Iterator[Tensor]:
    yield from node.outputs
    for tensor in {id(t): t for t in node.inputs}.values():
        if facts.is_input(tensor) and tensor.outputs[0] is node:
            yield tensor


def _groups(tensor: Tensor, facts: Facts) -> Iterator[Sequence[Node]]:
    """Lists of equal readers of *tensor*: the one to keep first, then those that can go."""
    found: dict[Hashable, list[Node]] = {}
    for reader in facts.consumers(tensor):
        if _first_variable(reader, facts) is tensor and _is_deterministic(reader, facts):
            key = _key(reader, facts)
            if key is not None:
                found.setdefault(key, []).append(reader)
    for nodes in found.values():
        if len(nodes) < 2:
            continue
        # A name that is seen outside stays, and so does its node.
        nodes.sort(key=lambda n: not _is_seen_outside(n, facts))
        others = [n for n in nodes[1:] if not _is_seen_outside(n, facts)]
        if others:
            yield [nodes[0], *others]


def _is_seen_outside(node: Node, facts: Facts) -> bool:
    return any(facts.is_seen_outside(t) for t in node.outputs)


def _first_variable(node: Node, facts: Facts) -> Tensor | None:
    for tensor in node.inputs:
        if not tensor.is_empty() and not facts.is_constant(tensor):
            return tensor
    return None


def _is_deterministic(node: Node, facts: Facts) -> bool:
    if facts.is_op(node, *_RANDOM) or facts.has_subgraph(node):
        return False
    return facts.is_op(node, node.op) and facts.has_op(node.op)


def _key(node: Node, facts: Facts) -> Hashable | None:
    attributes = []
    for name, value in sorted(node.attrs.items()):
        items = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(item, int | float | str) for item in items):
            return None
        attributes.append((name, isinstance(value, list), tuple((type(i), i) for i in items)))
    return (
        node.op,
        tuple(attributes),
        tuple(_operand(t, facts) for t in node.inputs),
        tuple(t.is_empty() for t in node.outputs),
    )


def _operand(tensor: Tensor, facts: Facts) -> Hashable:
    if tensor.is_empty():
        return ""
    shape = facts.static_shape(tensor)
    if not facts.is_constant(tensor) or shape is None or facts.dtype(tensor) is None:
        return id(tensor)
    values = facts.constant(tensor) if math.prod(shape) <= _MAX_COMPARED else None
    if values is None or values.dtype.hasobject:
        return id(tensor)
    return values.dtype.str, shape, values.tobytes()


def _merge(kept: Node, other: Node, rewriter: Rewriter) -> None:
    rewriter.remove(other)
    for old, new in zip(list(other.outputs), list(kept.outputs), strict=True):
        if not old.is_empty():
            rewriter.redirect(old, new)
