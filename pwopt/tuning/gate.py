"""Acceptance without a clock: what a roofline model says about a change."""

from __future__ import annotations

from collections.abc import Mapping

from pwopt.cost import Machine, window_seconds
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
        before = window_seconds(change.removed, facts, dims, roofline)
        after = window_seconds(change.added, facts, dims, roofline)
        # Where shapes are unknown there is nothing to refuse by; fewer nodes are still better.
        if before is None or after is None:
            better = len(change.added) <= len(change.removed)
        else:
            better = after <= before
        return Verdict.KEPT if better else Verdict.REJECTED_SLOWER

    return review
