"""Acceptance without a clock: what a roofline model says about a change."""

from __future__ import annotations

from collections.abc import Mapping

from pwopt.cost import Machine, rewrite_seconds
from pwopt.graph import Facts
from pwopt.remark import Verdict
from pwopt.tuning.driver import Change
from pwopt.tuning.pipeline import Review

__all__ = ["analytic_review"]


def analytic_review(
    facts: Facts, dims: Mapping[str, int], machine: Machine | None = None
) -> Review:
    """A review that refuses changes whose new nodes are estimated to take longer than the old.

    Args:
        facts: of the model being rewritten.
        dims: values for symbolic dimensions.
        machine: the roofline; a typical x86 core by default.
    """
    roofline = machine or Machine()

    def review(change: Change) -> Verdict:
        seconds = rewrite_seconds(change.removed, change.added, facts, dims, roofline)
        if seconds is None:
            # Nothing to estimate by: fewer nodes are better.
            better = len(change.added) < len(change.removed)
        else:
            before, after = seconds
            better = after < before or not change.added
        return Verdict.KEPT if better else Verdict.REJECTED_SLOWER

    return review
