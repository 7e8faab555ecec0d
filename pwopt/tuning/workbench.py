"""Builds candidate models, checks them against the original, and times them in pairs."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pwopt.cost import estimate_seconds, model_cost, window_seconds
from pwopt.errors import PwoptError
from pwopt.graph import Model, Written, concrete_dims, save
from pwopt.passes import Canonicalise
from pwopt.remark import Kind, Remark, Verdict
from pwopt.runtime import (
    Comparison,
    Copies,
    Feeds,
    Reference,
    Session,
    Verification,
    compare,
    make_inputs,
    measure_copies,
    open_session,
)
from pwopt.target import Target
from pwopt.tuning.cache import Cache
from pwopt.tuning.candidate import AnyPass
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import Review, Ruling, Rulings, StopReason, run_passes
from pwopt.tuning.window import Form, Window, cut_window, find_match

__all__ = [
    "Build",
    "Group",
    "InterruptedSearch",
    "Oracle",
    "Precision",
    "Progress",
    "Workbench",
    "counting",
    "silent",
]

_HALF_WIDTH = 0.005
"""Timing ends when the interval of the ratio is this narrow, on either side."""
_HOPELESS = 0.9
"""A candidate that loses its first pairs by more is not timed any further."""
_LARGE_BYTES = 1 << 23
"""A model that is worth more than the tenths of a second that collecting it takes."""


Group: TypeAlias = tuple[str, str]
"""Equal sites: a pass and a signature."""


class InterruptedSearch(Exception):  # noqa: N818 - says what happened, is no failure
    """The user wants the search to end."""


Progress = Callable[[str, float | None], None]
"""Told what is going on and, where known, how much of it is done (0 to 1)."""


def silent(_: str, __: float | None) -> None:
    """Progress that nobody wants to see."""


def counting(progress: Progress, label: str) -> Callable[[int, int], None]:
    """*progress* for something that counts its steps."""
    return lambda done, total: progress(label, done / max(total, 1))


@dataclass(frozen=True, eq=False)
class Build:
    """A model made by the passes under some rulings, saved to a scratch file.

    Attributes:
        prepared: whether the model was changed before any pass ran (opset raised, initializers
            taken off the input list), so that even without a rewrite it is not the original.
    """

    rulings: Rulings
    written: Written
    remarks: tuple[Remark, ...]
    proposed: int
    stop: StopReason
    prepared: bool = False

    @property
    def is_changed(self) -> bool:
        """Whether any pass, required ones included, changed anything."""
        return self.prepared or any(r.kind is Kind.APPLIED for r in self.remarks)

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of passes that changed something, without the required ones, in order."""
        names = [r.pass_name for r in self.remarks if r.kind is Kind.APPLIED]
        return tuple(n for n in dict.fromkeys(names) if n != Canonicalise.name)


@dataclass(frozen=True)
class Precision:
    """How carefully to time: pairs at least and at most, and a limit in seconds."""

    min_pairs: int
    max_pairs: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Oracle:
    """What the original computes.

    Attributes:
        feeds: the input sets; the first one is timed with.
        reference: its outputs; ``None`` if it cannot be executed.
        session: the original as it is timed, where it had to be opened for its interface.
    """

    feeds: Sequence[Feeds]
    reference: Reference | None
    session: Session | None = None


class Workbench:
    """Everything a search needs at hand. One graph, rewritten and undone; scratch files; sessions.

    Sessions stay open for the two models that were compared last, until something is verified.
    The oracle may still be at work while the first model is built.
    """

    def __init__(
        self,
        driver: Driver,
        original: Written,
        scratch: Path,
        oracle: Future[Oracle],
        target: Target,
        *,
        simplify: Sequence[AnyPass],
        lower: Sequence[AnyPass],
        review: Review | None,
        prepared: bool,
        seed: int,
        max_bytes: float,
        progress: Progress,
        cache: Cache | None = None,
    ) -> None:
        self.driver = driver
        self.original = original
        self.target = target
        self.simplify = tuple(simplify)
        self.lower = tuple(lower)
        self.review = review
        self.max_bytes = max_bytes
        self.progress = progress
        self._oracle = oracle
        self._base = driver.checkpoint()
        self._scratch = scratch
        self._seed = seed
        self._serial = 0
        self._prepared = prepared
        self._latest: Build | None = None
        self._expected: dict[Group, float] = {}
        self._sessions: dict[Path, Session] = {}
        self._verified: dict[str, Verification] = {}
        self._cache = cache
        self._cuttings: Path | None = None
        self._is_interrupted = False

    @property
    def feeds(self) -> Sequence[Feeds]:
        """The input sets; waits for the oracle."""
        return self._oracle.result().feeds

    @property
    def reference(self) -> Reference | None:
        """Outputs of the original, if it can be executed; waits for the oracle."""
        return self._oracle.result().reference

    def consult(self, oracle: Future[Oracle]) -> None:
        """Ask *oracle* from here on."""
        self.close()
        self._oracle = oracle

    def trust(self, sha256: str, verification: Verification) -> None:
        """Take over what an earlier run found about the very file with this digest."""
        self._verified[sha256] = verification

    def build(self, rulings: Rulings, written: Written | None = None) -> Build:
        """Run the passes under *rulings* on the loaded model and save the result.

        The driver's model is that of the latest build. The file goes when nothing refers to what
        was written any more: a search may try many models of half a gigabyte.

        Args:
            rulings: what to do with each candidate.
            written: the very file that comes out, if it is there already.
        """
        if self._latest is not None and self._latest.rulings == rulings:
            return self._latest
        self.driver.restore(self._base)
        stop = run_passes(self.driver, self.simplify, self.lower, rulings, self.review)
        # A folder each, so that external data bears the same name and equal models are equal files.
        if written is None:
            folder = self._new_folder()
            written = save(self.driver.model, folder / "model.onnx", durable=False)
            weakref.finalize(written, shutil.rmtree, folder, ignore_errors=True)
        self._expected = {}
        self._latest = Build(
            rulings,
            written,
            tuple(self.driver.ledger.remarks()),
            self.driver.proposed,
            stop,
            self._prepared,
        )
        return self._latest

    def verify(self, build: Build) -> Verification | None:
        """Compare *build* with the original; ``None`` if the original cannot be executed."""
        known = self._verified.get(build.written.sha256)
        if known is None:
            reference = self.reference
            if reference is None:
                return None
            self.progress("verifying", None)
            self.close()  # opening them again takes less than their memory is worth
            known = reference.verify(build.written.path)
            self._verified[build.written.sha256] = known
        return known

    def objection(self, build: Build) -> Ruling | None:
        """The ruling for whatever made *build* wrong or too large; ``None`` if it is neither."""
        if build.written.size_bytes > self.max_bytes:
            return Ruling(
                Verdict.REJECTED_SIZE,
                facts={"size_bytes": build.written.size_bytes, "limit_bytes": int(self.max_bytes)},
            )
        verification = self.verify(build)
        if verification is None or verification.ok:
            return None
        if not verification.outputs:  # it does not load or run
            return Ruling(Verdict.REJECTED_FAILED, facts={"failure": verification.reason})
        return Ruling(
            Verdict.REJECTED_WRONG,
            facts={"error": verification.max_relative, "tolerance": verification.tolerance},
        )

    def failure(self, model: Written) -> str | None:
        """Why *model* cannot be timed by itself; ``None`` if it can. Closes all sessions first."""
        self.close()
        try:
            with open_session(model.path, self.target) as session:
                session.run(self.feeds[0])
        except PwoptError as error:
            return str(error)
        return None

    def compare(
        self,
        baseline: Written,
        candidate: Written,
        precision: Precision,
        label: str,
        *,
        decide: float | None = None,
        anew: bool = False,
        reopened: int = 0,
    ) -> Comparison:
        """Time two models in turn; the ratio is baseline over candidate.

        With *decide*, timing ends as soon as the interval excludes that ratio, and after three
        pairs if the candidate clearly loses them all. What the cache
        knows is not timed once more, unless *anew*. With *reopened*, which counts how often
        that was done, both sessions are opened anew, at first the candidate's before the other,
        so that they lie elsewhere in memory.

        Raises:
            InterruptedSearch: :meth:`interrupt` was called.
        """
        key = (
            "comparison",
            self.target.fingerprint,
            baseline.sha256,
            candidate.sha256,
            {name: getattr(value, "shape", None) for name, value in self.feeds[0].items()},
            astuple(precision),
            decide,
            reopened,
        )
        known = None if anew or self._cache is None else self._cache.get(*key)
        if known is not None:
            return Comparison.from_json(known)
        if reopened:
            for path in (baseline.path, candidate.path):
                if path in self._sessions:
                    self._sessions.pop(path).close()
            for model in (candidate, baseline) if reopened % 2 else (baseline, candidate):
                self._session(model.path)
        comparison = self._timed(baseline.path, candidate.path, precision, label, decide)
        if self._cache is not None:
            self._cache.put(comparison.to_json(), *key)
        return comparison

    def compare_targets(
        self,
        model: Written,
        baseline: Target,
        candidate: Target,
        precision: Precision,
        label: str,
        *,
        decide: float | None = None,
    ) -> Comparison:
        """Time one model on two targets in turn; the ratio is baseline over candidate.

        Raises:
            InterruptedSearch: :meth:`interrupt` was called.
            PwoptError: it does not load or run on one of them.
        """
        key = (
            "targets",
            baseline.fingerprint,
            candidate.fingerprint,
            model.sha256,
            {name: getattr(value, "shape", None) for name, value in self.feeds[0].items()},
            astuple(precision),
            decide,
        )
        known = None if self._cache is None else self._cache.get(*key)
        if known is not None:
            return Comparison.from_json(known)
        with (
            open_session(model.path, baseline) as first,
            open_session(model.path, candidate) as second,
        ):
            comparison = self._compared(first, second, self.feeds[0], precision, label, decide)
        if self._cache is not None:
            self._cache.put(comparison.to_json(), *key)
        return comparison

    def copies(self) -> Copies | None:
        """What copying inputs to the device and outputs back takes; ``None`` on the CPU."""
        if self.target.provider == "cpu":  # no need to open a session
            return None
        session = self._session(self.original.path)
        return measure_copies(session, self.feeds[0], rng=np.random.default_rng(self._seed))

    def find_pass(self, name: str) -> AnyPass:
        """The selected pass called *name*."""
        return next(p for p in (*self.simplify, *self.lower) if p.name == name)

    def cut(self, build: Build, remark: Remark, variants: Sequence[str]) -> Window | None:
        """A window of *build* around the held candidate that *remark* tells of.

        It takes the place of the one that was cut before.
        """
        self.build(build.rulings)
        dims = concrete_dims(self.driver.model, self.target.input_shapes)
        pass_ = self.find_pass(remark.pass_name)
        if self._cuttings is not None:
            shutil.rmtree(self._cuttings)
        folder = self._cuttings = self._new_folder()

        def keep(model: Model) -> Form:
            path = folder / f"{len(list(folder.iterdir()))}.onnx"
            seconds = _seconds(model) if self.target.provider == "cpu" else None
            is_large = save(model, path, durable=False).size_bytes > _LARGE_BYTES
            del model
            if is_large:
                gc.collect()  # graphs refer to themselves
            return Form(path, seconds)

        return cut_window(self.driver, pass_, remark, variants, dims, keep)

    def expected_seconds(self, build: Build, groups: Sequence[Group]) -> dict[Group, float]:
        """What all sites of each of *groups* in *build* take together, by estimate.

        On a device, of which nothing is known, no time at all.
        """
        if self.target.provider != "cpu":
            return dict.fromkeys(groups, 0.0)
        self.build(build.rulings)
        facts = self.driver.facts
        dims = concrete_dims(self.driver.model, self.target.input_shapes)

        def seconds(group: Group) -> float:
            name, signature = group
            sites = [
                r
                for r in build.remarks
                if r.pass_name == name and r.facts.get("signature") == signature
            ]
            match = find_match(self.driver, self.find_pass(name), sites[0])
            each = None if match is None else window_seconds(match.nodes, facts, dims)
            return len(sites) * (each or 0.0)

        for group in groups:
            if group not in self._expected:
                self._expected[group] = seconds(group)
        return {group: self._expected[group] for group in groups}

    def estimate(self, window: Window) -> dict[str, float]:
        """What the analytic model expects: time after over time before, by variant.

        Variants that cannot be estimated are left out; on a device, all are.
        """
        before = window.before.seconds
        after = {name: form.seconds for name, form in window.after.items()}
        return {n: s / before for n, s in after.items() if before is not None and s is not None}

    def compare_window(
        self,
        window: Window,
        variant: str,
        precision: Precision,
        label: str,
        *,
        decide: float,
        futile: float | None = None,
    ) -> Comparison:
        """Time a window against its rewritten form.

        Args:
            window: of the latest build.
            variant: the form.
            precision: how carefully.
            label: for progress.
            decide: ends as soon as the interval excludes that ratio.
            futile: ends at a look at which the interval lies below that ratio.

        Raises:
            PwoptError: one of them does not run.
        """
        key = (
            "window",
            self.target.fingerprint,
            window.digest,
            variant,
            astuple(precision),
            decide,
            futile,
        )
        known = None if self._cache is None else self._cache.get(*key)
        if known is not None:
            return Comparison.from_json(known)
        self.check_interrupted()
        bare = replace(self.target, input_shapes={})
        with (
            open_session(window.before.path, bare) as before,
            open_session(window.after[variant].path, bare) as after,
        ):
            rng = np.random.default_rng(self._seed)
            feeds = make_inputs(before.interface.inputs, bare, rng, sets=1)[0]
            comparison = self._compared(before, after, feeds, precision, label, decide, futile)
        if self._cache is not None:
            self._cache.put(comparison.to_json(), *key)
        return comparison

    def _timed(
        self,
        baseline: Path,
        candidate: Path,
        precision: Precision,
        label: str,
        decide: float | None,
    ) -> Comparison:
        for path in [p for p in self._sessions if p not in (baseline, candidate)]:
            self._sessions.pop(path).close()
        first, second = self._session(baseline), self._session(candidate)
        return self._compared(first, second, self.feeds[0], precision, label, decide)

    def _compared(
        self,
        baseline: Session,
        candidate: Session,
        feeds: Feeds,
        precision: Precision,
        label: str,
        decide: float | None,
        futile: float | None = None,
    ) -> Comparison:
        self.progress(label, 0.0)
        show = counting(self.progress, label)

        def on_progress(done: int, total: int) -> None:
            self.check_interrupted()
            show(done, total)

        return compare(
            baseline,
            candidate,
            feeds,
            min_pairs=precision.min_pairs,
            max_pairs=precision.max_pairs,
            time_limit_s=precision.seconds,
            precision=_HALF_WIDTH,
            rng=np.random.default_rng(self._seed),
            decide=decide,
            give_up=None if decide is None else _HOPELESS,
            futile=futile,
            on_progress=on_progress,
        )

    def interrupt(self) -> None:
        """Ask the search to end with what it has; safe to call from a signal handler."""
        self._is_interrupted = True

    def check_interrupted(self) -> None:
        """Heed :meth:`interrupt`, once.

        Raises:
            InterruptedSearch: it was called.
        """
        if self._is_interrupted:
            self._is_interrupted = False
            raise InterruptedSearch

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        if self._oracle.done() and self._oracle.exception() is None:
            unused = self._oracle.result().session
            if unused is not None:
                unused.close()

    def _new_folder(self) -> Path:
        self._serial += 1
        folder = self._scratch / str(self._serial)
        folder.mkdir()
        return folder

    def _session(self, path: Path) -> Session:
        if path not in self._sessions:
            opened = self._oracle.result().session if path == self.original.path else None
            if opened is None or not opened.is_open:
                opened = open_session(path, self.target)
            self._sessions[path] = opened
        return self._sessions[path]


def _seconds(model: Model) -> float | None:
    """What *model* is estimated to take; ``None`` if it cannot be estimated."""
    cost = model_cost(model)
    return None if cost.unknown or not cost.nodes else estimate_seconds(cost.nodes)
