"""Which nodes compute nothing: their first output equals one of the tensors before them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pwopt.graph import Facts, Node, Shape, Tensor
from pwopt.passes._steps import Rule, Step, Why, bypass
from pwopt.remark import Decline

__all__ = ["NO_OPS"]

_UNBOUNDED = 2**31 - 1
"""Ends of a Slice from here on mean: to the end, whatever the size (int32 exports say so)."""


def _integers(node: Node, facts: Facts, index: int, key: str, since: int) -> tuple[int, ...] | None:
    """A list of integers that is an input since opset *since* and was an attribute before.

    Returns ``()`` if it is omitted, ``None`` if it is not constant.
    """
    if facts.opset < since:
        return facts.attr_ints(node, key, ())
    tensor = facts.input(node, index)
    if tensor is None:
        return ()
    values = facts.constant(tensor)
    return None if values is None else tuple(int(v) for v in values.reshape(-1))


def _pass_through(node: Node, facts: Facts) -> Step | Decline | None:
    return bypass(node, facts, node.inputs[0])


def _only_operand(node: Node, facts: Facts) -> Step | Decline | None:
    return bypass(node, facts, node.inputs[0]) if len(node.inputs) == 1 else None


def _dropout(node: Node, facts: Facts) -> Step | Decline | None:
    if any(facts.is_read(t) for t in node.outputs[1:]):
        return Decline(Why.MASK_READ)
    if _drops(node, facts):
        return Decline(Why.TRAINING_MODE)
    return bypass(node, facts, node.inputs[0], "remove-dropout")


def _drops(node: Node, facts: Facts) -> bool:
    """Whether a Dropout may do anything: at inference it is the identity."""
    if facts.opset < 7:
        return not facts.attr_int(node, "is_test", 0)
    if facts.opset < 12 or facts.input(node, 2) is None:
        return False
    mode = facts.constant(node.inputs[2])
    return mode is None or bool(mode.any())


def _cast(node: Node, facts: Facts) -> Step | Decline | None:
    if facts.opset < 6:  # the type was spelled out
        return None
    same = facts.elem_type(node.inputs[0]) == facts.attr_int(node, "to", 0)
    return bypass(node, facts, node.inputs[0]) if same else None


def _cast_like(node: Node, facts: Facts) -> Step | Decline | None:
    kind = facts.elem_type(node.inputs[0])
    same = kind is not None and kind == facts.elem_type(node.inputs[1])
    return bypass(node, facts, node.inputs[0]) if same else None


def _transpose(node: Node, facts: Facts) -> Step | Decline | None:
    rank = facts.rank(node.inputs[0])
    perm = facts.attr_ints(node, "perm", tuple(reversed(range(rank or 0))))
    if (rank is None and not perm) or perm != tuple(range(len(perm))):
        return None
    return bypass(node, facts, node.inputs[0])


def _reshape(node: Node, facts: Facts) -> Step | Decline | None:
    data = node.inputs[0]
    shape = facts.shape(data)
    if shape is None:
        return None
    target = _integers(node, facts, 1, "shape", since=5)
    if target is None or len(target) != len(shape):
        return None
    copies = not facts.attr_int(node, "allowzero", 0)
    kept = [(t == 0 and copies) or (t == d and t >= 0) for t, d in zip(target, shape, strict=True)]
    inferred = [t for t, k in zip(target, kept, strict=True) if not k]
    return bypass(node, facts, data) if inferred in ([], [-1]) else None


def _flatten(node: Node, facts: Facts) -> Step | Decline | None:
    matrix = facts.rank(node.inputs[0]) == 2 and facts.attr_int(node, "axis", 1) in (1, -1)
    return bypass(node, facts, node.inputs[0]) if matrix else None


def _expand(node: Node, facts: Facts) -> Step | Decline | None:
    target = _integers(node, facts, 1, "shape", since=8)
    if target is None or not _keeps_shape(target, facts.shape(node.inputs[0])):
        return None
    return bypass(node, facts, node.inputs[0])


def _keeps_shape(other: Sequence[int], shape: Shape | None) -> bool:
    """Whether broadcasting a tensor of *shape* against one of shape *other* leaves it as it is."""
    if not other:
        return True
    if shape is None or len(other) > len(shape):
        return False
    return all(o == 1 or o == d for o, d in zip(reversed(other), reversed(shape), strict=False))


def _tile(node: Node, facts: Facts) -> Step | Decline | None:
    if facts.opset < 6:
        return None
    repeats = _integers(node, facts, 1, "repeats", since=6)
    ones = repeats is not None and all(r == 1 for r in repeats)
    return bypass(node, facts, node.inputs[0]) if ones else None


def _pad(node: Node, facts: Facts) -> Step | Decline | None:
    pads = _integers(node, facts, 1, "pads" if facts.opset >= 2 else "paddings", since=11)
    zeros = pads is not None and not any(pads)
    return bypass(node, facts, node.inputs[0]) if zeros else None


def _slice(node: Node, facts: Facts) -> Step | Decline | None:
    data = node.inputs[0]
    starts = _integers(node, facts, 1, "starts", since=10)
    ends = _integers(node, facts, 2, "ends", since=10)
    axes = _integers(node, facts, 3, "axes", since=10)
    steps = _integers(node, facts, 4, "steps", since=10)
    if starts is None or ends is None or axes is None or steps is None:
        return None
    if any(starts) or any(s != 1 for s in steps):
        return None
    shape = facts.shape(data)
    for axis, end in zip(axes or range(len(ends)), ends, strict=False):
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if end < (size if isinstance(size, int) else _UNBOUNDED):
            return None
    return bypass(node, facts, data)


def _axes(node: Node, facts: Facts, rank: int | None) -> tuple[int, ...] | None:
    """Normalised, sorted axes of a Squeeze or Unsqueeze, if they are given and constant."""
    axes = _integers(node, facts, 1, "axes", since=13)
    if not axes or rank is None:
        return None
    return tuple(sorted(a + rank if a < 0 else a for a in axes))


def _undone(node: Node, facts: Facts) -> Step | Decline | None:
    """Squeeze of an Unsqueeze along the same axes, or the reverse."""
    first = facts.producer(node.inputs[0])
    wanted = "Unsqueeze" if node.op == "Squeeze" else "Squeeze"
    if first is None or not facts.is_op(first, wanted):
        return None
    rank = facts.rank(first.outputs[0] if node.op == "Squeeze" else first.inputs[0])
    axes = _axes(node, facts, rank)
    if axes is None or axes != _axes(first, facts, rank):
        return None
    return bypass(node, facts, first.inputs[0], "cancel-pair")


def _neutral(value: float, *, either_side: bool) -> Rule:
    """Add 0, Sub 0, Mul 1, Div 1 where the constant does not widen the shape."""

    def rule(node: Node, facts: Facts) -> Step | Decline | None:
        if facts.opset < 7 or len(node.inputs) != 2:
            return None
        for index in (1, 0) if either_side else (1,):
            constant, data = node.inputs[index], node.inputs[1 - index]
            values = _small_constant(constant, facts)
            if values is None or not (values == value).all():
                continue
            if not _keeps_shape(values.shape, facts.shape(data)):
                continue
            if _may_flip_zero(node, values):
                return Decline(Why.SIGN_OF_ZERO)
            return bypass(node, facts, data)
        return None

    return rule


def _small_constant(tensor: Tensor, facts: Facts) -> np.ndarray[Any, Any] | None:
    if not facts.is_constant(tensor):
        return None
    shape = facts.static_shape(tensor)
    if shape is None or math.prod(shape) > _MAX_NEUTRAL:
        return None
    values = facts.constant(tensor)
    return values if values is not None and values.size and values.dtype.kind in "fiu" else None


_MAX_NEUTRAL = 1 << 16
"""Larger constants are not searched for zeros and ones."""


def _may_flip_zero(node: Node, values: np.ndarray[Any, Any]) -> bool:
    """``-0.0 + 0.0`` and ``-0.0 - -0.0`` are +0.0: not bit for bit what went in."""
    if values.dtype.kind != "f" or node.op not in ("Add", "Sub"):
        return False
    positive = ~np.signbit(values)
    return bool(positive.any() if node.op == "Add" else (~positive).any())


NO_OPS: Mapping[str, Rule] = {
    "Add": _neutral(0, either_side=True),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _only_operand,
    "Div": _neutral(1, either_side=False),
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _pass_through,
    "Max": _only_operand,
    "Mean": _only_operand,
    "Min": _only_operand,
    "Mul": _neutral(1, either_side=True),
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _undone,
    "Sub": _neutral(0, either_side=False),
    "Sum": _only_operand,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _undone,
}
