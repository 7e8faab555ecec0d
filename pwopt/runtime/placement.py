"""Which execution provider really ran which node, from a profile of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pwopt.runtime.profile import kernel_events, node_of

__all__ = ["PlacedNode", "Placement", "placement_of"]

_MOST_NAMED: Final = 5
_LARGEST_SHAPE: Final = 64
"""A list of integers of more elements than this is no shape."""
_COPIES: Final = ("MemcpyFromHost", "MemcpyToHost")


@dataclass(frozen=True)
class PlacedNode:
    """A node of the graph that the runtime ran, and where."""

    name: str
    op: str
    provider: str

    def __str__(self) -> str:
        return f"'{self.name}' ({self.op})" if self.name else self.op


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a model ran.

    Attributes:
        provider: the one that was asked for, in ONNX Runtime's words.
        nodes: number of nodes by provider.
        fallen: nodes that another provider ran, in the order of execution. Arithmetic on shapes
            is not among them: the runtime leaves that to the CPU on purpose.
        copies: nodes that the runtime added to copy values between memories.
    """

    provider: str
    nodes: Mapping[str, int]
    fallen: tuple[PlacedNode, ...]
    copies: int

    @property
    def complaint(self) -> str | None:
        """What ran elsewhere, in words; ``None`` if nothing did."""
        if not self.fallen:
            return None
        named = ", ".join(map(str, self.fallen[:_MOST_NAMED]))
        more = len(self.fallen) - _MOST_NAMED
        others = sorted({n.provider.removesuffix("ExecutionProvider") for n in self.fallen})
        return (
            f"{self.provider} left {len(self.fallen)} of {sum(self.nodes.values())} nodes to"
            f" {' and '.join(others) or 'no provider'}: {named}"
            + (f" and {more} more" if more > 0 else "")
        )


def placement_of(events: Iterable[Mapping[str, Any]], provider: str) -> Placement:
    """Read the events of a profile, as :func:`pwopt.runtime.profile.summarize_events` takes them.

    Args:
        events: of one run or several.
        provider: the execution provider that was asked for, in ONNX Runtime's words.
    """
    placed: dict[tuple[str, str], PlacedNode] = {}
    fallen: dict[tuple[str, str], PlacedNode] = {}
    for event in sorted(kernel_events(events), key=lambda event: float(event["ts"])):
        name, op, where = node_of(event)
        node = placed.setdefault((name, op), PlacedNode(name, op, where))
        if where != provider and not _is_shape_arithmetic(event):
            fallen.setdefault((name, op), node)
    return Placement(
        provider,
        dict(Counter(node.provider for node in placed.values())),
        tuple(fallen.values()),
        sum(node.op in _COPIES for node in placed.values()),
    )


def _is_shape_arithmetic(event: Mapping[str, Any]) -> bool:
    """Whether all that a node writes are short lists of integers."""
    written = event.get("args", {}).get("output_type_shape")
    if not isinstance(written, list) or not written:
        return False
    return all(
        kind.startswith(("int", "uint", "bool")) and _is_short(shape)
        for tensor in written
        for kind, shape in tensor.items()
    )


def _is_short(shape: list[int]) -> bool:
    return len(shape) <= 1 and math.prod(shape) <= _LARGEST_SHAPE
