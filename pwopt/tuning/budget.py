"""The factorised model that keeps within an accuracy budget: fitted, judged, timed, chosen."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from pwopt.calibration import Judge, Samples
from pwopt.cost import model_cost
from pwopt.errors import BudgetError, ReplayError
from pwopt.graph import Model, ModelProto, Written, load, parse
from pwopt.passes import FactorizeConv, LowerConvWinograd
from pwopt.passes.factorize_conv import Form
from pwopt.result import AccuracyFigures, FactorizationFigures, FactorizedPoint
from pwopt.runtime import Comparison, Feeds
from pwopt.target import Target
from pwopt.tuning.allocation import Step, front, survey
from pwopt.tuning.cache import Cache
from pwopt.tuning.driver import Driver
from pwopt.tuning.factorize import Fitting, base_model, fitted, written
from pwopt.tuning.workbench import Oracle, Precision, Progress, Workbench, counting, silent

__all__ = [
    "Budget",
    "Judged",
    "Outcome",
    "Place",
    "confirmed",
    "factorize",
    "refactorize",
    "spend",
]

_TIMING: Final = Precision(9, 201, 2.0)
_MORE_POINTS: Final = 3
"""Models to fit beyond those of the budget, if the one that was chosen breaks it in the end."""
_LEAST_CUT: Final = 0.95
_MOST_CUT: Final = 0.5
"""What such a model is predicted to lose, of what the one before was."""
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
class Place:
    """Where and how models are made.

    Attributes:
        target: where they are to run.
        scratch: folder for files.
        seed: of the positions that are looked at.
        clock: whether time is measured; otherwise multiplications are counted.
        fitting: what is taken into account.
        feeds: to time with.
        progress: told what is going on.
        cache: of measurements.
    """

    target: Target
    scratch: Path
    seed: int
    clock: bool = True
    fitting: Fitting = Fitting()  # noqa: RUF009 - frozen
    feeds: Sequence[Feeds] = ()
    progress: Progress = silent
    cache: Cache | None = None


@dataclass(frozen=True, eq=False)
class Judged:
    """A point of the front, made.

    Attributes:
        step: its plan and what was predicted.
        written: the model.
        accuracy: on the samples that points are chosen on.
        comparison: the original against it; ``None`` without a clock.
        macs, whole_macs: multiplications of the model and of the original; ``None``: unknown.
        final: accuracy on samples that had no part in the choice; ``None``: not looked at.
    """

    step: Step
    written: Written
    accuracy: AccuracyFigures
    comparison: Comparison | None
    macs: int | None
    whole_macs: int | None
    final: AccuracyFigures | None = None

    @property
    def speedup(self) -> float:
        """As measured; without a clock that of the multiplications."""
        if self.comparison is not None:
            return self.comparison.speedup
        return (self.whole_macs or 1) / max(self.macs or 1, 1)

    @property
    def is_faster(self) -> bool:
        """Whether the worse end of the interval says so."""
        return (self.speedup if self.comparison is None else self.comparison.ci95[0]) > 1


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
    place: Place,
    final: Judge | None = None,
) -> Outcome:
    """Find the fastest factorised model within *budget*.

    The front is bisected: where a model keeps within the budget a faster one is tried, otherwise a
    slower one. The one chosen must keep it on the samples of *final*, too, which had no part in
    that.
    """
    layers = survey(base, bench, samples, place.scratch, place.seed, clock=place.clock)
    whole_macs = model_cost(parse(base), place.target.input_shapes).macs
    total = _macs_of_a_sample(base, samples)
    if place.clock:
        label = "timing the original"
        whole = bench.compare(bench.original, bench.original, _TIMING, label)
        total = whole.baseline.median_ms
    steps = [s for s in front(layers) if total / max(total - s.saved, 1e-9) >= _LEAST_SPEEDUP]
    search = _Search(base, bench, judge, samples, budget, place, whole_macs, total)
    found = search.run(steps)
    if final is None:
        return found
    return confirmed(found, budget, final, bench.progress, partial(search.slower, steps))


def _macs_of_a_sample(base: ModelProto, samples: Samples) -> float:
    """Multiplications of the size that the survey counts: calibration data may be smaller."""
    feeds = next(samples.take([0]).batches(1))
    shapes = {name: np.asarray(value).shape for name, value in feeds.items()}
    return float(model_cost(parse(base), shapes).macs or 1) / (samples.fixed_batch or 1)


def confirmed(
    outcome: Outcome,
    budget: Budget,
    final: Judge,
    progress: Progress,
    slower: Callable[[Judged], Judged | None],
) -> Outcome:
    """*outcome* with a best one that keeps *budget* on the samples of *final*.

    What was chosen is judged first. If it breaks the budget there, the next slower one that kept it
    before follows, and after these what *slower* makes. Where a speedup is asked for there is none:
    it would be too slow.
    """
    points, best = list(outcome.points), outcome.best
    while best is not None:
        figures = final.figures(best.written.path, counting(progress, "judging finally"))
        looked_at = replace(best, final=figures)
        points[points.index(best)] = looked_at
        if budget.allows(figures):
            return Outcome(tuple(points), looked_at)
        if budget.target_speedup is not None:
            break
        left = [p for p in points[: points.index(looked_at)] if _is_fine(p, budget)]
        best = next((p for p in reversed(left) if p.final is None), None)
        if best is None:
            best = slower(looked_at)
            if best is not None:
                insort(points, best, key=lambda p: p.speedup)
    return Outcome(tuple(points), None)


def _is_fine(point: Judged, budget: Budget) -> bool:
    return budget.allows(point.accuracy) and point.is_faster


@dataclass(eq=False)
class _Search:
    base: ModelProto
    bench: Workbench
    judge: Judge
    samples: Samples
    budget: Budget
    place: Place
    whole_macs: int | None
    total: float
    made: dict[int, Judged] = field(default_factory=dict)

    def run(self, steps: Sequence[Step]) -> Outcome:
        low, high = -1, len(steps)
        if self.budget.target_speedup is not None and steps:
            expected = self._expected(steps, self.budget.target_speedup)
            if self._goes_on(self._judged(steps, expected)):
                low = expected
            else:
                high = expected
                # What is counted comes as it was predicted: no slower step is fast enough.
                low = low if self.place.clock else expected - 1
        while high - low > 1 and len(self.made) < self.budget.points:
            middle = self._between(steps, low, high)
            point = self._judged(steps, middle)
            if self._goes_on(point):
                low = middle
            else:
                high = middle
        points = sorted(self.made.values(), key=lambda p: p.speedup)
        return Outcome(tuple(points), self._best(points))

    def slower(self, steps: Sequence[Step], than: Judged) -> Judged | None:
        """A model that saves less than another one and keeps the budget, if there is one.

        What is predicted to be lost is scaled by what the budget allows of what was found.
        """
        while len(self.made) < self.budget.points + _MORE_POINTS:
            loss = than.step.loss * self._allowed(than)
            left = [k for k, s in enumerate(steps) if k not in self.made and s.loss <= loss]
            if not left:
                break
            than = self._judged(steps, left[-1])
            if _is_fine(than, self.budget):
                return than
        return None

    def _allowed(self, point: Judged) -> float:
        """What the budget allows, relative to what a model loses that will not do."""
        lost = (point.final or point.accuracy).drop
        if lost is None or self.budget.max_drop is None or lost <= 0:
            return _LEAST_CUT
        return float(np.clip(self.budget.max_drop / lost, _MOST_CUT, _LEAST_CUT))

    def _expected(self, steps: Sequence[Step], speedup: float) -> int:
        """The first step that is predicted to be so fast, or the last one."""
        enough = self.total * (1 - 1 / speedup)
        return next((k for k, s in enumerate(steps) if s.saved >= enough), len(steps) - 1)

    def _between(self, steps: Sequence[Step], low: int, high: int) -> int:
        """The step that saves about half as much as lies between two of them."""
        least = steps[low].saved if low >= 0 else 0.0
        most = steps[min(high, len(steps) - 1)].saved
        inner = range(low + 1, high)
        return min(inner, key=lambda k: abs(steps[k].saved - (least + most) / 2))

    def _goes_on(self, point: Judged) -> bool:
        """Whether a faster model is to be tried next."""
        if self.budget.target_speedup is not None:
            is_enough = point.speedup >= self.budget.target_speedup
            return not is_enough and self.budget.allows(point.accuracy)
        return self.budget.allows(point.accuracy)

    def _best(self, points: Sequence[Judged]) -> Judged | None:
        """The fastest within the budget, or the first that is fast enough."""
        fine = [p for p in points if _is_fine(p, self.budget)]
        target = self.budget.target_speedup
        if target is not None:
            fast = [p for p in fine if p.speedup >= target]
            return fast[0] if fast else None
        return fine[-1] if fine else None

    def _judged(self, steps: Sequence[Step], index: int) -> Judged:
        known = self.made.get(index)
        if known is not None:
            return known
        step, bench = steps[index], self.bench
        label = f"fitting model {len(self.made) + 1}"
        made = _made(self.base, step.plan, self.samples, self.place, f"point-{index}", label)
        accuracy = self.judge.figures(made.path, counting(bench.progress, "judging"))
        comparison = None
        if self.place.clock:
            comparison = bench.compare(bench.original, made, _TIMING, "timing")
        macs = model_cost(load(made.path), bench.target.input_shapes).macs
        self.made[index] = Judged(step, made, accuracy, comparison, macs, self.whole_macs)
        return self.made[index]


def factorize(
    model: Model,
    original: Written,
    judge: Judge,
    samples: Samples,
    budget: Budget,
    place: Place,
    final: Judge | None = None,
) -> tuple[Written | None, FactorizationFigures]:
    """Factorise *model* within *budget*.

    Args:
        model: as it was loaded and prepared; it stays as it is.
        original: the file to be faster than.
        judge: knows what the original does on data held out.
        samples: calibration data.
        budget: what may be lost.
        place: where and how.
        final: the same for further data, where the choice depends on what *judge* says.

    Returns:
        The model to go on with, ``None`` if none within the budget is faster; and all that was
        looked at.

    Raises:
        BudgetError: the speedup that was asked for is not to be had within the budget.
    """
    base = base_model(model.to_proto())
    oracle: Future[Oracle] = Future()
    oracle.set_result(Oracle(place.feeds, None))
    driver = Driver(parse(base))
    driver.rewriter.infer_shapes()
    folder = place.scratch / "factorising"  # the next workbench counts its files from one, too
    folder.mkdir()
    bench = Workbench(
        driver,
        original,
        folder,
        oracle,
        place.target,
        simplify=(),
        lower=(FactorizeConv(), LowerConvWinograd()),
        review=None,
        prepared=False,
        seed=place.seed,
        max_bytes=float("inf"),
        progress=place.progress,
        cache=place.cache,
    )
    try:
        outcome = spend(base, bench, judge, samples, budget, place, final)
    finally:
        bench.close()
    if outcome.best is None and budget.target_speedup is not None:
        raise BudgetError(_says(outcome, budget))
    best = outcome.best
    figures = FactorizationFigures(
        samples.digest,
        len(samples),
        place.seed,
        None if best is None else outcome.points.index(best) + 1,
        tuple(_point(p) for p in outcome.points),
        None if best is not None else _says(outcome, budget),
        0 if final is None else len(judge.samples),
    )
    return (None if best is None else best.written), figures


def refactorize(
    model: Model,
    samples: Samples,
    figures: FactorizationFigures,
    number: int,
    place: Place,
) -> Written:
    """Make a point of an earlier run once more.

    Raises:
        ReplayError: the calibration data are others, or what comes out is another file.
    """
    if samples.digest != figures.calibration_sha256:
        raise ReplayError(
            "the calibration data, or how they are preprocessed, are not those that the report was"
            " made with"
        )
    if not 1 <= number <= len(figures.points):
        raise ReplayError(f"the report has {len(figures.points)} factorised models, not {number}")
    point = figures.points[number - 1]
    plan = {site: Form.parse(name) for site, name in point.plan.items()}
    base = base_model(model.to_proto())
    place = replace(place, seed=figures.seed)
    made = _made(base, plan, samples, place, "factorised", "fitting the factors")
    if made.sha256 != point.sha256:
        raise ReplayError(
            "the factors come out otherwise than in the report (another machine, or other versions"
            " or threads?): the model would be another one"
        )
    return made


def _made(
    base: ModelProto,
    plan: Mapping[str, Form],
    samples: Samples,
    place: Place,
    name: str,
    label: str,
) -> Written:
    """*base* with the forms of *plan* fitted to *samples*, in a folder *name* of its own."""
    factors = fitted(
        base,
        plan,
        samples,
        place.target,
        place.scratch,
        place.seed,
        place.fitting,
        counting(place.progress, label),
    )
    folder = place.scratch / name
    folder.mkdir()
    return written(base, factors, folder / "model.onnx")


def _point(judged: Judged) -> FactorizedPoint:
    comparison = judged.comparison
    return FactorizedPoint(
        {site: form.name for site, form in judged.step.plan.items()},
        judged.step.loss,
        judged.accuracy,
        None if comparison is None else comparison.speedup,
        None if comparison is None else comparison.ci95,
        judged.macs,
        judged.written.size_bytes,
        judged.written.sha256,
        judged.final,
    )


def _says(outcome: Outcome, budget: Budget) -> str:
    """That nothing keeps the budget, and what came closest."""
    limits = []
    if budget.target_speedup is not None:
        limits.append(f"{budget.target_speedup:g}x as fast")
    if budget.max_drop is not None:
        limits.append(f"losing at most {budget.max_drop:g}")
    says = f"no factorised model is {' and '.join(limits)}"
    if budget.target_speedup is None:
        says = f"no factorised model that loses at most {budget.max_drop:g} is faster"
    if not outcome.points:
        return f"{says}; no layer has a form that is faster"
    fine = [p for p in outcome.points if budget.allows(p.accuracy)]
    last = [p for p in outcome.points if p.final is not None]
    best = last[0] if last else fine[-1] if fine else outcome.points[0]
    figures = best.final or best.accuracy
    lost = "" if figures.drop is None else f", losing {figures.drop:.3g} {figures.unit}"
    where = " on the samples that had no part in the choice" if last else ""
    return (
        f"{says}; the closest is {best.speedup:.3g}x as fast with {figures.metric}"
        f" {figures.optimized:.4g}{lost}{where}"
    )
