"""Slices that take every n-th row or column, read as an offset and a step per axis of space."""

from __future__ import annotations

from dataclasses import dataclass

from pwopt.graph import Facts, Node, Tensor

__all__ = ["Sampling", "sampling", "taken"]

_OPEN_END = 2**31 - 1
"""An end from here on means the end of the axis, whatever its size."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """A tensor as ``source[:, :, offset::step, ...]``.

    Attributes:
        source: ``[N, C, *spatial]``.
        offsets: per axis of space, below the step.
        steps: per axis of space.
        nodes: the Slices in between, the last one first.
    """

    source: Tensor
    offsets: tuple[int, ...]
    steps: tuple[int, ...]
    nodes: tuple[Node, ...]


def sampling(tensor: Tensor, rank: int, facts: Facts) -> Sampling:
    """*tensor*, of *rank* dimensions, through all Slices that sample axes of space to their end."""
    space = rank - 2
    found = Sampling(tensor, (0,) * space, (1,) * space, ())
    while True:
        node = facts.producer(found.source)
        entries = taken(node, rank, facts) if node is not None else None
        if node is None or entries is None:
            return found
        offsets = tuple(a + s * b for (a, s), b in zip(entries, found.offsets, strict=True))
        steps = tuple(s * t for (_, s), t in zip(entries, found.steps, strict=True))
        found = Sampling(node.inputs[0], offsets, steps, (*found.nodes, node))


def taken(node: Node, rank: int, facts: Facts) -> list[tuple[int, int]] | None:
    """Offset and step per axis of space that the Slice *node* takes; ``None`` if it does else."""
    # Before opset 10 a Slice has no steps.
    if not facts.is_op(node, "Slice") or facts.opset < 10:
        return None
    given = [facts.constant(facts.input(node, index)) for index in range(1, 5)]
    starts, ends, axes, steps = (None if v is None else [int(i) for i in v] for v in given)
    if starts is None or ends is None:
        return None
    for index, values in ((3, axes), (4, steps)):
        if values is None and facts.input(node, index) is not None:
            return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    shape = facts.shape(node.inputs[0])
    found = [(0, 1)] * (rank - 2)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis % rank - 2
        size = shape[axis % rank] if shape is not None and len(shape) == rank else None
        if place < 0 or not 0 <= start < step or not _reaches_end(start, end, step, size):
            return None
        found[place] = (start, step)
    return found


def _reaches_end(start: int, end: int, step: int, size: int | str | None) -> bool:
    """Whether nothing is left out behind the last position taken."""
    if not isinstance(size, int):
        return end >= _OPEN_END
    if end < 0:
        end += size
    return (
        size > start
        and (min(end, size) - start + step - 1) // step == (size - start + step - 1) // step
    )
