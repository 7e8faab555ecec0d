"""Compute only those pixels that strided readers read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Dim, Facts, Node, Rewriter, Shape, Tensor
from pwopt.passes._channel_affine import trains
from pwopt.passes._movable import ELEMENTWISE
from pwopt.passes._strided_slices import taken
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["EliminateDeadPixels", "EliminateDeadPixelsMatch"]

Array = np.ndarray[Any, Any]
Factor = tuple[int, ...]
"""Per axis of space: of so many positions in a row, only the first one is read."""

_POOLS = ("AveragePool", "MaxPool")
_PER_PIXEL = ("BatchNormalization", "LRN")
"""Operators whose first input alone has axes of space, and that work on each pixel by itself."""
_MAX_DEPTH = 64
_TO_THE_END = 2**31 - 1


@dataclass(frozen=True, eq=False)
class _Region:
    """What shrinks once only the pixels that are read are computed.

    Attributes:
        factor: by how much.
        readers: strided nodes, whose strides shrink.
        tensors: what shrinks.
        inside: nodes that work pixel by pixel, on tensors that shrink.
        sources: nodes that take the factor on as a stride.
        cut: tensors that stay as they are, and are sampled for the nodes inside.
        places: nodes inside and those of their inputs that have axes of space.
    """

    factor: Factor
    readers: tuple[Node, ...]
    tensors: tuple[Tensor, ...]
    inside: tuple[Node, ...]
    sources: tuple[Node, ...]
    cut: tuple[Tensor, ...]
    places: tuple[tuple[Node, int], ...]

    @property
    def saves(self) -> bool:
        """Whether windows or products are left out, and not only elementwise operations."""
        return bool(self.sources) or any(n.op == "Conv" for n in self.inside)


@dataclass(frozen=True, eq=False)
class EliminateDeadPixelsMatch(Match):
    """A node that skips positions, and what shrinks before it."""

    region: _Region


@dataclass(frozen=True)
class EliminateDeadPixels(Pass[EliminateDeadPixelsMatch]):
    """Leave out the pixels that strided readers skip.

    Rewrites:
        Where all readers of a value are a Conv or pool with a kernel of 1 and a stride, or a Slice
        of every n-th row or column, the stride (what is common to all of them) moves up: through
        elementwise operators, BatchNormalization, LRN, Concat along the channels and pointwise
        convolutions, to a Conv or pool that takes it on as its own. Where one operand of an
        operator on the way is read by others too (the shortcut of a residual block), it is sampled
        by a pool with a kernel of 1, or a Slice for other types than float32 and other than two
        axes of space.

    Algebra:
        What works pixel by pixel commutes with sampling: ``f(x)[::s] = f(x[::s])``. A window
        operator with stride t that is sampled by s has stride s t: ``floor(floor(r / t) / s) =
        floor(r / (s t))``, so also the number of positions agrees, ``ceil(n / s)``.

    Declines when:
        the node reads every pixel, pads, rounds its size up, or has indices that are read; its
        data are read at other pixels too, are a graph output, or have an unknown rank; nothing
        before it is a convolution or pool that would compute less (the same restrictions hold for
        those); the opset has no Slice with steps where one is needed.

    Exactness:
        ROUNDING: the same products, but another kernel may sum them in another order.

    When it pays:
        By MACs: three quarters of those of the last block of each stage of the original ResNets,
        which stride in the first pointwise convolution and in the shortcut, 10 % of all MACs of
        ResNet-50.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        READS_EVERY_PIXEL = "reads-every-pixel"
        SHAPE_UNKNOWN = "shape-unknown"
        PADDED = "padded"
        ROUNDS_UP = "rounds-up"
        INDICES_READ = "indices-read"
        OTHER_READERS = "other-readers"
        GRAPH_OUTPUT = "graph-output"
        NOTHING_SAVED = "nothing-saved"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "eliminate-dead-pixels"
    roots: ClassVar[tuple[str, ...]] = ("Conv", "AveragePool", "MaxPool", "Slice")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> EliminateDeadPixelsMatch | Decline:
        """See the class."""
        data = node.inputs[0]
        rank = facts.rank(data)
        if rank is None:
            return Decline(self.Why.SHAPE_UNKNOWN)
        if _is_one(_own_steps(node, rank, facts)):
            return Decline(self._not_sampling(node, rank, facts))
        if facts.is_output(data):
            return Decline(self.Why.GRAPH_OUTPUT)
        demand = _Demand(facts, rank)
        factor = demand.of(data)
        if _is_one(factor):
            return Decline(self.Why.OTHER_READERS)
        region = _Growth(factor, demand).grow(data)
        if not region.saves:
            producer = facts.producer(data)
            return Decline(self.Why.NOTHING_SAVED, {"before": producer.op if producer else "input"})
        if facts.opset < 10 and not all(_pools(t, facts) for t in region.cut):
            return Decline(
                self.Why.OP_NOT_IN_OPSET, {"op": "Slice", "since": 10, "opset": facts.opset}
            )
        return EliminateDeadPixelsMatch(
            node,
            (*region.readers, *region.inside, *region.sources),
            region,
            facts={
                "factor": list(factor),
                "shrunk": len(region.tensors),
                "sampled": len(region.cut),
            },
        )

    def _not_sampling(self, node: Node, rank: int, facts: Facts) -> Why:
        """Why *node* cannot be said to skip positions."""
        window = _window(node, rank, facts)
        if window is None:
            return self.Why.READS_EVERY_PIXEL if node.op == "Slice" else self.Why.SHAPE_UNKNOWN
        if not any(s > k == 1 for s, k in zip(window.strides, window.kernel, strict=True)):
            return self.Why.READS_EVERY_PIXEL
        if window.is_plain:
            return self.Why.PADDED
        return self.Why.INDICES_READ if len(node.outputs) > 1 else self.Why.ROUNDS_UP

    def rewrite(
        self,
        match: EliminateDeadPixelsMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        region, facts = match.region, Facts(rewriter.model)
        rank = len(region.factor) + 2
        for node in region.readers:
            _shrink_steps(rewriter, node, region.factor)
        for node in region.sources:
            _enlarge_steps(rewriter, node, region.factor)
        smaller = {
            id(t): rewriter.variable(f"{t.name}/sampled", t, _sampled_shape(t, region.factor))
            for t in (*region.tensors, *region.cut)
        }
        for tensor in region.tensors:
            producer = facts.producer(tensor)
            assert producer is not None
            rewriter.set_output(producer, 0, smaller[id(tensor)])
        for tensor in region.cut:
            first = next(n for n in region.inside if any(t is tensor for t in n.inputs))
            _sample(rewriter, first, tensor, smaller[id(tensor)], region.factor)
        for node, index in (*region.places, *((n, 0) for n in region.readers)):
            values = facts.constant(node.inputs[index])
            if values is None:
                rewriter.set_input(node, index, smaller[id(node.inputs[index])])
            else:
                rewriter.set_weight(node, index, _sampled_values(values, rank, region.factor))
        for node in region.readers:
            _drop_if_idle(rewriter, node)


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Window:
    """The geometry of a Conv or pool.

    Attributes:
        pads: ``None`` if they are not known.
        is_plain: whether every output is one window's, with no word of where that lies.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...] | None
    is_plain: bool = True

    @property
    def may_skip(self) -> bool:
        """Whether other strides leave the windows that remain as they are."""
        return self.is_plain and self.pads is not None


def _window(node: Node, rank: int, facts: Facts) -> _Window | None:
    """The window of *node*, a Conv or pool on tensors of *rank* dimensions."""
    space = rank - 2
    if facts.is_op(node, "Conv"):
        conv = facts.conv(node)
        if conv is None or conv.spatial_rank != space:
            return None
        return _Window(conv.kernel, conv.strides, conv.pads)
    if not facts.is_op(node, *_POOLS):
        return None
    ones = (1,) * space
    kernel = facts.attr_ints(node, "kernel_shape", ())
    strides = facts.attr_ints(node, "strides", ones)
    dilations = facts.attr_ints(node, "dilations", ones)
    if not len(kernel) == len(strides) == len(dilations) == space:
        return None
    # Indices say where the maxima lie in the whole input.
    is_plain = len(node.outputs) == 1 and not facts.attr_int(node, "ceil_mode", 0)
    return _Window(kernel, strides, facts.window_pads(node, kernel, strides, dilations), is_plain)


def _own_steps(node: Node, rank: int, facts: Facts) -> Factor:
    """At every how many positions *node* reads its first input."""
    space = rank - 2
    if facts.is_op(node, "Slice"):
        found = taken(node, rank, facts) or []
        return tuple(1 if offset else step for offset, step in found) or (1,) * space
    window = _window(node, rank, facts)
    if window is None or window.pads is None or not window.is_plain:
        return (1,) * space
    return tuple(
        window.strides[a] if window.kernel[a] == 1 and not any(window.pads[a::space]) else 1
        for a in range(space)
    )


def _is_one(factor: Factor) -> bool:
    return all(f == 1 for f in factor)


@dataclass
class _Demand:
    """Which pixels of a tensor are read, in the end."""

    facts: Facts
    rank: int
    _known: dict[int, Factor] = field(default_factory=dict)

    def of(self, tensor: Tensor, depth: int = 0) -> Factor:
        """Pixels that lie so far apart are read, no others."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = self._read(tensor, depth)
        return self._known[id(tensor)]

    def _read(self, tensor: Tensor, depth: int) -> Factor:
        nobody = (0,) * (self.rank - 2)
        everything = (1,) * (self.rank - 2)
        if self.facts.is_seen_outside(tensor) or depth > _MAX_DEPTH:
            return everything
        steps = nobody
        for consumer in self.facts.consumers(tensor):
            found = self._by(consumer, tensor, depth)
            steps = tuple(math.gcd(a, b) for a, b in zip(steps, found, strict=True))
            if _is_one(steps):
                return everything
        return everything if steps == nobody else steps

    def _by(self, consumer: Node, tensor: Tensor, depth: int) -> Factor:
        if consumer.inputs[0] is tensor and sum(t is tensor for t in consumer.inputs) == 1:
            own = _own_steps(consumer, self.rank, self.facts)
            if not _is_one(own):
                return own
        operands = self.operands(consumer) or ()
        places = [i for i, t in enumerate(consumer.inputs) if t is tensor]
        if not all(place in operands for place in places):
            return (1,) * (self.rank - 2)
        return self.of(consumer.outputs[0], depth + 1)

    def can_leave_out(self, node: Node | None) -> bool:
        """Whether there is a *node*, and it need not compute pixels that nobody reads."""
        if node is None or self.operands(node) is not None:
            return node is not None
        window = _window(node, self.rank, self.facts)
        return window is not None and window.may_skip

    def operands(self, node: Node) -> list[int] | None:
        """The inputs of *node* with axes of space, if it computes every pixel by itself."""
        facts = self.facts
        if len(node.outputs) != 1 or facts.rank(node.outputs[0]) != self.rank:
            return None
        if facts.is_op(node, "Conv"):
            window = _window(node, self.rank, facts)
            if window is None or window.pads is None or any(window.pads):
                return None
            return [0] if _is_one((*window.kernel, *window.strides)) else None
        if facts.is_op(node, *_PER_PIXEL):
            return [0] if node.op != "BatchNormalization" or not self._is_special(node) else None
        if facts.is_op(node, "Concat"):
            along_channels = facts.attr_int(node, "axis", 1) in (1, 1 - self.rank)
            return list(range(len(node.inputs))) if along_channels else None
        if node.op not in ELEMENTWISE or not facts.is_op(node, node.op):
            return None
        if len(node.inputs) > 1 and facts.opset < 7:
            return None  # Broadcasting was an attribute.
        found = [i for i, t in enumerate(node.inputs) if not t.is_empty()]
        extents = [_has_space(node.inputs[i], self.rank, facts) for i in found]
        if None in extents:
            return None
        return [i for i, wide in zip(found, extents, strict=True) if wide]

    def _is_special(self, node: Node) -> bool:
        per_activation = self.facts.opset < 9 and not self.facts.attr_int(node, "spatial", 1)
        return per_activation or trains(self.facts, node)


def _has_space(tensor: Tensor, rank: int, facts: Facts) -> bool | None:
    """Whether *tensor*, broadcast to *rank*, differs along axes of space; ``None`` if unclear."""
    shape = facts.shape(tensor)
    if shape is None or len(shape) > rank:
        return None
    if all(d == 1 for d in shape[max(len(shape) - rank + 2, 0) :]):
        return False
    return True if len(shape) == rank or facts.is_constant(tensor) else None


@dataclass
class _Growth:
    """A region in the making; see :class:`_Region`."""

    factor: Factor
    demand: _Demand
    tensors: dict[int, Tensor] = field(default_factory=dict)
    readers: dict[int, Node] = field(default_factory=dict)
    inside: dict[int, Node] = field(default_factory=dict)
    sources: dict[int, Node] = field(default_factory=dict)
    cut: dict[int, Tensor] = field(default_factory=dict)
    places: list[tuple[Node, int]] = field(default_factory=list)
    _pending: list[Tensor] = field(default_factory=list)

    def grow(self, seed: Tensor) -> _Region:
        """What shrinks together with *seed*."""
        facts, demand = self.demand.facts, self.demand
        self._pending.append(seed)
        while self._pending:
            tensor = self._pending.pop()
            producer = facts.producer(tensor)
            if id(tensor) in self.tensors or not demand.can_leave_out(producer):
                continue
            assert producer is not None
            self.tensors[id(tensor)] = tensor
            for node in facts.consumers(tensor):
                if _is_one(_own_steps(node, demand.rank, facts)):
                    self._enter(node)
                else:
                    self.readers[id(node)] = node
            if demand.operands(producer) is None:
                self.sources[id(producer)] = producer
            else:
                self._enter(producer)
        return _Region(
            self.factor,
            tuple(self.readers.values()),
            tuple(self.tensors.values()),
            tuple(self.inside.values()),
            tuple(self.sources.values()),
            tuple(self.cut.values()),
            tuple(self.places),
        )

    def _enter(self, node: Node) -> None:
        """Have *node* compute the pixels that are read, from operands that shrink or are cut."""
        if id(node) in self.inside or id(node) in self.sources:
            return
        operands = self.demand.operands(node)
        assert operands is not None
        if node.op == "Conv" and not self._shrinks(node.inputs[0]):
            self.sources[id(node)] = node
            return
        self.inside[id(node)] = node
        self._pending.append(node.outputs[0])
        for index in operands:
            tensor = node.inputs[index]
            self.places.append((node, index))
            if self._shrinks(tensor):
                self._pending.append(tensor)
            elif not self.demand.facts.is_constant(tensor):
                self.cut[id(tensor)] = tensor

    def _shrinks(self, tensor: Tensor) -> bool:
        producer = self.demand.facts.producer(tensor)
        steps = self.demand.of(tensor)
        fits = all(s % f == 0 for f, s in zip(self.factor, steps, strict=True))
        return fits and self.demand.can_leave_out(producer)


def _pools(tensor: Tensor, facts: Facts) -> bool:
    """Whether a pool can sample *tensor*: it has kernels for this type and two axes of space."""
    return facts.dtype(tensor) == np.float32 and facts.rank(tensor) == 4


# -- writing ---------------------------------------------------------------------------------------


def _sampled_shape(tensor: Tensor, factor: Factor) -> Shape | None:
    if tensor.shape is None:
        return None
    space: Sequence[Dim] = tensor.shape[2:]
    sampled = (
        -(-d // f) if isinstance(d, int) else (d if f == 1 else None)
        for d, f in zip(space, factor, strict=True)
    )
    return (*tensor.shape[:2], *sampled)


def _sampled_values(values: Array, rank: int, factor: Factor) -> Array:
    """A constant that is broadcast to *rank*, at the positions that are read."""
    cut = (slice(None), slice(None), *(slice(None, None, f) for f in factor))
    return np.array(values[cut[rank - values.ndim :]], order="C")


def _set_strides(rewriter: Rewriter, node: Node, window: _Window, strides: Sequence[int]) -> None:
    rewriter.set_attribute(node, "strides", list(strides))
    if "auto_pad" in node.attrs:
        # What it stands for depends on the strides.
        assert window.pads is not None
        rewriter.set_attribute(node, "pads", list(window.pads))
        rewriter.set_attribute(node, "auto_pad", None)


def _enlarge_steps(rewriter: Rewriter, node: Node, factor: Factor) -> None:
    """Let *node* compute one position of so many."""
    window = _window(node, len(factor) + 2, Facts(rewriter.model))
    assert window is not None
    strides = [s * f for s, f in zip(window.strides, factor, strict=True)]
    _set_strides(rewriter, node, window, strides)


def _shrink_steps(rewriter: Rewriter, node: Node, factor: Factor) -> None:
    """Let *node* read the same from data that have only one position of so many."""
    facts, rank = Facts(rewriter.model), len(factor) + 2
    if node.op == "Slice":
        ends, axes, steps = (facts.constant(facts.input(node, i)) for i in (2, 3, 4))
        assert ends is not None
        assert steps is not None
        places = range(len(steps)) if axes is None else [int(a) % rank for a in axes]
        divisors = [factor[p - 2] for p in places]
        rewriter.set_weight(node, 2, np.full_like(ends, _TO_THE_END))
        rewriter.set_weight(node, 4, steps // np.array(divisors, steps.dtype))
        return
    window = _window(node, rank, facts)
    assert window is not None
    strides = [s // f for s, f in zip(window.strides, factor, strict=True)]
    _set_strides(rewriter, node, window, strides)


def _sample(
    rewriter: Rewriter, near: Node, tensor: Tensor, sampled: Tensor, factor: Factor
) -> None:
    """Add what takes *sampled* from *tensor*."""
    if _pools(tensor, Facts(rewriter.model)):
        attributes = {"kernel_shape": [1, 1], "strides": list(factor)}
        # Not MaxPool, whose kernels take NaN for less than any number.
        rewriter.add("AveragePool", [tensor], [sampled], attributes, near=near)
        return
    space = len(factor)
    hint = f"{tensor.name}/sampled"
    values = {
        "starts": [0] * space,
        "ends": [_TO_THE_END] * space,
        "axes": list(range(2, space + 2)),
        "steps": list(factor),
    }
    operands = [rewriter.constant(f"{hint}/{k}", np.array(v, np.int64)) for k, v in values.items()]
    rewriter.add("Slice", [tensor, *operands], [sampled], near=near)


def _drop_if_idle(rewriter: Rewriter, node: Node) -> None:
    """Remove a pool that has nothing left to skip."""
    facts = Facts(rewriter.model)
    data = node.inputs[0]
    window = _window(node, facts.rank(data) or 0, facts) if facts.is_op(node, *_POOLS) else None
    if window is None or not _is_one((*window.kernel, *window.strides)):
        return
    if facts.can_bypass(node, data):
        rewriter.bypass(node, data)
