"""Which simplifying passes stay: all are applied together and taken away one by one."""

from __future__ import annotations

from dataclasses import replace

from pwopt.remark import Fact, Kind, Verdict
from pwopt.tuning.effort import least_seconds
from pwopt.tuning.pipeline import Ruling
from pwopt.tuning.trials import Trials
from pwopt.tuning.verdicts import (
    facts_of,
    groups_of,
    is_gain,
    ruling_of,
    variants_of,
    with_group,
    with_pass,
)
from pwopt.tuning.workbench import Build

__all__ = ["choose_variants", "prune"]

_TOGETHER: dict[str, Fact] = {"measured": "all simplifications together"}


def prune(trials: Trials, base: Build, best: Build) -> Build:
    """Take passes away one by one; what is not missed stays away.

    Where that would leave no time for the lowering passes, as for models that run for a
    second, all of them share the verdict of their sum.
    """
    total = trials.timing.compare(base, best, "simplified")
    names = best.applied
    each_s = least_seconds(trials.timing.allowance.trial, total)
    if len(names) == 1 or not trials.clock.affords(len(names) * each_s):
        ruling = ruling_of(total)
        if len(names) > 1:
            ruling = replace(ruling, facts={**ruling.facts, **_TOGETHER})
        for name in names:
            trials.rule_pass(name, ruling)
        return best if is_gain(total) else base
    for name in reversed(names):
        refused = Ruling(Verdict.REJECTED_SLOWER)
        without = trials.build(with_pass(trials.rulings, name, refused))
        ruling = ruling_of(trials.timing.compare(without, best, f"with and without {name}"))
        trials.rule_pass(name, ruling)
        if ruling.verdict is not Verdict.KEPT:
            best = without
        elif trials.thorough:
            best = _prune_groups(trials, best, name)
    return best


def _prune_groups(trials: Trials, best: Build, name: str) -> Build:
    """Take away what slows a pass that gains: groups of equal sites, one by one.

    A group that is not missed stays: many gains too small to be told apart make the pass's.
    """
    groups = groups_of(best, name, Kind.APPLIED)
    for group in groups if len(groups) > 1 else ():
        if not trials.clock.has_time():
            break
        refused = Ruling(Verdict.REJECTED_SLOWER)
        without = trials.build(with_group(trials.rulings, group, refused))
        comparison = trials.timing.compare(best, without, f"{name}, group by group")
        if is_gain(comparison):
            facts = facts_of(comparison, inverse=True)
            trials.rule_group(group, replace(refused, facts=facts))
            best = without
    return best


def choose_variants(trials: Trials, best: Build) -> Build:
    """Where a pass that stayed offers several forms, take the fastest."""
    for name in best.applied:
        for variant in variants_of(best, name)[1:]:
            if not trials.clock.has_time():
                return best
            trial = trials.build(with_pass(trials.rulings, name, Ruling(variant=variant)))
            comparison = trials.timing.compare(best, trial, f"{name} as {variant}")
            if is_gain(comparison):
                best, trials.rulings = trial, trial.rulings
    return best
