"""Real data, how accurate the original is on them, and factors as far as that allows."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from pwopt.calibration import Data, HeldOut, Judge, Samples, feeds_digest, parse_metric
from pwopt.errors import ReplayError, UsageError
from pwopt.graph import Model, Written, load
from pwopt.line.options import Options
from pwopt.line.stages import Stages
from pwopt.result import AccuracyFigures, FactorizationFigures, Script
from pwopt.runtime import Feeds, UntestableError, input_sets
from pwopt.target import Target
from pwopt.tuning.budget import Budget, Place, factorize, refactorize
from pwopt.tuning.cache import Cache
from pwopt.tuning.confirmation import Found
from pwopt.tuning.effort import Effort
from pwopt.tuning.workbench import Progress, Workbench, counting

__all__ = ["Judging"]


class Judging:
    """The stages of one run that look at data.

    Attributes:
        data: the real data that were given, if any.
        parts: what to calibrate with, to choose by and to judge on, where accuracy is asked for.
        judge: the original's accuracy, if it is asked for.
        accuracy: what is to be reported.
        factorised: the model with factors in the place of kernels, if there is one.
        factorization: how it was come by.
    """

    def __init__(
        self,
        original: Written,
        target: Target,
        options: Options,
        cache: Cache | None,
        stages: Stages,
        notes: list[str],
        progress: Progress,
    ) -> None:
        self.original = original
        self.target = target
        self.options = options
        self.cache = cache
        self.stages = stages
        self.notes = notes
        self.progress = progress
        self.parts: HeldOut | None = None
        self.judge: Judge | None = None
        self.accuracy: AccuracyFigures | None = None
        self.factorised: Written | None = None
        self.factorization: FactorizationFigures | None = None
        self.data = self._read()

    @cached_property
    def feeds(self) -> list[Feeds]:
        """What to verify and time with; read or drawn once."""
        rng = np.random.default_rng(self.options.seed)
        if self.data is None:
            return input_sets(self.original.path, None, self.target, rng)
        return self.data.input_sets(rng)

    def _read(self) -> Data | None:
        """The real data that were given; their errors come before anything takes long."""
        options = self.options
        if options.calibration is None and options.validation is None:
            if options.judges:
                raise UsageError("There is nothing to judge accuracy on; give --validation.")
            return None
        try:
            data = Data(
                self.original.path,
                self.target,
                calibration=options.calibration,
                validation=options.validation,
                preprocess=options.preprocess,
            )
        except UntestableError:
            if options.judges:
                raise
            return None  # the oracle meets the same, and says so
        script = options.replay
        if script is not None and script.factorization is not None:
            earlier = script.factorization
            self.parts = data.held_out(earlier.seed, chooses=earlier.selected_on > 0)
        elif options.judges:
            self.parts = data.held_out(options.seed, chooses=options.chooses)
        return data

    def judge_original(self) -> None:
        """How accurate the original is, if that is asked for."""
        if self.parts is None or not self.options.judges:
            return
        with self.stages.stage("accuracy"):
            if self.parts.drawn:
                self.notes.append(
                    f"{len(self.parts.validation)} of the samples of --calibration were held out to"
                    " judge accuracy on."
                )
            if self.parts.selection is not None:
                self.notes.append(
                    f"{len(self.parts.selection)} of the samples to judge on are there to choose"
                    f" among factorised models; accuracy is that on the other"
                    f" {len(self.parts.validation)}."
                )
            self.judge = self._judge_on(self.parts.validation)

    def _judge_on(self, samples: Samples) -> Judge:
        assert self.parts is not None
        metric = self.options.metric
        judge = Judge.of(
            self.original.path,
            samples,
            self.target,
            metric=parse_metric(metric) if isinstance(metric, str) else metric,
            seed=self.options.seed,
            progress=counting(self.progress, "judging the original"),
        )
        if self.options.max_accuracy_drop is not None:
            parts = 1 if self.parts.selection is None else 2
            judge.assert_resolves(self.options.max_accuracy_drop, parts)
        return judge

    def factorise(self, model: Model, scratch: Path) -> Model:
        """*model* with factors in the place of kernels, if there is a budget for that."""
        options = self.options
        script = options.replay
        calibration = None if self.parts is None else self.parts.calibration
        place = Place(
            self.target,
            scratch,
            options.seed,
            clock=options.effort is not Effort.NONE,
            progress=self.progress,
            cache=self.cache,
        )
        if script is not None:
            self.factorization = script.factorization
            number = self._number(script)
            if script.factorization is None or number is None:
                return model
            if calibration is None:
                raise UsageError(
                    "The report's model was factorised; give the same --calibration (and"
                    " --validation, --preprocess) again."
                )
            made = refactorize(model, calibration, script.factorization, number, place)
        elif options.approximates and self.judge is not None:
            if calibration is None:
                if options.target_speedup is not None:
                    raise UsageError("--target-speedup needs data to fit to; give --calibration.")
                self.notes.append("Nothing was approximated: that needs --calibration.")
                return model
            if options.keep_overridable_initializers and model.listed:
                self.notes.append("Nothing was approximated: initializers may be overridden.")
                return model
            budget = Budget(options.max_accuracy_drop, options.target_speedup)
            budget.allows(self.judge.unchanged())  # complains about metrics without a baseline
            place = replace(place, feeds=self.feeds)
            found = self._factorised_within(model, self.judge, calibration, budget, place)
            if found is None:
                assert self.factorization is not None
                self.notes.append(f"Nothing was approximated: {self.factorization.failure}.")
                return model
            made = found
        else:
            return model
        self.factorised = made
        return load(made.path)

    def _factorised_within(
        self, model: Model, judge: Judge, calibration: Samples, budget: Budget, place: Place
    ) -> Written | None:
        """The best model within *budget*: that of an earlier run made again, else a new one."""
        selection = None if self.parts is None else self.parts.selection
        key = (
            "factorization",
            version("pwopt"),
            self.target.fingerprint,
            self.original.sha256,
            calibration.digest,
            judge.samples.digest,
            None if selection is None else selection.digest,
            repr(judge.metric),
            repr(budget),
            (place.seed, place.clock, repr(place.fitting)),
        )
        known = None if self.cache is None else self.cache.get(*key)
        if known is not None:
            figures = FactorizationFigures.from_json(known)
            try:
                found = (
                    None
                    if figures.chosen is None
                    else refactorize(model, calibration, figures, figures.chosen, place)
                )
            except ReplayError as error:
                self.notes.append(f"An earlier factorisation is not taken over: {error}.")
            else:
                self.factorization = figures
                return found
        first = judge if selection is None else self._judge_on(selection)
        found, self.factorization = factorize(
            model,
            self.original,
            first,
            calibration,
            budget,
            place,
            None if selection is None else judge,
        )
        if self.cache is not None:
            self.cache.put(asdict(self.factorization), *key)
        return found

    def _number(self, script: Script) -> int | None:
        """Which factorised model of a report to make; ``None``: none."""
        if self.options.front_point is not None:
            if script.factorization is None:
                raise UsageError("--front-point: the report has no factorised models.")
            return self.options.front_point
        if script.factorization is None or script.keeps_original:
            return None
        return script.factorization.chosen

    def within_budget(self, bench: Workbench, found: Found) -> Found:
        """What was found, or the original if that loses more accuracy than is allowed."""
        judge = self.judge
        if judge is None:
            return found
        self.accuracy = judge.unchanged()
        if found.build is None:
            return found
        build = bench.build(found.build.rulings)
        figures = judge.figures(build.written.path, counting(self.progress, "judging"))
        most = self.options.max_accuracy_drop
        if most is None or not figures.exceeds(most):
            self.accuracy = figures
            return found
        self.notes.append(
            f"What was found loses {figures.drop:.3g} of {figures.metric}, more than the {most:g}"
            " allowed; the original is kept."
        )
        return Found(None, found.rulings, None, "more accuracy would be lost than is allowed")

    def key(self) -> tuple[object, ...]:
        """All of the data and of the factors that the end of a search depends on."""
        is_given = self.data is not None and self.options.calibration is not None
        given = feeds_digest(self.feeds) if is_given else None
        parts = self.parts and (
            self.parts.calibration and self.parts.calibration.digest,
            self.parts.validation.digest,
        )
        return (None if self.factorised is None else self.factorised.sha256, given, parts)
