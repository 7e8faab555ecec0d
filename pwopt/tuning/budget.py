"""The factorised model that keeps within an accuracy budget: fitted, judged, timed, chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pwopt.calibration import Judge, Samples
from pwopt.graph import ModelProto, Written
from pwopt.result import AccuracyFigures
from pwopt.runtime import Comparison
from pwopt.tuning.allocation import Step, front, survey
from pwopt.tuning.factorize import Fitting, fitted, written
from pwopt.tuning.workbench import Precision, Workbench, counting

__all__ = ["Budget", "Judged", "Outcome", "spend"]

_TIMING: Final = Precision(9, 201, 2.0)
_LEAST_SPEEDUP: Final = 1.02
"""Predicted gains below this are not looked at."""


@dataclass(frozen=True)
class Budget:
    """What may be lost, and what is wanted for it.

    Attributes:
        max_drop: in the metric's unit; ``None``: whatever the speedup costs.
        target_speedup: stop at this; ``None``: as fast as the budget allows.
        points: how many models may be fitted and judged.
    """

    max_drop: float | None
    target_speedup: float | None
    points: int = 7

    def allows(self, accuracy: AccuracyFigures) -> bool:
        """Whether no more is lost than may be."""
        return self.max_drop is None or not accuracy.exceeds(self.max_drop)


@dataclass(frozen=True, eq=False)
class Judged:
    """A point of the front, made.

    Attributes:
        step: its plan and what was predicted.
        written: the model.
        accuracy: on data held out.
        comparison: the original against it.
    """

    step: Step
    written: Written
    accuracy: AccuracyFigures
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class Outcome:
    """All points that were made, and the one to take; ``None`` if none keeps the budget."""

    points: tuple[Judged, ...]
    best: Judged | None


def spend(
    base: ModelProto,
    bench: Workbench,
    judge: Judge,
    samples: Samples,
    budget: Budget,
    scratch: Path,
    seed: int,
    fitting: Fitting = Fitting(),  # noqa: B008 - frozen
) -> Outcome:
    """Find the fastest factorised model within *budget*.

    The front is bisected: where a model keeps within the budget a faster one is tried, otherwise a
    slower one.
    """
    layers = survey(base, bench, samples, scratch, seed)
    steps = front(layers)
    whole = bench.compare(bench.original, bench.original, _TIMING, "timing the original")
    total = whole.baseline.median_ms
    steps = [s for s in steps if total / max(total - s.saved_ms, 1e-9) >= _LEAST_SPEEDUP]
    search = _Search(base, bench, judge, samples, budget, scratch, seed, fitting)
    return search.run(steps)


@dataclass(eq=False)
class _Search:
    base: ModelProto
    bench: Workbench
    judge: Judge
    samples: Samples
    budget: Budget
    scratch: Path
    seed: int
    fitting: Fitting
    made: dict[int, Judged] = field(default_factory=dict)

    def run(self, steps: Sequence[Step]) -> Outcome:
        low, high = -1, len(steps)
        while high - low > 1 and len(self.made) < self.budget.points:
            middle = self._between(steps, low, high)
            point = self._judged(steps, middle)
            if self._goes_on(point):
                low = middle
            else:
                high = middle
        points = sorted(self.made.values(), key=lambda p: p.comparison.speedup)
        return Outcome(tuple(points), self._best(points))

    def _between(self, steps: Sequence[Step], low: int, high: int) -> int:
        """The step that saves about half as much as lies between two of them."""
        least = steps[low].saved_ms if low >= 0 else 0.0
        most = steps[min(high, len(steps) - 1)].saved_ms
        inner = range(low + 1, high)
        return min(inner, key=lambda k: abs(steps[k].saved_ms - (least + most) / 2))

    def _goes_on(self, point: Judged) -> bool:
        """Whether a faster model is to be tried next."""
        if self.budget.target_speedup is not None:
            is_enough = point.comparison.speedup >= self.budget.target_speedup
            return not is_enough and self.budget.allows(point.accuracy)
        return self.budget.allows(point.accuracy)

    def _best(self, points: Sequence[Judged]) -> Judged | None:
        """The fastest within the budget, or the first that is fast enough."""
        fine = [p for p in points if self.budget.allows(p.accuracy) and p.comparison.ci95[0] > 1.0]
        target = self.budget.target_speedup
        if target is not None:
            fast = [p for p in fine if p.comparison.speedup >= target]
            return fast[0] if fast else None
        return fine[-1] if fine else None

    def _judged(self, steps: Sequence[Step], index: int) -> Judged:
        known = self.made.get(index)
        if known is not None:
            return known
        step, bench = steps[index], self.bench
        factors = fitted(
            self.base,
            step.plan,
            self.samples,
            bench.target,
            self.scratch,
            self.seed,
            self.fitting,
            counting(bench.progress, f"fitting model {len(self.made) + 1}"),
        )
        folder = self.scratch / f"point-{index}"
        folder.mkdir()
        made = written(self.base, factors, folder / "model.onnx")
        accuracy = self.judge.figures(made.path, counting(bench.progress, "judging"))
        comparison = bench.compare(bench.original, made, _TIMING, "timing")
        self.made[index] = Judged(step, made, accuracy, comparison)
        return self.made[index]
