"""What a canonicalising rule answers: a step to take, a reason not to, or nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.graph.fold import Unfoldable
from pwopt.remark import Decline

__all__ = ["Rule", "Step", "Why", "bypass"]


class Why(StrEnum):
    """Reasons of canonicalise to decline."""

    CANONICAL = "already-canonical"
    UNKNOWN_OPERATOR = "unknown-operator"
    CONTROL_FLOW = "control-flow"
    KEEPS_NAME = "name-seen-outside"
    TRAINING_MODE = "training-mode"
    MASK_READ = "mask-read"
    SPARSE = "sparse-constant"
    SHAPE_UNKNOWN = "shape-unknown"
    SIGN_OF_ZERO = "sign-of-zero"
    PADS_AMBIGUOUS = "pads-ambiguous"
    NOT_EVALUATED = Unfoldable.NOT_EVALUATED.value
    TOO_LARGE = Unfoldable.TOO_LARGE.value
    NOT_DEFINED = Unfoldable.NOT_DEFINED.value


@dataclass(frozen=True, eq=False)
class Step:
    """A change of the graph, and what to call it in a report."""

    name: str
    apply: Callable[[Rewriter], object]


Rule = Callable[[Node, Facts], Step | Decline | None]
"""Looks at one node; ``None`` means that the rule does not concern it."""


def bypass(node: Node, facts: Facts, source: Tensor, name: str = "remove-no-op") -> Step | Decline:
    """Let *source* stand for the first output of *node*, the only one that is read."""
    if not facts.can_bypass(node, source):
        return Decline(Why.KEEPS_NAME, {"output": node.outputs[0].name})
    return Step(name, lambda rewriter: rewriter.bypass(node, source))
