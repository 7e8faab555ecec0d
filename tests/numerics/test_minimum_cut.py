"""Minimum cuts against exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics.minimum_cut import minimum_cut

Edges = list[tuple[int, int, int]]


def cost(edges: Edges, side: list[bool]) -> int:
    return sum(capacity for tail, head, capacity in edges if not side[tail] and side[head])


@st.composite
def networks(draw: st.DrawFn, largest: int) -> tuple[int, Edges]:
    size = draw(st.integers(2, largest))
    node = st.integers(0, size - 1)
    edges = draw(st.lists(st.tuples(node, node, st.integers(0, 20)), max_size=4 * size))
    return size, [(tail, head, capacity) for tail, head, capacity in edges if tail != head]


@settings(max_examples=100, deadline=None)
@given(networks(7))
def test_no_labelling_is_cheaper(network: tuple[int, Edges]) -> None:
    size, edges = network
    value, side = minimum_cut(size, edges, 0, 1)
    assert not side[0]
    assert side[1]
    assert cost(edges, side) == value
    rest = itertools.product([False, True], repeat=size - 2)
    every = [[False, True, *labels] for labels in rest]
    assert value == min(cost(edges, labels) for labels in every)
    cheapest = [labels for labels in every if cost(edges, labels) == value]
    assert side.count(False) == min(labels.count(False) for labels in cheapest)


@settings(max_examples=30, deadline=None)
@given(networks(60))
def test_flow_and_cut_agree(network: tuple[int, Edges]) -> None:
    # The value is the flow that was pushed; a cut that costs the same proves both the best.
    size, edges = network
    value, side = minimum_cut(size, edges, 0, 1)
    assert value == cost(edges, side)


def test_a_long_chain_does_not_recurse_and_takes_large_capacities() -> None:
    length = 5000
    edges = [(i, i + 1, 10**30) for i in range(length)]
    edges[1234] = (1234, 1235, 10**20)
    value, side = minimum_cut(length + 1, edges, 0, length)
    assert value == 10**20
    assert side == [i > 1234 for i in range(length + 1)]
