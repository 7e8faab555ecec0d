"""The search against a synthetic machine: latencies follow from what was applied, no clock."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pwopt.errors import PwoptError, VerificationError
from pwopt.graph import Written
from pwopt.remark import Kind, Remark, Verdict
from pwopt.runtime import Comparison, Latency
from pwopt.tuning import clock as clock_module
from pwopt.tuning.confirmation import Found, confirm
from pwopt.tuning.effort import Effort
from pwopt.tuning.pipeline import Ruling, Rulings, StopReason
from pwopt.tuning.search import search
from pwopt.tuning.settling import settle
from pwopt.tuning.workbench import Build, InterruptedSearch, Workbench

Site = tuple[str, str, tuple[str, ...]]
"""Pass, signature, variants."""


class SyntheticBench:
    """Stands in for a workbench; the time of a model is a product of factors of what it applied."""

    def __init__(
        self,
        simplify: list[Site],
        lower: list[Site],
        factors: dict[str, float],
        *,
        wrong: set[str] = frozenset(),  # type: ignore[assignment]
        canonical: float = 1.0,
    ) -> None:
        self.sites = [*simplify, *lower]
        self.simplify = [SimpleNamespace(name=n) for n in dict.fromkeys(s[0] for s in simplify)]
        self.lower = [SimpleNamespace(name=n) for n in dict.fromkeys(s[0] for s in lower)]
        self.factors = factors
        self.wrong = wrong
        self.canonical = canonical
        self.original = Written(Path("original"), "original", 0)
        self.feeds: list[dict[str, Any]] = [{}]
        self.builds = 0
        self.comparisons = 0
        self.interrupted_at = -1
        self.has_windows = False
        self.windows = 0
        self.window_ms = 1.0
        self.alone: dict[str, float] = {}
        self.prepared = True
        self.expected: dict[str, float] = {}
        self.original_ms = 1.0
        self.seconds: dict[str, float] = {}
        self.crashing: set[str] = set()

    def progress(self, *_: object) -> None:
        pass

    def build(self, rulings: Rulings) -> Build:
        self.builds += 1
        remarks = []
        applied = []
        for ordinal, (name, group, variants) in enumerate(self.sites, start=1):
            ruling = rulings.find(name, group)
            if rulings.limit is not None and ordinal > rulings.limit:
                ruling = Ruling(Verdict.HELD)
            variant = ruling.variant or variants[0]
            facts: dict[str, Any] = {"signature": group}
            if variants != ("default",):
                facts["variants"] = list(variants)
            remarks.append(
                Remark(ordinal, name, group, ruling.verdict.kind, ruling.verdict.value, facts)
            )
            if ruling.verdict is Verdict.KEPT:
                applied.append(f"{name}/{group}/{variant}")
        content = " ".join(applied)
        written = Written(Path(f"m {content}"), content, 0)
        return Build(
            rulings,
            written,
            tuple(remarks),
            len(self.sites),
            StopReason.FIXED_POINT,
            self.prepared,
        )

    def objection(self, build: Build) -> Ruling | None:
        bad = self.wrong & set(build.written.sha256.split())
        return Ruling(Verdict.REJECTED_WRONG, facts={"error": 1.0}) if bad else None

    def verify(self, build: Build) -> Any:
        ok = self.objection(build) is None
        return SimpleNamespace(ok=ok, reason=None if ok else "too far off")

    def time(self, path: Path) -> float:
        if path == self.original.path:
            return self.original_ms
        time = self.canonical * self.original_ms
        for applied in str(path).split()[1:]:
            time *= self.factors.get(applied, 1.0)
        return time

    def cut(self, build: Build, remark: Remark, variants: list[str]) -> Any:
        if not self.has_windows:
            return None
        group = str(remark.facts["signature"])
        return SimpleNamespace(name=remark.pass_name, group=group, after=dict.fromkeys(variants))

    def compare_window(self, window: Any, variant: str, *_: object, **__: object) -> Comparison:
        self.windows += 1
        applied = f"{window.name}/{window.group}/{variant}"
        time = self.alone.get(applied, self.factors.get(applied, 1.0))
        return compared(self.window_ms, self.window_ms * time)

    def expected_seconds(
        self, _: Build, groups: list[tuple[str, str]]
    ) -> dict[tuple[str, str], float]:
        return {group: self.seconds.get(group[0], 0.0) for group in groups}

    def estimate(self, window: Any) -> dict[str, float]:
        return {
            v: self.expected.get(f"{window.name}/{window.group}/{v}", 1.0) for v in window.after
        }

    def failure(self, model: Written) -> str | None:
        bad = self.crashing & set(model.sha256.split())
        return f"{min(bad)} crashes" if bad else None

    def check_interrupted(self) -> None:
        if self.comparisons == self.interrupted_at:
            self.interrupted_at = -1
            raise InterruptedSearch

    def compare(
        self, baseline: Written, candidate: Written, *_: object, **__: object
    ) -> Comparison:
        self.comparisons += 1
        self.check_interrupted()
        for model in (baseline, candidate):
            if self.failure(model) is not None:
                raise PwoptError("a session crashed")
        return compared(self.time(baseline.path), self.time(candidate.path))


def compared(a: float, b: float) -> Comparison:
    ratio = a / b
    return Comparison(
        Latency(a, (a, a), 9),
        Latency(b, (b, b), 9),
        ratio,
        (ratio * 0.998, ratio * 1.002),
        9,
        stable=True,
    )


def run(bench: SyntheticBench, effort: Effort = Effort.FULL) -> Found:
    return search(cast("Workbench", bench), effort, Rulings())


def kept(found: Found) -> set[str]:
    assert found.build is not None
    return set(found.build.written.sha256.split())


ONE = ("default",)


def test_a_helpful_pass_stays_and_idle_and_harmful_ones_go() -> None:
    bench = SyntheticBench(
        [("good", "g", ONE), ("idle", "i", ONE), ("bad", "b", ONE)],
        [],
        {"good/g/default": 0.8, "bad/b/default": 1.3},
    )
    found = run(bench)
    assert kept(found) == {"good/g/default"}
    assert found.comparison is not None
    assert found.comparison.speedup == pytest.approx(1.25)
    kinds = {r.pass_name: (r.kind, r.reason) for r in found.build.remarks}  # type: ignore[union-attr]
    assert kinds["idle"] == (Kind.REJECTED, Verdict.REJECTED_SLOWER.value)


def test_full_effort_drops_the_harmful_group_of_a_helpful_pass() -> None:
    bench = SyntheticBench(
        [("mixed", "good", ONE), ("mixed", "bad", ONE)],
        [],
        {"mixed/good/default": 0.5, "mixed/bad/default": 1.1},
    )
    assert kept(run(bench)) <= {"mixed/good/default", "mixed/bad/default"}
    bench.sites.append(("other", "o", ONE))
    bench.factors["other/o/default"] = 0.9
    assert kept(run(bench)) == {"mixed/good/default", "other/o/default"}


def test_full_effort_keeps_the_many_small_gains_of_a_helpful_pass() -> None:
    groups = [f"g{k}" for k in range(12)]
    simplify: list[Site] = [*(("many", group, ONE) for group in groups), ("other", "o", ONE)]
    bench = SyntheticBench(
        simplify,
        [],
        {f"many/{group}/default": 0.996 for group in groups} | {"other/o/default": 0.9},
    )
    assert kept(run(bench)) == {*(f"many/{group}/default" for group in groups), "other/o/default"}


def test_the_fastest_variant_is_taken() -> None:
    bench = SyntheticBench(
        [("raise", "r", ("slowish", "fast"))],
        [],
        {"raise/r/slowish": 0.9, "raise/r/fast": 0.7},
    )
    assert kept(run(bench)) == {"raise/r/fast"}


def test_a_lowering_that_loses_everywhere_is_rejected_with_its_figure() -> None:
    bench = SyntheticBench(
        [],
        [("lower", "a", ("nhwc", "nchw")), ("lower", "b", ("nhwc", "nchw"))],
        {f"lower/{g}/{v}": 1.4 for g in "ab" for v in ("nhwc", "nchw")},
    )
    found = run(bench)
    assert kept(found) == set()
    assert found.build is not None
    rejected = [r for r in found.build.remarks if r.kind is Kind.REJECTED]
    assert len(rejected) == 2
    ruling = found.build.rulings.find("lower", "a")
    assert float(str(ruling.facts["speedup"])) < 1


def test_a_lowering_that_wins_on_one_group_only_is_kept_there() -> None:
    bench = SyntheticBench(
        [],
        [("lower", "a", ("nhwc", "nchw")), ("lower", "b", ("nhwc", "nchw"))],
        {
            "lower/a/nhwc": 1.5,
            "lower/a/nchw": 1.4,
            "lower/b/nhwc": 0.95,
            "lower/b/nchw": 0.8,
        },
    )
    assert kept(run(bench)) == {"lower/b/nchw"}


def test_a_wrong_rewrite_is_found_by_bisection_and_taken_back() -> None:
    sites: list[Site] = [("p", f"g{i}", ONE) for i in range(16)]
    factors = {f"p/g{i}/default": 0.98 for i in range(16)}
    bench = SyntheticBench(sites, [], factors, wrong={"p/g11/default"})
    build = settle(cast("Workbench", bench), bench.build(Rulings()))
    assert build.remarks[11].reason == Verdict.REJECTED_WRONG.value
    assert sum(r.kind is Kind.APPLIED for r in build.remarks) == 15
    assert bench.builds <= 8, "bisection takes log2(16) builds and a few"


def test_several_wrong_rewrites_are_all_found() -> None:
    sites: list[Site] = [("p", f"g{i}", ONE) for i in range(9)]
    bench = SyntheticBench(sites, [], {}, wrong={"p/g2/default", "p/g7/default"})
    build = settle(cast("Workbench", bench), bench.build(Rulings()))
    wrong = [r.site for r in build.remarks if r.reason == Verdict.REJECTED_WRONG.value]
    assert wrong == ["g2", "g7"]


def test_a_wrong_base_is_an_error_and_not_a_model() -> None:
    bench = SyntheticBench([], [], {})
    bench.objection = lambda _: Ruling(Verdict.REJECTED_WRONG)  # type: ignore[method-assign, assignment]
    bench.sites = [("p", "g", ONE)]
    with pytest.raises(VerificationError, match="canonicalised model differs"):
        settle(cast("Workbench", bench), bench.build(Rulings()))


def test_a_slower_canonicalised_model_gives_way_to_the_original() -> None:
    bench = SyntheticBench([], [], {}, canonical=1.05)
    found = run(bench)
    assert found.build is None
    assert "no model was as fast as the original" in found.reason


def test_gains_that_do_not_add_up_fall_back_to_the_canonicalised_model() -> None:
    class Interacting(SyntheticBench):
        def compare(
            self, baseline: Written, candidate: Written, *a: object, **k: object
        ) -> Comparison:
            if baseline == self.original and candidate.path != Path("m "):
                return super().compare(Written(Path("m slow"), "slow", 0), self.original)
            return super().compare(baseline, candidate)

        def time(self, path: Path) -> float:
            return 0.8 if path == Path("m slow") else super().time(path)

    bench = Interacting([("p", "g", ONE)], [], {"p/g/default": 0.9})
    found = run(bench)
    assert kept(found) == set()
    assert "was taken back" in found.reason
    in_a_hurry = search(cast("Workbench", bench), Effort.QUICK, Rulings(), time_limit_s=0)
    assert kept(in_a_hurry) == set()
    assert "did not add up" in in_a_hurry.reason


def test_what_makes_the_whole_slower_than_the_original_is_found_and_taken_back() -> None:
    class Deceiving(SyntheticBench):
        """Shows what group 3 costs only where the original is on the other side."""

        def compare(
            self, baseline: Written, candidate: Written, *a: object, **k: object
        ) -> Comparison:
            if baseline == self.original and "p/g3/default" in candidate.sha256:
                self.comparisons += 1
                return compared(1.0, 1.4 * self.time(candidate.path))
            return super().compare(baseline, candidate, *a, **k)

    sites: list[Site] = [("p", f"g{i}", ONE) for i in range(8)]
    bench = Deceiving(sites, [], {f"p/g{i}/default": 0.97 for i in range(8)})
    found = run(bench, Effort.QUICK)
    assert kept(found) == {f"p/g{i}/default" for i in range(8) if i != 3}
    assert found.build is not None
    assert found.build.remarks[3].reason == Verdict.REJECTED_SLOWER.value
    assert found.comparison is not None
    assert found.comparison.speedup > 1
    assert found.reason.endswith("was taken back")


def test_where_nothing_applies_nothing_is_timed() -> None:
    bench = SyntheticBench([], [], {})
    bench.prepared = False
    found = run(bench)
    assert found.build is None
    assert found.comparison is None
    assert "nothing to change" in found.reason


def test_one_disturbed_confirmation_does_not_cost_a_good_model() -> None:
    class Disturbed(SyntheticBench):
        disturbances = 1

        def compare(
            self, baseline: Written, candidate: Written, *a: object, **k: object
        ) -> Comparison:
            if baseline == self.original and self.disturbances:
                self.disturbances -= 1
                return super().compare(candidate, baseline)
            return super().compare(baseline, candidate)

    bench = Disturbed([("p", "g", ONE)], [], {"p/g/default": 0.9})
    assert kept(run(bench)) == {"p/g/default"}


@pytest.mark.parametrize("at", range(1, 8))
def test_an_interrupted_search_ends_with_what_has_shown_to_help(at: int) -> None:
    bench = SyntheticBench(
        [("good", "g", ONE), ("bad", "b", ONE), ("worse", "w", ONE)],
        [("lower", "l1", ONE), ("lower", "l2", ONE)],
        {
            "good/g/default": 0.8,
            "bad/b/default": 1.02,
            "worse/w/default": 1.05,
            "lower/l1/default": 0.8,
            "lower/l2/default": 1.1,
        },
    )
    bench.interrupted_at = at
    found = run(bench)
    assert bench.interrupted_at == -1, "the search was over before"
    assert found.is_partial
    assert "interrupted" in found.reason
    assert found.comparison is not None
    assert found.comparison.speedup >= 1
    best = run(SyntheticBench([*bench.sites[:3]], [*bench.sites[3:]], bench.factors))
    assert not best.is_partial
    assert best.comparison is not None
    assert best.comparison.speedup >= found.comparison.speedup


def test_an_interruption_before_anything_was_built_is_passed_on() -> None:
    bench = SyntheticBench([("good", "g", ONE)], [], {})
    bench.interrupted_at = 0
    with pytest.raises(InterruptedSearch):
        run(bench)


def test_a_time_limit_ends_the_trials() -> None:
    lower: list[Site] = [("lower", f"l{i}", ("a", "b", "c")) for i in range(4)]
    factors = {f"lower/l{i}/{v}": 0.9 for i in range(4) for v in "abc"}
    bench = SyntheticBench([], lower, factors)
    found = search(cast("Workbench", bench), Effort.FULL, Rulings(), time_limit_s=0.0)
    assert found.reason.startswith("the time of this effort was spent")
    assert bench.comparisons == 2  # the confirmation, with sessions opened twice


def test_simplifications_of_a_model_that_runs_for_seconds_share_one_verdict() -> None:
    simplify: list[Site] = [(f"s{i}", "g", ONE) for i in range(4)]
    lower: list[Site] = [("lower", "l", ("a", "b"))]
    factors = {"s0/g/default": 0.9, "s1/g/default": 1.01, "lower/l/a": 0.8}
    bench = SyntheticBench(simplify, lower, factors)
    assert kept(run(bench, Effort.QUICK)) == {"s0/g/default", "lower/l/a"}
    slow = SyntheticBench(simplify, lower, factors)
    slow.original_ms = 2000.0
    found = run(slow, Effort.QUICK)
    assert kept(found) == {*(f"s{i}/g/default" for i in range(4)), "lower/l/a"}
    assert slow.comparisons < bench.comparisons
    ruling = found.rulings.find("s1", "g")
    assert ruling.facts["measured"] == "all simplifications together"


def test_a_pass_that_holds_most_of_the_model_has_most_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(SyntheticBench):
        now = 0.0

        def compare_window(self, *args: Any, **kwargs: Any) -> Comparison:
            self.now += 8.0
            return super().compare_window(*args, **kwargs)

    def found(seconds: dict[str, float]) -> set[str]:
        heavy: list[Site] = [("heavy", f"h{i}", ("a",)) for i in range(5)]
        others: list[Site] = [(name, "o", ("a",)) for name in ("light", "lighter")]
        bench = Slow([], [*heavy, *others], {f"heavy/h{i}/a": 0.9 for i in range(5)})
        bench.has_windows = True
        bench.seconds = seconds
        monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=lambda: bench.now))
        return kept(run(bench, Effort.QUICK))

    assert len(found({"heavy": 1.0, "light": 0.1, "lighter": 0.1})) == 5
    assert len(found({})) < 5


def test_an_earlier_end_is_confirmed_or_dropped() -> None:
    bench = SyntheticBench([("good", "g", ONE), ("bad", "b", ONE)], [], {"good/g/default": 0.8})
    found = run(bench)
    decisions = json.loads(json.dumps(found.rulings.decisions()))
    rulings = Rulings().with_decisions(decisions)
    assert rulings == found.rulings
    before = bench.comparisons
    again = confirm(cast("Workbench", bench), Effort.FULL, rulings)
    assert again is not None
    assert kept(again) == kept(found)
    assert bench.comparisons == before + 1
    bench.factors["good/g/default"] = 1.2
    assert confirm(cast("Workbench", bench), Effort.FULL, rulings) is None
    bench.wrong = {"good/g/default"}
    assert confirm(cast("Workbench", bench), Effort.FULL, rulings) is None


def windowed(lower: list[Site], factors: dict[str, float], **alone: float) -> SyntheticBench:
    bench = SyntheticBench([], lower, factors)
    bench.has_windows = True
    bench.alone = {key.replace("_", "/"): value for key, value in alone.items()}
    return bench


def test_windows_choose_the_form_of_every_group() -> None:
    lower: list[Site] = [("low", g, ("a", "b")) for g in ("g1", "g2", "g3")]
    factors = {"low/g1/a": 0.9, "low/g1/b": 0.8, "low/g2/a": 0.9, "low/g2/b": 1.1, "low/g3/a": 1.2}
    bench = windowed(lower, factors)
    found = run(bench, Effort.QUICK)
    assert kept(found) == {"low/g1/b", "low/g2/a"}
    assert bench.windows == 6
    assert bench.comparisons == 4  # all gains together, g3 beside them, the confirmation twice
    assert found.build is not None
    reasons = {r.site: r.reason for r in found.build.remarks}
    assert reasons["g3"] == Verdict.REJECTED_SLOWER.value


def test_a_limit_of_ordinals_holds_for_lowering_too() -> None:
    lower: list[Site] = [("low", f"g{n}", ("a", "b")) for n in (1, 2, 3)]
    factors = {f"low/g{n}/b": 0.5 for n in (1, 2, 3)}
    bench = windowed(lower, factors)
    found = search(cast("Workbench", bench), Effort.QUICK, Rulings(limit=2))
    assert kept(found) == {"low/g1/b", "low/g2/b"}
    assert bench.windows == 4, "what may not be applied is not timed"
    wrong = windowed(lower, factors)
    wrong.wrong = {"low/g2/b", "low/g3/a"}
    found = search(cast("Workbench", wrong), Effort.QUICK, Rulings(limit=2))
    assert kept(found) == {"low/g1/b"}


def test_a_form_far_behind_ends_the_list_of_a_long_window() -> None:
    lower: list[Site] = [("low", "g", ("a", "b", "c", "d"))]
    factors = {"low/g/a": 0.5, "low/g/b": 0.51, "low/g/c": 0.49, "low/g/d": 0.1}
    long = windowed(lower, factors)
    long.window_ms = 100.0
    assert kept(run(long, Effort.QUICK)) == {"low/g/d"}
    assert long.windows == 4, "b is close behind a, and c leads"
    far = windowed(lower, factors | {"low/g/b": 0.6})
    far.window_ms = 100.0
    assert kept(run(far, Effort.QUICK)) == {"low/g/a"}
    assert far.windows == 2


def test_gains_of_windows_that_the_whole_model_does_not_show_are_dropped() -> None:
    lower: list[Site] = [("low", g, ONE) for g in ("g1", "g2", "g3", "g4", "g5")]
    factors = {f"low/g{i}/default": 0.95 for i in range(1, 6)} | {"low/g3/default": 1.4}
    bench = windowed(lower, factors, low_g3_default=0.7)
    assert kept(run(bench)) == {f"low/g{i}/default" for i in (1, 2, 4, 5)}


def test_sites_that_gain_only_together_are_tried_together() -> None:
    lower: list[Site] = [("low", "g1", ONE), ("low", "g2", ONE)]
    factors = {"low/g1/default": 0.9, "low/g2/default": 0.9}
    bench = windowed(lower, factors, low_g1_default=1.03, low_g2_default=1.1)
    assert kept(run(bench)) == {"low/g1/default", "low/g2/default"}
    hopeless = windowed(lower, factors, low_g1_default=1.2, low_g2_default=1.2)
    assert kept(run(hopeless)) == set()


def test_sites_that_nearly_gain_are_tried_beside_those_that_do() -> None:
    groups = ("g1", "g2", "g3", "g4")
    lower: list[Site] = [("low", g, ONE) for g in groups]
    factors = {f"low/{g}/default": 0.9 for g in groups} | {"low/g4/default": 1.3}
    alone = {"low_g2_default": 1.02, "low_g3_default": 1.03, "low_g4_default": 1.3}
    found = run(windowed(lower, factors, **alone), Effort.QUICK)
    assert kept(found) == {"low/g1/default", "low/g2/default", "low/g3/default"}


def test_a_window_that_gains_but_is_wrong_is_left_out() -> None:
    lower: list[Site] = [("low", "g1", ONE), ("low", "g2", ONE)]
    bench = windowed(lower, {"low/g1/default": 0.9, "low/g2/default": 0.5})
    bench.wrong = {"low/g2/default"}
    found = run(bench)
    assert kept(found) == {"low/g1/default"}
    assert found.build is not None
    reasons = {r.site: r.reason for r in found.build.remarks}
    assert reasons["g2"] == Verdict.REJECTED_WRONG.value


@pytest.mark.parametrize("groups", [("g1",), ("g1", "g2")])
def test_a_form_that_is_wrong_makes_room_for_the_next(groups: tuple[str, ...]) -> None:
    lower: list[Site] = [("low", g, ("a", "b", "c")) for g in groups]
    factors = {
        f"low/{g}/{v}": t for g in groups for v, t in zip("abc", (0.5, 0.9, 0.7), strict=True)
    }
    bench = windowed(lower, factors)
    bench.wrong = {"low/g1/a", "low/g1/c"}
    found = run(bench)
    assert kept(found) == {"low/g1/b", *(f"low/{g}/a" for g in groups[1:])}


def test_what_the_analytic_model_rules_out_is_not_timed() -> None:
    lower: list[Site] = [("low", "g1", ("a", "b")), ("low", "g2", ("a", "b"))]
    bench = windowed(lower, {"low/g1/a": 0.5, "low/g1/b": 0.7, "low/g2/a": 0.1, "low/g2/b": 0.1})
    bench.expected = {"low/g1/a": 9.0, "low/g2/a": 9.0, "low/g2/b": 8.0}
    found = run(bench, Effort.QUICK)
    assert kept(found) == {"low/g1/b"}
    assert bench.windows == 1
    assert found.build is not None
    reasons = {r.site: r.reason for r in found.build.remarks}
    assert reasons["g2"] == Verdict.REJECTED_ESTIMATE.value
    assert found.build.rulings.find("low", "g2").facts == {"expected": 0.125}


def test_a_rewrite_that_crashes_is_rejected_and_the_search_goes_on() -> None:
    simplify: list[Site] = [("good", "g", ONE), ("other", "o", ONE)]
    lower: list[Site] = [("low", "g1", ONE), ("low", "g2", ONE)]
    factors = {"good/g/default": 0.8, "low/g1/default": 0.9, "low/g2/default": 0.5}
    bench = SyntheticBench(simplify, lower, factors)
    bench.has_windows = True
    bench.crashing = {"low/g2/default"}
    found = run(bench)
    assert kept(found) == {"good/g/default", "low/g1/default"}
    assert found.build is not None
    ruling = found.build.rulings.find("low", "g2")
    assert ruling.verdict is Verdict.REJECTED_FAILED
    assert ruling.facts == {"failure": "low/g2/default crashes"}


def test_a_crash_of_the_simplified_model_leaves_the_canonicalised_one() -> None:
    bench = SyntheticBench([("only", "o", ONE)], [], {"only/o/default": 0.5})
    bench.crashing = {"only/o/default"}
    found = run(bench)
    assert kept(found) == set()
    assert found.build is not None
    assert found.build.rulings.find("only", "o").verdict is Verdict.REJECTED_FAILED


def test_a_neutral_simplification_that_makes_room_for_a_gain_stays() -> None:
    class Enabling(SyntheticBench):
        def build(self, rulings: Rulings) -> Build:
            sites = self.sites
            if rulings.find("neutral", "n").verdict is not Verdict.KEPT:
                self.sites = [s for s in sites if s[1] != "behind"]
            try:
                return super().build(rulings)
            finally:
                self.sites = sites

    bench = Enabling(
        [("neutral", "n", ONE), ("good", "g", ONE)],
        [("low", "behind", ONE)],
        {"good/g/default": 0.9, "low/behind/default": 0.8},
    )
    bench.has_windows = True
    found = run(bench, Effort.QUICK)
    assert kept(found) == {"neutral/n/default", "good/g/default", "low/behind/default"}
    bench.factors["low/behind/default"] = 1.1
    assert kept(run(bench, Effort.QUICK)) == {"good/g/default"}


def test_full_effort_brings_back_what_gains_beside_others_only() -> None:
    class Neighbours(SyntheticBench):
        def time(self, path: Path) -> float:
            both = {"low/g1/default", "high/h/default"} <= set(str(path).split())
            return super().time(path) * (0.7 if both else 1.0)

    factors = {"low/g1/default": 1.04, "low/g2/default": 1.2, "high/h/default": 0.9}
    lower: list[Site] = [("low", "g1", ONE), ("low", "g2", ONE), ("high", "h", ONE)]
    found = [
        run(with_windows(Neighbours([], lower, factors)), effort)
        for effort in (Effort.QUICK, Effort.FULL)
    ]
    assert [kept(f) for f in found] == [
        {"high/h/default"},
        {"low/g1/default", "high/h/default"},
    ]
    assert found[1].reason == "no change of any one decision gains anything more"


def with_windows(bench: SyntheticBench) -> SyntheticBench:
    bench.has_windows = True
    return bench
