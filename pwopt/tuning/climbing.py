"""One decision after the other changed beside all others, until no change gains."""

from __future__ import annotations

from pwopt.remark import Kind, Verdict
from pwopt.tuning.candidate import offered_forms
from pwopt.tuning.pipeline import Ruling
from pwopt.tuning.trials import BESIDE, Decision, Trials
from pwopt.tuning.verdicts import group_of, groups_of, is_close, sites_of
from pwopt.tuning.workbench import Build

__all__ = ["climb"]

_WORTH_A_FLIP = 0.9
"""What lost more than this is not looked at again beside other rewrites."""


def climb(trials: Trials, best: Build) -> Build:
    """Change one decision after the other beside all others, until no change gains."""
    gained = True
    while gained and trials.clock.has_time():
        gained = False
        for change in _changes(trials, best):
            if not trials.clock.has_time():
                return best
            trial = trials.changed(best, change)
            if trial is not None:
                best, gained = trial, True
    if not gained:
        trials.clock.end = "no change of any one decision gains anything more"
    return best


def _changes(trials: Trials, best: Build) -> list[list[Decision]]:
    """Decisions that may be wrong beside the others: drops, returns, other forms."""
    refused = Ruling(Verdict.REJECTED_SLOWER, facts=BESIDE)
    found: list[list[Decision]] = []
    for pass_ in trials.bench.simplify:
        ruling = trials.rulings.by_pass.get(pass_.name)
        if is_close(ruling, _WORTH_A_FLIP):
            found.append([(pass_.name, None, Ruling(facts=BESIDE))])
        elif pass_.name in best.applied:
            found.append([(pass_.name, None, refused)])
    for pass_ in trials.bench.lower:
        close = trials.close(best, pass_.name, _WORTH_A_FLIP)
        found += [close] if len(close) > 1 else []  # equal or not, they may help each other
        found += [[decision] for decision in close]
        for group in groups_of(best, pass_.name, Kind.APPLIED):
            site = next(r for r in sites_of(best, pass_.name) if group_of(r) == group)
            others = [v for v in offered_forms(site) if v != site.facts.get("variant")]
            if len(offered_forms(site)) > 1:
                found += [[(pass_.name, group, Ruling(variant=v, facts=BESIDE))] for v in others]
            found.append([(pass_.name, group, refused)])
    return found
