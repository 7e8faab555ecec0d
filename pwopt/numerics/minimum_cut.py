"""Minimum s-t cuts: the cheapest way to give every node one of two labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

__all__ = ["minimum_cut"]


def minimum_cut(
    size: int, edges: Iterable[tuple[int, int, int]], source: int, sink: int
) -> tuple[int, list[bool]]:
    """Cut the nodes ``0 .. size-1`` into a side of *source* and a side of *sink*.

    Dinic's algorithm (Dinitz 1970): shortest augmenting paths, by levels; integers of any size.

    Args:
        size: number of nodes.
        edges: ``(tail, head, capacity)``; the capacity is paid if the tail lies on the side of
            the source and the head does not.
        source: the node that is labelled ``False``.
        sink: the node that is labelled ``True``; not the source.

    Returns:
        The smallest sum of cut capacities, and for every node whether it lies on the side of the
        sink. Among equal cuts it is the one with the fewest nodes on the side of the source.
    """
    heads: list[int] = []
    residual: list[int] = []
    leaving: list[list[int]] = [[] for _ in range(size)]
    for tail, head, capacity in edges:
        leaving[tail].append(len(heads))
        leaving[head].append(len(heads) + 1)
        heads += (head, tail)
        residual += (capacity, 0)
    flow = 0
    levels = _levels(source, leaving, heads, residual)
    while levels[sink] >= 0:
        flow += _blocking_flow(source, sink, levels, leaving, heads, residual)
        levels = _levels(source, leaving, heads, residual)
    return flow, [level < 0 for level in levels]


def _levels(
    source: int, leaving: list[list[int]], heads: list[int], residual: list[int]
) -> list[int]:
    """Distances from *source* along edges with capacity left; -1 where there is no way."""
    levels = [-1] * len(leaving)
    levels[source] = 0
    queue = deque([source])
    while queue:
        node = queue.popleft()
        for edge in leaving[node]:
            head = heads[edge]
            if residual[edge] and levels[head] < 0:
                levels[head] = levels[node] + 1
                queue.append(head)
    return levels


def _blocking_flow(
    source: int,
    sink: int,
    levels: list[int],
    leaving: list[list[int]],
    heads: list[int],
    residual: list[int],
) -> int:
    """Saturate every path from level to level; return the flow that was added."""
    total = 0
    untried = [0] * len(leaving)
    path: list[int] = []
    node = source
    while True:
        if node == sink:
            pushed = min(residual[edge] for edge in path)
            for edge in path:
                residual[edge] -= pushed
                residual[edge ^ 1] += pushed
            total += pushed
            path.clear()
            node = source
            continue
        while untried[node] < len(leaving[node]):
            edge = leaving[node][untried[node]]
            if residual[edge] and levels[heads[edge]] == levels[node] + 1:
                break
            untried[node] += 1
        else:
            if node == source:
                return total
            levels[node] = -1
            node = heads[path.pop() ^ 1]
            continue
        path.append(edge)
        node = heads[edge]
