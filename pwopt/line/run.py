"""The straight line from a model file to a verified, measured, faster one, and its report."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from pwopt import passes as catalogue
from pwopt.calibration import Given, Preprocess
from pwopt.cost import Machine, model_cost
from pwopt.errors import (
    InvalidModelError,
    OutputError,
    ReplayError,
    VerificationError,
)
from pwopt.graph import (
    Model,
    Written,
    concrete_dims,
    file_sha256,
    find_nan,
    has_external_data,
    has_float16,
    load,
    raise_opset,
    save_copy,
    size_on_disk,
)
from pwopt.line.figures import (
    Final,
    annotated,
    disturbance,
    error_figures,
    latency_figures,
    option_figures,
    overruled,
    placement_figures,
)
from pwopt.line.judging import Judging
from pwopt.line.options import Check, Options
from pwopt.line.stages import Stages
from pwopt.remark import Tally, Verdict
from pwopt.result import (
    CoarseFigures,
    CostChange,
    HalfFigures,
    ModelFile,
    OptionsFigures,
    Recipe,
    Report,
    Script,
    Totals,
)
from pwopt.runtime import (
    Reference,
    UntestableError,
    Verification,
    make_inputs,
    open_session,
    resolve,
    rounding_floor,
)
from pwopt.runtime.providers import find_provider
from pwopt.runtime.strain import Strain, read_ticks
from pwopt.target import Target
from pwopt.tuning.cache import Cache
from pwopt.tuning.candidate import AnyPass
from pwopt.tuning.confirmation import Found, confirm
from pwopt.tuning.driver import Driver
from pwopt.tuning.effort import Effort
from pwopt.tuning.gate import analytic_review
from pwopt.tuning.half import convert_to_half, half_with
from pwopt.tuning.options import seconds_for_options, try_options
from pwopt.tuning.pipeline import Review, Ruling, Rulings
from pwopt.tuning.replay import Culprit, find_culprit, replay, rulings_of
from pwopt.tuning.search import search
from pwopt.tuning.settling import settle
from pwopt.tuning.workbench import (
    Build,
    InterruptedSearch,
    Oracle,
    Precision,
    Progress,
    Workbench,
    silent,
)

__all__ = ["bisect", "default_passes", "optimize"]

_CAREFUL = Precision(15, 301, 10.0)
_APART = Precision(11, 301, 5.0)
_MOST_NAMED = 8


def optimize(
    model: str | Path,
    output: str | Path | None = None,
    target: Target = Target(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
    progress: Progress = silent,
) -> Report:
    """Optimize a model file for a target, write the result and say what was done.

    Args:
        model: path of the ONNX model.
        output: where to write; default ``<stem>.opt.onnx`` beside the model.
        target: provider, threads and the shapes that fix dynamic dimensions for measuring.
        options: what to try and how long.
        progress: told what is going on.

    Returns:
        The report; ``report.output.path`` is ``None`` for a dry run.

    Raises:
        PwoptError: the model is invalid, the target unavailable, the output not writable, or
            dimensions that measuring needs are unknown. Nothing is written then.
    """
    source = Path(model)
    destination = Path(output) if output is not None else source.with_suffix(".opt.onnx")
    _assert_writable(source, destination, options)
    if options.replay is not None:
        options, target = _as_recorded(options, target, options.replay)
    return _Line(source, destination, resolve(target), options, progress).run()


def default_passes(target: Target) -> tuple[AnyPass, ...]:
    """The passes that run for *target* unless others are asked for, as its provider wants them."""
    own = {p.name: p for p in map(catalogue.parse_spec, find_provider(target.provider).passes)}
    return tuple(own.get(p.name, p) for p in catalogue.ALL if p.by_default or p.name in own)


def bisect(
    model: str | Path,
    script: Script,
    check: Check,
    target: Target = Target(),  # noqa: B008 - frozen
    progress: Progress = silent,
    *,
    calibration: Given | None = None,
    validation: Given | None = None,
    preprocess: Preprocess | None = None,
) -> Culprit | None:
    """Find the rewrite of a report that breaks a verification or costs latency.

    In a factorised model it is one of the exact rewrites that is looked for, beside the factors.

    Args:
        model: path of the ONNX model that the report was made from.
        script: the decisions of the report.
        check: what goes wrong.
        target: where to verify or time.
        progress: told what is going on.
        calibration: as the report was made with, if its model was factorised: the factors are
            fitted once more.
        validation: the same; without it, a half of *calibration* would be held out.
        preprocess: how images were read.

    Returns:
        The first rewrite with which the check fails; ``None`` if it does not fail with all.

    Raises:
        PwoptError: the model is invalid, not the one of the report, or fails without a rewrite.
    """
    source = Path(model)
    options = Options(
        replay=script, calibration=calibration, validation=validation, preprocess=preprocess
    )
    options, target = _as_recorded(options, target, script)
    return _Line(source, source, resolve(target), options, progress).bisect(script, check)


def _as_recorded(options: Options, target: Target, script: Script) -> tuple[Options, Target]:
    recipe = script.recipe
    recorded = replace(
        options,
        effort=Effort.NONE,
        passes=tuple(catalogue.parse_spec(spec) for spec in recipe.passes),
        skip_passes=(),
        opset=recipe.opset,
        keep_overridable_initializers=recipe.keep_overridable_initializers,
        fp16=recipe.fp16 is not None,
    )
    shapes = {**script.input_shapes, **target.input_shapes}
    return recorded, replace(target, input_shapes=shapes)


def _assert_writable(source: Path, destination: Path, options: Options) -> None:
    if options.dry_run:
        return
    both_exist = source.exists() and destination.exists()
    if both_exist and source.samefile(destination) and not options.overwrite:
        raise OutputError(f"{destination}: is the input itself; pass --overwrite to replace it")
    if destination.is_dir():
        raise OutputError(f"{destination}: is a folder; name a file")
    if not destination.parent.is_dir():
        raise OutputError(f"{destination}: the folder {destination.parent} does not exist")


class _Line:
    """One run of the line, stage after stage; no stage calls an earlier one."""

    def __init__(
        self,
        source: Path,
        destination: Path,
        target: Target,
        options: Options,
        progress: Progress,
    ) -> None:
        self.source = source
        self.destination = destination
        self.target = target
        self.options = options
        self.progress = progress
        self.stages = Stages()
        self.start = time.perf_counter()
        self.ticks = read_ticks()
        self.notes: list[str] = []
        self.prepared = False
        self.known: dict[str, Any] | None = None
        self.ask: Callable[[], Future[Oracle]]
        self.half: HalfFigures | None = None
        self.cache = None if options.cache is None else Cache(options.cache, self.notes.append)

    def run(self) -> Report:
        with self._prepared() as bench:
            with self.stages.stage("search"):
                found = self._search(bench)
            with self.stages.stage("accuracy"):
                found = self.judging.within_budget(bench, found)
            with self.stages.stage("options"):
                options = self._options(bench, found)
            with self.stages.stage("fp16"):
                half = self._half(bench, found)
            with self.stages.stage("write"):
                final = self._write(bench, found)
            report = self._report(found, final, len(bench.feeds))
            return replace(report, options=options, fp16=half)

    def bisect(self, script: Script, check: Check) -> Culprit | None:
        with self._prepared(is_judged=False) as bench:
            is_bad = (
                partial(_is_wrong, bench) if check is Check.VERIFY else partial(_is_slow, bench)
            )
            return find_culprit(bench, script, is_bad)

    @contextmanager
    def _prepared(self, *, is_judged: bool = True) -> Iterator[Workbench]:
        """The model on a workbench; the original runs beside."""
        with self.stages.stage("load"):
            model = self._load()
            self.judging = Judging(
                self.original,
                self.target,
                self.options,
                self.cache,
                self.stages,
                self.notes,
                self.progress,
            )
        if self.options.fp16:
            model = self._halved(model)
        with (
            tempfile.TemporaryDirectory(prefix="pwopt-") as scratch,
            ThreadPoolExecutor(max_workers=1) as beside,
        ):
            if is_judged:
                self.judging.judge_original()
            with self.stages.stage("factorize"):
                model = self.judging.factorise(model, Path(scratch))
            self.prepared |= self.judging.factorised is not None
            precision = "float16" if has_float16(model) else None
            depth = model.depth
            self.known = self._known()
            self.ask = lambda: beside.submit(self._oracle, depth, precision)
            is_verified = self.known is not None and self.known["verification"] is not None
            oracle = beside.submit(self._inputs_alone) if is_verified else self.ask()
            bench = self._workbench(model, oracle, Path(scratch))
            try:
                yield bench
            finally:
                bench.close()
                if self.cache is not None:
                    self.cache.close()

    # -- stages --------------------------------------------------------------------------------

    def _load(self) -> Model:
        self.progress("loading", None)
        model = load(self.source)
        broken = find_nan(model)
        if broken is not None:
            raise InvalidModelError(f"{self.source}: initializer '{broken}' holds NaN")
        size_bytes = size_on_disk(self.source, model)
        self.original = Written(self.source, file_sha256(self.source), size_bytes)
        script = self.options.replay
        if script is not None and script.model_sha256 != self.original.sha256:
            raise ReplayError(f"{self.source}: is not the model that the report was made from")
        self.before = self._totals(model, size_bytes)
        self.opset_before = model.opset
        self.has_external_data = has_external_data(model)
        if self.options.opset is not None:
            model = raise_opset(model, self.options.opset)
            self.prepared = model.opset != self.opset_before
            self.notes.append(f"The opset was raised from {self.opset_before} to {model.opset}.")
        if self.options.keep_overridable_initializers:
            model.overridable = True
        elif model.listed:
            count = model.unlist_initializers()
            self.prepared = True
            self.notes.append(
                f"{count} initializers were listed among the inputs, which made them overridable;"
                " they are treated as constants (--keep-overridable-initializers prevents this)."
            )
        return model

    def _halved(self, model: Model) -> Model:
        """In fp16, but for what calibration, or the report that is replayed, keeps in fp32."""
        self.prepared = True
        script = self.options.replay
        if script is not None:
            self.half = HalfFigures(script.recipe.fp16 or (), len(model.nodes))
            return half_with(model, self.half.kept)
        self.progress("converting to fp16", None)
        with self.stages.stage("fp16"):
            feeds = self.judging.feeds
            tolerance = self.options.max_error or rounding_floor("float16", model.depth)
            half = convert_to_half(model, feeds, self.target, tolerance)
        self.half = HalfFigures(half.kept, half.nodes)
        if half.kept:
            some = ", ".join(half.kept[:_MOST_NAMED])
            more = " ..." if len(half.kept) > _MOST_NAMED else ""
            self.notes.append(f"{len(half.kept)} nodes stay in fp32: {some}{more}")
        return half.model

    def _known(self) -> dict[str, Any] | None:
        """What an earlier search on this model and target ended with."""
        is_search = self.options.replay is None and self.options.effort is not Effort.NONE
        if self.cache is None or not is_search:
            return None
        found: dict[str, Any] | None = self.cache.get(*self._search_key())
        return found

    def _inputs_alone(self) -> Oracle:
        """Enough for timing a model that was verified before."""
        if self.judging.data is not None:
            return Oracle(self.judging.feeds, None)
        session = open_session(self.source, self.target)
        rng = np.random.default_rng(self.options.seed)
        return Oracle(make_inputs(session.interface.inputs, self.target, rng), None, session)

    def _oracle(self, depth: int, precision: str | None) -> Oracle:
        """Run the original; in a thread of its own, so that rewriting need not wait for it."""
        self.progress("running the original", None)
        with self.stages.stage("reference"):
            try:
                feeds = self.judging.feeds
                # What is exact is so with regard to the factors.
                factorised = self.judging.factorised
                exact = self.source if factorised is None else factorised.path
                reference = Reference.of(
                    exact,
                    self.target,
                    feeds,
                    depth=depth,
                    max_error=self.options.max_error,
                    precision=precision,
                )
            except UntestableError as error:
                self.notes.append(
                    f"The original could not be executed, so nothing was changed: {error}"
                    " (give real inputs with --calibration)."
                )
                return Oracle((), None)
            return Oracle(feeds, reference)

    def _workbench(
        self,
        model: Model,
        oracle: Future[Oracle],
        scratch: Path,
    ) -> Workbench:
        driver = Driver(model)
        try:
            driver.rewriter.infer_shapes()
        except InvalidModelError as error:
            raise InvalidModelError(f"{self.source}: {error}") from error
        simplify, lower = self._selected()
        clockless = self.options.effort is Effort.NONE and self.options.passes is None
        return Workbench(
            driver,
            self.original,
            scratch,
            oracle,
            self.target,
            simplify=simplify,
            lower=lower,
            review=self._review(driver) if clockless else None,
            prepared=self.prepared,
            seed=self.options.seed,
            max_bytes=self.options.max_size_growth * self.original.size_bytes,
            progress=self.progress,
            cache=self.cache,
        )

    def _review(self, driver: Driver) -> Review:
        dims = concrete_dims(driver.model, self.target.input_shapes)
        machine = Machine(**find_provider(self.target.provider).roofline)
        return analytic_review(driver.facts, dims, machine)

    def _selected(self) -> tuple[tuple[AnyPass, ...], tuple[AnyPass, ...]]:
        """The passes to run: (simplifying, lowering), in catalogue order."""
        skipped = set(self.options.skip_passes)
        for name in skipped:
            catalogue.find(name)
        chosen = self.options.passes
        if chosen is None:
            chosen = default_passes(self.target)
        max_error = self.options.max_error
        if max_error is not None and self.options.replay is None:
            chosen = tuple(p.allowing(max_error) for p in chosen)
        order = [p.name for p in catalogue.ALL]
        wanted = (p for p in chosen if p.name not in skipped)
        return catalogue.split(sorted(wanted, key=lambda p: order.index(p.name)))

    def _search(self, bench: Workbench) -> Found:
        if self.options.replay is not None:
            return self._replayed(bench, self.options.replay)
        rulings = Rulings(
            limit=self.options.rewrite_limit,
            skip=self.options.skip_rewrites,
            only=self.options.only_rewrites,
        )
        if self.options.effort is Effort.NONE:
            bench.build(rulings)  # while the original still runs
        try:
            found = None if self.known is None else self._confirmed(bench, rulings, self.known)
            if found is not None:
                return found
            if bench.reference is None:
                reason = "the original cannot be executed on this target"
                return Found(None, rulings, None, reason)
            if self.options.effort is Effort.NONE:
                return self._without_clock(bench, rulings)
            return self._with_clock(bench, rulings)
        except VerificationError as error:
            self.notes.append(f"{error}; the original is kept.")
            return Found(None, rulings, None, "no rewritten model could be verified")

    def _without_clock(self, bench: Workbench, rulings: Rulings) -> Found:
        build = settle(bench, bench.build(rulings))
        return Found(build, build.rulings, None, build.stop.value)

    def _confirmed(self, bench: Workbench, rulings: Rulings, known: dict[str, Any]) -> Found | None:
        """The end of an earlier search, if it holds; its verification, if it is the very file."""
        if known["rulings"] is None:
            return Found(None, rulings, None, f"decided by an earlier search: {known['reason']}")
        rulings = rulings.with_decisions(known["rulings"])
        build = bench.build(rulings, self._in_place(known))
        if known["verification"] is not None:
            if build.written.sha256 != known["sha256"]:  # written by another version of onnx, say
                bench.consult(self.ask())
                return None
            bench.trust(build.written.sha256, Verification.from_json(known["verification"]))
        found = confirm(bench, self.options.effort, rulings, known["seconds"])
        if found is None and not build.applied:
            return Found(
                None,
                rulings,
                None,
                "decided by an earlier search, which gained nothing; no faster now, so the original"
                " is kept",
            )
        if found is None and known["verification"] is not None:
            bench.consult(self.ask())
        return found

    def _in_place(self, known: dict[str, Any]) -> Written | None:
        """The file to write, if an earlier run left it where it belongs, byte for byte."""
        path, size = self.destination, known.get("size_bytes")
        if self.options.dry_run or size is None or known["verification"] is None:
            return None
        if not path.is_file() or path.stat().st_size != size or path.samefile(self.source):
            return None
        sha256 = file_sha256(path)
        return Written(path, sha256, size) if sha256 == known["sha256"] else None

    def _with_clock(self, bench: Workbench, rulings: Rulings) -> Found:
        """Search, and remember what it ended with."""
        try:
            with _ends_early_on_interrupt(bench):
                found = search(bench, self.options.effort, rulings, self.options.time_limit_s)
        except InterruptedSearch:
            raise KeyboardInterrupt from None  # nothing to end with yet, or confirming
        if self.cache is None or found.is_partial:
            return found
        end: dict[str, Any] = {
            "rulings": None,
            "reason": found.reason,
            "seconds": time.perf_counter() - self.start,
            "sha256": None,
            "size_bytes": None,
            "verification": {},
        }
        if found.build is not None:
            verification = bench.verify(found.build)
            assert verification is not None
            end["rulings"] = found.build.rulings.decisions()
            end["sha256"] = found.build.written.sha256
            end["size_bytes"] = found.build.written.size_bytes
            # Which provider runs which node is looked at anew on a device.
            is_kept = verification.placement is None
            end["verification"] = verification.to_json() if is_kept else None
        self.cache.put(end, *self._search_key())
        return found

    def _options(self, bench: Workbench, found: Found) -> OptionsFigures | None:
        """Provider options tried on what was found; never part of its speedup."""
        is_idle = found.comparison is None or found.is_partial
        if is_idle or not self.options.tune_options or self.options.replay is not None:
            return None
        finished = bench.original if found.build is None else found.build.written
        seconds = seconds_for_options(self.options.effort, self.options.time_limit_s)
        try:
            tried = try_options(bench, finished, seconds)
        except InterruptedSearch:
            return None
        return None if tried is None else option_figures(tried)

    def _half(self, bench: Workbench, found: Found) -> HalfFigures | None:
        """The gain of the conversion to fp16 and that of rewriting, each by itself."""
        if self.half is None or found.comparison is None or found.is_partial:
            return self.half
        held = Ruling(Verdict.HELD)
        base = bench.build(replace(found.rulings, default=held, limit=0))
        try:
            conversion = bench.compare(bench.original, base.written, _APART, "timing fp16 alone")
            rewriting = (
                None
                if found.build is None
                else bench.compare(base.written, found.build.written, _APART, "timing rewriting")
            )
        except InterruptedSearch:
            return self.half
        return replace(
            self.half,
            conversion=latency_figures(conversion, None),
            rewriting=latency_figures(rewriting, None),
        )

    def _search_key(self) -> tuple[object, ...]:
        """All that the end of a search depends on."""
        options = replace(
            self.options,
            passes=None,
            cache=None,
            overwrite=False,
            dry_run=False,
            tune_options=True,
            calibration=None,
            validation=None,
        )
        specs = [p.spec() for part in self._selected() for p in part]
        return (
            "end of a search",
            version("pwopt"),
            self.target.fingerprint,
            self.original.sha256,
            *self.judging.key(),
            specs,
            repr(options),
        )

    def _replayed(self, bench: Workbench, script: Script) -> Found:
        if self.options.front_point is not None:
            build = bench.build(Rulings(default=Ruling(Verdict.HELD)))
            reason = f"replayed: factorised model {self.options.front_point}, nothing was measured"
            return Found(build, build.rulings, None, reason)
        if script.keeps_original:
            reason = "replayed: the report kept the original"
            return Found(None, Rulings(default=Ruling(Verdict.HELD)), None, reason)
        rulings = rulings_of(
            script,
            limit=self.options.rewrite_limit,
            skip=self.options.skip_rewrites,
            only=self.options.only_rewrites,
        )
        build = replay(bench, script, rulings)
        verification = bench.verify(build)
        if verification is None:
            self.notes.append("The original cannot be executed here: nothing was verified anew.")
        elif not verification.ok:
            raise VerificationError(f"the replayed model differs: {verification.reason}")
        return Found(build, build.rulings, None, "replayed; nothing was measured")

    def _write(self, bench: Workbench, found: Found) -> Final:
        """Put the winner in place, built again unless it is the latest build, and its remarks."""
        self.progress("writing", None)
        if found.build is None:
            coarse = self._coarse(bench, self.original)
            return Final(
                self._published(self.original),
                self.opset_before,
                self.before,
                tuple(overruled(bench, found.rulings)),
                None,
                None if bench.reference is None else bench.reference.placement,
                coarse,
            )
        build = bench.build(found.build.rulings)
        verification = bench.verify(build)
        coarse = self._coarse(bench, build.written)  # while the original is still there
        model = bench.driver.model
        written = self._published(build.written)
        return Final(
            written,
            model.opset,
            self._totals(model, written.size_bytes),
            tuple(annotated(r, build.rulings) for r in build.remarks),
            verification,
            None if verification is None else verification.placement,
            coarse,
            None if found.comparison is None else bench.copies(),
        )

    def _coarse(self, bench: Workbench, written: Written) -> CoarseFigures | None:
        """How far original and *written* deviate as timed, if the device cuts corners then."""
        provider, reference = find_provider(self.target.provider), bench.reference
        if reference is None or not provider.is_coarse(self.target.provider_options):
            return None
        original = reference.deviation(self.original.path, self.target)
        same = written.sha256 == self.original.sha256
        optimized = original if same else reference.deviation(written.path, self.target)
        return CoarseFigures(provider.coarse, original, optimized)

    def _published(self, model: Written) -> Written:
        """Put the winner in place, the very file that was verified and timed; not in a dry run."""
        if self.options.dry_run:
            return model
        if model.path == self.destination:  # left there by an earlier run
            with suppress(OSError):
                model.path.touch()
            return model
        beside = model.path.with_name(f"{model.path.name}.data").exists() or (
            model is self.original and self.has_external_data
        )
        return save_copy(model, self.destination, beside=beside)

    def _totals(self, model: Model, size_bytes: int) -> Totals:
        cost = model_cost(model, self.target.input_shapes)
        return Totals(cost.params, cost.macs, size_bytes)

    def _report(self, found: Found, final: Final, inputs: int) -> Report:
        if found.build is not None and found.comparison is not None:
            self.notes += disturbance(found.comparison, str(Strain.since(self.ticks)))
        seen = {r.pass_name for r in final.remarks}
        names = [p.name for p in catalogue.ALL if p.name in seen]
        return Report(
            pwopt=version("pwopt"),
            model=ModelFile(
                self.source, self.original.sha256, self.opset_before, self.original.size_bytes
            ),
            output=ModelFile(
                None if self.options.dry_run else self.destination,
                final.written.sha256,
                final.opset,
                final.written.size_bytes,
            ),
            target=self.target,
            latency=latency_figures(found.comparison, final.copies)
            if found.build is not None
            else None,
            error=error_figures(final, inputs),
            cost=CostChange(self.before, final.totals),
            recipe=Recipe(
                tuple(p.spec() for part in self._selected() for p in part),
                self.options.opset,
                self.options.keep_overridable_initializers,
                None if self.half is None else self.half.kept,
            ),
            passes={n: Tally.of([r for r in final.remarks if r.pass_name == n]) for n in names},
            remarks=final.remarks,
            seconds={**self.stages.seconds, "total": time.perf_counter() - self.start},
            stop_reason=found.reason,
            notes=tuple(self.notes),
            placement=placement_figures(final.placement),
            accuracy=self.judging.accuracy,
            factorization=self.judging.factorization,
        )


def _is_wrong(bench: Workbench, build: Build) -> bool:
    verification = bench.verify(build)
    if verification is None:
        raise VerificationError("the original cannot be executed here, so nothing can be verified")
    return not verification.ok


def _is_slow(bench: Workbench, build: Build) -> bool:
    """Whether *build* is slower than the canonicalised model, beyond noise."""
    base = bench.build(replace(build.rulings, limit=0))
    comparison = bench.compare(base.written, build.written, _CAREFUL, "timing", decide=1.0)
    return comparison.ci95[1] < 1


@contextmanager
def _ends_early_on_interrupt(bench: Workbench) -> Iterator[None]:
    """The first Ctrl-C ends the search with the best model so far, the next one everything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def heed(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        bench.interrupt()

    signal.signal(signal.SIGINT, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
