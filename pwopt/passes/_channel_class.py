"""Tensors whose channels can only be rearranged together, and rearranging them.

What an operator computes for one channel from the same channel alone (an activation, a depthwise
convolution, a pool) does not care in which order channels stand, as long as its constants stand in
the same order. So an arrangement of channels spreads through such operators until it meets a
convolution, whose weights take it up: their rows before, their columns behind.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, Tensor, ValuesView
from pwopt.numerics import arrangement as arrangements
from pwopt.numerics.arrangement import Arrangement
from pwopt.passes._channel_affine import trains

__all__ = [
    "Carrier",
    "ChannelClass",
    "End",
    "carrier",
    "channel_class",
    "dense_or_grouped",
    "rearrange",
]

Array = np.ndarray[Any, Any]

_LARGEST_CLASS = 400
"""Tensors looked at; what hangs together with more is left alone."""

# fmt: off
_UNARY = frozenset({
    "Abs", "Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh",
    "ThresholdedRelu",
})
"""Functions of one element that make something finite of whatever finite a filler holds."""
_NARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Sub", "Sum"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
# fmt: on


@dataclass(frozen=True, eq=False)
class End:
    """Where the tensors of a class meet something that cannot take an arrangement up.

    Attributes:
        tensor: the member of the class.
        node: what reads or writes it; ``None`` if it is fed, is a graph output, or is captured.
        reads: whether *node* reads it.
    """

    tensor: Tensor
    node: Node | None
    reads: bool


@dataclass(eq=False)
class ChannelClass:
    """Tensors that share one arrangement of their channels.

    Attributes:
        channels: how many they have.
        tensors: the members.
        carriers: operators that work channel by channel, with their per-channel constants.
        writers: convolutions whose output channels these are.
        readers: convolutions whose input channels these are.
        ends: everything else that touches a member.
        has_products: whether two members are multiplied, so that fillers may grow.
    """

    channels: int
    tensors: list[Tensor] = field(default_factory=list)
    carriers: list[Node] = field(default_factory=list)
    writers: list[ConvFacts] = field(default_factory=list)
    readers: list[ConvFacts] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    has_products: bool = False

    @property
    def group(self) -> int:
        """The number of parts that channels cannot leave: those of its grouped convolutions."""
        return math.lcm(*(conv.group for conv in (*self.writers, *self.readers)))

    def admits(self, arrangement: Sequence[int]) -> bool:
        """Whether every convolution's groups are kept."""
        return all(
            arrangements.keeps_groups(arrangement, self.channels, conv.group)
            for conv in (*self.writers, *self.readers)
            if conv.group > 1
        )


@dataclass(frozen=True)
class PerChannel:
    """A constant operand with values per channel.

    Attributes:
        index: which input it is.
        axis: the axis that channels lie along.
        neutral: what suits a filler.
    """

    index: int
    axis: int = 0
    neutral: float = 0.0

    def taken(self, values: ValuesView, arrangement: Sequence[int]) -> Array:
        """Its *values* under *arrangement*."""
        return arrangements.take(values, arrangement, axis=self.axis, fill=self.neutral)


@dataclass(frozen=True, eq=False)
class Carrier:
    """How a node works channel by channel.

    Attributes:
        members: tensors with the channels at stake; the output comes last.
        constants: its constants per channel.
    """

    members: tuple[Tensor, ...]
    constants: tuple[PerChannel, ...] = ()


def channel_class(facts: Facts, seed: Tensor) -> ChannelClass | None:
    """The class of *seed*; ``None`` if its number of channels is unknown or 1, or if it is huge."""
    channels = facts.channels(seed)
    if channels is None or channels < 2 or (facts.rank(seed) or 0) < 3:
        return None
    found = ChannelClass(channels)
    known: set[int] = set()
    queue = deque([seed])
    visited: set[int] = set()
    while queue:
        tensor = queue.popleft()
        if id(tensor) in known:
            continue
        known.add(id(tensor))
        found.tensors.append(tensor)
        if len(known) > _LARGEST_CLASS:
            return None
        producer = facts.producer(tensor)
        if producer is None or facts.is_seen_outside(tensor):
            found.ends.append(End(tensor, None, reads=False))
        neighbours = facts.consumers(tensor)
        for node in neighbours if producer is None else (producer, *neighbours):
            works = carrier(node, channels, facts)
            if works is None or not any(m is tensor for m in works.members):
                _add_conv_or_end(found, node, tensor, node is producer, facts)
            elif id(node) not in visited:
                visited.add(id(node))
                found.carriers.append(node)
                found.has_products |= node.op == "Mul" and len(works.members) > 2
                queue.extend(works.members)
    return found


def _add_conv_or_end(
    found: ChannelClass, node: Node, tensor: Tensor, writes: bool, facts: Facts
) -> None:
    conv = dense_or_grouped(node, facts)
    if conv is not None and writes and conv.cout == found.channels:
        found.writers.append(conv)
    elif conv is not None and _reads_as_data(node, tensor) and conv.cin == found.channels:
        found.readers.append(conv)
    else:
        found.ends.append(End(tensor, node, reads=not writes))


def _reads_as_data(node: Node, tensor: Tensor) -> bool:
    return node.inputs[0] is tensor and not any(t is tensor for t in node.inputs[1:])


def dense_or_grouped(node: Node, facts: Facts) -> ConvFacts | None:
    """*node* as a convolution whose weights can be rearranged."""
    conv = facts.conv(node)
    if conv is None or not facts.is_constant(conv.weight) or not facts.is_float(conv.weight):
        return None
    if conv.bias is not None and not facts.is_constant(conv.bias):
        return None
    if node.op == "ConvTranspose" and conv.group > 1:
        return None
    return conv


# -- what works channel by channel -----------------------------------------------------------------


def carrier(node: Node, channels: int, facts: Facts) -> Carrier | None:
    """How *node* works channel by channel on tensors with so many channels, if it does."""
    if not facts.is_op(node, node.op) or len(node.outputs) != 1:
        return None
    if node.op in _UNARY:
        return _pointwise(node, channels, facts, operands=1)
    if node.op in _NARY:
        return _pointwise(node, channels, facts, operands=len(node.inputs))
    if node.op in _POOLS:
        return _through(node, channels, facts)
    if node.op == "Conv":
        return _depthwise(node, channels, facts)
    if node.op == "BatchNormalization":
        return _normalisation(node, channels, facts)
    if node.op == "ReduceMean":
        return _spatial_mean(node, channels, facts)
    if node.op in ("Resize", "Upsample"):
        return _resize(node, channels, facts)
    return None


def _through(node: Node, channels: int, facts: Facts) -> Carrier | None:
    members = (node.inputs[0], node.outputs[0])
    return Carrier(members) if all(_has(t, channels, facts) for t in members) else None


def _has(tensor: Tensor, channels: int, facts: Facts) -> bool:
    return (facts.rank(tensor) or 0) >= 3 and facts.channels(tensor) == channels


def _pointwise(node: Node, channels: int, facts: Facts, *, operands: int) -> Carrier | None:
    """An elementwise operator: full tensors, constants per channel, and what has one channel."""
    output = node.outputs[0]
    rank = facts.rank(output)
    if rank is None or not _has(output, channels, facts):
        return None
    if operands > 1 and not facts.has_op("Add", since=7):
        return None  # broadcasting was an attribute
    if node.op == "Div" and not _divides_by_constant(node, facts):
        return None
    members: list[Tensor] = []
    constants: list[PerChannel] = []
    for index in range(operands):
        role = _operand(facts.input(node, index), channels, rank, facts)
        if role is None:
            return None
        if isinstance(role, Tensor):
            members.append(role)
        elif role >= 0:
            constants.append(PerChannel(index, role, 1.0 if node.op == "Div" else 0.0))
    is_bent = node.op == "PRelu" and len(members) > 1
    return Carrier((*members, output), tuple(constants)) if members and not is_bent else None


def _operand(tensor: Tensor | None, channels: int, rank: int, facts: Facts) -> Tensor | int | None:
    """A member, or the axis of a constant that channels lie along, -1 if it is for all alike."""
    shape = facts.shape(tensor)
    if tensor is None or shape is None:
        return None
    axis = 1 - (rank - len(shape))
    size = shape[axis] if 0 <= axis < len(shape) else 1
    if size == 1:
        return -1
    if size != channels:
        return None
    if facts.is_constant(tensor):
        return axis
    return tensor if len(shape) == rank else None


def _divides_by_constant(node: Node, facts: Facts) -> bool:
    divisor = facts.constant(facts.input(node, 1))
    return divisor is not None and bool((divisor != 0).all())


def _depthwise(node: Node, channels: int, facts: Facts) -> Carrier | None:
    conv = dense_or_grouped(node, facts)
    if conv is None or not conv.group == conv.cin == conv.cout == channels:
        return None
    constants = tuple(PerChannel(i) for i in (1, 2) if facts.input(node, i) is not None)
    return Carrier((conv.input, conv.output), constants)


def _normalisation(node: Node, channels: int, facts: Facts) -> Carrier | None:
    through = _through(node, channels, facts)
    per_activation = facts.opset < 9 and not facts.attr_int(node, "spatial", 1)
    if through is None or per_activation or trains(facts, node):
        return None
    if not all(facts.is_constant(t) for t in node.inputs[1:5]):
        return None
    neutral = (PerChannel(1), PerChannel(2), PerChannel(3), PerChannel(4, neutral=1.0))
    return Carrier(through.members, neutral)


def _spatial_mean(node: Node, channels: int, facts: Facts) -> Carrier | None:
    through = _through(node, channels, facts)
    if through is None or not facts.attr_int(node, "keepdims", 1):
        return None
    given = facts.constant(facts.input(node, 1))
    axes = facts.attr_ints(node, "axes", ()) if given is None else tuple(int(a) for a in given)
    rank = facts.rank(node.inputs[0]) or 0
    is_spatial = bool(axes) and all(a % rank > 1 for a in axes)
    return through if is_spatial else None


def _resize(node: Node, channels: int, facts: Facts) -> Carrier | None:
    """By constant scales; sizes would name the number of channels."""
    through = _through(node, channels, facts)
    if through is None or facts.opset < 9 or "axes" in node.attrs:
        return None
    if facts.input(node, 3) is not None:
        return None
    if facts.attr_str(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return None
    first = facts.opset < 11 or node.op == "Upsample"
    scales = facts.constant(facts.input(node, 1 if first else 2))
    if scales is None or scales.size < 2 or scales.reshape(-1)[1] != 1:
        return None
    return through


# -- rearranging -----------------------------------------------------------------------------------


def rearrange(
    rewriter: Rewriter, found: ChannelClass, arrangement: Arrangement, seed: Tensor | None = None
) -> dict[int, Tensor]:
    """Give all tensors of a class *arrangement*; ends are left to the caller.

    Args:
        rewriter: what writes.
        found: the class.
        arrangement: what the places of its tensors hold from now on.
        seed: a member that has it already.

    Returns:
        By ``id`` of a member, the tensor that takes its place if the number of channels changes.
    """
    facts = Facts(rewriter.model)
    for conv in found.readers:
        _read(rewriter, facts, conv, arrangement)
    for conv in found.writers:
        _write(rewriter, facts, conv, arrangement)
    for node in found.carriers:
        works = carrier(node, found.channels, facts)
        assert works is not None
        for constant in works.constants:
            values = facts.constant(node.inputs[constant.index])
            assert values is not None
            rewriter.set_weight(node, constant.index, constant.taken(values, arrangement))
        if node.op == "Conv":
            rewriter.set_attribute(node, "group", len(arrangement))
    if len(arrangement) == found.channels:
        return {}
    return {
        id(t): _resized(rewriter, facts, t, len(arrangement))
        for t in found.tensors
        if t is not seed
    }


def _read(rewriter: Rewriter, facts: Facts, conv: ConvFacts, arrangement: Arrangement) -> None:
    weight = facts.constant(conv.node.inputs[1])
    assert weight is not None
    if conv.node.op == "ConvTranspose":
        taken = arrangements.take(weight, arrangement)
    else:
        taken = arrangements.take_inputs(weight, arrangement, group=conv.group)
    rewriter.set_weight(conv.node, 1, taken)


def _write(rewriter: Rewriter, facts: Facts, conv: ConvFacts, arrangement: Arrangement) -> None:
    weight = facts.constant(conv.node.inputs[1])
    assert weight is not None
    axis = 1 if conv.node.op == "ConvTranspose" else 0
    rewriter.set_weight(conv.node, 1, arrangements.take(weight, arrangement, axis=axis))
    if conv.bias is not None:
        bias = facts.constant(conv.node.inputs[2])
        assert bias is not None
        rewriter.set_weight(conv.node, 2, arrangements.take(bias, arrangement))


def _resized(rewriter: Rewriter, facts: Facts, tensor: Tensor, channels: int) -> Tensor:
    """A tensor with *channels* channels in the place of *tensor*."""
    shape = facts.shape(tensor)
    assert shape is not None
    resized = rewriter.variable(tensor.name, tensor, (shape[0], channels, *shape[2:]))
    producer = facts.producer(tensor)
    if producer is not None:
        index = next(i for i, t in enumerate(producer.outputs) if t is tensor)
        rewriter.set_output(producer, index, resized)
    rewriter.redirect(tensor, resized)
    return resized
