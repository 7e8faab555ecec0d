"""What a pass is: it reads a site, says why not, or offers variants and writes one.

A pass knows algebra and nothing of timing: whether a rewrite pays is decided around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Generic, Self, TypeVar

from pwopt.graph import Facts, Node, Rewriter
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["DEFAULT_VARIANT", "Match", "Pass", "Variant"]


@dataclass(frozen=True, eq=False)
class Match:
    """A site where a pass applies.

    Attributes:
        root: the node the match started from.
        nodes: every node the rewrite reads as a pattern, the root included; their operators,
            attributes and shapes make the signature that equal sites share.
        facts: figures for the remark.
    """

    root: Node
    nodes: tuple[Node, ...]
    facts: Mapping[str, Fact] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Variant:
    """One of several ways to do the same rewrite."""

    name: str


DEFAULT_VARIANT = Variant("default")

M = TypeVar("M", bound=Match)


@dataclass(frozen=True)
class Pass(ABC, Generic[M]):
    """One rewrite. The dataclass fields of a subclass are its options.

    Class attributes:
        name: the CLI's name, kebab-case; the module is its snake_case, the class its CamelCase.
        roots: operator types that a match starts from (``"*"`` for every node); operators outside
            the standard domain are written ``domain.Op``.
        exactness: how far the result may lie from the original.
        required: whether the pass always runs, unmeasured (canonicalise).
        by_default: whether it is part of the default pipeline.
        Why: the reasons it may decline for; there is no ``OTHER``.
    """

    name: ClassVar[str]
    roots: ClassVar[tuple[str, ...]]
    exactness: ClassVar[Exactness]
    required: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    Why: ClassVar[type[Enum]]

    @abstractmethod
    def match(self, node: Node, facts: Facts) -> M | Decline:
        """Whether the pass applies at *node*; leaves the graph untouched."""

    def variants(self, match: M) -> tuple[Variant, ...]:  # noqa: ARG002 - most passes have one
        """The ways to rewrite *match*, the one to use without measuring first."""
        return (DEFAULT_VARIANT,)

    @abstractmethod
    def rewrite(self, match: M, variant: Variant, rewriter: Rewriter) -> None:
        """Rewrite *match* through *rewriter*."""

    def allowing(self, max_error: float) -> Self:  # noqa: ARG002 - few passes have more to offer
        """The pass for users who accept deviations of *max_error*, relative to outputs' scales."""
        return self

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options, which are the dataclass fields."""
        return tuple(f.name for f in fields(cls))

    def spec(self) -> str:
        """The pass with its non-default options, as ``--passes`` takes it: ``name:key=value``."""
        changed = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ":".join([self.name, *changed])


def _text(value: Any) -> str:
    return value.value if isinstance(value, Enum) else str(value)
