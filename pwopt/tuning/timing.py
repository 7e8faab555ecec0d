"""Whole models timed in pairs, as carefully as what they show asks for."""

from __future__ import annotations

from dataclasses import dataclass

from pwopt.errors import PwoptError
from pwopt.graph import Written
from pwopt.runtime import Comparison
from pwopt.tuning.clock import Clock
from pwopt.tuning.effort import Allowance, least_seconds, longer
from pwopt.tuning.verdicts import CERTAIN, MARGIN, Walkover, is_gain, is_loss, is_undecided
from pwopt.tuning.workbench import Build, Precision, Workbench

__all__ = ["Timing"]

_BEYOND_PLACEMENT = 1.03
"""Smaller gains are looked at again with sessions opened anew, for it may be where they lie."""
_REOPENINGS = 2
"""How often: chance places two equal models favourably once in four, three times once in 64."""


@dataclass(frozen=True)
class Timing:
    """Compares builds with each other and with the original; a crash is a loss, no failure."""

    bench: Workbench
    allowance: Allowance
    clock: Clock

    def compare(self, baseline: Build, candidate: Build, label: str) -> Comparison:
        """Two builds; what looks like a gain but may be chance is timed once more, for longer."""
        trial = self.allowance.trial
        comparison = self._compare_once(baseline, candidate, trial, label)
        patient = longer(trial)
        is_affordable = self.clock.affords(least_seconds(patient, comparison))
        if is_affordable and is_undecided(comparison):
            comparison = self._compare_once(baseline, candidate, patient, label)
        for reopened in range(1, 1 + _REOPENINGS):
            if not is_gain(comparison) or comparison.speedup >= _BEYOND_PLACEMENT:
                break
            comparison = comparison.joined(
                self._compare_once(baseline, candidate, trial, label, reopened=reopened)
            )
        return comparison

    def _compare_once(
        self,
        baseline: Build,
        candidate: Build,
        precision: Precision,
        label: str,
        *,
        reopened: int = 0,
    ) -> Comparison:
        try:
            return self.bench.compare(
                baseline.written,
                candidate.written,
                precision,
                f"timing {label}",
                decide=1 + MARGIN,
                reopened=reopened,
            )
        except PwoptError as error:
            return self._forfeited(baseline.written, candidate.written, error)

    def is_slow(self, build: Build) -> bool:
        """Whether *build* is slower than the original, in one trial."""
        original = self.bench.original
        label = "timing what does not add up"
        try:
            comparison = self.bench.compare(original, build.written, self.allowance.trial, label)
        except PwoptError as error:
            comparison = self._forfeited(original, build.written, error)
        return is_loss(comparison)

    def against_original(self, build: Build) -> Comparison:
        """Timed once more if it looks slower: a disturbed machine must not cost a good model."""
        comparison = self._confirm_once(build)
        return self._confirm_once(build) if is_loss(comparison) else comparison

    def _confirm_once(self, build: Build) -> Comparison:
        try:
            comparison = self._opened(build, 0).joined(self._opened(build, 1))
            if comparison.ci95[0] > 1 and comparison.speedup < _BEYOND_PLACEMENT:
                comparison = comparison.joined(self._opened(build, 2))
        except PwoptError as error:
            return self._forfeited(self.bench.original, build.written, error)
        return comparison

    def _opened(self, build: Build, times: int) -> Comparison:
        """The original against *build*, after both were opened anew so many *times*."""
        return self.bench.compare(
            self.bench.original,
            build.written,
            self.allowance.confirm,
            "timing for confirmation",
            anew=True,
            reopened=times,
        )

    def _forfeited(self, baseline: Written, candidate: Written, error: PwoptError) -> Comparison:
        """A comparison that failed: lost by the side that does not run, else by the candidate.

        Both may run, but not beside each other for want of memory.
        """
        why = self.bench.failure(candidate)
        if why is None and self.bench.failure(baseline) is not None:
            return Walkover.of(CERTAIN, "the model without it does not run")
        return Walkover.of(1 / CERTAIN, why or str(error))
