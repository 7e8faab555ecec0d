"""Operators that can work in another layout once their axes are renamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor

__all__ = ["ELEMENTWISE", "Axes", "Movable", "inverse", "movable", "reduced_axes"]

Axes = tuple[int, ...]
"""A change of layout: axis ``a`` of the old layout is axis ``axes[a]`` of the new one."""


@dataclass(frozen=True, eq=False)
class Movable:
    """Operators that compute the same in another layout, once their axes are renamed.

    Attributes:
        nodes: usually one; several if they can only move together.
        inputs: tensors read in the layout at stake (not scalars, constants, indices).
        outputs: tensors written in that layout.
        transform: renames the axes, after inputs and outputs were reconnected.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    transform: Callable[[Rewriter, Axes], None]


def inverse(perm: Sequence[int]) -> Axes:
    """The permutation that undoes *perm*."""
    undone = [0] * len(perm)
    for index, axis in enumerate(perm):
        undone[axis] = index
    return tuple(undone)


# fmt: off
ELEMENTWISE = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
})
_REDUCTIONS = frozenset({
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
})
# fmt: on
_SELECTIONS = frozenset({"ArgMax", "ArgMin"})
_NORMALISATIONS = frozenset({"Hardmax", "LogSoftmax", "Softmax"})


def movable(node: Node, axes: Axes, facts: Facts) -> Movable | None:
    """How to move *node* into a layout whose axes are renamed by *axes*, if it can move.

    Elementwise operators (with constants and scalars beside tensors of full rank), Concat, Split,
    Slice, Pad, Softmax and its kin along one axis, and reductions.
    """
    if not facts.is_op(node, node.op):
        return None
    if node.op in ELEMENTWISE:
        return _elementwise(node, axes, facts)
    if node.op in _REDUCTIONS or node.op in _SELECTIONS:
        return _reduction(node, axes, facts)
    if node.op in _NORMALISATIONS:
        # Before opset 13 these flatten their input to a matrix.
        is_along_axis = facts.has_op(node.op, since=13)
        return _along_axis(node, axes, facts, -1) if is_along_axis else None
    if node.op == "Split":
        return _along_axis(node, axes, facts, 0)
    if node.op == "Concat":
        return _concat(node, axes, facts)
    if node.op == "Slice":
        return _slice(node, axes, facts)
    if node.op == "Pad":
        return _pad(node, axes, facts)
    return None


def _elementwise(node: Node, axes: Axes, facts: Facts) -> Movable | None:
    if len(node.inputs) > 1 and not facts.has_op("Add", since=7):
        return None  # broadcasting was an attribute
    sorted_inputs = _sort_inputs(node, len(axes), facts)
    if sorted_inputs is None or len(node.outputs) != 1:
        return None
    inputs, constants = sorted_inputs

    def transform(rewriter: Rewriter, axes: Axes) -> None:
        facts = Facts(rewriter.model)
        for index in constants:
            values = _moved_constant(facts, node.inputs[index], axes)
            if facts.has_op("Sum", since=8):  # before, some operators did not broadcast
                first = next(i for i, d in enumerate(values.shape) if d != 1)
                values = values.reshape(values.shape[first:])
            rewriter.set_weight(node, index, values)

    return Movable((node,), inputs, (node.outputs[0],), transform)


def _sort_inputs(
    node: Node, rank: int, facts: Facts
) -> tuple[tuple[Tensor, ...], tuple[int, ...]] | None:
    """The full-rank tensors and the places of constants with a layout; scalars have none."""
    tensors: list[Tensor] = []
    constants: list[int] = []
    for index, tensor in enumerate(node.inputs):
        if tensor.is_empty():
            continue
        shape = facts.shape(tensor)
        if shape is None or len(shape) > rank:
            return None
        is_constant = facts.is_constant(tensor)
        if all(d == 1 for d in shape) and (is_constant or len(shape) < rank):
            continue
        if not is_constant and len(shape) < rank:
            return None
        if is_constant:
            constants.append(index)
        else:
            tensors.append(tensor)
    return (tuple(tensors), tuple(constants)) if tensors else None


def _concat(node: Node, axes: Axes, facts: Facts) -> Movable | None:
    rank = len(axes)
    if any(facts.rank(tensor) != rank for tensor in node.inputs):
        return None
    inputs = tuple(t for t in node.inputs if not facts.is_constant(t))
    if not inputs:
        return None

    def transform(rewriter: Rewriter, axes: Axes) -> None:
        facts = Facts(rewriter.model)
        for index, tensor in enumerate(list(node.inputs)):
            if facts.is_constant(tensor):
                rewriter.set_weight(node, index, _moved_constant(facts, tensor, axes))
        _move_axis(rewriter, node, axes, 1)

    return Movable((node,), inputs, (node.outputs[0],), transform)


def _along_axis(node: Node, axes: Axes, facts: Facts, default: int) -> Movable | None:
    """An operator along attribute ``axis`` of its first input, whose outputs have its rank."""
    if not _carries(facts, node.inputs[0], axes):
        return None

    def transform(rewriter: Rewriter, axes: Axes) -> None:
        _move_axis(rewriter, node, axes, default)

    outputs = tuple(t for t in node.outputs if not t.is_empty())
    return Movable((node,), (node.inputs[0],), outputs, transform)


def _reduction(node: Node, axes: Axes, facts: Facts) -> Movable | None:
    if not _carries(facts, node.inputs[0], axes):
        return None
    reduced = reduced_axes(node, len(axes), facts)
    if reduced is None:
        return None
    keeps_rank = facts.attr_int(node, "keepdims", 1) == 1
    left = [axis for old, axis in enumerate(axes) if old not in reduced]
    if not keeps_rank and left != sorted(left):
        # Without the reduced axes the result has no layout only if the others keep their order.
        return None

    def transform(rewriter: Rewriter, axes: Axes) -> None:
        moved = [axes[axis] for axis in reduced]
        if node.op in _SELECTIONS:
            rewriter.set_attribute(node, "axis", moved[0])
        elif "axes" in node.attrs:
            rewriter.set_attribute(node, "axes", moved)
        elif len(node.inputs) > 1:
            rewriter.set_weight(node, 1, np.array(moved, np.int64))

    outputs = (node.outputs[0],) if keeps_rank else ()
    return Movable((node,), (node.inputs[0],), outputs, transform)


def reduced_axes(node: Node, rank: int, facts: Facts) -> tuple[int, ...] | None:
    """The axes of a reduction of a tensor of *rank* axes, counted from the front, if constant."""
    if node.op in _SELECTIONS:
        return (facts.attr_int(node, "axis", 0) % rank,)
    if facts.attr_int(node, "noop_with_empty_axes", 0):
        return None
    if facts.input(node, 1) is not None:
        return _indices(facts, node, 1, rank)
    given = facts.attr_ints(node, "axes", tuple(range(rank)))
    return tuple(axis % rank for axis in given)


def _slice(node: Node, axes: Axes, facts: Facts) -> Movable | None:
    if not _carries(facts, node.inputs[0], axes):
        return None
    rank = len(axes)
    by_attributes = not facts.has_op("Slice", since=10)
    if by_attributes:
        given = facts.attr_ints(node, "axes", ()) or range(len(node.attrs["starts"]))
        cut: tuple[int, ...] | None = tuple(axis % rank for axis in given)
    elif facts.input(node, 3) is not None:
        cut = _indices(facts, node, 3, rank)
    else:
        starts = facts.static_shape(node.inputs[1])
        cut = None if starts is None else tuple(range(starts[0]))
    if cut is None:
        return None

    def transform(rewriter: Rewriter, axes: Axes) -> None:
        moved = [axes[axis] for axis in cut]
        if by_attributes:
            rewriter.set_attribute(node, "axes", moved)
            return
        dtype = Facts(rewriter.model).dtype(node.inputs[1])
        rewriter.set_weight(node, 3, np.array(moved, dtype or np.int64))

    return Movable((node,), (node.inputs[0],), (node.outputs[0],), transform)


def _pad(node: Node, axes: Axes, facts: Facts) -> Movable | None:
    if not _carries(facts, node.inputs[0], axes):
        return None
    rank = len(axes)
    if facts.input(node, 3) is not None:
        padded = _indices(facts, node, 3, rank)
        if padded is None:
            return None

        def rename(rewriter: Rewriter, axes: Axes) -> None:
            dtype = Facts(rewriter.model).dtype(node.inputs[3])
            moved = [axes[axis] for axis in padded]
            rewriter.set_weight(node, 3, np.array(moved, dtype or np.int64))

        return Movable((node,), (node.inputs[0],), (node.outputs[0],), rename)
    by_attribute = not facts.has_op("Pad", since=11)
    amounts = facts.attr_ints(node, "pads", ()) if by_attribute else _ints(facts, node.inputs[1])
    if amounts is None or len(amounts) != 2 * rank:
        return None

    def reorder(rewriter: Rewriter, axes: Axes) -> None:
        order = inverse(axes)
        moved = [amounts[a] for a in order] + [amounts[a + rank] for a in order]
        if by_attribute:
            rewriter.set_attribute(node, "pads", moved)
        else:
            rewriter.set_weight(node, 1, np.array(moved, np.int64))

    return Movable((node,), (node.inputs[0],), (node.outputs[0],), reorder)


def _carries(facts: Facts, tensor: Tensor, axes: Axes) -> bool:
    return facts.rank(tensor) == len(axes) and not facts.is_constant(tensor)


def _ints(facts: Facts, tensor: Tensor | None) -> tuple[int, ...] | None:
    values = facts.constant(tensor)
    return None if values is None else tuple(int(v) for v in values.reshape(-1))


def _indices(facts: Facts, node: Node, index: int, rank: int) -> tuple[int, ...] | None:
    """The constant axes that input *index* of *node* lists, counted from the front."""
    values = _ints(facts, facts.input(node, index))
    return tuple(axis % rank for axis in values) if values else None


def _move_axis(rewriter: Rewriter, node: Node, axes: Axes, default: int) -> None:
    axis = int(node.attrs.get("axis", default)) % len(axes)
    rewriter.set_attribute(node, "axis", axes[axis])


def _moved_constant(facts: Facts, tensor: Tensor, axes: Axes) -> np.ndarray[Any, Any]:
    """The values of *tensor*, with leading axes of size 1 up to full rank, in the new layout."""
    values = facts.constant(tensor)
    assert values is not None
    full = values.reshape((1,) * (len(axes) - values.ndim) + values.shape)
    return np.array(full.transpose(inverse(axes)), order="C")
