"""Lowering passes tried in the whole model: what gained in windows, and what has no windows."""

from __future__ import annotations

from dataclasses import replace

from pwopt.remark import Verdict
from pwopt.runtime import Comparison
from pwopt.tuning.forms import Gain
from pwopt.tuning.pipeline import Ruling
from pwopt.tuning.trials import Trials
from pwopt.tuning.verdicts import (
    OBJECTIONS,
    facts_of,
    is_gain,
    ruling_of,
    sites_of,
    variants_of,
    with_group,
    with_pass,
)
from pwopt.tuning.workbench import Build, Group

__all__ = ["everywhere", "take", "together"]


def take(trials: Trials, best: Build, gains: list[Gain]) -> Build:
    """Put gains of windows into the whole model; where they do not add up, half of them.

    The half with the larger gains is tried first, then the other one on top of it.
    """
    gains = [g for g in gains if g.group not in trials.rulings.by_group]
    if not gains:
        return best
    rulings = trials.rulings
    for gain in gains:
        rulings = with_group(rulings, gain.group, gain.ruling)
    trial = trials.build(rulings)
    comparison = trials.timing.compare(best, trial, "what gained in windows together")
    if is_gain(comparison):
        trials.rulings = trial.rulings
        return take(trials, trial, _other_forms(trials, gains))
    if len(gains) == 1:
        (gain,) = gains
        if gain.group in trials.rulings.by_group:
            return take(trials, best, _other_forms(trials, gains))
        trials.rule_group(gain.group, ruling_of(comparison))
        return best
    gains = sorted(gains, key=lambda g: -g.saved_ms)
    half = (len(gains) + 1) // 2
    for part in (gains[:half], gains[half:]):
        # A pass may overrun its share for gains that were seen, but not the whole time.
        if not trials.clock.is_run_down():
            best = take(trials, best, part)
    return best


def _other_forms(trials: Trials, gains: list[Gain]) -> list[Gain]:
    """The next forms for those of *gains* that were found to be wrong or too large."""
    refused = [g for g in gains if g.others and g.group in trials.rulings.by_group]
    refused = [g for g in refused if trials.rulings.by_group[g.group].verdict in OBJECTIONS]
    groups = {g.group for g in refused}
    free = {k: r for k, r in trials.rulings.by_group.items() if k not in groups}
    trials.rulings = replace(trials.rulings, by_group=free)
    return [replace(g, ruling=g.others[0], others=g.others[1:]) for g in refused]


def everywhere(trials: Trials, best: Build, name: str, groups: list[Group]) -> Build:
    """Try each form of a lowering pass on all of *groups*, then on one after the other."""
    ranked = _ranked(trials, best, name)
    if not ranked:
        return best
    comparison, variant, trial = ranked[0]
    trials.rule_pass(name, ruling_of(comparison, variant))
    if is_gain(comparison):
        best = trial
    if len(groups) == 1 or (comparison.ci95[1] < 1 and not trials.thorough):
        return best
    for group in groups:
        best = _by_itself(trials, best, group, [v for _, v, _ in ranked[:2]])
    return best


def _ranked(trials: Trials, best: Build, name: str) -> list[tuple[Comparison, str, Build]]:
    """The forms of a pass on all its sites, fastest first.

    Passes list forms in order of general preference; without thoroughness, two in a row that
    are behind the leader end the list.
    """
    tried: list[tuple[Comparison, str, Build]] = []
    behind = 0
    for variant in variants_of(best, name):
        if not trials.clock.has_time() or (behind == 2 and not trials.thorough):
            break
        trial = trials.build(with_pass(trials.rulings, name, Ruling(variant=variant)))
        if trial.written.sha256 == best.written.sha256:
            continue
        comparison = trials.timing.compare(best, trial, f"{name} as {variant}")
        leader = max((c.speedup for c, _, _ in tried), default=0.0)
        behind = behind + 1 if comparison.speedup < leader else 0
        tried.append((comparison, variant, trial))
    return sorted(tried, key=lambda t: -t[0].speedup)


def _by_itself(trials: Trials, best: Build, group: Group, variants: list[str]) -> Build:
    """One group of equal sites: every other choice against the current one."""
    name = group[0]
    current = trials.rulings.find(*group)
    choices: list[Ruling] = [Ruling(variant=v) for v in variants]
    if current.verdict is Verdict.KEPT:
        choices = [c for c in choices if c.variant != current.variant]
        choices.append(Ruling(Verdict.REJECTED_SLOWER))
    for choice in choices:
        if not trials.clock.has_time():
            break
        trial = trials.build(with_group(trials.rulings, group, choice))
        if trial.written.sha256 == best.written.sha256:
            continue
        comparison = trials.timing.compare(best, trial, f"{name}, group by group")
        if is_gain(comparison):
            best = trial
            facts = facts_of(comparison, inverse=choice.verdict is not Verdict.KEPT)
            trials.rule_group(group, replace(choice, facts=facts))
        elif current.verdict is not Verdict.KEPT and choice is choices[0]:
            trials.rule_group(group, ruling_of(comparison, choice.variant))
    return best


def together(trials: Trials, best: Build, name: str) -> Build:
    """All sites of a pass at once, though none of them gains by itself."""
    if len(list(sites_of(best, name))) < 2:
        return best
    for variant in variants_of(best, name)[: None if trials.thorough else 1]:
        if not trials.clock.has_time():
            break
        groups = trials.rulings.by_group.items()
        free = {k: r for k, r in groups if k[0] != name or r.verdict in OBJECTIONS}
        rulings = with_pass(replace(trials.rulings, by_group=free), name, Ruling(variant=variant))
        trial = trials.build(rulings)
        if trial.written.sha256 == best.written.sha256:
            continue
        comparison = trials.timing.compare(best, trial, f"{name} everywhere as {variant}")
        if is_gain(comparison):
            trials.rulings = with_pass(trial.rulings, name, ruling_of(comparison, variant))
            return trial
    return best
