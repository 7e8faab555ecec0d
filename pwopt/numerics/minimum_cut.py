"""Minimum s-t cuts: the cheapest way to give every node one of two labels."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["minimum_cut"]


def minimum_cut(
    size: int, edges: Iterable[tuple[int, int, int]], source: int, sink: int
) -> tuple[int, list[bool]]:
    """Cut the nodes ``0 .. size-1`` into a side of *source* and a side of *sink*.

    The flow is NetworkX's, by Dinitz's algorithm (1970), on integers of any size.

    Args:
        size: number of nodes.
        edges: ``(tail, head, capacity)``; the capacity is paid if the tail lies on the side of
            the source and the head does not. Parallel edges add up.
        source: the node that is labelled ``False``.
        sink: the node that is labelled ``True``; not the source.

    Returns:
        The smallest sum of cut capacities, and for every node whether it lies on the side of the
        sink. Among equal cuts it is the one with the fewest nodes on the side of the source.
    """
    # Slow to import, and few models have a region to cut.
    import networkx as nx
    from networkx.algorithms.flow import dinitz

    # NetworkX keeps the side of the sink small. Turned around, source and sink swap roles.
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(size))
    for tail, head, capacity in edges:
        known = graph.get_edge_data(head, tail, {"capacity": 0})["capacity"]
        graph.add_edge(head, tail, capacity=known + capacity)
    value, (at_sink, _) = nx.minimum_cut(graph, sink, source, flow_func=dinitz)
    return int(value), [node in at_sink for node in range(size)]
