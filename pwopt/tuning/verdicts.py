"""What comparisons say about rewrites, and the rulings that follow for their sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pwopt.remark import Fact, Kind, Remark, Verdict
from pwopt.runtime import Comparison, Latency
from pwopt.tuning.candidate import offered_forms
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.workbench import Build, Group

__all__ = [
    "ALMOST",
    "CERTAIN",
    "MARGIN",
    "OBJECTIONS",
    "PROMISING",
    "Walkover",
    "admitted_sites",
    "facts_of",
    "group_of",
    "groups_of",
    "is_close",
    "is_gain",
    "is_loss",
    "is_undecided",
    "open_groups",
    "ruling_of",
    "sites_of",
    "variants_of",
    "windowed",
    "with_group",
    "with_pass",
]

MARGIN = 0.005
"""A rewrite stays only if the worse end of its interval shows more than this gain."""
PROMISING = 1 + 2 * MARGIN
"""What looks like less is no gain; a form in a window that cannot be more is not timed further."""
ALMOST = 0.95
"""What loses more than this alone is not tried beside others, which may help it."""
OBJECTIONS = (Verdict.REJECTED_WRONG, Verdict.REJECTED_SIZE, Verdict.REJECTED_FAILED)
"""Verdicts on what may not be applied at all, whatever it gains."""
CERTAIN = 1000.0
"""Stands for the speedup over a model that does not run."""


@dataclass(frozen=True)
class Walkover(Comparison):
    """A comparison that one side loses because it does not run."""

    failure: str = ""

    @classmethod
    def of(cls, speedup: float, failure: str) -> Walkover:
        """Of so large a speedup (or a small one), because of *failure*."""
        nothing = Latency(0.0, (0.0, 0.0), 0)
        return cls(nothing, nothing, speedup, (speedup, speedup), 0, stable=True, failure=failure)


def is_gain(comparison: Comparison) -> bool:
    """Whether the worse end of the interval is a gain beyond :data:`MARGIN`."""
    return comparison.ci95[0] > 1 + MARGIN


def is_undecided(comparison: Comparison) -> bool:
    """What looks like a gain but may be chance."""
    return comparison.speedup > PROMISING and not is_gain(comparison)


def is_loss(comparison: Comparison) -> bool:
    """Slower beyond noise, or by more than 1% whatever the noise."""
    return comparison.ci95[1] < 1 or comparison.speedup < 0.99


def ruling_of(comparison: Comparison, variant: str | None = None) -> Ruling:
    """To keep what gained, in the form *variant*, or to reject it, with the figures."""
    if isinstance(comparison, Walkover):
        verdict = Verdict.KEPT if is_gain(comparison) else Verdict.REJECTED_FAILED
        return Ruling(verdict, variant, {"failure": comparison.failure})
    verdict = Verdict.KEPT if is_gain(comparison) else Verdict.REJECTED_SLOWER
    return Ruling(verdict, variant, facts_of(comparison))


def windowed(comparison: Comparison, variant: str) -> Ruling:
    """:func:`ruling_of` what was timed in a window."""
    ruling = ruling_of(comparison, variant)
    return replace(ruling, facts={**ruling.facts, "measured": "in a window"})


def facts_of(comparison: Comparison, *, inverse: bool = False) -> dict[str, Fact]:
    """What a rewrite gains; *inverse* if the candidate of the comparison is the one without it."""
    speedup, (low, high) = comparison.speedup, comparison.ci95
    if inverse:
        speedup, low, high = 1 / speedup, 1 / high, 1 / low
    return {
        "speedup": round(speedup, 4),
        "ci95": [round(low, 4), round(high, 4)],
        "pairs": comparison.pairs,
    }


def with_pass(rulings: Rulings, name: str, ruling: Ruling) -> Rulings:
    """*rulings* with one for all sites of a pass."""
    return replace(rulings, by_pass={**rulings.by_pass, name: ruling})


def with_group(rulings: Rulings, group: Group, ruling: Ruling) -> Rulings:
    """*rulings* with one for a group of equal sites."""
    return replace(rulings, by_group={**rulings.by_group, group: ruling})


def sites_of(build: Build, name: str) -> Iterator[Remark]:
    """The remarks of a pass on sites where it applies."""
    return (r for r in build.remarks if r.pass_name == name and r.ordinal is not None)


def admitted_sites(build: Build, name: str) -> Iterator[Remark]:
    """Those of :func:`sites_of` that the user's limit of ordinals admits."""
    limit = build.rulings.limit
    return (r for r in sites_of(build, name) if limit is None or (r.ordinal or 0) <= limit)


def group_of(site: Remark) -> Group:
    """The group of equal sites that the one with this remark belongs to."""
    return site.pass_name, str(site.facts["signature"])


def groups_of(build: Build, name: str, kind: Kind | None = None) -> list[Group]:
    """Groups of equal sites of a pass, by default all, that ended in *kind*."""
    return _groups(r for r in sites_of(build, name) if kind is None or r.kind is kind)


def open_groups(build: Build, name: str) -> list[Group]:
    """Groups of equal sites of a pass that are held and that the user's limit admits."""
    return _groups(r for r in admitted_sites(build, name) if r.kind is Kind.HELD)


def _groups(sites: Iterable[Remark]) -> list[Group]:
    return list(dict.fromkeys(group_of(r) for r in sites))


def is_close(ruling: Ruling | None, least: float) -> bool:
    """Whether it was timed and dropped for a speedup that is not below *least*."""
    if ruling is None or ruling.verdict is not Verdict.REJECTED_SLOWER:
        return False
    speedup = ruling.facts.get("speedup")
    return isinstance(speedup, float) and speedup >= least


def variants_of(build: Build, name: str) -> list[str]:
    """Every form that a pass offers at any of its sites, in the pass's order of preference."""
    return list(dict.fromkeys(v for site in sites_of(build, name) for v in offered_forms(site)))
