"""Repeating the decisions of a report, and finding the one that does harm."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pwopt.errors import ReplayError
from pwopt.graph.extract import extract
from pwopt.remark import Remark, Verdict
from pwopt.result import Script
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.window import find_match
from pwopt.tuning.workbench import Build, Workbench

if TYPE_CHECKING:
    from pwopt.graph import ModelProto

__all__ = ["Culprit", "find_culprit", "first_bad", "replay", "rulings_of"]

_OF_THE_SITE = frozenset({"signature", "variants"})
"""Facts of a remark that the candidate itself brings along."""


def rulings_of(
    script: Script,
    *,
    limit: int | None = None,
    skip: frozenset[int] = frozenset(),
    only: frozenset[int] | None = None,
) -> Rulings:
    """The decisions of *script*, some of them left out.

    Up to *limit* every candidate must be the one that the report names. Where others are left
    out, what comes behind them may be numbered otherwise, so decisions go by pass and site then.

    Raises:
        ReplayError: *skip* or *only* names a rewrite that the report does not have.
    """
    known = {r.ordinal for r in script.candidates}
    unknown = sorted((skip | (only or frozenset())) - known)
    if unknown:
        raise ReplayError(f"the report has no rewrite {unknown[0]}; its last is {len(known)}")
    held = Ruling(Verdict.HELD)
    if skip or only is not None:
        return Rulings(
            by_site={
                (r.pass_name, r.site): held if _is_left_out(r, limit, skip, only) else _ruling(r)
                for r in script.candidates
            },
            default=held,
        )
    return Rulings(
        by_ordinal={r.ordinal: _ruling(r) for r in script.candidates if r.ordinal is not None},
        default=held,
        limit=limit,
        expected={
            r.ordinal: (r.pass_name, r.site, str(r.facts["signature"]))
            for r in script.candidates
            if r.ordinal is not None
        },
    )


def replay(bench: Workbench, script: Script, rulings: Rulings) -> Build:
    """Build the model of *script* under *rulings*, without measuring.

    Raises:
        ReplayError: the model or a site is not what the report was made from, or the whole
            script gives another file.
    """
    build = bench.build(rulings)
    if rulings.expected is None or rulings.limit is not None:
        return build
    if build.proposed != len(script.candidates):
        raise ReplayError(
            f"{build.proposed} rewrites were proposed, where the report has"
            f" {len(script.candidates)}"
        )
    if build.written.sha256 != script.output_sha256:
        raise ReplayError(
            "every rewrite of the report was repeated, but the model came out as another file;"
            " was it made by another version of pwopt or onnx?"
        )
    return build


@dataclass(frozen=True, eq=False)
class Culprit:
    """The rewrite that does harm.

    Attributes:
        remark: of the candidate.
        looks: how many models were built and looked at.
        window: the nodes that it rewrites, as they were before, as a model of their own; ``None``
            if they cannot be found any more.
    """

    remark: Remark
    looks: int
    window: ModelProto | None


def find_culprit(
    bench: Workbench, script: Script, is_bad: Callable[[Build], bool]
) -> Culprit | None:
    """The first rewrite of *script* that makes the model bad; ``None`` if the whole is fine.

    Raises:
        ReplayError: the script does not fit the model, or the model is bad without any rewrite.
    """
    looks = 0

    def is_bad_up_to(limit: int) -> bool:
        nonlocal looks
        looks += 1
        return is_bad(replay(bench, script, rulings_of(script, limit=limit)))

    last = len(script.candidates)
    if script.keeps_original or not last or not is_bad_up_to(last):
        return None
    if is_bad_up_to(0):
        raise ReplayError("the canonicalised model, without any rewrite, fails already")
    worst = first_bad(last, is_bad_up_to)
    remark = next(r for r in script.candidates if r.ordinal == worst)
    bench.build(rulings_of(script, limit=worst - 1))
    return Culprit(remark, looks, _window(bench, remark))


def _window(bench: Workbench, remark: Remark) -> ModelProto | None:
    pass_ = bench.find_pass(remark.pass_name)
    match = find_match(bench.driver, pass_, remark)
    return None if match is None else extract(bench.driver.model, match.nodes)


def first_bad(last: int, is_bad: Callable[[int], bool]) -> int:
    """The smallest limit from 1 to *last* that is bad, in log2(*last*) looks.

    *last* itself is known to be bad, 0 to be fine; what is bad stays bad.
    """
    return 1 + bisect_left(range(1, last), True, key=is_bad)


def _ruling(remark: Remark) -> Ruling:
    facts = {k: v for k, v in remark.facts.items() if k not in _OF_THE_SITE}
    variant = remark.facts.get("variant")
    return Ruling(Verdict(remark.reason), None if variant is None else str(variant), facts)


def _is_left_out(
    remark: Remark, limit: int | None, skip: frozenset[int], only: frozenset[int] | None
) -> bool:
    ordinal = remark.ordinal or 0
    beyond = limit is not None and ordinal > limit
    return beyond or ordinal in skip or (only is not None and ordinal not in only)
