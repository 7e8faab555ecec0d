"""Seconds from counts: a roofline with an efficiency per kind of kernel.

S. Williams, A. Waterman, D. Patterson: "Roofline: An Insightful Visual Performance Model for
Multicore Architectures" (Communications of the ACM 52(4), 2009): a kernel takes the longer of the
time to compute and the time to move its data. To that are added what an execution node by node
costs, and the three habits of ONNX Runtime on x86 that decide whether a rewrite pays:

* The start of every node costs a fixed time. Views cost only that; constants cost nothing.
* What directly follows a convolution is absorbed into it: a BatchNormalization or a per-channel
  factor or bias, then the addition of a residual, then one of the activations of
  :data:`ABSORBED_ACTIVATIONS`. They cost next to nothing.
* Convolutions keep their data in a channel-blocked layout, which survives some operators
  (:data:`LAYOUT_KEEPERS`) and no others. A tensor is copied wherever one side of it is blocked
  and the other is not.

The default figures were fitted to ONNX Runtime 1.31 on one core of an x86 server with AVX2. An
estimate serves to compare two ways of computing the same thing and to discard hopeless ones early;
where there is a clock, the clock decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from pwopt.cost.analytic import NodeCost, Operand, node_cost
from pwopt.cost.operators import WorkClass
from pwopt.graph import Facts, Node

__all__ = [
    "ABSORBED_ACTIVATIONS",
    "LAYOUT_KEEPERS",
    "Machine",
    "estimate_seconds",
    "rewrite_seconds",
    "window_seconds",
]


@dataclass(frozen=True)
class Machine:
    """One processor core, or a whole GPU, as the estimates see it.

    Attributes:
        gflops: peak 10^9 floating-point operations per second: 96 are two AVX2
            multiply-add units on 8 floats each, at 3 GHz.
        gbytes_per_s: 10^9 bytes per second, read and written together, of an elementwise kernel
            on activations, which lie in the outer caches.
        node_overhead_us: microseconds that the runtime spends on any node.
        channel_block: channels in a block of the convolutions' own layout; 0 if they have none.
        absorbs: whether the runtime lets a convolution take in what follows it.
    """

    gflops: float = 96.0
    gbytes_per_s: float = 30.0
    node_overhead_us: float = 1.5
    channel_block: int = 8
    absorbs: bool = True


class Efficiency(NamedTuple):
    """The fractions of a machine's peaks that a kind of kernel reaches."""

    compute: float
    bandwidth: float


_EFFICIENCY: Mapping[WorkClass, Efficiency] = MappingProxyType(
    {
        WorkClass.DENSE_CONV: Efficiency(0.90, 1.0),
        WorkClass.POINTWISE_CONV: Efficiency(0.82, 1.0),
        WorkClass.GROUPED_CONV: Efficiency(0.60, 1.0),
        WorkClass.DEPTHWISE_CONV: Efficiency(0.25, 0.5),
        WorkClass.CONV_TRANSPOSE: Efficiency(0.50, 0.5),
        WorkClass.MATMUL: Efficiency(0.76, 1.0),
        WorkClass.ELEMENTWISE: Efficiency(0.10, 1.0),
        WorkClass.POOL: Efficiency(0.15, 0.5),
        WorkClass.REDUCTION: Efficiency(0.10, 0.5),
        WorkClass.COPY: Efficiency(1.0, 1.0),
        WorkClass.TRANSPOSE: Efficiency(1.0, 0.5),
        WorkClass.OTHER: Efficiency(0.02, 0.1),
    }
)
_NARROW_GROUPS = Efficiency(0.10, 0.5)
"""Grouped convolutions whose groups are narrower than a block of channels."""

_SCALAR_NS: Mapping[str, float] = MappingProxyType(
    {
        "Celu": 2.3,
        "CumSum": 3.0,
        "DepthToSpace": 2.0,
        "Elu": 2.3,
        "Gelu": 1.3,
        "LRN": 30.0,
        "Log": 2.5,
        "Mish": 13.5,
        "PRelu": 5.3,
        "Pow": 6.0,
        "Selu": 2.2,
        "Sin": 2.3,
        "Sign": 1.2,
        "Softplus": 13.0,
        "SpaceToDepth": 0.8,
    }
)
"""Nanoseconds per output element of the kernels that are not vectorized, on the default machine."""
_SCALAR_GFLOPS = 96.0

ABSORBED_ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
"""Activations that ONNX Runtime's CPU kernels apply within the convolution before them."""

LAYOUT_KEEPERS = frozenset(
    {
        *ABSORBED_ACTIVATIONS,
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Concat",
        "Gelu",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSwish",
        "MaxPool",
        "Mul",
        "Pad",
        "Resize",
        "Sum",
        "Upsample",
    }
)
"""Operators that run in the convolutions' layout on blocked inputs of like shape."""

_CONVS = frozenset({"Conv", "com.microsoft.FusedConv"})
_BLOCKABLE = frozenset(
    {
        WorkClass.DENSE_CONV,
        WorkClass.DEPTHWISE_CONV,
        WorkClass.GROUPED_CONV,
        WorkClass.POINTWISE_CONV,
    }
)
_LOOK_BACK = 8
"""How many operators back a window looks for the layout that its inputs come in."""
_LOOK_AHEAD = 4
"""How many operators ahead a window is charged for the layout that its outputs come in."""


def estimate_seconds(costs: Iterable[NodeCost], machine: Machine | None = None) -> float:
    """Seconds that the nodes of *costs* take together, one after the other.

    Nodes that could not be counted add nothing, so check for them first
    (:attr:`pwopt.cost.ModelCost.unknown`).
    """
    region = _Region(tuple(costs), (), machine or Machine())
    return region.seconds()


def window_seconds(
    nodes: Sequence[Node],
    facts: Facts,
    dims: Mapping[str, int] | None = None,
    machine: Machine | None = None,
) -> float | None:
    """Seconds that *nodes* take, with what depends on them right behind.

    That is the activations, additions, pools, ... up to the next convolution: whether they are
    absorbed, and in which layout they work, is up to *nodes*. So a convolution that becomes a
    matrix product is charged for the Relu behind it and for every copy between layouts.

    Args:
        nodes: nodes of the model, or nodes that a rewrite has taken out of it.
        facts: of the model.
        dims: sizes of symbolic dimensions.
        machine: what to estimate for; a typical x86 core by default.

    Returns:
        ``None`` if a shape is unknown, or an operator has no cost rule.
    """
    behind = _behind(nodes, {}, facts)
    return _seconds(nodes, list(behind.values()), {}, facts, dims, machine)


def rewrite_seconds(
    removed: Sequence[Node],
    added: Sequence[Node],
    facts: Facts,
    dims: Mapping[str, int] | None = None,
    machine: Machine | None = None,
) -> tuple[float, float] | None:
    """Seconds (before, after) of a rewrite that has been made, as :func:`window_seconds`.

    Both sides are charged with the same nodes behind them. Nodes that were changed in place, and
    so neither removed nor added, do not show.

    Returns:
        ``None`` if a shape is unknown, or an operator has no cost rule.
    """
    new = {id(node): node for node in added}
    behind_new = _behind(added, {}, facts)
    # Readers that were redirected to another tensor are behind one of the two sides only.
    shared = [node for key, node in _behind(removed, new, facts).items() if key in behind_new]
    before = _seconds(removed, shared, new, facts, dims, machine)
    after = _seconds(added, shared, {}, facts, dims, machine)
    return None if before is None or after is None else (before, after)


def _seconds(
    nodes: Sequence[Node],
    behind: Sequence[Node],
    ignored: Mapping[int, Node],
    facts: Facts,
    dims: Mapping[str, int] | None,
    machine: Machine | None,
) -> float | None:
    costs = [node_cost(node, facts, dims) for node in nodes]
    if not all(cost.known for cost in costs):
        return None
    charged = [*nodes, *behind]
    followers = [cost for node in behind if (cost := node_cost(node, facts, dims)).known]
    around = _around(charged, ignored, facts)
    context = [cost for node in around if (cost := node_cost(node, facts, dims)).known]
    return _Region([*costs, *followers], context, machine or Machine()).seconds()


def _behind(nodes: Sequence[Node], ignored: Mapping[int, Node], facts: Facts) -> dict[int, Node]:
    """Live nodes whose layout and absorption depend on *nodes*, by ``id``, some steps ahead."""
    inside = {id(node) for node in nodes}
    found: dict[int, Node] = {}
    frontier = list(nodes)
    for _ in range(_LOOK_AHEAD):
        readers = [r for n in frontier for t in n.outputs for r in facts.consumers(t)]
        frontier = []
        for node in readers:
            key = id(node)
            if key in found or key in inside or key in ignored:
                continue
            if facts.op(node) in LAYOUT_KEEPERS:
                found[key] = node
                frontier.append(node)
    return found


def _around(nodes: Sequence[Node], ignored: Mapping[int, Node], facts: Facts) -> list[Node]:
    """Live readers of the tensors of *nodes*, and producers of their inputs some steps back."""
    inside = {id(node) for node in nodes}
    found: dict[int, Node] = {}

    def meet(candidates: Iterable[Node]) -> None:
        found.update(
            (id(node), node)
            for node in candidates
            if id(node) not in inside and id(node) not in ignored
        )

    made = {id(tensor) for node in nodes for tensor in node.outputs}
    for node in nodes:
        for tensor in node.outputs:
            meet(facts.consumers(tensor))
    frontier = [t for node in nodes for t in node.inputs if id(t) not in made]
    walked: set[int] = set()
    for _ in range(_LOOK_BACK):
        producers: dict[int, Node] = {}
        for tensor in frontier:
            producer = facts.producer(tensor)
            if producer is None or id(producer) in walked or id(producer) in ignored:
                continue
            producers[id(producer)] = producer
            meet((producer, *facts.consumers(tensor)))
        walked.update(producers)
        frontier = [
            t for n in producers.values() if facts.op(n) in LAYOUT_KEEPERS for t in n.inputs
        ]
    return list(found.values())


# -- a part of a graph ---------------------------------------------------------------------------


class _Open(IntEnum):
    """What a node's kernel can still absorb of the nodes behind it."""

    NOTHING = 0
    ACTIVATION = 1
    RESIDUAL = 2
    """A residual addition or an affine operator, and then an activation."""


class _Region:
    """Nodes and, for their borders, the nodes around them; joined by the names of tensors."""

    def __init__(
        self,
        costs: Sequence[NodeCost],
        context: Sequence[NodeCost],
        machine: Machine,
    ) -> None:
        self._costs = costs
        self._machine = machine
        everything = (*context, *costs)
        # Of two producers, one stands for the other: the node asked about is the one meant.
        self._producers = {o.name: cost for cost in everything for o in cost.outputs}
        self._readers: dict[str, list[NodeCost]] = {}
        for cost in everything:
            for operand in _data(cost):
                self._readers.setdefault(operand.name, []).append(cost)
        self._blocked: dict[int, bool] = {}
        self._open: dict[int, _Open] = {}
        self._absorbed: dict[int, bool] = {}
        for cost in self._in_order(everything):
            self._blocked[id(cost)] = self._is_blocked(cost)
            self._absorb(cost)

    def seconds(self) -> float:
        """Seconds of the nodes, and of copies between layouts of the tensors that they touch."""
        own = sum(self._node_seconds(cost) for cost in self._costs)
        tensors = {
            operand.name: operand
            for cost in self._costs
            for operand in (*_data(cost), *cost.outputs)
        }
        return own + sum(self._copies(t) * self._copy_seconds(t) for t in tensors.values())

    def _in_order(self, costs: Sequence[NodeCost]) -> Iterator[NodeCost]:
        """Producers before their readers."""
        seen: set[int] = set()
        for root in costs:
            stack = [(root, False)]
            while stack:
                cost, is_ready = stack.pop()
                if is_ready:
                    yield cost
                elif id(cost) not in seen:
                    seen.add(id(cost))
                    stack.append((cost, True))
                    stack.extend((producer, False) for producer in self._sources(cost))

    def _sources(self, cost: NodeCost) -> list[NodeCost]:
        return [
            self._producers[operand.name]
            for operand in _data(cost)
            if operand.name in self._producers
        ]

    # -- layout

    def _is_blocked(self, cost: NodeCost) -> bool:
        """Whether *cost* computes in the convolutions' own layout."""
        block = self._machine.channel_block
        if not block or not cost.known:
            return False
        if cost.op in _CONVS:
            return _fits_blocks(cost, block)
        if cost.op not in LAYOUT_KEEPERS or not self._come_blocked(cost):
            return False
        if cost.op == "Concat":
            return all(t.shape is not None and t.shape[1] % block == 0 for t in cost.inputs)
        if cost.op in _BROADCASTING:
            return _is_channelwise(cost)
        return True

    def _come_blocked(self, cost: NodeCost) -> bool:
        data = _data(cost)
        return bool(data) and all(
            operand.name in self._producers
            and self._blocked.get(id(self._producers[operand.name]), False)
            for operand in data
        )

    def _copies(self, operand: Operand) -> int:
        """How often a tensor is copied because its two ends differ in layout."""
        producer = self._producers.get(operand.name)
        readers = self._readers.get(operand.name, ())
        if producer is not None and self._blocked[id(producer)]:
            is_plain = any(not self._blocked[id(reader)] for reader in readers)
            return int(is_plain or operand.is_output)
        block = self._machine.channel_block
        # A first convolution, on fewer channels than a block has, reads the plain layout.
        return int(
            any(
                self._blocked[id(r)] and r.op in _CONVS and _input_channels(r) >= block
                for r in readers
            )
        )

    def _copy_seconds(self, operand: Operand) -> float:
        moved = 2 * (operand.bytes or 0) / (self._machine.gbytes_per_s * 1e9)
        return moved + self._machine.node_overhead_us * 1e-6

    # -- absorption

    def _absorb(self, cost: NodeCost) -> None:
        """Settle whether *cost* vanishes into a node before it, and what it absorbs itself."""
        host = self._host(cost)
        wanted = _ABSORBABLE.get(cost.op, _Open.NOTHING)
        is_open = self._open.get(id(host), _Open.NOTHING) if host is not None else _Open.NOTHING
        is_absorbed = wanted is not _Open.NOTHING and is_open >= wanted
        self._absorbed[id(cost)] = is_absorbed
        if not is_absorbed:
            is_host = self._machine.absorbs and cost.op in _HOSTS
            self._open[id(cost)] = _HOSTS[cost.op] if is_host else _Open.NOTHING
        elif wanted is _Open.ACTIVATION:
            self._open[id(cost)] = _Open.NOTHING
        else:
            is_residual = len(_data(cost)) > 1
            self._open[id(cost)] = _Open.ACTIVATION if is_residual else _Open.RESIDUAL

    def _host(self, cost: NodeCost) -> NodeCost | None:
        """The producer that may absorb *cost*: one whose output nobody else reads."""
        data = _data(cost)
        if len(data) > 1 and (cost.op not in ("Add", "Sum") or not self._blocked[id(cost)]):
            return None
        if len(data) > 2 or (cost.op in _BROADCASTING and not _is_channelwise(cost)):
            return None
        for operand in data:
            producer = self._producers.get(operand.name)
            is_private = len(self._readers[operand.name]) == 1
            if producer is None or not is_private or operand.is_output:
                continue
            if self._open.get(id(producer), _Open.NOTHING) is not _Open.NOTHING:
                return producer
        return None

    # -- time

    def _node_seconds(self, cost: NodeCost) -> float:
        machine = self._machine
        if not cost.known or cost.op == "Constant":
            return 0.0
        if self._absorbed[id(cost)]:
            # The result of the host is in registers; only a residual has to be read.
            extra = sum(operand.bytes or 0 for operand in _data(cost)[1:])
            return cost.flops / (machine.gflops * 1e9) + extra / (machine.gbytes_per_s * 1e9)
        overhead = machine.node_overhead_us * 1e-6
        if cost.work_class is WorkClass.VIEW:
            return overhead
        if cost.op in _SCALAR_NS:
            elements = math.prod(cost.outputs[0].shape or ())
            return (
                overhead + _SCALAR_NS[cost.op] * 1e-9 * elements * _SCALAR_GFLOPS / machine.gflops
            )
        efficiency = self._efficiency(cost)
        compute = cost.flops / (machine.gflops * 1e9 * efficiency.compute)
        memory = cost.bytes / (machine.gbytes_per_s * 1e9 * efficiency.bandwidth)
        return overhead + max(compute, memory)

    def _efficiency(self, cost: NodeCost) -> Efficiency:
        if cost.work_class is WorkClass.GROUPED_CONV and not self._blocked[id(cost)]:
            return _NARROW_GROUPS
        return _EFFICIENCY[cost.work_class]


_AFFINE = ("Add", "BatchNormalization", "Mul", "Sum")
_BROADCASTING = frozenset({"Add", "Mul", "Sum"})
_ABSORBABLE: Mapping[str, _Open] = MappingProxyType(
    {
        **dict.fromkeys(ABSORBED_ACTIVATIONS, _Open.ACTIVATION),
        **dict.fromkeys(_AFFINE, _Open.RESIDUAL),
    }
)
"""What a host must be open to in order to absorb an operator."""
_HOSTS: Mapping[str, _Open] = MappingProxyType({"Conv": _Open.RESIDUAL, "Gemm": _Open.ACTIVATION})


def _data(cost: NodeCost) -> list[Operand]:
    """The inputs that are no constants."""
    return [operand for operand in cost.inputs if not operand.is_constant]


def _input_channels(cost: NodeCost) -> int:
    shape = cost.inputs[0].shape or ()
    return shape[1] if len(shape) > 1 else 0


def _fits_blocks(cost: NodeCost, block: int) -> bool:
    """Whether ONNX Runtime runs this convolution in its blocked layout: float32, 2-D."""
    shape = cost.inputs[0].shape or ()
    weight = cost.inputs[1].shape or ()
    if len(shape) != 4 or len(weight) != 4 or cost.work_class not in _BLOCKABLE:
        return False
    if cost.inputs[0].bytes != 4 * math.prod(shape):
        return False
    cin, cout, per_group = shape[1], weight[0], weight[1]
    if cost.work_class is WorkClass.DEPTHWISE_CONV:
        return cin == cout and cin % block == 0
    if cost.work_class is WorkClass.GROUPED_CONV:
        return per_group % block == 0 and (cout * per_group // cin) % block == 0
    return cin < block or cin % 4 == 0


def _is_channelwise(cost: NodeCost) -> bool:
    """Whether the operands are of one shape, or constants of one value per channel."""
    result = cost.outputs[0].shape or ()
    if any(operand.shape != result for operand in _data(cost)):
        return False
    return all(_is_per_channel(t.shape or (), result) for t in cost.inputs if t.is_constant)


def _is_per_channel(shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether a constant of *shape* broadcasts to *result* along the channels alone."""
    if len(result) < 2 or len(shape) > len(result):
        return False
    full = (1,) * (len(result) - len(shape)) + shape
    return full[1] == result[1] and math.prod(full) == result[1]
