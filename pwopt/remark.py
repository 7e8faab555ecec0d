"""What passes and the driver say about sites: applied, declined, rejected, held.

A *site* is one root node that one pass looked at. Every site ends in exactly one remark, so
``visited == applied + declined + rejected + held`` holds for every pass and for the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

__all__ = ["Decline", "Exactness", "Fact", "Kind", "Remark", "Tally", "Verdict"]

Fact = None | bool | int | float | str | list["Fact"] | tuple["Fact", ...] | dict[str, "Fact"]
"""A JSON-compatible value that a remark carries."""


class Exactness(StrEnum):
    """How far the result of a rewrite may lie from the original."""

    BITWISE = "bitwise"
    """Every output bit is the same."""
    ROUNDING = "rounding"
    """The same function in real arithmetic; outputs differ by floating-point rounding only."""
    APPROXIMATE = "approximate"
    """A different function within an error budget; never on unless asked for."""


class Kind(StrEnum):
    """What became of a site."""

    APPLIED = "applied"
    DECLINED = "declined"
    REJECTED = "rejected"
    HELD = "held"


class Verdict(StrEnum):
    """What the gate said about a candidate rewrite."""

    KEPT = "kept"
    REJECTED_WRONG = "rejected-wrong"
    REJECTED_SLOWER = "rejected-slower"
    REJECTED_SIZE = "rejected-size"
    REJECTED_FAILED = "rejected-failed"
    """The rewritten model does not load, or fails when it runs."""
    REJECTED_ESTIMATE = "rejected-estimate"
    """The analytic model is so sure of a loss that nothing was timed."""
    HELD = "held"

    @property
    def kind(self) -> Kind:
        """The kind of remark a site with this verdict ends in."""
        if self is Verdict.KEPT:
            return Kind.APPLIED
        return Kind.HELD if self is Verdict.HELD else Kind.REJECTED


@dataclass(frozen=True, eq=False)
class Decline:
    """A pass's reason for leaving a site alone: one member of its ``Why`` enum, and the facts."""

    why: Enum
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class Remark:
    """One line about one site.

    ``ordinal`` numbers candidates (sites that matched) in the order they were proposed, starting
    at 1, and is ``None`` for declined sites. ``reason`` is the ``Why`` value of a decline or the
    :class:`Verdict` value of a candidate.
    """

    ordinal: int | None
    pass_name: str
    site: str
    kind: Kind
    reason: str
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """Counts of remarks by kind; ``visited`` is their sum by construction of the remarks."""

    applied: int = 0
    declined: int = 0
    rejected: int = 0
    held: int = 0

    @classmethod
    def of(cls, remarks: list[Remark]) -> Tally:
        """Count *remarks* by kind."""
        kinds = [remark.kind for remark in remarks]
        return cls(*(kinds.count(kind) for kind in Kind))

    @property
    def visited(self) -> int:
        """Sites visited."""
        return self.applied + self.declined + self.rejected + self.held
