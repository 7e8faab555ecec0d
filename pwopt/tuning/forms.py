"""The forms that a lowering pass offers for equal sites, timed in a window around one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pwopt.errors import PwoptError
from pwopt.remark import Fact, Remark, Verdict
from pwopt.runtime import Comparison
from pwopt.tuning.candidate import offered_forms
from pwopt.tuning.effort import longer
from pwopt.tuning.pipeline import Ruling
from pwopt.tuning.trials import Trials
from pwopt.tuning.verdicts import (
    ALMOST,
    MARGIN,
    PROMISING,
    admitted_sites,
    group_of,
    is_undecided,
    windowed,
)
from pwopt.tuning.window import Window
from pwopt.tuning.workbench import Build, Group, Precision

__all__ = ["Forms", "Gain"]

_LONG_MS = 50.0
"""Forms in windows that take longer are timed once, in few pairs."""
_CLOSE_BEHIND = 0.95
"""There, a form that has less than this part of the leader's speedup ends the list."""
_HOPELESS = 3.0
"""Forms that the analytic model expects to take so many times as long are not timed; a wide
margin, for it is a roofline and knows no kernel."""


@dataclass(frozen=True)
class Gain:
    """What a group of equal sites gains in a window, times the number of its sites, in ms."""

    group: Group
    ruling: Ruling
    saved_ms: float
    others: tuple[Ruling, ...] = ()
    """Forms that gain too, if less: for where the first one is too inaccurate or too large."""


@dataclass(frozen=True)
class Forms:
    """Finds the best form for each group of equal sites, one window after the other.

    Attributes:
        almost: passes of which some window nearly gained.
    """

    trials: Trials
    almost: set[str] = field(default_factory=set)

    def gains(self, best: Build, groups: list[Group]) -> tuple[list[Gain], list[Group]]:
        """What *groups* gain, and those of them that no window can be cut for or run."""
        trials = self.trials
        gains: list[Gain] = []
        uncut = []
        for group in groups:
            if not trials.clock.has_time():
                break
            sites = [r for r in admitted_sites(best, group[0]) if group_of(r) == group]
            window = trials.bench.cut(best, sites[0], offered_forms(sites[0]))
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
        return gains, uncut

    def _in_window(self, group: Group, sites: list[Remark], window: Window) -> Gain | None:
        """The best form for the equal *sites*, measured in a window around one of them.

        ``None`` if none gains, which rules the group out.

        Raises:
            PwoptError: no form of the window runs.
        """
        expected = self.trials.bench.estimate(window)
        offered = [v for v in offered_forms(sites[0]) if expected.get(v, 1.0) < _HOPELESS]
        if not offered:
            facts: dict[str, Fact] = {"expected": round(1 / min(expected.values()), 4)}
            self.trials.rule_group(group, Ruling(Verdict.REJECTED_ESTIMATE, facts=facts))
            return None
        tried = self._timed(window, offered, group[0])
        return self._judged(group, len(sites), tried)

    def _timed(self, window: Window, offered: list[str], name: str) -> list[tuple[Comparison, str]]:
        """The forms of *window* among those *offered*, until the rest is not worth the time.

        Raises:
            PwoptError: none of them runs.
        """
        tried: list[tuple[Comparison, str]] = []
        failure: PwoptError | None = None
        behind, patience = 0, len(offered) if self.trials.thorough else 2
        for variant in offered:
            if variant not in window.after or behind == patience:
                continue
            if tried and not self.trials.clock.has_time():
                break
            try:
                comparison = self._compare(window, variant, name)
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
        return tried

    def _is_long(self, comparison: Comparison) -> bool:
        """Whether its window takes so long that it was timed in few pairs."""
        return comparison.baseline.median_ms > _LONG_MS and not self.trials.thorough

    def _compare(self, window: Window, variant: str, name: str) -> Comparison:
        """What looks like a gain but may be chance is timed once more, unless it takes long."""
        precision = self.trials.timing.allowance.window
        comparison = self._compare_once(window, variant, name, precision)
        if self._is_long(comparison) or not is_undecided(comparison):
            return comparison
        return self._compare_once(window, variant, name, longer(precision))

    def _compare_once(
        self, window: Window, variant: str, name: str, precision: Precision
    ) -> Comparison:
        label = f"timing {name}, site by site"
        return self.trials.bench.compare_window(
            window, variant, precision, label, decide=1 + MARGIN, futile=PROMISING
        )

    def _judged(self, group: Group, sites: int, tried: list[tuple[Comparison, str]]) -> Gain | None:
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
        return Gain(group, first, saved * sites, gaining)
