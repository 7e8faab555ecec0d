"""By how much Resize and Upsample scale each axis, in whatever way it is given."""

from __future__ import annotations

from typing import Any

from pwopt.graph import Facts, Node

__all__ = ["scale_factors"]


def scale_factors(node: Node, rank: int, facts: Facts) -> list[float] | None:
    """By how much *node* scales each axis; a size that is given counts by the shape before."""
    scales_at = 2 if node.op == "Resize" and facts.opset >= 11 else 1
    scales: Any = None
    if node.op == "Upsample" and facts.opset < 9:
        scales = node.attrs.get("scales")
    else:
        scales = facts.constant(facts.input(node, scales_at))
    places = [a % rank for a in facts.attr_ints(node, "axes", tuple(range(rank)))]
    factors = [1.0] * rank
    if scales is not None and len(scales):
        given = [float(s) for s in scales]
    else:
        sizes = facts.constant(facts.input(node, 3)) if scales_at == 2 else None
        shape = facts.shape(node.inputs[0])
        if sizes is None or shape is None or len(shape) != rank:
            return None
        if facts.attr_str(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
            return None
        before = [d for d in (shape[a] for a in places) if isinstance(d, int) and d > 0]
        if len(before) != len(places):
            return None
        given = [int(s) / d for s, d in zip(sizes, before, strict=True)]
    if len(given) != len(places):
        return None
    for place, factor in zip(places, given, strict=True):
        factors[place] = factor
    return factors
