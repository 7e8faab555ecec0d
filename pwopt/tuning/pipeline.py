"""Passes in order, to a fixed point, with a ruling for every candidate.

There is no clock in here: a pipeline applies what its rulings say, and says how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from pwopt.graph import Model, load, parse
from pwopt.passes import Canonicalise
from pwopt.passes.contract import Variant
from pwopt.remark import Fact, Remark, Verdict
from pwopt.tuning.candidate import AnyPass, Candidate
from pwopt.tuning.driver import Change, Driver

if TYPE_CHECKING:
    from pwopt.graph import ModelProto

__all__ = ["Pipeline", "Review", "Ruling", "Rulings", "StopReason", "run_passes"]

_MAX_ROUNDS = 16


class StopReason(StrEnum):
    """Why a pipeline ended."""

    FIXED_POINT = "fixed point: no pass has anything left to do"
    ROUND_LIMIT = f"round limit: passes still found work after {_MAX_ROUNDS} rounds"


@dataclass(frozen=True)
class Ruling:
    """What to do with candidates: try a variant, or not and why.

    Attributes:
        verdict: :attr:`Verdict.KEPT` to apply, anything else to leave alone.
        variant: name of the variant to apply; ``None`` takes the pass's first.
        facts: what led to the ruling (measured speedup, say); goes into the remark.
    """

    verdict: Verdict = Verdict.KEPT
    variant: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)


KEEP = Ruling()


@dataclass(frozen=True)
class Rulings:
    """Rulings by (pass, signature), by pass, or by default, the most specific first.

    Attributes:
        limit: candidates with a higher ordinal are held.
    """

    by_group: Mapping[tuple[str, str], Ruling] = field(default_factory=dict)
    by_pass: Mapping[str, Ruling] = field(default_factory=dict)
    default: Ruling = KEEP
    limit: int | None = None

    def of(self, candidate: Candidate) -> Ruling:
        """The ruling for *candidate*; required passes are never ruled out."""
        if candidate.pass_.required:
            return KEEP
        if self.limit is not None and candidate.ordinal > self.limit:
            return Ruling(Verdict.HELD, facts={"limit": self.limit})
        return self.find(candidate.pass_.name, candidate.signature)

    def find(self, name: str, signature: str) -> Ruling:
        """The ruling for a candidate of pass *name*, the limit aside."""
        return self.by_group.get((name, signature)) or self.by_pass.get(name) or self.default


Review = Callable[[Change], Verdict]


def run_passes(
    driver: Driver,
    simplify: Sequence[AnyPass],
    lower: Sequence[AnyPass] = (),
    rulings: Rulings = Rulings(),
    review: Review | None = None,
) -> StopReason:
    """Canonicalise and simplify to a fixed point, lower once, and tidy up after lowering.

    Args:
        driver: holds the model; types are inferred anew wherever a pass changed something.
        simplify: passes whose result is smaller or simpler; run in rounds.
        lower: passes that put more primitive operators in place; they would undo or be undone by
            simplifying ones, so they run once, afterwards.
        rulings: what to do with each candidate.
        review: looks at each change before it is committed.
    """

    def choose(candidate: Candidate) -> Variant | Verdict:
        ruling = rulings.of(candidate)
        if ruling.verdict is not Verdict.KEPT:
            return ruling.verdict
        named = [v for v in candidate.variants if v.name == ruling.variant]
        return named[0] if named else candidate.variants[0]

    def apply(pass_: AnyPass) -> int:
        if review is None or pass_.required:
            applied, _ = driver.run(pass_, choose)
        else:
            applied, _ = driver.run(pass_, choose, review)
        if applied:
            driver.rewriter.infer_shapes()
        return applied

    canonicalise = Canonicalise()
    reason = StopReason.ROUND_LIMIT
    for _ in range(_MAX_ROUNDS):
        if not sum(apply(pass_) for pass_ in (canonicalise, *simplify)):
            reason = StopReason.FIXED_POINT
            break
    if sum(apply(pass_) for pass_ in lower):
        apply(canonicalise)
    driver.rewriter.drop_idle_initializers()
    return reason


class Pipeline:
    """The programmatic pass pipeline: passes applied wherever they match, without a clock.

    What is asked for is done: nothing is measured, and nothing verified beyond the passes' own
    algebra; use :func:`pwopt.optimize` or :func:`pwopt.verify` for that.
    """

    def __init__(self, passes: Sequence[AnyPass]) -> None:
        """Take *passes* in the order in which they are to run."""
        self.passes = tuple(passes)
        self.remarks: list[Remark] = []

    def run(self, model: str | Path | ModelProto) -> ModelProto:
        """Rewrite a model file or message; the input is left as it is.

        Initializers that old models list among the inputs are treated as constants.

        Raises:
            InvalidModelError: the model is not valid.
        """
        wrapped: Model = load(Path(model)) if isinstance(model, str | Path) else parse(model)
        wrapped.unlist_initializers()
        driver = Driver(wrapped)
        driver.rewriter.infer_shapes()
        run_passes(driver, (), ())
        for pass_ in self.passes:
            driver.run(pass_)
            driver.rewriter.infer_shapes()
        run_passes(driver, (), ())
        self.remarks = driver.ledger.remarks()
        return wrapped.to_proto()
