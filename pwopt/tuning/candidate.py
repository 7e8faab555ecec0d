"""A rewrite that could be made: what it is, and which other sites are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pwopt.graph import Constant, Facts, Node, Tensor
from pwopt.passes.contract import DEFAULT_VARIANT, Match, Pass, Variant
from pwopt.remark import Remark

__all__ = ["AnyPass", "Candidate", "describe", "offered_forms", "signature"]

AnyPass = Pass[Any]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One site that matched.

    Attributes:
        ordinal: stable number, counted over all candidates of a run in the order proposed.
        site: the root node's name.
        signature: equal for sites that do the same work (operators, attributes, shapes, dtypes).
        variants: what the pass offers there.
    """

    ordinal: int
    pass_: AnyPass
    match: Match
    site: str
    signature: str
    variants: tuple[Variant, ...]


def signature(pass_: AnyPass, match: Match, facts: Facts) -> str:
    """A digest of the pass and of the operators, attributes and shapes that *match* covers."""
    return _digest(pass_.spec(), match.nodes, facts)


def describe(nodes: Iterable[Node], facts: Facts) -> str:
    """A digest of operators, attributes and shapes of *nodes*, whatever they are called."""
    return _digest("", nodes, facts)


def _digest(seed: str, nodes: Iterable[Node], facts: Facts) -> str:
    numbers: dict[int, int] = {}
    digest = hashlib.sha256(seed.encode())
    for node in nodes:
        digest.update(_describe(node, facts, numbers).encode())
    return digest.hexdigest()[:16]


def _describe(node: Node, facts: Facts, numbers: dict[int, int]) -> str:
    def tensor(t: Tensor) -> str:
        number = numbers.setdefault(id(t), len(numbers))
        kind = "c" if isinstance(t, Constant) else "v"
        return f"{kind}{number}{facts.dtype(t)}{facts.shape(t)}"

    attributes = sorted((k, str(v)) for k, v in node.attrs.items())
    reads = [tensor(t) for t in node.inputs]
    writes = [tensor(t) for t in node.outputs]
    return f"{facts.op(node)}{attributes}{reads}{writes};"


def offered_forms(remark: Remark) -> list[str]:
    """Names of the forms that the pass of a candidate's *remark* offers, in its order."""
    names = remark.facts.get("variants") or [DEFAULT_VARIANT.name]
    assert isinstance(names, list | tuple)
    return [str(name) for name in names]
