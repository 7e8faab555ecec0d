"""Fold Mul, Add, Sub and Div by constants into weights, or into one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.numerics import channel_algebra
from pwopt.passes._activations import Activation, named_at
from pwopt.passes._channel_affine import (
    Affine,
    Fold,
    Obstacle,
    apply_fold,
    fold_backward,
    fold_forward,
)
from pwopt.passes._movable import reduced_axes
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["FoldAffine", "FoldAffineMatch"]

Array = np.ndarray[Any, Any]
Float64 = npt.NDArray[np.float64]

_FUSED_AS_WRITTEN = (Activation.GELU, Activation.GELU_TANH)
"""Activations that ONNX Runtime recognises as they are written out, the last factor included."""


@dataclass(frozen=True, eq=False)
class _AffineNode:
    """A node that computes ``scale * data + shift``.

    Attributes:
        scale, shift: float64, broadcast against ``data`` as ONNX does.
        shape: of the node's constant.
        dtype: of the node's constant, and so of ``data``.
    """

    node: Node
    data: Tensor
    scale: Float64
    shift: Float64
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def is_scalar(self) -> bool:
        """Whether the constant has one element."""
        return math.prod(self.shape) == 1


@dataclass(frozen=True, eq=False)
class _Merge:
    """One operator with one constant for two."""

    first: Node
    data: Tensor
    op: str
    constant: Array
    is_constant_first: bool


@dataclass(frozen=True, eq=False)
class _Normalise:
    """A BatchNormalization for two operators.

    Attributes:
        scale, shift: ``[C]``.
    """

    first: Node
    data: Tensor
    scale: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class FoldAffineMatch(Match):
    """An affine operator on ``data``, and where it goes."""

    data: Tensor
    plan: Fold | _Merge | _Normalise
    backward: bool


@dataclass(frozen=True)
class FoldAffine(Pass[FoldAffineMatch]):
    """Fold Mul, Add, Sub and Div by constants into neighbouring weights.

    Rewrites:
        ``Conv -> Mul`` (Add, Sub, Div; by a constant that is a scalar or varies along the channels
        only, as either operand, except ``c / x``) into ``Conv``; likewise behind ConvTranspose,
        BatchNormalization, Gemm and MatMul (which becomes a Gemm where it needs a bias and has
        rank 2, and keeps the Add of its bias elsewhere), and before them, into every one of them
        if it feeds several. The operator before goes first. Between the two may stand Relu,
        LeakyRelu, PRelu, MaxPool, GlobalMaxPool, AveragePool, GlobalAveragePool and Concat where
        they commute: ``Conv -> Relu -> Mul`` by a positive constant becomes ``Conv -> Relu``.
        Where no weights are near, two such operators in a row become one: Mul and Div a Mul, Add
        and Sub an Add or Sub, a scale and a shift of four dimensions or more, at least one of
        which differs by channel, a BatchNormalization.

    Algebra:
        Every root is a map ``s x + t``. Behind an operator:
        ``s (W x + b) + t = (diag(s) W) x + (s b + t)``; before one:
        ``W (s x + t) + b = (W diag(s)) x + (W t + b)``, where every tap must read ``t``, so a
        padded convolution takes a scale only. A BatchNormalization has a diagonal W. For
        ``s > 0``, ``relu(s x) = s relu(x)`` and ``max(s x + t) = s max(x) + t``; means are linear;
        every piece of a Concat has its part of s and t. In a row:
        ``s2 (s1 x + t1) + t2 = (s1 s2) x + (s2 t1 + t2)``, which is a BatchNormalization of mean 0
        and variance 1.

    Declines when:
        both operands are computed (a residual Add) or both constant; the tensors are not floating
        point (an integer Div truncates); the constant divides by ``x``, is zero as a divisor, or
        is not finite; broadcasting would enlarge ``x``; the constant varies along another axis
        than the channels; nothing linear stands next to it; the value between is read elsewhere
        or is a graph output; weights are not constant; a shift would meet zero padding; folded
        weights would leave the range of their type; it is the half that ends a GELU, or scale or
        shift of a LayerNormalization, written out, which ONNX Runtime fuses as a whole; a scale
        and a shift are both scalars, as in activations that are written out, or have less than
        four dimensions, whose last may be the channels.

    Exactness:
        ROUNDING. Weights are computed in float64 and rounded once, so a Div costs no more than a
        Mul. Shared weights get a copy.

    When it pays:
        By one operator and one pass over memory. ONNX Runtime folds a per-channel Mul or Add right
        behind a Conv by itself when it loads a model, but no scalar, and nothing into a
        BatchNormalization, nor does it run an Add of a constant in its blocked layout: a DenseNet
        whose normalisations have Mul and Add of their own gained 1.3 times.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        TWO_VARIABLES = "two-variables"
        NO_VARIABLE = "no-variable"
        NOT_FLOAT = "not-float"
        LEGACY_BROADCAST = "legacy-broadcast"
        DIVIDES_BY_VARIABLE = "divides-by-variable"
        NOT_FINITE = "not-finite"
        SHAPE_UNKNOWN = "shape-unknown"
        ENLARGES_OUTPUT = "enlarges-output"
        PART_OF_ACTIVATION = "part-of-activation"
        PART_OF_NORMALISATION = "part-of-normalisation"
        NOT_ONE_OPERATOR = "not-one-operator"
        WOULD_GROW = "would-grow"
        NO_LINEAR_NEIGHBOUR = Obstacle.NO_LINEAR_NEIGHBOUR.value
        OTHER_READERS = Obstacle.OTHER_READERS.value
        GRAPH_OUTPUT = Obstacle.GRAPH_OUTPUT.value
        NON_LINEAR_BETWEEN = Obstacle.NON_LINEAR_BETWEEN.value
        WEIGHT_NOT_CONSTANT = Obstacle.WEIGHT_NOT_CONSTANT.value
        BIAS_NOT_PER_CHANNEL = Obstacle.BIAS_NOT_PER_CHANNEL.value
        NOT_PER_CHANNEL = Obstacle.NOT_PER_CHANNEL.value
        SHIFT_MEETS_PADDING = Obstacle.SHIFT_MEETS_PADDING.value
        NO_BIAS_INPUT = Obstacle.NO_BIAS_INPUT.value
        OUT_OF_RANGE = Obstacle.OUT_OF_RANGE.value

    name: ClassVar[str] = "fold-affine"
    roots: ClassVar[tuple[str, ...]] = ("Mul", "Add", "Sub", "Div")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> FoldAffineMatch | Decline:
        """See the class."""
        found = self._read(node, facts)
        if isinstance(found, self.Why):
            return Decline(found)
        affine = self._align(found, facts)
        if isinstance(affine, self.Why):
            reasons = [affine]
        else:
            before = fold_backward(facts, found.data, affine)
            if isinstance(before, Fold):
                return _folded(found, before, facts, backward=True)
            behind = fold_forward(facts, node.outputs[0], affine)
            if isinstance(behind, Fold):
                return _folded(found, behind, facts, backward=False)
            reasons = [self.Why(before.value), self.Why(behind.value)]
        merge = self._merge(found, facts)
        if not isinstance(merge, self.Why):
            return FoldAffineMatch(
                node,
                (merge.first, node),
                found.data,
                merge,
                backward=True,
                facts={"into": facts.site(merge.first)},
            )
        reasons.append(merge)
        telling = [why for why in reasons if why is not self.Why.NO_LINEAR_NEIGHBOUR]
        return Decline((telling or reasons)[0], {"tried": [why.value for why in reasons]})

    def _read(self, node: Node, facts: Facts) -> _AffineNode | Why:
        """*node* as an affine map, or why it is none."""
        first, second = node.inputs[:2]
        constant_first = facts.is_constant(first)
        if constant_first == facts.is_constant(second):
            return self.Why.NO_VARIABLE if constant_first else self.Why.TWO_VARIABLES
        constant, data = (first, second) if constant_first else (second, first)
        dtype = facts.dtype(constant)
        values = facts.constant(constant)
        if values is None or dtype is None or not facts.is_float(constant):
            return self.Why.NOT_FLOAT
        if facts.opset < 7:
            return self.Why.LEGACY_BROADCAST
        if node.op == "Div" and constant_first:
            return self.Why.DIVIDES_BY_VARIABLE
        scale, shift = _terms(node.op, values.astype(np.float64), constant_first)
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            return self.Why.NOT_FINITE
        if node.op == "Mul" and values.size == 1 and named_at(node, facts) in _FUSED_AS_WRITTEN:
            return self.Why.PART_OF_ACTIVATION
        if _ends_layer_normalisation(node.op, data, facts):
            return self.Why.PART_OF_NORMALISATION
        return _AffineNode(node, data, scale, shift, values.shape, dtype)

    def _align(self, found: _AffineNode, facts: Facts) -> Affine | Why:
        """The map with the rank of its data, whose shape it must leave alone."""
        shape = facts.shape(found.data)
        if shape is None:
            return self.Why.SHAPE_UNKNOWN
        rank = len(shape)
        if len(found.shape) > rank:
            return self.Why.ENLARGES_OUTPUT
        for dim, size in zip(reversed(shape), reversed(found.shape), strict=False):
            if size not in (1, dim):
                return self.Why.ENLARGES_OUTPUT
        scale, shift = (
            v.reshape((1,) * (rank - v.ndim) + v.shape) for v in (found.scale, found.shift)
        )
        return Affine(scale, shift)

    def _merge(self, second: _AffineNode, facts: Facts) -> _Merge | _Normalise | Why:
        """*second* and the affine operator before it as one, or why not."""
        producer = facts.producer(second.data)
        if producer is None or not facts.is_op(producer, *self.roots):
            return self.Why.NO_LINEAR_NEIGHBOUR
        first = self._read(producer, facts)
        if isinstance(first, self.Why):
            return self.Why.NO_LINEAR_NEIGHBOUR
        if facts.is_output(second.data):
            return self.Why.GRAPH_OUTPUT
        if not facts.is_private(second.data):
            return self.Why.OTHER_READERS
        scale = first.scale * second.scale
        shift = first.shift * second.scale + second.shift
        if not shift.any():
            op, values = "Mul", scale
        elif (scale == 1).all():
            op, values = "Add", shift
        elif (scale == -1).all():
            op, values = "Sub", shift
        else:
            return self._normalise(first, second, facts)
        # The shape of both, since either may be what enlarges the data.
        shape = np.broadcast_shapes(first.shape, second.shape)
        if np.prod(shape) > max(np.prod(first.shape), np.prod(second.shape)):
            return self.Why.WOULD_GROW
        full = np.broadcast_to(values, shape)
        constant = channel_algebra.cast(full, second.dtype, may_vanish=op != "Mul")
        if constant is None:
            return self.Why.OUT_OF_RANGE
        return _Merge(producer, first.data, op, constant, is_constant_first=op == "Sub")

    def _normalise(self, first: _AffineNode, second: _AffineNode, facts: Facts) -> _Normalise | Why:
        """A scale and a shift as a BatchNormalization, or why not."""
        # Two scalars are rather part of an activation that is written out, and three dimensions
        # rather a sequence, whose channels come last.
        if first.is_scalar and second.is_scalar:
            return self.Why.NOT_ONE_OPERATOR
        maps = [self._align(node, facts) for node in (first, second)]
        channels = facts.channels(first.data)
        vectors = [
            m.along(1, channels)
            for m in maps
            if isinstance(m, Affine) and channels is not None and m.rank > 3
        ]
        known = [v for v in vectors if v is not None]
        if len(known) != 2:
            return self.Why.NOT_ONE_OPERATOR
        (inner, offset), (outer, shift) = known
        scale = channel_algebra.cast(outer * inner, second.dtype)
        total = channel_algebra.cast(outer * offset + shift, second.dtype, may_vanish=True)
        if scale is None or total is None:
            return self.Why.OUT_OF_RANGE
        return _Normalise(first.node, first.data, scale, total)

    def rewrite(
        self,
        match: FoldAffineMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        node, plan = match.root, match.plan
        if isinstance(plan, Fold):
            apply_fold(rewriter, node, match.data, plan, backward=match.backward)
            return
        if isinstance(plan, _Normalise):
            _write_normalisation(rewriter, node, plan)
            return
        constant = rewriter.constant(f"{node.outputs[0].name}/constant", plan.constant)
        operands = [constant, plan.data] if plan.is_constant_first else [plan.data, constant]
        output = node.outputs[0]
        rewriter.remove(node)
        rewriter.remove(plan.first)
        rewriter.add(plan.op, operands, [output], near=node)


def _write_normalisation(rewriter: Rewriter, node: Node, plan: _Normalise) -> None:
    """A BatchNormalization of variance 1 that does what *plan* says."""
    output = node.outputs[0]
    zeros, ones = np.zeros_like(plan.scale), np.ones_like(plan.scale)
    parameters = {"scale": plan.scale, "bias": plan.shift, "mean": zeros, "variance": ones}
    inputs = [rewriter.constant(f"{output.name}/{k}", v) for k, v in parameters.items()]
    rewriter.remove(node)
    rewriter.remove(plan.first)
    attributes = {"epsilon": 0.0}
    rewriter.add("BatchNormalization", [plan.data, *inputs], [output], attributes, near=node)


def _terms(op: str, constant: Float64, constant_first: bool) -> tuple[Float64, Float64]:
    """Scale and shift of *op* by *constant*."""
    one, zero = np.ones(()), np.zeros(())
    if op == "Mul":
        return constant, zero
    if op == "Div":
        with np.errstate(divide="ignore", over="ignore"):
            return 1 / constant, zero
    if op == "Add":
        return one, constant
    return (-one, constant) if constant_first else (one, -constant)


def _ends_layer_normalisation(op: str, data: Tensor, facts: Facts) -> bool:
    """Whether ``op(data, constant)`` is scale or shift of a LayerNormalization over the last axis.

    That is ``(x - mean) / sqrt(variance + epsilon)``, then Mul, then Add.
    """
    quotient = facts.producer(data)
    if op == "Add" and facts.is_op(quotient, "Mul"):
        assert quotient is not None
        varying = [t for t in quotient.inputs if not facts.is_constant(t)]
        quotient = facts.producer(varying[0]) if len(varying) == 1 else None
    elif op != "Mul":
        return False
    root = _producer_of(quotient, "Div", 1, facts)
    total = _producer_of(root, "Sqrt", 0, facts)
    if not facts.is_op(total, "Add"):
        return False
    assert total is not None
    means = [facts.producer(t) for t in total.inputs if not facts.is_constant(t)]
    rank = facts.rank(data)
    return (
        rank is not None
        and len(means) == 1
        and means[0] is not None
        and facts.is_op(means[0], "ReduceMean")
        and reduced_axes(means[0], rank, facts) == (rank - 1,)
    )


def _producer_of(node: Node | None, op: str, index: int, facts: Facts) -> Node | None:
    """What computes input *index* of *node*, if *node* is an *op*."""
    return facts.producer(node.inputs[index]) if node and facts.is_op(node, op) else None


def _folded(found: _AffineNode, fold: Fold, facts: Facts, *, backward: bool) -> FoldAffineMatch:
    return FoldAffineMatch(
        found.node,
        (found.node, *fold.nodes),
        found.data,
        fold,
        backward,
        facts={"into": fold.describe(facts)},
    )
