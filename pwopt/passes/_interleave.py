"""Putting the phases of an image, which stand on channels, side by side in space."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pwopt.graph import Dim, Facts, Node, Tensor
from pwopt.passes._emitter import Emitter, times

__all__ = ["Arrangement", "activation_behind", "arrangements", "interleave"]

_ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Clip")
"""What ONNX Runtime fuses into the Conv before it."""


class Arrangement(StrEnum):
    """By which operators."""

    CHANNELS_LAST = "channels-last"
    TRANSPOSE = "transpose"
    DEPTH_TO_SPACE = "depth-to-space"


def arrangements(steps: Sequence[int], width: Dim) -> tuple[Arrangement, ...]:
    """What can interleave phases of *steps* rows and columns that are *width* wide.

    A Reshape can leave one dimension open, so all but DepthToSpace need to know the width.
    """
    found: list[Arrangement] = []
    if isinstance(width, int) and width > 0:
        found += [Arrangement.TRANSPOSE, Arrangement.CHANNELS_LAST]
    if steps[0] == steps[1]:
        found.append(Arrangement.DEPTH_TO_SPACE)
    return tuple(found)


def activation_behind(tensor: Tensor, facts: Facts) -> Node | None:
    """The activation that alone reads *tensor*, and so may come before a rearrangement of it."""
    node = facts.sole_consumer(tensor)
    if node is None or not facts.is_op(node, *_ACTIVATIONS):
        return None
    if node.inputs[0] is not tensor:
        return None
    return node if all(t.is_empty() or facts.is_constant(t) for t in node.inputs[1:]) else None


def interleave(
    emitter: Emitter,
    x: Tensor,
    steps: Sequence[int],
    arrangement: Arrangement,
    surplus: Sequence[int] = (0, 0),
) -> Tensor:
    """Phases into place: ``y[n, c, sh i + a, sw j + b] = x[n, (a sw + b) C + c, i, j]``.

    Args:
        emitter: what writes; takes the element type from a tensor of its own.
        x: ``[N, sh * sw * C, H, W]``.
        steps: ``(sh, sw)``.
        arrangement: by which operators.
        surplus: rows and columns at the end that are left out.
    """
    down, right = steps
    batch, phases, height, width = emitter.facts.shape(x) or (None,) * 4
    assert isinstance(phases, int)
    channels = phases // (down * right)
    tall, wide = times(height, down), times(width, right)
    cut = tuple(_less(d, n) for d, n in zip((tall, wide), surplus, strict=True))
    if arrangement is Arrangement.CHANNELS_LAST:
        y = emitter.transpose(x, 0, 2, 3, 1)
        if down > 1:
            split = (down, right * channels)
            y = emitter.reshape(y, (0, 0, 0, *split), (batch, height, width, *split))
            y = emitter.transpose(y, 0, 1, 3, 2, 4)
        dims = (0, _or_rest(tall), _or_rest(wide), channels)
        y = emitter.reshape(y, dims, (batch, tall, wide, channels))
        y = emitter.drop_ends(y, {1: surplus[0], 2: surplus[1]}, (batch, *cut, channels))
        return emitter.transpose(y, 0, 3, 1, 2)
    if arrangement is Arrangement.TRANSPOSE:
        y = x
        if right > 1:
            rest = _product(channels, height, width)
            y = emitter.reshape(y, (0, down, right, _or_rest(rest)), (batch, down, right, rest))
            y = emitter.transpose(y, 0, 1, 3, 2)
        if down > 1:
            rows = times(height, channels)
            dims = (0, down, _or_rest(rows), _or_rest(wide))
            y = emitter.reshape(y, dims, (batch, down, rows, wide))
            y = emitter.transpose(y, 0, 2, 1, 3)
        dims = (0, channels, _or_rest(tall), _or_rest(wide))
        y = emitter.reshape(y, dims, (batch, channels, tall, wide))
    else:
        shape = (batch, channels, tall, wide)
        y = emitter.emit("DepthToSpace", [x], shape, {"blocksize": down})
    return emitter.drop_ends(y, {2: surplus[0], 3: surplus[1]}, (batch, channels, *cut))


def _product(*dims: Dim) -> Dim:
    total = 1
    for dim in dims:
        if not isinstance(dim, int):
            return None
        total *= dim
    return total


def _less(dim: Dim, count: int) -> Dim:
    if count == 0:
        return dim
    return dim - count if isinstance(dim, int) else None


def _or_rest(dim: Dim) -> int:
    """A dimension as Reshape takes it: what is left, if it is not known."""
    return dim if isinstance(dim, int) else -1
