"""What the report says, made of what the stages of the line found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pwopt.graph import Written
from pwopt.remark import Kind, Remark, Verdict
from pwopt.result import (
    CoarseFigures,
    ErrorFigures,
    LatencyFigures,
    OptionFigures,
    OptionsFigures,
    PlacementFigures,
    Totals,
)
from pwopt.runtime import Comparison, Copies, Placement, Verification
from pwopt.tuning.options import OptionsFound
from pwopt.tuning.pipeline import Rulings
from pwopt.tuning.workbench import Workbench

__all__ = [
    "Final",
    "annotated",
    "disturbance",
    "error_figures",
    "latency_figures",
    "option_figures",
    "overruled",
    "placement_figures",
]

_DISTURBED = 0.02
"""An interval whose half is wider than this is worth a note."""


@dataclass(frozen=True)
class Final:
    """What was written in the end."""

    written: Written
    opset: int
    totals: Totals
    remarks: tuple[Remark, ...]
    verification: Verification | None
    placement: Placement | None = None
    coarse: CoarseFigures | None = None
    copies: Copies | None = None


def disturbance(comparison: Comparison, strain: str) -> list[str]:
    """A note if the spread was wide, and whether it was too wide to tell which is faster."""
    low, high = comparison.ci95
    if high - low <= 2 * _DISTURBED:
        return []
    within = f"the speedup is known to within {50 * (high - low):.0f}% only"
    undecided = ", too little to tell which model is faster" if low < 1 < high else ""
    why = f" ({strain})" if strain else ""
    return [f"The machine was disturbed while timing{why}: {within}{undecided}."]


def latency_figures(comparison: Comparison | None, copies: Copies | None) -> LatencyFigures | None:
    """A comparison as reported; copies to and from a device beside it."""
    if comparison is None:
        return None
    copies_ms = None if copies is None else (copies.to_device_ms, copies.to_host_ms)
    return LatencyFigures(
        comparison.baseline.median_ms,
        comparison.candidate.median_ms,
        comparison.speedup,
        comparison.ci95,
        comparison.pairs,
        copies_ms,
    )


def error_figures(final: Final, inputs: int) -> ErrorFigures:
    """The deviation of what was written; an untouched original has none."""
    verification = final.verification
    if verification is None:
        return ErrorFigures(0.0, 0.0, inputs, coarse=final.coarse)
    untested = tuple(f"{o.name}: {o.why}" for o in verification.outputs if not o.tested)
    return ErrorFigures(
        verification.max_relative,
        verification.tolerance,
        verification.inputs,
        untested,
        final.coarse,
    )


def option_figures(found: OptionsFound) -> OptionsFigures:
    """Provider options that were tried, with what each did."""
    return OptionsFigures(
        found.settings,
        latency_figures(found.original, None),
        latency_figures(found.optimized, None),
        tuple(
            OptionFigures(
                dict(trial.settings),
                trial.verdict is Verdict.KEPT,
                None if trial.comparison is None else trial.comparison.speedup,
                None if trial.comparison is None else trial.comparison.ci95,
                trial.reason or trial.verdict.value,
            )
            for trial in found.trials
        ),
    )


def placement_figures(placement: Placement | None) -> PlacementFigures | None:
    """Which nodes ran where, on a device."""
    if placement is None:
        return None
    return PlacementFigures(placement.nodes, tuple(map(str, placement.fallen)), placement.copies)


def annotated(remark: Remark, rulings: Rulings) -> Remark:
    """The remark of a candidate with what led to its ruling (measured speedups, errors)."""
    if remark.ordinal is None:
        return remark
    signature = str(remark.facts["signature"])
    ruling = rulings.find(remark.pass_name, signature, remark.site, remark.ordinal)
    return replace(remark, facts={**remark.facts, **ruling.facts})


def overruled(bench: Workbench, rulings: Rulings) -> Iterator[Remark]:
    """The remarks when the original is kept: nothing that could be applied was."""
    for remark in bench.build(rulings).remarks:
        final = annotated(remark, rulings)
        if remark.kind is Kind.APPLIED:
            slower = Verdict.REJECTED_SLOWER
            final = replace(final, kind=slower.kind, reason=slower.value)
        yield final
