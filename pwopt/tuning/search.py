"""The choice among rewrites: what is verified and measured faster stays, nothing else.

Simplifying passes are applied together and taken away one by one (what is not missed goes). The
forms of a lowering pass are timed in windows, once per group of equal sites; what gains there must
gain in the whole model too. Every comparison is in pairs, in one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from pwopt.errors import PwoptError
from pwopt.remark import Fact, Kind, Remark, Verdict
from pwopt.runtime import Comparison
from pwopt.tuning.candidate import offered_forms
from pwopt.tuning.clock import DONE, Clock
from pwopt.tuning.confirmation import Found, conclude
from pwopt.tuning.effort import ALLOWANCES, Effort, least_seconds, longer
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.timing import Timing
from pwopt.tuning.trials import BESIDE, Decision, Trials
from pwopt.tuning.verdicts import (
    ALMOST,
    MARGIN,
    OBJECTIONS,
    PROMISING,
    admitted_sites,
    facts_of,
    group_of,
    groups_of,
    is_close,
    is_gain,
    is_undecided,
    open_groups,
    ruling_of,
    sites_of,
    variants_of,
    windowed,
    with_group,
    with_pass,
)
from pwopt.tuning.window import Window
from pwopt.tuning.workbench import Build, Group, InterruptedSearch, Precision, Workbench

__all__ = ["search"]

_LONG_MS = 50.0
"""Forms in windows that take longer are timed once, in few pairs."""
_CLOSE_BEHIND = 0.95
"""There, a form that has less than this part of the leader's speedup ends the list."""
_HOPELESS = 3.0
"""Forms that the analytic model expects to take so many times as long are not timed; a wide
margin, for it is a roofline and knows no kernel."""
_WORTH_A_FLIP = 0.9
"""What lost more than this is not looked at again beside other rewrites."""
_TOGETHER: dict[str, Fact] = {"measured": "all simplifications together"}


@dataclass(frozen=True)
class _Gain:
    """What a group of equal sites gains in a window, times the number of its sites, in ms."""

    group: Group
    ruling: Ruling
    saved_ms: float
    others: tuple[Ruling, ...] = ()
    """Forms that gain too, if less: for where the first one is too inaccurate or too large."""


def search(
    bench: Workbench, effort: Effort, rulings: Rulings, time_limit_s: float | None = None
) -> Found:
    """Find the fastest verified model within the effort's time.

    Args:
        bench: the model and the target.
        effort: quick or full.
        rulings: what the user decided already (limits, ordinals); never overruled.
        time_limit_s: seconds to spend on trials; by default those of the effort.
    """
    allowance = ALLOWANCES[effort]
    clock = Clock(allowance.total_s if time_limit_s is None else time_limit_s)
    timing = Timing(bench, allowance, clock)
    trials = Trials(bench, clock, timing, rulings, thorough=effort is Effort.FULL)
    return _Search(trials).run()


class _Search:
    """One run: step after step on the best build so far."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.almost: set[str] = set()
        """Passes of which some window nearly gained."""

    def run(self) -> Found:
        for pass_ in self.trials.bench.lower:
            self.trials.rule_pass(pass_.name, Ruling(Verdict.HELD))
        base = self.trials.build(replace(self.trials.rulings, default=Ruling(Verdict.HELD)))
        is_pruned = is_partial = False
        try:
            best = self.trials.build(self.trials.rulings)
            if best.written.sha256 != base.written.sha256:
                best = self._prune(base, best)
                is_pruned = True
                best = self._choose_variants(best)
            best = self._sweep(best)
            if (
                self.trials.clock.end != DONE and self.trials.clock.has_time()
            ):  # some pass had too short a share
                self.trials.clock.end = DONE
                best = self._sweep(best)
            best = self._from_neutral(best)
            if self.trials.thorough:
                best = self._climb(best)
        except InterruptedSearch:
            is_partial = True
            self.trials.clock.end = "interrupted"
            if not is_pruned:  # what was not looked at has not shown to help
                self.trials.rulings = replace(self.trials.rulings, default=Ruling(Verdict.HELD))
        found = conclude(self.trials, base, self.trials.build(self.trials.rulings))
        return replace(found, is_partial=is_partial)

    # -- steps ---------------------------------------------------------------------------------

    def _prune(self, base: Build, best: Build) -> Build:
        """Take passes away one by one; what is not missed stays away.

        Where that would leave no time for the lowering passes, as for models that run for a
        second, all of them share the verdict of their sum.
        """
        total = self.trials.timing.compare(base, best, "simplified")
        names = best.applied
        each_s = least_seconds(self.trials.timing.allowance.trial, total)
        if len(names) == 1 or not self.trials.clock.affords(len(names) * each_s):
            ruling = ruling_of(total)
            if len(names) > 1:
                ruling = replace(ruling, facts={**ruling.facts, **_TOGETHER})
            for name in names:
                self.trials.rule_pass(name, ruling)
            return best if is_gain(total) else base
        for name in reversed(names):
            refused = Ruling(Verdict.REJECTED_SLOWER)
            without = self.trials.build(with_pass(self.trials.rulings, name, refused))
            ruling = ruling_of(
                self.trials.timing.compare(without, best, f"with and without {name}")
            )
            self.trials.rule_pass(name, ruling)
            if ruling.verdict is not Verdict.KEPT:
                best = without
            elif self.trials.thorough:
                best = self._prune_groups(best, name)
        return best

    def _prune_groups(self, best: Build, name: str) -> Build:
        """The same for groups of equal sites within one pass."""
        groups = groups_of(best, name, Kind.APPLIED)
        for group in groups if len(groups) > 1 else ():
            if not self.trials.clock.has_time():
                break
            refused = Ruling(Verdict.REJECTED_SLOWER)
            without = self.trials.build(with_group(self.trials.rulings, group, refused))
            ruling = ruling_of(self.trials.timing.compare(without, best, f"{name}, group by group"))
            self.trials.rule_group(group, ruling)
            if ruling.verdict is not Verdict.KEPT:
                best = without
        return best

    def _choose_variants(self, best: Build) -> Build:
        """Where a pass that stayed offers several forms, take the fastest."""
        for name in best.applied:
            for variant in variants_of(best, name)[1:]:
                if not self.trials.clock.has_time():
                    return best
                rulings = with_pass(self.trials.rulings, name, Ruling(variant=variant))
                trial = self.trials.build(rulings)
                comparison = self.trials.timing.compare(best, trial, f"{name} as {variant}")
                if is_gain(comparison):
                    best, self.trials.rulings = trial, trial.rulings
        return best

    def _sweep(self, best: Build) -> Build:
        """Each lowering pass on what is held yet, sharing the time."""
        names = [p.name for p in self.trials.bench.lower]
        for position, name in enumerate(names):
            self._share_time(best, names[position:])
            best = self._lower(best, name)
        self.trials.clock.allot_all()
        return best

    def _lower(self, best: Build, name: str) -> Build:
        """Choose the form of a lowering pass for each group of equal sites, in windows.

        Groups are looked at in the order of their share of the time, so that what matters most is
        decided when time is short. A pass with groups that no window can be cut for, such as
        large regions, or whose windows do not run, is first tried on the whole model; so is one
        of which no group gains by itself, but some nearly, for sites may help each other. Where
        some gain, those that nearly do are tried beside them.
        """
        groups = open_groups(best, name)
        if not groups:
            return best
        expected = self.trials.bench.expected_seconds(best, groups)
        groups.sort(key=lambda g: -expected[g])
        gains: list[_Gain] = []
        uncut = []
        for group in groups:
            if not self.trials.clock.has_time():
                break
            sites = [r for r in admitted_sites(best, name) if group_of(r) == group]
            window = self.trials.bench.cut(best, sites[0], offered_forms(sites[0]))
            if window is None:
                uncut.append(group)
                continue
            try:
                gain = self._in_window(group, sites, window)
            except PwoptError:  # on made-up values, say; the whole model may run
                uncut.append(group)
                continue
            if gain is not None:
                gains.append(gain)
        if uncut:
            best = self._on_whole_model(best, name, uncut)
            if name in best.applied:
                return best
        return self._beside(self._take(best, gains), name)

    def _beside(self, best: Build, name: str) -> Build:
        """What nearly gained by itself, beside what did."""
        if name not in best.applied:
            return self._together(best, name) if name in self.almost else best
        close = self.trials.close(best, name, ALMOST)
        if not close or not self.trials.clock.has_time():
            return best
        return self.trials.changed(best, close) or best

    def _in_window(self, group: Group, sites: list[Remark], window: Window) -> _Gain | None:
        """The best form for the equal *sites*, measured in a window around one of them.

        ``None`` if none gains, which rules the group out.

        Raises:
            PwoptError: no form of the window runs.
        """
        expected = self.trials.bench.estimate(window)
        offered = [v for v in offered_forms(sites[0]) if expected.get(v, 1.0) < _HOPELESS]
        if not offered:
            facts: dict[str, Fact] = {"expected": round(1 / min(expected.values()), 4)}
            ruling = Ruling(Verdict.REJECTED_ESTIMATE, facts=facts)
            self.trials.rule_group(group, ruling)
            return None
        tried: list[tuple[Comparison, str]] = []
        failure: PwoptError | None = None
        behind, patience = 0, len(offered) if self.trials.thorough else 2
        for variant in offered:
            if variant not in window.after or behind == patience:
                continue
            if tried and not self.trials.clock.has_time():
                break
            try:
                comparison = self._compare_window(window, variant, group[0])
            except PwoptError as error:
                failure = error
                continue
            leader = max((c for c, _ in tried), key=lambda c: c.speedup, default=None)
            if leader is None or comparison.speedup > leader.speedup:
                behind = 0
            elif self._is_long(comparison) and comparison.speedup < _CLOSE_BEHIND * leader.speedup:
                behind = patience
            else:
                behind += 1
            tried.append((comparison, variant))
        if failure is not None and not tried:
            raise failure
        return self._judged(group, len(sites), tried)

    def _is_long(self, comparison: Comparison) -> bool:
        """Whether its window takes so long that it was timed in few pairs."""
        return comparison.baseline.median_ms > _LONG_MS and not self.trials.thorough

    def _compare_window(self, window: Window, variant: str, name: str) -> Comparison:
        """What looks like a gain but may be chance is timed once more, unless it takes long."""
        comparison = self._compare_window_once(
            window, variant, name, self.trials.timing.allowance.window
        )
        if self._is_long(comparison) or not is_undecided(comparison):
            return comparison
        return self._compare_window_once(
            window, variant, name, longer(self.trials.timing.allowance.window)
        )

    def _compare_window_once(
        self, window: Window, variant: str, name: str, precision: Precision
    ) -> Comparison:
        label = f"timing {name}, site by site"
        return self.trials.bench.compare_window(
            window, variant, precision, label, decide=1 + MARGIN, futile=PROMISING
        )

    def _judged(
        self, group: Group, sites: int, tried: list[tuple[Comparison, str]]
    ) -> _Gain | None:
        """The gain of the best form that was *tried*; ``None`` rules the group out, if any was."""
        if not tried:
            return None
        tried.sort(key=lambda t: -t[0].speedup)
        if tried[0][0].speedup > ALMOST:
            self.almost.add(group[0])
        first, *others = (windowed(comparison, variant) for comparison, variant in tried)
        if first.verdict is not Verdict.KEPT:
            self.trials.rule_group(group, first)
            return None
        saved = tried[0][0].baseline.median_ms - tried[0][0].candidate.median_ms
        gaining = tuple(r for r in others if r.verdict is Verdict.KEPT)
        return _Gain(group, first, saved * sites, gaining)

    def _take(self, best: Build, gains: list[_Gain]) -> Build:
        """Put gains of windows into the whole model; where they do not add up, half of them.

        The half with the larger gains is tried first, then the other one on top of it.
        """
        gains = [g for g in gains if g.group not in self.trials.rulings.by_group]
        if not gains:
            return best
        rulings = self.trials.rulings
        for gain in gains:
            rulings = with_group(rulings, gain.group, gain.ruling)
        trial = self.trials.build(rulings)
        comparison = self.trials.timing.compare(best, trial, "what gained in windows together")
        if is_gain(comparison):
            self.trials.rulings = trial.rulings
            return self._take(trial, self._other_forms(gains))
        if len(gains) == 1:
            (gain,) = gains
            if gain.group in self.trials.rulings.by_group:
                return self._take(best, self._other_forms(gains))
            self.trials.rule_group(gain.group, ruling_of(comparison))
            return best
        gains = sorted(gains, key=lambda g: -g.saved_ms)
        half = (len(gains) + 1) // 2
        for part in (gains[:half], gains[half:]):
            # A pass may overrun its share for gains that were seen, but not the whole time.
            if not self.trials.clock.is_run_down():
                best = self._take(best, part)
        return best

    def _other_forms(self, gains: list[_Gain]) -> list[_Gain]:
        """The next forms for those of *gains* that were found to be wrong or too large."""
        refused = [g for g in gains if g.others and g.group in self.trials.rulings.by_group]
        refused = [
            g for g in refused if self.trials.rulings.by_group[g.group].verdict in OBJECTIONS
        ]
        groups = {g.group for g in refused}
        free = {k: r for k, r in self.trials.rulings.by_group.items() if k not in groups}
        self.trials.rulings = replace(self.trials.rulings, by_group=free)
        return [replace(g, ruling=g.others[0], others=g.others[1:]) for g in refused]

    def _on_whole_model(self, best: Build, name: str, groups: list[Group]) -> Build:
        """Try each form of a lowering pass on all of *groups*, then on one after the other."""
        ranked = self._rank_variants(best, name)
        if not ranked:
            return best
        comparison, variant, trial = ranked[0]
        self.trials.rule_pass(name, ruling_of(comparison, variant))
        if is_gain(comparison):
            best = trial
        if len(groups) == 1 or (comparison.ci95[1] < 1 and not self.trials.thorough):
            return best
        for group in groups:
            best = self._settle_group(best, group, [v for _, v, _ in ranked[:2]])
        return best

    def _together(self, best: Build, name: str) -> Build:
        """All sites of a pass at once, though none of them gains by itself."""
        if len(list(sites_of(best, name))) < 2:
            return best
        for variant in variants_of(best, name)[: None if self.trials.thorough else 1]:
            if not self.trials.clock.has_time():
                break
            groups = self.trials.rulings.by_group.items()
            free = {k: r for k, r in groups if k[0] != name or r.verdict in OBJECTIONS}
            rulings = with_pass(
                replace(self.trials.rulings, by_group=free), name, Ruling(variant=variant)
            )
            trial = self.trials.build(rulings)
            if trial.written.sha256 == best.written.sha256:
                continue
            comparison = self.trials.timing.compare(best, trial, f"{name} everywhere as {variant}")
            if is_gain(comparison):
                self.trials.rulings = with_pass(trial.rulings, name, ruling_of(comparison, variant))
                return trial
        return best

    def _from_neutral(self, best: Build) -> Build:
        """Once more from the simplifications that were dropped because they alone gain nothing.

        Some make sites for lowering passes that the simpler start does not have.
        """
        names = [
            p.name
            for p in self.trials.bench.simplify
            if is_close(self.trials.rulings.by_pass.get(p.name), ALMOST)
        ]
        if not names or not self.trials.clock.has_time():
            return best
        return self.trials.attempt(partial(self._from, names, best)) or best

    def _from(self, names: list[str], best: Build) -> Build | None:
        """With the simplifications *names*, lowered where they make room; ``None``: no gain."""
        trials = self.trials
        facts: dict[str, Fact] = {"measured": "with what it makes room for"}
        for name in names:
            trials.rule_pass(name, Ruling(facts=facts))
        start = trial = trials.build(trials.rulings)
        lower = [p.name for p in trials.bench.lower]
        known = {g for name in lower for g in groups_of(best, name)}
        fresh = [n for n in lower if not known.issuperset(groups_of(start, n, Kind.HELD))]
        for position, name in enumerate(fresh):
            self._share_time(start, fresh[position:])
            trial = self._lower(trial, name)
        trials.clock.allot_all()
        if trial.written.sha256 in (start.written.sha256, best.written.sha256):
            return None
        comparison = trials.timing.compare(best, trial, "from the neutral simplifications")
        return trial if is_gain(comparison) else None

    def _climb(self, best: Build) -> Build:
        """Change one decision after the other beside all others, until no change gains."""
        gained = True
        while gained and self.trials.clock.has_time():
            gained = False
            for change in self._changes(best):
                if not self.trials.clock.has_time():
                    return best
                trial = self.trials.changed(best, change)
                if trial is not None:
                    best, gained = trial, True
        if not gained:
            self.trials.clock.end = "no change of any one decision gains anything more"
        return best

    def _changes(self, best: Build) -> list[list[Decision]]:
        """Decisions that may be wrong beside the others: drops, returns, other forms."""
        refused = Ruling(Verdict.REJECTED_SLOWER, facts=BESIDE)
        found: list[list[Decision]] = []
        for pass_ in self.trials.bench.simplify:
            ruling = self.trials.rulings.by_pass.get(pass_.name)
            if is_close(ruling, _WORTH_A_FLIP):
                found.append([(pass_.name, None, Ruling(facts=BESIDE))])
            elif pass_.name in best.applied:
                found.append([(pass_.name, None, refused)])
        for pass_ in self.trials.bench.lower:
            close = self.trials.close(best, pass_.name, _WORTH_A_FLIP)
            found += [close] if len(close) > 1 else []  # equal or not, they may help each other
            found += [[decision] for decision in close]
            for group in groups_of(best, pass_.name, Kind.APPLIED):
                site = next(r for r in sites_of(best, pass_.name) if group_of(r) == group)
                others = [v for v in offered_forms(site) if v != site.facts.get("variant")]
                if len(offered_forms(site)) > 1:
                    found += [
                        [(pass_.name, group, Ruling(variant=v, facts=BESIDE))] for v in others
                    ]
                found.append([(pass_.name, group, refused)])
        return found

    def _rank_variants(self, best: Build, name: str) -> list[tuple[Comparison, str, Build]]:
        """The forms of a pass on all its sites, fastest first.

        Passes list forms in order of general preference; without thoroughness, two in a row that
        are behind the leader end the list.
        """
        tried: list[tuple[Comparison, str, Build]] = []
        behind = 0
        for variant in variants_of(best, name):
            if not self.trials.clock.has_time() or (behind == 2 and not self.trials.thorough):
                break
            trial = self.trials.build(with_pass(self.trials.rulings, name, Ruling(variant=variant)))
            if trial.written.sha256 == best.written.sha256:
                continue
            comparison = self.trials.timing.compare(best, trial, f"{name} as {variant}")
            leader = max((c.speedup for c, _, _ in tried), default=0.0)
            behind = behind + 1 if comparison.speedup < leader else 0
            tried.append((comparison, variant, trial))
        return sorted(tried, key=lambda t: -t[0].speedup)

    def _settle_group(self, best: Build, group: Group, variants: list[str]) -> Build:
        """One group of equal sites by itself: every other choice against the current one."""
        name = group[0]
        current = self.trials.rulings.find(*group)
        choices: list[Ruling] = [Ruling(variant=v) for v in variants]
        if current.verdict is Verdict.KEPT:
            choices = [c for c in choices if c.variant != current.variant]
            choices.append(Ruling(Verdict.REJECTED_SLOWER))
        for choice in choices:
            if not self.trials.clock.has_time():
                break
            trial = self.trials.build(with_group(self.trials.rulings, group, choice))
            if trial.written.sha256 == best.written.sha256:
                continue
            comparison = self.trials.timing.compare(best, trial, f"{name}, group by group")
            if is_gain(comparison):
                best = trial
                facts = facts_of(comparison, inverse=choice.verdict is not Verdict.KEPT)
                self.trials.rule_group(group, replace(choice, facts=facts))
            elif current.verdict is not Verdict.KEPT and choice is choices[0]:
                ruling = ruling_of(comparison, choice.variant)
                self.trials.rule_group(group, ruling)
        return best

    def _share_time(self, best: Build, names: list[str]) -> None:
        """Give the first of *names* its part of the time that is left.

        Half of the time is shared evenly among the passes that have something to try, half by
        what they expect their sites to take: where one holds nearly all of a slow model, it needs
        more than the others.
        """
        groups = {n: held for n in names if (held := open_groups(best, n))}
        if names[0] not in groups:
            return
        expected = self.trials.bench.expected_seconds(
            best, [g for held in groups.values() for g in held]
        )
        total = sum(expected.values())
        part = even = 1 / len(groups)
        if total > 0:
            part = (even + sum(expected[g] for g in groups[names[0]]) / total) / 2
        self.trials.clock.allot(part)
