"""Tiny passes for testing the driver: they rename operators, which is easy to see."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pwopt.graph import Facts, Node, Rewriter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness


class ToyWhy(StrEnum):
    NAMED_KEEP = "named-keep"


@dataclass(frozen=True)
class Swap(Pass[Match]):
    """Replaces operator ``source`` by ``result``; leaves nodes whose name holds "keep"."""

    source: str = "Relu"
    result: str = "Abs"
    alternative: str = "Neg"

    name: ClassVar[str] = "swap"
    roots: ClassVar[tuple[str, ...]] = ("Relu", "Abs", "Neg")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    Why: ClassVar[type[ToyWhy]] = ToyWhy

    def match(self, node: Node, facts: Facts) -> Match | Decline:
        if node.op != self.source or "keep" in node.name:
            return Decline(ToyWhy.NAMED_KEEP, {"name": node.name})
        return Match(node, (node,))

    def variants(self, match: Match) -> tuple[Variant, ...]:
        return (Variant(self.result), Variant(self.alternative))

    def rewrite(self, match: Match, variant: Variant, rewriter: Rewriter) -> None:
        node = match.root
        source, output = node.inputs[0], node.outputs[0]
        rewriter.remove(node)
        rewriter.add(variant.name, [source], [output], near=node)
