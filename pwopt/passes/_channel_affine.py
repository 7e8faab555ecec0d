"""Folding a per-channel affine map ``s x + t`` into the linear operators around it.

A BatchNormalization in inference mode is such a map, and so is a Mul, Add, Sub or Div by a constant
that varies along the channel axis at most. The map can be taken in

* by the operator *before* it, at its outputs: ``s (W x + b) + t = (diag(s) W) x + (s b + t)``;
* by the operators *behind* it, at their inputs: ``W (s x + t) + b = (W diag(s)) x + (W t + b)``,
  where the second half needs that every tap of the kernel reads ``t``, so no zero padding.

A BatchNormalization counts as a linear operator too, one with a diagonal matrix.

On the way it may cross operators that it commutes with: a scale ``s > 0`` crosses Relu, LeakyRelu
and PRelu (they are positively homogeneous: ``f(s x) = s f(x)``); ``s x + t`` with ``s > 0`` crosses
MaxPool and GlobalMaxPool (a maximum commutes with an increasing map; padding is never the maximum);
any ``s x`` crosses AveragePool and GlobalAveragePool (they are linear), and ``t`` too where no
window averages padding zeros. Any map crosses Concat: backwards every piece takes its part,
forwards the map is the identity on the channels of the other pieces.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, Tensor
from pwopt.numerics import channel_algebra

__all__ = [
    "Absorption",
    "Affine",
    "Fold",
    "Obstacle",
    "apply_fold",
    "fold_backward",
    "fold_forward",
    "trains",
]

Array = np.ndarray[Any, Any]
Float64 = npt.NDArray[np.float64]


class Obstacle(StrEnum):
    """What keeps an affine map from reaching or entering a linear operator."""

    NO_LINEAR_NEIGHBOUR = "no-linear-neighbour"
    OTHER_READERS = "other-readers"
    GRAPH_OUTPUT = "graph-output"
    NON_LINEAR_BETWEEN = "non-linear-between"
    NOT_FLOAT = "not-float"
    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    BIAS_NOT_PER_CHANNEL = "bias-not-per-channel"
    NOT_PER_CHANNEL = "not-per-channel"
    SHIFT_MEETS_PADDING = "shift-meets-padding"
    NO_BIAS_INPUT = "no-bias-input"
    OUT_OF_RANGE = "out-of-range"


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``scale * x + shift``.

    Attributes:
        scale, shift: float64, of the rank of ``x``; every axis is 1 or as long as that of ``x``.
    """

    scale: Float64
    shift: Float64

    @property
    def rank(self) -> int:
        """Number of dimensions of ``x``."""
        return self.scale.ndim

    @property
    def has_scale(self) -> bool:
        """Whether the scale is not one everywhere."""
        return bool((self.scale != 1).any())

    @property
    def has_shift(self) -> bool:
        """Whether the shift is not zero everywhere."""
        return bool(self.shift.any())

    @property
    def is_increasing(self) -> bool:
        """Whether larger inputs give larger outputs everywhere."""
        return bool((self.scale > 0).all())

    def along(self, axis: int, size: int) -> tuple[Float64, Float64] | None:
        """Scale and shift as ``[size]``, if they vary along *axis* at most."""
        vectors: list[Float64] = []
        for values in (self.scale, self.shift):
            if values.size != values.shape[axis] or values.size not in (1, size):
                return None
            vectors.append(np.broadcast_to(values.reshape(-1), (size,)))
        return vectors[0], vectors[1]

    def varies_within_channels(self) -> bool:
        """Whether the map is not the same all over a channel (axis 1)."""
        return any(math.prod(v.shape) != v.shape[1] for v in (self.scale, self.shift))

    def part(self, axis: int, start: int, size: int) -> Affine:
        """The map on *size* elements of *axis* from *start* on."""
        cut = (slice(None),) * axis + (slice(start, start + size),)
        scale, shift = (v if v.shape[axis] == 1 else v[cut] for v in (self.scale, self.shift))
        return Affine(scale, shift)

    def embedded(self, axis: int, start: int, size: int, total: int) -> Affine:
        """The map that does this on *size* of *total* elements of *axis*, nothing on the others."""
        parts: list[Float64] = []
        for values, rest in ((self.scale, np.ones), (self.shift, np.zeros)):
            shape = list(values.shape)
            shape[axis] = total
            whole = rest(shape)
            whole[(slice(None),) * axis + (slice(start, start + size),)] = values
            parts.append(whole)
        return Affine(parts[0], parts[1])


@dataclass(frozen=True, eq=False)
class Absorption:
    """New parameters for a linear node; ``None`` leaves the old ones.

    Attributes:
        node: the linear node.
        weight, bias: its new weight (the scale of a BatchNormalization) and bias.
        adder: the Add that holds the bias of a MatMul, if there is one.
        mean: of a BatchNormalization.
    """

    node: Node
    weight: Array | None
    bias: Array | None
    adder: Node | None = None
    mean: Array | None = None


@dataclass(frozen=True, eq=False)
class Fold:
    """Where an affine map goes.

    Attributes:
        absorptions: what becomes of the linear nodes that take it in.
        crossed: the nodes it commutes with on the way, nearest to the map first.
    """

    absorptions: tuple[Absorption, ...]
    crossed: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node the map meets."""
        return (*self.crossed, *(a.node for a in self.absorptions))

    def describe(self, facts: Facts) -> str:
        """The names of the nodes that take the map in."""
        return ", ".join(facts.site(a.node) for a in self.absorptions)


# -- the way there ---------------------------------------------------------------------------------


def fold_backward(facts: Facts, tensor: Tensor, affine: Affine) -> Fold | Obstacle:
    """Fold *affine*, which is applied to *tensor*, into the linear operators that compute it."""
    crossed: list[Node] = []
    operators: list[tuple[_Linear, Affine]] = []
    obstacles: list[Obstacle] = []
    pending = [(tensor, affine)]
    while pending:
        current, part = pending.pop()
        producer = facts.producer(current)
        operator = _linear(facts, producer) or _biased_matmul(facts, producer)
        pieces = _pieces(facts, producer, affine.rank)
        if producer is None or not (operator or pieces or _may_cross(facts, producer)):
            return Obstacle.NO_LINEAR_NEIGHBOUR
        # What is in the way matters only if a linear operator stands behind it.
        obstacles += _readers(facts, current)
        if operator is not None:
            operators.append((operator, part))
            continue
        crossed.append(producer)
        if pieces is None:
            obstacles += _crossing(facts, producer, part)
            pending.append((producer.inputs[0], part))
            continue
        if obstacles:
            return obstacles[0]  # There may be many ways from here, all of them in vain.
        parts = [(p.tensor, part.part(p.axis, p.start, p.size)) for p in pieces]
        pending += [(t, a) for t, a in reversed(parts) if a.has_scale or a.has_shift]
    if not operators:
        return Obstacle.NO_LINEAR_NEIGHBOUR
    if obstacles:
        return obstacles[0]
    return _fold([o.absorb_behind(facts, part) for o, part in operators], crossed)


def fold_forward(facts: Facts, tensor: Tensor, affine: Affine) -> Fold | Obstacle:
    """Fold *affine*, which computes *tensor*, into the linear operators that read it."""
    crossed: dict[int, Node] = {}
    operators: list[tuple[_Linear, Affine]] = []
    obstacles: list[Obstacle] = []
    pending = [(tensor, affine)]
    while pending:
        current, part = pending.pop()
        obstacles += _outside_readers(facts, current)
        for consumer in facts.consumers(current):
            # What is in the way matters only if a linear operator stands behind it.
            obstacles += _entering(facts, current, consumer, part)
            operator = _linear(facts, consumer)
            pieces = _pieces(facts, consumer, affine.rank)
            if operator is not None:
                operators.append((operator, part))
            elif id(consumer) in crossed:
                obstacles.append(Obstacle.OTHER_READERS)  # A Concat that is reached twice.
            elif pieces is not None:
                crossed[id(consumer)] = consumer
                piece = next(p for p in pieces if p.tensor is current)
                whole = part.embedded(piece.axis, piece.start, piece.size, piece.total)
                pending.append((consumer.outputs[0], whole))
            elif _may_cross(facts, consumer):
                crossed[id(consumer)] = consumer
                pending.append((consumer.outputs[0], part))
    if not operators:
        return Obstacle.NO_LINEAR_NEIGHBOUR
    if obstacles:
        return obstacles[0]
    return _fold([o.absorb_before(facts, part) for o, part in operators], list(crossed.values()))


def _fold(answers: Sequence[Absorption | Obstacle], crossed: Sequence[Node]) -> Fold | Obstacle:
    absorptions: list[Absorption] = []
    for answer in answers:
        if isinstance(answer, Obstacle):
            return answer
        absorptions.append(answer)
    return Fold(tuple(absorptions), tuple(crossed))


def _outside_readers(facts: Facts, tensor: Tensor) -> list[Obstacle]:
    if facts.is_output(tensor):
        return [Obstacle.GRAPH_OUTPUT]
    return [Obstacle.OTHER_READERS] if facts.is_captured(tensor) else []


def _entering(facts: Facts, tensor: Tensor, consumer: Node, affine: Affine) -> list[Obstacle]:
    """Why *affine*, applied to *tensor*, can neither enter nor cross *consumer*."""
    if sum(t is tensor for t in consumer.inputs) > 1:
        return [Obstacle.OTHER_READERS]
    if _pieces(facts, consumer, affine.rank) is not None:
        return []
    if consumer.inputs[0] is not tensor:
        return [Obstacle.OTHER_READERS]
    if _linear(facts, consumer) is not None:
        return []
    if not _may_cross(facts, consumer):
        return [Obstacle.OTHER_READERS]
    return _crossing(facts, consumer, affine)


def _readers(facts: Facts, tensor: Tensor) -> list[Obstacle]:
    """Why what computes *tensor* cannot change: others than one node read it."""
    if facts.is_output(tensor):
        return [Obstacle.GRAPH_OUTPUT]
    return [] if facts.is_private(tensor) else [Obstacle.OTHER_READERS]


@dataclass(frozen=True, eq=False)
class _Piece:
    """An input of a Concat, and where it lies among the *total* elements of the output's axis."""

    tensor: Tensor
    axis: int
    start: int
    size: int
    total: int


def _pieces(facts: Facts, node: Node | None, rank: int) -> list[_Piece] | None:
    """The inputs of a Concat of tensors of *rank*, whose sizes along its axis are known."""
    if node is None or not facts.is_op(node, "Concat"):
        return None
    axis = facts.attr_int(node, "axis", 1) % rank
    shapes = [facts.shape(t) for t in node.inputs]
    sizes = [s[axis] for s in shapes if s is not None and len(s) == rank]
    known = [s for s in sizes if isinstance(s, int)]
    if len(known) != len(node.inputs):
        return None
    starts = [sum(known[:i]) for i in range(len(known))]
    return [
        _Piece(tensor, axis, start, size, sum(known))
        for tensor, start, size in zip(node.inputs, starts, known, strict=True)
    ]


_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
_MAXIMA = ("MaxPool", "GlobalMaxPool")
_MEANS = ("AveragePool", "GlobalAveragePool")


def _may_cross(facts: Facts, node: Node) -> bool:
    """Whether some affine map commutes with *node*."""
    if not facts.is_op(node, *_HOMOGENEOUS, *_MAXIMA, *_MEANS):
        return False
    if len(node.outputs) != 1:
        return False  # The indices of a MaxPool may change with rounding where values tie.
    # With ceil_mode a window may lie in the padding alone, where runtimes differ.
    return facts.attr_int(node, "ceil_mode", 0) == 0


def _crossing(facts: Facts, node: Node, affine: Affine) -> list[Obstacle]:
    """Why *affine* does not commute with *node*, which :func:`_may_cross`."""
    if facts.is_op(node, *_HOMOGENEOUS):
        ok = affine.is_increasing and not affine.has_shift
        return [] if ok else [Obstacle.NON_LINEAR_BETWEEN]
    if affine.varies_within_channels():
        return [Obstacle.NOT_PER_CHANNEL]
    if facts.is_op(node, *_MAXIMA):
        return [] if affine.is_increasing else [Obstacle.NON_LINEAR_BETWEEN]
    if affine.has_shift and _averages_padding(facts, node):
        return [Obstacle.SHIFT_MEETS_PADDING]
    return []


def _averages_padding(facts: Facts, node: Node) -> bool:
    if node.op == "GlobalAveragePool" or not facts.attr_int(node, "count_include_pad", 0):
        return False
    kernel = facts.attr_ints(node, "kernel_shape", ())
    ones = (1,) * len(kernel)
    strides = facts.attr_ints(node, "strides", ones)
    pads = facts.window_pads(node, kernel, strides, facts.attr_ints(node, "dilations", ones))
    return pads is None or any(pads)


# -- the linear operators --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Linear(ABC):
    """A linear operator; data is its input 0, weights its input 1, a bias its input 2.

    Attributes:
        adder: for a MatMul, the Add that stands in for its bias.
    """

    node: Node
    adder: Node | None = field(default=None, kw_only=True)

    def absorb_behind(self, facts: Facts, affine: Affine) -> Absorption | Obstacle:
        """Parameters with which the node does what *affine* after it did."""
        vectors = affine.along(self._axis(affine), self._channels(behind=True))
        if vectors is None:
            return Obstacle.NOT_PER_CHANNEL
        scale, shift = vectors
        bias: Float64 | None = None
        if affine.has_shift or self._has_bias(facts):
            old = self._bias(facts)
            if isinstance(old, Obstacle):
                return old
            bias = scale * old + shift
        return self._absorption(facts, scale if affine.has_scale else None, bias, behind=True)

    def absorb_before(self, facts: Facts, affine: Affine) -> Absorption | Obstacle:
        """Parameters with which the node does what *affine* before it did."""
        vectors = affine.along(self._axis(affine), self._channels(behind=False))
        if vectors is None:
            return Obstacle.NOT_PER_CHANNEL
        scale, shift = vectors
        bias: Float64 | None = None
        if affine.has_shift:
            old = self._bias(facts)
            if isinstance(old, Obstacle):
                return old
            response = self._response(facts, shift)
            if isinstance(response, Obstacle):
                return response
            bias = old + response
        return self._absorption(facts, scale if affine.has_scale else None, bias, behind=False)

    def _absorption(
        self, facts: Facts, scale: Float64 | None, bias: Float64 | None, *, behind: bool
    ) -> Absorption | Obstacle:
        weight = facts.constant(self.node.inputs[1])
        dtype = facts.dtype(self.node.inputs[1])
        if dtype is None or not facts.is_float(self.node.inputs[1]):
            return Obstacle.NOT_FLOAT
        if weight is None and scale is not None:
            return Obstacle.WEIGHT_NOT_CONSTANT
        new_weight: Array | None = None
        if weight is not None and scale is not None:
            new_weight = channel_algebra.cast(self._scaled(weight, scale, behind=behind), dtype)
            if new_weight is None:
                return Obstacle.OUT_OF_RANGE
        new_bias: Array | None = None
        if bias is not None:
            new_bias = channel_algebra.cast(bias, dtype, may_vanish=True)
            if new_bias is None:
                return Obstacle.OUT_OF_RANGE
        return Absorption(self.node, new_weight, new_bias, self.adder)

    def _has_bias(self, facts: Facts) -> bool:
        return facts.input(self.node, 2) is not None or self.adder is not None

    @abstractmethod
    def _axis(self, affine: Affine) -> int:
        """The channel axis, of a tensor of the rank of *affine*."""

    @abstractmethod
    def _channels(self, *, behind: bool) -> int:
        """Number of output or input channels."""

    @abstractmethod
    def _bias(self, facts: Facts) -> Float64 | Obstacle:
        """The bias as ``[Cout]``, zeros if absent."""

    @abstractmethod
    def _response(self, facts: Facts, shift: Float64) -> Float64 | Obstacle:
        """What the node, without bias, makes of an input that is *shift* everywhere."""

    @abstractmethod
    def _scaled(self, weight: Array, scale: Float64, *, behind: bool) -> Float64:
        """Weights with a scale on the output or input channels."""


@dataclass(frozen=True, eq=False)
class _Conv(_Linear):
    """Conv or ConvTranspose."""

    conv: ConvFacts

    @property
    def _transposed(self) -> bool:
        return self.node.op == "ConvTranspose"

    def _axis(self, affine: Affine) -> int:  # noqa: ARG002 - channels are always axis 1
        return 1

    def _channels(self, *, behind: bool) -> int:
        return self.conv.cout if behind else self.conv.cin

    def _bias(self, facts: Facts) -> Float64 | Obstacle:
        if self.conv.bias is None:
            return np.zeros(self.conv.cout)
        bias = facts.constant(self.conv.bias)
        return Obstacle.WEIGHT_NOT_CONSTANT if bias is None else bias.astype(np.float64)

    def _response(self, facts: Facts, shift: Float64) -> Float64 | Obstacle:
        # A ConvTranspose answers a constant with a pattern of the period of its strides.
        if self._transposed or not self.conv.is_unpadded:
            return Obstacle.SHIFT_MEETS_PADDING
        weight = facts.constant(self.conv.weight)
        if weight is None:
            return Obstacle.WEIGHT_NOT_CONSTANT
        return channel_algebra.constant_response(weight, shift, group=self.conv.group)

    def _scaled(self, weight: Array, scale: Float64, *, behind: bool) -> Float64:
        apply = channel_algebra.scale_outputs if behind else channel_algebra.scale_inputs
        return apply(weight, scale, group=self.conv.group, transposed=self._transposed)


@dataclass(frozen=True, eq=False)
class _Matrix(_Linear):
    """Gemm or MatMul with a two-dimensional right-hand side ``[K, N]``.

    Attributes:
        shape: K and N.
        is_stored_transposed: whether the weight is stored as ``[N, K]``.
        alpha, beta: factors of the product and of the bias.
    """

    shape: tuple[int, int]
    is_stored_transposed: bool
    alpha: float
    beta: float

    def _axis(self, affine: Affine) -> int:
        return affine.scale.ndim - 1

    def _channels(self, *, behind: bool) -> int:
        return self.shape[1] if behind else self.shape[0]

    def _bias(self, facts: Facts) -> Float64 | Obstacle:
        size = self.shape[1]
        tensor = facts.input(self.node, 2)
        if self.adder is not None:
            tensor = next(t for t in self.adder.inputs if t is not self.node.outputs[0])
        elif self.node.op == "MatMul" and facts.rank(self.node.inputs[0]) != 2:
            return Obstacle.NO_BIAS_INPUT
        if tensor is None:
            return np.zeros(size)
        bias = facts.constant(tensor)
        if bias is None:
            return Obstacle.WEIGHT_NOT_CONSTANT
        if bias.size not in (1, size) or (bias.ndim and bias.shape[-1] != bias.size):
            return Obstacle.BIAS_NOT_PER_CHANNEL
        return np.broadcast_to(self.beta * bias.astype(np.float64).reshape(-1), (size,))

    def _response(self, facts: Facts, shift: Float64) -> Float64 | Obstacle:
        weight = facts.constant(self.node.inputs[1])
        if weight is None:
            return Obstacle.WEIGHT_NOT_CONSTANT
        rows = weight if self.is_stored_transposed else weight.T
        return self.alpha * channel_algebra.constant_response(rows, shift)

    def _scaled(self, weight: Array, scale: Float64, *, behind: bool) -> Float64:
        rows = weight if self.is_stored_transposed else weight.T
        apply = channel_algebra.scale_outputs if behind else channel_algebra.scale_inputs
        scaled = apply(rows, scale)
        return scaled if self.is_stored_transposed else scaled.T


@dataclass(frozen=True, eq=False)
class _Normalisation(_Linear):
    """BatchNormalization in inference mode, whose parameters are constant.

    Attributes:
        scale, bias, mean: its inputs.
        slope: what it multiplies by, ``scale / sqrt(variance + epsilon)``.
    """

    scale: Float64
    bias: Float64
    mean: Float64
    slope: Float64

    def absorb_before(self, facts: Facts, affine: Affine) -> Absorption | Obstacle:
        """Parameters with which the node does what *affine* before it did.

        ``slope (s x + t - mean) + bias``; without a mean, no large term comes in that another one
        would have to cancel.
        """
        vectors = affine.along(1, self.scale.size)
        if vectors is None:
            return Obstacle.NOT_PER_CHANNEL
        scale, shift = vectors
        bias = self.bias + self.slope * (shift - self.mean)
        found = self._absorption(facts, scale if affine.has_scale else None, bias, behind=False)
        if isinstance(found, Obstacle) or not self.mean.any():
            return found
        dtype = facts.dtype(self.node.inputs[3])
        return replace(found, mean=np.zeros(self.mean.shape, dtype))

    def _axis(self, affine: Affine) -> int:  # noqa: ARG002 - channels are always axis 1
        return 1

    def _channels(self, *, behind: bool) -> int:  # noqa: ARG002 - as many before as behind
        return self.scale.size

    def _bias(self, facts: Facts) -> Float64 | Obstacle:  # noqa: ARG002 - read already
        return self.bias

    def _response(self, facts: Facts, shift: Float64) -> Float64 | Obstacle:  # noqa: ARG002
        return self.slope * shift

    def _scaled(self, weight: Array, scale: Float64, *, behind: bool) -> Float64:  # noqa: ARG002
        return weight.astype(np.float64) * scale


def trains(facts: Facts, node: Node) -> bool:
    """Whether the BatchNormalization *node* is in training mode."""
    if facts.attr_int(node, "training_mode", 0):
        return True
    if any(not t.is_empty() for t in node.outputs[1:]):
        return True
    return facts.opset < 7 and not facts.attr_int(node, "is_test", 0)


def _normalisation(facts: Facts, node: Node) -> _Normalisation | None:
    """*node* as a BatchNormalization that is an affine map, if it is one."""
    per_activation = facts.opset < 9 and not facts.attr_int(node, "spatial", 1)
    if per_activation or trains(facts, node):
        return None
    parameters = [facts.constant(t) for t in node.inputs[1:5]]
    scale, bias, mean, variance = parameters
    if scale is None or bias is None or mean is None or variance is None:
        return None
    epsilon = facts.attr_float(node, "epsilon", 1e-5)
    terms = channel_algebra.batch_normalization_affine(scale, bias, mean, variance, epsilon)
    if terms is None:
        return None
    return _Normalisation(
        node,
        scale=scale.astype(np.float64),
        bias=bias.astype(np.float64),
        mean=mean.astype(np.float64),
        slope=terms[0],
    )


def _biased_matmul(facts: Facts, node: Node | None) -> _Linear | None:
    """The MatMul whose bias the Add *node* is."""
    if node is None or not facts.is_op(node, "Add"):
        return None
    for product, bias in (node.inputs, reversed(node.inputs)):
        producer = facts.producer(product)
        rank = facts.rank(product)
        if not facts.is_op(producer, "MatMul") or not facts.is_private(product) or rank is None:
            continue
        operator = _linear(facts, producer)
        if operator is not None and facts.is_constant(bias) and len(bias.shape) <= rank:
            return replace(operator, adder=node)
    return None


_LINEAR = ("BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul")


def _linear(facts: Facts, node: Node | None) -> _Linear | None:
    """*node* as a linear operator whose weight shape is known, with data on the left."""
    if node is None or not facts.is_op(node, *_LINEAR):
        return None
    if node.op == "BatchNormalization":
        return _normalisation(facts, node)
    conv = facts.conv(node)
    if conv is not None:
        return _Conv(node, conv)
    shape = facts.static_shape(facts.input(node, 1))
    if shape is None or len(shape) != 2 or node.op not in ("Gemm", "MatMul"):
        return None
    if facts.attr_int(node, "transA", 0) or facts.opset < 7:
        return None  # Before opset 7 a Gemm has another rule for the shape of its bias.
    stored_transposed = bool(facts.attr_int(node, "transB", 0))
    return _Matrix(
        node,
        (shape[1], shape[0]) if stored_transposed else (shape[0], shape[1]),
        stored_transposed,
        facts.attr_float(node, "alpha", 1.0),
        facts.attr_float(node, "beta", 1.0),
    )


# -- writing ---------------------------------------------------------------------------------------


def apply_fold(rewriter: Rewriter, node: Node, data: Tensor, fold: Fold, *, backward: bool) -> None:
    """Write *fold* and remove *node*, the affine operator, which reads *data*."""
    target = node.outputs[0]
    if backward:
        # The operator before takes over the name that others know the result by.
        source = fold.absorptions[0]
        last = fold.crossed[0] if fold.crossed else source.adder or source.node
        rewriter.remove(node)
        rewriter.set_output(last, 0, target)
        _revisit_downstream(rewriter, target)
    else:
        rewriter.bypass(node, data)
        _revisit_upstream(rewriter, data)
    for absorption in fold.absorptions:
        _write(rewriter, absorption)


def _write(rewriter: Rewriter, absorption: Absorption) -> None:
    node, weight, bias = absorption.node, absorption.weight, absorption.bias
    if weight is not None:
        rewriter.set_weight(node, 1, weight)
    if absorption.mean is not None:
        rewriter.set_weight(node, 3, absorption.mean)
    if bias is None:
        return
    if absorption.adder is not None:
        rewriter.set_inputs(
            absorption.adder, [node.outputs[0], rewriter.constant(f"{node.name}/bias", bias)]
        )
        return
    if node.op != "MatMul":
        rewriter.set_weight(node, 2, bias)
        if node.attrs.get("beta", 1.0) != 1.0:
            rewriter.set_attribute(node, "beta", None)
        return
    inputs: Sequence[Tensor] = [*node.inputs, rewriter.constant(f"{node.name}/bias", bias)]
    output = node.outputs[0]
    rewriter.remove(node)
    rewriter.add("Gemm", inputs, [output], near=node)


# Where a map has gone, another one that waited behind crossable operators may follow.


def _revisit_upstream(rewriter: Rewriter, tensor: Tensor) -> None:
    facts = Facts(rewriter.model)
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        producer = facts.producer(pending.pop())
        if producer is None or id(producer) in seen:
            continue
        seen.add(id(producer))
        if facts.is_op(producer, "Concat"):
            pending += producer.inputs
        elif _may_cross(facts, producer):
            pending.append(producer.inputs[0])
        else:
            rewriter.revisit(producer)


def _revisit_downstream(rewriter: Rewriter, tensor: Tensor) -> None:
    facts = Facts(rewriter.model)
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        for consumer in facts.consumers(pending.pop()):
            if id(consumer) in seen:
                continue
            seen.add(id(consumer))
            if facts.is_op(consumer, "Concat") or _may_cross(facts, consumer):
                pending.append(consumer.outputs[0])
            else:
                rewriter.revisit(consumer)
