"""Channels in another order, or with others between them.

An arrangement says what stands at each place: ``arrangement[j]`` is the number of the channel that
place ``j`` holds now, or :data:`PADDING` where it holds a filler that nobody looks at. Parameters
follow their channels and are neutral for fillers; weights that read channels ignore fillers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
    "PADDING",
    "Arrangement",
    "aligned",
    "identity",
    "is_identity",
    "keeps_groups",
    "spread",
    "take",
    "take_inputs",
]

Array = np.ndarray[Any, Any]
Arrangement = tuple[int, ...]
PADDING = -1


def identity(channels: int) -> Arrangement:
    """Every channel in its place."""
    return tuple(range(channels))


def is_identity(arrangement: Sequence[int], channels: int) -> bool:
    """Whether *arrangement* leaves *channels* channels as they are."""
    return tuple(arrangement) == identity(channels)


def spread(channels: int, places: int, *, group: int = 1) -> Arrangement:
    """*channels* on *places*, with fillers behind each of *group* equal parts."""
    width = channels // group
    fillers = (PADDING,) * (places // group - width)
    parts = (tuple(range(g * width, (g + 1) * width)) + fillers for g in range(group))
    return tuple(channel for part in parts for channel in part)


def aligned(channels: int, block: int, *, group: int = 1) -> int:
    """Places for *channels* if each of *group* parts is to have a multiple of *block*."""
    return group * (-(-(channels // group) // block) * block)


def keeps_groups(arrangement: Sequence[int], channels: int, group: int) -> bool:
    """Whether each of *group* equal parts still holds the channels of its own part, and only those.

    That is what a convolution with so many groups asks of its input or output.
    """
    if len(arrangement) % group or channels % group:
        return False
    places, width = len(arrangement) // group, channels // group
    for number in range(group):
        part = arrangement[number * places : (number + 1) * places]
        held = sorted(c for c in part if c != PADDING)
        if held != list(range(number * width, (number + 1) * width)):
            return False
    return True


def take(values: Array, arrangement: Sequence[int], axis: int = 0, fill: float = 0.0) -> Array:
    """*values* with *axis* arranged anew; places of fillers hold *fill*."""
    places = np.asarray(arrangement, np.intp)
    taken = np.take(values, np.maximum(places, 0), axis=axis)
    if (places == PADDING).any():
        shape = [1] * values.ndim
        shape[axis] = -1
        taken = np.where((places == PADDING).reshape(shape), values.dtype.type(fill), taken)
    return np.ascontiguousarray(taken)


def take_inputs(weight: Array, arrangement: Sequence[int], *, group: int = 1) -> Array:
    """Weights of a Conv, ``[Cout, Cin/group, *kernel]``, that reads arranged channels.

    The arrangement keeps the groups (:func:`keeps_groups`).
    """
    width = weight.shape[1]
    places = len(arrangement) // group
    blocks = []
    for number, rows in enumerate(np.split(weight, group)):
        part = arrangement[number * places : (number + 1) * places]
        local = [c if c == PADDING else c - number * width for c in part]
        blocks.append(take(rows, local, axis=1))
    return np.concatenate(blocks)
