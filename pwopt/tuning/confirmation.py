"""The end of a search, or of an earlier one, against the original."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pwopt.errors import PwoptError
from pwopt.passes import Canonicalise
from pwopt.remark import Kind, Verdict
from pwopt.runtime import Comparison
from pwopt.tuning.effort import ALLOWANCES, Effort
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.settling import first_guilty
from pwopt.tuning.trials import Trials
from pwopt.tuning.verdicts import group_of, is_loss, with_group
from pwopt.tuning.workbench import Build, Workbench

__all__ = ["Found", "conclude", "confirm"]

_TAKEN_BACK = "; what was slower against the original was taken back"
_CONFIRMING = 0.04
"""The part of the first run's seconds that confirming its end may take; a tenth is promised."""


@dataclass(frozen=True, eq=False)
class Found:
    """The end of a search.

    Attributes:
        build: the model to write; ``None`` means the original, untouched.
        rulings: the last word on every candidate that was looked at.
        comparison: the original against it; ``None`` if nothing was timed.
        reason: why the search ended.
        is_partial: whether it was interrupted; not to be built on later.
    """

    build: Build | None
    rulings: Rulings
    comparison: Comparison | None
    reason: str
    is_partial: bool = False


def confirm(
    bench: Workbench, effort: Effort, rulings: Rulings, seconds: float = math.inf
) -> Found | None:
    """Build what an earlier search ended with and time it once against the original.

    Args:
        bench: the model and the target.
        effort: of the earlier search.
        rulings: what it ended with.
        seconds: what it took; confirming takes a small part of that, unless it looks slower.

    Returns:
        ``None`` if it does not hold any more: something was taken back, or it is slower.
    """
    build = bench.build(rulings)
    if bench.objection(build) is not None:
        return None
    trial = ALLOWANCES[effort].trial
    brief = replace(trial, seconds=min(trial.seconds, _CONFIRMING * seconds))
    for reopened in (0, 1):  # a disturbed machine must not cost a good model
        try:
            comparison = bench.compare(
                bench.original,
                build.written,
                trial if reopened else brief,
                "timing for confirmation",
                anew=True,
                reopened=reopened,
            )
        except PwoptError:
            return None
        if not is_loss(comparison):
            break
    else:
        return None
    return Found(build, rulings, comparison, "decided by an earlier search; confirmed")


def conclude(trials: Trials, base: Build, best: Build) -> Found:
    """End with *best*, timed against the original, carefully.

    What makes it slower after all is found and taken back. Falls back to the canonicalised model,
    or to nothing.
    """
    if not best.is_changed:
        return Found(None, trials.rulings, None, f"{trials.clock.end}; there is nothing to change")
    comparison = trials.timing.against_original(best)
    while is_loss(comparison):
        without = _without_guilty(trials, best)
        if without is None:
            break
        best, trials.rulings = without, without.rulings
        trials.clock.end = f"{trials.clock.end.removesuffix(_TAKEN_BACK)}{_TAKEN_BACK}"
        comparison = trials.timing.against_original(best)
    if not is_loss(comparison):
        return Found(best, trials.rulings, comparison, trials.clock.end)
    if base.is_changed and best.written.sha256 != base.written.sha256:
        comparison = trials.timing.against_original(base)
        if not is_loss(comparison):
            reason = f"{trials.clock.end}; the kept gains did not add up"
            return Found(base, base.rulings, comparison, reason)
    reason = f"{trials.clock.end}; no model was as fast as the original"
    return Found(None, trials.rulings, comparison, reason)


def _without_guilty(trials: Trials, best: Build) -> Build | None:
    """*best* without the group of the first rewrite that makes it slower than the original.

    Found by bisection over the ordinals; ``None`` if there is none, or no time.
    """

    def is_slow(rulings: Rulings) -> bool:
        return trials.timing.is_slow(trials.bench.build(rulings))

    trials.clock.allot_all()
    if not best.applied or not trials.clock.has_time():
        return None
    if is_slow(replace(best.rulings, limit=0)):
        return None
    guilty = first_guilty(best, is_slow)
    if guilty.kind is not Kind.APPLIED or guilty.pass_name == Canonicalise.name:
        return None
    refused = Ruling(Verdict.REJECTED_SLOWER, facts={"measured": "against the original"})
    return trials.build(with_group(best.rulings, group_of(guilty), refused))
