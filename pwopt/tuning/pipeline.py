"""Passes in order, to a fixed point, with a ruling for every candidate.

There is no clock in here: a pipeline applies what its rulings say, and says how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pwopt.errors import ReplayError
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

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ruling:
        """What :meth:`to_json` made."""
        return cls(Verdict(value["verdict"]), value["variant"], value["facts"])


KEEP = Ruling()


@dataclass(frozen=True)
class Rulings:
    """Rulings by ordinal, by (pass, site), by (pass, signature), by pass, or by default.

    The most specific one holds.

    Attributes:
        limit: candidates with a higher ordinal are held.
        skip: candidates with these ordinals are held.
        only: candidates with other ordinals are held.
        expected: (pass, site, signature) of the candidate that bears an ordinal; another one, up
            to the limit, is an error.
    """

    by_ordinal: Mapping[int, Ruling] = field(default_factory=dict)
    by_site: Mapping[tuple[str, str], Ruling] = field(default_factory=dict)
    by_group: Mapping[tuple[str, str], Ruling] = field(default_factory=dict)
    by_pass: Mapping[str, Ruling] = field(default_factory=dict)
    default: Ruling = KEEP
    limit: int | None = None
    skip: frozenset[int] = frozenset()
    only: frozenset[int] | None = None
    expected: Mapping[int, tuple[str, str, str]] | None = None

    def of(self, candidate: Candidate) -> Ruling:
        """The ruling for *candidate*; required passes are never ruled out.

        Raises:
            ReplayError: it is not the candidate that was expected.
        """
        ordinal = candidate.ordinal
        beyond = self.limit is not None and ordinal > self.limit
        if self.expected is not None and not beyond:
            _assert_expected(candidate, self.expected.get(ordinal))
        if candidate.pass_.required:
            return KEEP
        if beyond or ordinal in self.skip or (self.only is not None and ordinal not in self.only):
            return Ruling(Verdict.HELD)
        return self.find(candidate.pass_.name, candidate.signature, candidate.site, ordinal)

    def find(self, name: str, signature: str, site: str = "", ordinal: int | None = None) -> Ruling:
        """The ruling for a candidate of pass *name*, what the user left out aside."""
        return (
            (self.by_ordinal.get(ordinal) if ordinal is not None else None)
            or self.by_site.get((name, site))
            or self.by_group.get((name, signature))
            or self.by_pass.get(name)
            or self.default
        )

    def decisions(self) -> dict[str, Any]:
        """The rulings by signature and by pass as JSON-compatible values."""
        return {
            "by_group": [[*key, ruling.to_json()] for key, ruling in self.by_group.items()],
            "by_pass": {name: ruling.to_json() for name, ruling in self.by_pass.items()},
            "default": self.default.to_json(),
        }

    def with_decisions(self, value: Mapping[str, Any]) -> Rulings:
        """These rulings with those that :meth:`decisions` made of others."""
        return replace(
            self,
            by_group={(n, s): Ruling.from_json(r) for n, s, r in value["by_group"]},
            by_pass={name: Ruling.from_json(r) for name, r in value["by_pass"].items()},
            default=Ruling.from_json(value["default"]),
        )


def _assert_expected(candidate: Candidate, expected: tuple[str, str, str] | None) -> None:
    found = (candidate.pass_.name, candidate.site, candidate.signature)
    if found == expected:
        return
    says = "nothing more" if expected is None else f"{expected[0]} at '{expected[1]}'"
    raise ReplayError(
        f"rewrite {candidate.ordinal} is {found[0]} at '{found[1]}', where the report has {says}"
        + (", of another shape" if expected is not None and found[:2] == expected[:2] else "")
    )


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
