"""Which symbolic dimensions are equal for certain."""

from __future__ import annotations

from itertools import chain

from pwopt.graph import Facts, Tensor

__all__ = ["is_reliable", "same_but_channels"]


def is_reliable(name: str, facts: Facts) -> bool:
    """Whether equal names of dimensions mean equal sizes.

    Some exporters call all unknown dimensions alike. Such a name stands at several places of an
    input's shape, or is no name at all ("?", "None").
    """
    if not name.isidentifier() or name.lower() in ("none", "unknown", "dynamic"):
        return False
    shapes = [facts.shape(tensor) or () for tensor in facts.inputs]
    if any(shape.count(name) > 1 for shape in shapes):
        return False
    places = chain.from_iterable(enumerate(shape) for shape in shapes)
    return len({axis for axis, dim in places if dim == name}) <= 1


def same_but_channels(first: Tensor, second: Tensor, facts: Facts) -> bool:
    """Whether two tensors are certain to have the same shape, their channels (axis 1) aside."""
    left, right = facts.shape(first), facts.shape(second)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(
        a == b and (isinstance(a, int) or (isinstance(a, str) and is_reliable(a, facts)))
        for axis, (a, b) in enumerate(zip(left, right, strict=True))
        if axis != 1
    )
