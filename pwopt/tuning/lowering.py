"""The lowering passes, one after the other: which forms go into the best model so far."""

from __future__ import annotations

from functools import partial

from pwopt.remark import Fact, Kind
from pwopt.tuning.forms import Forms
from pwopt.tuning.pipeline import Ruling
from pwopt.tuning.trials import Trials
from pwopt.tuning.verdicts import ALMOST, groups_of, is_close, is_gain, open_groups
from pwopt.tuning.whole_model import everywhere, take, together
from pwopt.tuning.workbench import Build

__all__ = ["Lowering"]

_WITH_ROOM: dict[str, Fact] = {"measured": "with what it makes room for"}


class Lowering:
    """The part of a search that is about lowering passes; remembers what nearly gained."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self._forms = Forms(trials)

    def sweep(self, best: Build) -> Build:
        """Each lowering pass on what is held yet, sharing the time."""
        names = [p.name for p in self.trials.bench.lower]
        for position, name in enumerate(names):
            self._share_time(best, names[position:])
            best = self._lower(best, name)
        self.trials.clock.allot_all()
        return best

    def from_neutral(self, best: Build) -> Build:
        """Once more from the simplifications that were dropped because they alone gain nothing.

        Some make sites for lowering passes that the simpler start does not have.
        """
        trials = self.trials
        passes = trials.rulings.by_pass
        names = [p.name for p in trials.bench.simplify if is_close(passes.get(p.name), ALMOST)]
        if not names or not trials.clock.has_time():
            return best
        return trials.attempt(partial(self._from, names, best)) or best

    def _from(self, names: list[str], best: Build) -> Build | None:
        """With the simplifications *names*, lowered where they make room; ``None``: no gain."""
        trials = self.trials
        for name in names:
            trials.rule_pass(name, Ruling(facts=_WITH_ROOM))
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
        gains, uncut = self._forms.gains(best, groups)
        if uncut:
            best = everywhere(self.trials, best, name, uncut)
            if name in best.applied:
                return best
        return self._beside(take(self.trials, best, gains), name)

    def _beside(self, best: Build, name: str) -> Build:
        """What nearly gained by itself, beside what did."""
        trials = self.trials
        if name not in best.applied:
            return together(trials, best, name) if name in self._forms.almost else best
        close = trials.close(best, name, ALMOST)
        if not close or not trials.clock.has_time():
            return best
        return trials.changed(best, close) or best

    def _share_time(self, best: Build, names: list[str]) -> None:
        """Give the first of *names* its part of the time that is left.

        Half of the time is shared evenly among the passes that have something to try, half by
        what they expect their sites to take: where one holds nearly all of a slow model, it needs
        more than the others.
        """
        groups = {n: held for n in names if (held := open_groups(best, n))}
        if names[0] not in groups:
            return
        everything = [g for held in groups.values() for g in held]
        expected = self.trials.bench.expected_seconds(best, everything)
        total = sum(expected.values())
        part = even = 1 / len(groups)
        if total > 0:
            part = (even + sum(expected[g] for g in groups[names[0]]) / total) / 2
        self.trials.clock.allot(part)
