from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pwopt.errors import UsageError
from pwopt.runtime import Comparison, Latency, compare, measure, open_session
from pwopt.runtime.measure import (
    Sampler,
    WarmSampler,
    compare_samplers,
    measure_sampler,
    median_interval,
)
from pwopt.target import Target
from tests.runtime.textual import RELU, write


class Machine:
    """A virtual machine: models take virtual time, with noise, a drift, and memory of the last."""

    def __init__(
        self,
        seed: int = 0,
        *,
        noise: float = 0.0,
        drift: float = 0.0,
        second_is_slower: float = 0.0,
    ) -> None:
        self.now_ms = 0.0
        self.order: list[str] = []
        self._rng = np.random.default_rng(seed)
        self._noise = noise
        self._drift = drift
        self._second_is_slower = second_is_slower

    def sampler(self, name: str, milliseconds: float) -> Sampler:
        def sample() -> float:
            factor = 1 + self._noise * self._rng.standard_normal()
            factor *= 1 + self._drift * len(self.order)
            factor *= 1 + self._second_is_slower * (len(self.order) % 2)
            self.order.append(name)
            elapsed = max(milliseconds * factor, 1e-6)
            self.now_ms += elapsed
            return elapsed

        return sample

    def clock(self) -> float:
        return self.now_ms / 1e3


def compared(
    machine: Machine,
    candidate_ms: float,
    *,
    seed: int = 0,
    decide: float | None = None,
    min_pairs: int = 9,
    max_pairs: int = 60,
    time_limit_s: float = 1e9,
    precision: float = 0.01,
    give_up: float | None = None,
    futile: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """A baseline of 5 ms against a candidate."""
    return compare_samplers(
        machine.sampler("A", 5.0),
        machine.sampler("B", candidate_ms),
        rng=np.random.default_rng(seed),
        decide=decide,
        min_pairs=min_pairs,
        max_pairs=max_pairs,
        time_limit_s=time_limit_s,
        precision=precision,
        give_up=give_up,
        futile=futile,
        on_progress=on_progress,
        clock=machine.clock,
    )


@pytest.mark.parametrize(("decide", "max_pairs"), [(None, 20), (1.0, 60)])
def test_equal_models_rarely_show_a_gain(decide: float | None, max_pairs: int) -> None:
    trials = 100
    results = [
        compared(Machine(n, noise=0.02), 5.0, seed=n, decide=decide, max_pairs=max_pairs)
        for n in range(trials)
    ]
    assert sum(result.ci95[0] > 1 for result in results) <= 0.05 * trials
    assert sum(result.ci95[1] < 1 for result in results) <= 0.1 * trials
    assert np.mean([result.speedup for result in results]) == pytest.approx(1.0, abs=0.003)


def test_a_slowdown_of_three_percent_is_found_in_noise_of_two() -> None:
    trials = 60
    results = [
        compared(Machine(seed, noise=0.02), 5.0 * 1.03, seed=seed, decide=1.0)
        for seed in range(trials)
    ]
    assert sum(result.ci95[1] < 1 for result in results) >= 0.9 * trials


def test_the_ratio_is_baseline_over_candidate() -> None:
    result = compared(Machine(), 2.5)
    assert result.speedup == pytest.approx(2.0)
    assert result.ci95 == pytest.approx((2.0, 2.0))
    assert result.baseline.median_ms == pytest.approx(5.0)
    assert result.candidate.median_ms == pytest.approx(2.5)
    assert result.baseline.runs == result.candidate.runs == result.pairs == 12
    assert result.stable


def test_who_goes_first_alternates() -> None:
    machine = Machine()
    compared(machine, 5.0, min_pairs=4, max_pairs=4)
    assert "".join(machine.order) == "ABBAABBA"


def test_neither_order_nor_drift_favours_a_side() -> None:
    result = compared(
        Machine(noise=0.001, drift=0.002, second_is_slower=0.05), 5.0, precision=0, max_pairs=40
    )
    assert result.speedup == pytest.approx(1.0, abs=0.005)
    assert result.ci95[0] < 1 < result.ci95[1]


def test_a_few_disturbed_samples_do_not_move_the_median() -> None:
    machine = Machine(noise=0.005)
    steady, count = machine.sampler("A", 5.0), 0

    def disturbed() -> float:
        nonlocal count
        count += 1
        return steady() * (10 if count % 7 == 0 else 1)

    result = compare_samplers(
        disturbed, machine.sampler("B", 5.0), rng=np.random.default_rng(0), clock=machine.clock
    )
    assert result.speedup == pytest.approx(1.0, abs=0.01)


def test_it_ends_once_decided_or_precise() -> None:
    assert compared(Machine(noise=0.05), 10.0, decide=1.0, precision=0).pairs == 9
    assert compared(Machine(noise=0.05), 10.0, precision=0).pairs == 60
    assert compared(Machine(noise=0.001), 5.0).pairs == 12
    undecided = compared(Machine(noise=0.05), 5.0, decide=1.0, precision=0)
    assert (undecided.pairs, undecided.stable) == (60, False)


@pytest.mark.parametrize("count", [2, 7, 31, 400])
def test_intervals_are_those_of_the_percentile_bootstrap(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(count).lognormal(0.0, 0.1, count)
    median, (low, high) = median_interval(values, np.random.default_rng(0))
    known = stats.bootstrap((values,), np.median, method="percentile", rng=1, n_resamples=9999)
    assert median == np.median(values)
    spread = 0.05 * (values.max() - values.min())
    assert (low, high) == pytest.approx(tuple(known.confidence_interval), abs=spread)


def test_clear_losers_are_given_up_after_three_pairs() -> None:
    lost = compared(Machine(noise=0.02), 6.0, decide=1.005, give_up=0.9)
    assert lost.pairs == 3
    assert lost.ci95[1] < 0.9
    assert compared(Machine(noise=0.02), 5.3, decide=1.005, give_up=0.9).pairs > 3
    assert compared(Machine(noise=0.02), 4.0, decide=1.005, give_up=0.9).pairs > 3


def test_what_cannot_gain_enough_is_not_timed_to_the_end() -> None:
    def pairs(candidate_ms: float, futile: float | None) -> float:
        found = [
            compared(
                Machine(n, noise=0.02),
                candidate_ms,
                seed=n,
                decide=1.005,
                futile=futile,
                max_pairs=200,
                precision=0.005,
            )
            for n in range(20)
        ]
        return float(np.mean([c.pairs for c in found]))

    assert pairs(5.0, 1.01) < 0.6 * pairs(5.0, None)
    assert pairs(5.0 / 1.03, 1.01) == pytest.approx(pairs(5.0 / 1.03, None), rel=0.05)


def test_precision_is_half_the_width_relative_to_the_speedup() -> None:
    for precision in (0.02, 0.01):
        result = compared(Machine(noise=0.03), 2.5, precision=precision, max_pairs=400)
        half_width = (result.ci95[1] - result.ci95[0]) / 2 / result.speedup
        assert 0.5 * precision < half_width <= 1.1 * precision


def test_the_time_limit_spares_the_first_six_pairs() -> None:
    assert compared(Machine(noise=0.05), 5.0, time_limit_s=0, precision=0).pairs == 6
    assert compared(Machine(noise=0.05), 5.0, time_limit_s=0, min_pairs=3, precision=0).pairs == 3
    assert compared(Machine(noise=0.05), 5.0, time_limit_s=0.2, precision=0).pairs == 21


def test_the_same_seed_gives_the_same_interval() -> None:
    first, again, other = (compared(Machine(noise=0.05), 5.0, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.ci95 != other.ci95


def test_progress_counts_pairs() -> None:
    seen: list[tuple[int, int]] = []
    compared(Machine(), 5.0, max_pairs=20, on_progress=lambda *at: seen.append(at))
    assert seen == [(n, 20) for n in range(1, 13)]


@pytest.mark.parametrize(("fewest", "most"), [(1, 5), (9, 8), (0, 0)])
def test_impossible_numbers_are_usage_errors(fewest: int, most: int) -> None:
    with pytest.raises(UsageError, match="samples are impossible"):
        compared(Machine(), 5.0, min_pairs=fewest, max_pairs=most)


def test_measuring_alone_stops_when_precise() -> None:
    rng = np.random.default_rng(0)
    quiet, noisy = Machine(noise=0.001), Machine(noise=0.2)
    latency = measure_sampler(quiet.sampler("A", 5.0), rng=rng, clock=quiet.clock)
    assert latency.runs == 12
    assert latency.ci95_ms[0] <= latency.median_ms <= latency.ci95_ms[1]
    assert latency.median_ms == pytest.approx(5.0, rel=0.01)
    assert measure_sampler(noisy.sampler("A", 5.0), rng=rng, clock=noisy.clock).runs == 60


class Model:
    """Takes ``steps_ns`` in turn, then the last one for ever, on a virtual clock."""

    def __init__(self, *steps_ns: int) -> None:
        self.now_ns = 0
        self.runs = 0
        self._steps = steps_ns

    def run(self) -> None:
        self.now_ns += self._steps[min(self.runs, len(self._steps) - 1)]
        self.runs += 1

    def clock_ns(self) -> int:
        return self.now_ns


def test_short_models_are_repeated_to_two_milliseconds() -> None:
    model = Model(300_000)
    sampler = WarmSampler.warmed_up(model.run, clock_ns=model.clock_ns)
    before = model.runs
    assert sampler() == pytest.approx(0.3)
    assert sampler.repeats == 7
    assert model.runs - before == 8  # one untimed


def test_the_lead_in_is_not_timed() -> None:
    model = Model(10_000_000)
    sampler = WarmSampler.warmed_up(model.run, clock_ns=model.clock_ns)
    cold_then_warm = Model(9_000_000, 5_000_000)
    assert WarmSampler(cold_then_warm.run, 1, sampler.lead_in, cold_then_warm.clock_ns)() == 5.0


def test_long_models_run_once_per_sample() -> None:
    model = Model(400_000_000)
    sampler = WarmSampler.warmed_up(model.run, clock_ns=model.clock_ns)
    before = model.runs
    assert sampler() == 400.0
    assert model.runs - before == 1


def test_warming_up_goes_on_while_runs_get_faster_within_bounds() -> None:
    falling = Model(*(int(1e7 * 0.8**n) for n in range(12)))
    WarmSampler.warmed_up(falling.run, clock_ns=falling.clock_ns)
    assert falling.runs == 14
    for_ever = Model(*(int(1e7 * 0.9**n) for n in range(100)))
    WarmSampler.warmed_up(for_ever.run, clock_ns=for_ever.clock_ns)
    assert for_ever.runs == 20
    slow = Model(900_000_000)
    WarmSampler.warmed_up(slow.run, clock_ns=slow.clock_ns)
    assert slow.runs == 2
    slower = Model(1_100_000_000)
    WarmSampler.warmed_up(slower.run, clock_ns=slower.clock_ns)
    assert slower.runs == 1


def test_sessions_are_compared_with_the_collector_off(tmp_path: Path) -> None:
    states: list[bool] = []
    feeds = {"x": np.ones((1, 3), np.float32)}
    with (
        open_session(write(tmp_path, RELU), Target(threads=1)) as first,
        open_session(write(tmp_path, RELU), Target(threads=1)) as second,
    ):
        result = compare(
            first,
            second,
            feeds,
            min_pairs=2,
            max_pairs=4,
            rng=np.random.default_rng(0),
            on_progress=lambda *_: states.append(gc.isenabled()),
        )
        latency = measure(first, feeds, min_runs=2, max_runs=3, rng=np.random.default_rng(0))
    assert 2 <= result.pairs <= 4
    assert result.ci95[0] <= result.speedup <= result.ci95[1]
    assert set(states) == {False}
    assert gc.isenabled()
    assert latency.median_ms > 0


def test_wrong_feeds_are_refused_before_timing(tmp_path: Path) -> None:
    with (
        open_session(write(tmp_path, RELU), Target(threads=1)) as session,
        pytest.raises(UsageError, match="lacks 'x'"),
    ):
        compare(session, session, {}, rng=np.random.default_rng(0))


def test_joined_comparisons_hold_both_intervals() -> None:
    first = Comparison(
        Latency(2.0, (1.9, 2.1), 10), Latency(1.0, (0.9, 1.1), 10), 2.0, (1.8, 2.1), 10, stable=True
    )
    second = Comparison(
        Latency(8.0, (7.9, 8.1), 5), Latency(4.0, (3.9, 4.1), 5), 0.5, (0.4, 0.6), 5, stable=False
    )
    joined = first.joined(second)
    assert joined.speedup == pytest.approx(1.0)
    assert joined.ci95 == (0.4, 2.1)
    assert joined.pairs == 15
    assert joined.baseline == Latency(4.0, (1.9, 8.1), 15)
    assert not joined.stable
    assert Comparison.from_json(json.loads(json.dumps(joined.to_json()))) == joined
