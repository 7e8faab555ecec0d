"""How much time a search may take, and how carefully it times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pwopt.runtime import Comparison
from pwopt.tuning.workbench import Precision

__all__ = ["ALLOWANCES", "Allowance", "Effort", "least_seconds", "longer"]

_PATIENCE = 5
"""How much longer a promising but undecided comparison may take."""


class Effort(StrEnum):
    """How much time to spend."""

    NONE = "none"
    QUICK = "quick"
    FULL = "full"


@dataclass(frozen=True)
class Allowance:
    """Seconds for all trials, and how carefully to time windows, trials and the end."""

    total_s: float
    window: Precision
    trial: Precision
    confirm: Precision


ALLOWANCES = {
    Effort.QUICK: Allowance(
        60.0, Precision(7, 201, 1.0), Precision(7, 201, 3.0), Precision(11, 301, 5.0)
    ),
    Effort.FULL: Allowance(
        1200.0, Precision(11, 301, 4.0), Precision(11, 301, 12.0), Precision(21, 501, 15.0)
    ),
}


def longer(precision: Precision) -> Precision:
    """For what is promising but undecided."""
    return replace(
        precision, min_pairs=2 * precision.min_pairs, seconds=_PATIENCE * precision.seconds
    )


def least_seconds(precision: Precision, comparison: Comparison) -> float:
    """What the fewest pairs of models that run as long as those compared take."""
    pair_ms = comparison.baseline.median_ms + comparison.candidate.median_ms
    return precision.min_pairs * pair_ms / 1000
