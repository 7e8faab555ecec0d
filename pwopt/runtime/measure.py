"""Paired latency: two sessions take turns, and the ratio of their times is what counts.

Machines are shared and noisy, so that an absolute time says little; a ratio of two samples taken
one right after the other says much. The median over such pairs is robust against the odd
disturbed one, and a percentile bootstrap (Efron 1979) tells how far it can be trusted.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pwopt.errors import UsageError
from pwopt.runtime.session import Session, Value

__all__ = [
    "Comparison",
    "Copies",
    "Latency",
    "Sampler",
    "WarmSampler",
    "compare",
    "compare_samplers",
    "measure",
    "measure_copies",
    "measure_sampler",
    "mean_interval",
    "median_interval",
]

Sampler: TypeAlias = Callable[[], float]
"""Takes one sample: milliseconds per run."""

_CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 1000
_RESAMPLED_AT_ONCE: Final = 1_000_000
"""Values that a bootstrap holds in memory."""
_EARLY_ALPHA: Final = 0.0025
"""One-sided error allowed at each look before the last; eight looks together spend 2%."""
_FEWEST_PAIRS: Final = 6
"""With fewer, not even the extremes of the sample make a 95% interval: 2 * 0.5**5 > 5%."""
_CLEAR_PAIRS: Final = 3
_SAMPLE_NS: Final = 2_000_000
_MOST_REPEATS: Final = 2000
_LEAD_IN_BELOW_NS: Final = 250_000_000
_WARM_UP_NS: Final = 1_000_000_000
_WARM_UP_RUNS: Final = 20
_STILL_FALLING: Final = 0.98
_COPY_SAMPLES: Final = 9


@dataclass(frozen=True)
class Latency:
    """Time of one run.

    Attributes:
        median_ms: median over the samples, in milliseconds.
        ci95_ms: 95% bootstrap interval of that median.
        runs: number of samples; for very short models each is the mean of several runs.
    """

    median_ms: float
    ci95_ms: tuple[float, float]
    runs: int

    def joined(self, other: Latency) -> Latency:
        """Both as one: the geometric mean, and an interval that holds both."""
        low, high = zip(self.ci95_ms, other.ci95_ms, strict=True)
        return Latency(
            math.sqrt(self.median_ms * other.median_ms),
            (min(low), max(high)),
            self.runs + other.runs,
        )


@dataclass(frozen=True)
class Copies:
    """What moving values between memories takes, once per run, in milliseconds.

    Attributes:
        to_device_ms: all inputs, from numpy's memory to the device's.
        to_host_ms: all outputs, back.
    """

    to_device_ms: float
    to_host_ms: float


@dataclass(frozen=True)
class Comparison:
    """Two models timed in pairs.

    Attributes:
        baseline: latency of the baseline in this comparison.
        candidate: latency of the candidate in this comparison.
        speedup: median over the pairs of baseline time / candidate time; above 1 is faster.
        ci95: 95% bootstrap interval of the speedup.
        pairs: number of pairs.
        stable: whether the interval is narrow enough to decide: within the precision asked for,
            or beside the ratio that was to be decided.
    """

    baseline: Latency
    candidate: Latency
    speedup: float
    ci95: tuple[float, float]
    pairs: int
    stable: bool

    def joined(self, other: Comparison) -> Comparison:
        """Both as one: geometric means, and an interval that holds both.

        Where a session's memory happens to lie shifts all of its times by a few percent, which no
        number of pairs averages out; comparing once more with sessions opened anew does.
        """
        low, high = zip(self.ci95, other.ci95, strict=True)
        return Comparison(
            self.baseline.joined(other.baseline),
            self.candidate.joined(other.candidate),
            math.sqrt(self.speedup * other.speedup),
            (min(low), max(high)),
            self.pairs + other.pairs,
            stable=self.stable and other.stable,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparison:
        """What :meth:`to_json` made, also after a way through JSON."""
        sides = {side: _latency_from(value[side]) for side in ("baseline", "candidate")}
        low, high = value["ci95"]
        return cls(**{**value, **sides, "ci95": (low, high)})


@dataclass(frozen=True)
class WarmSampler:
    """A :data:`Sampler` around a function that runs a model once.

    Attributes:
        run: runs the model once.
        repeats: timed runs per sample, so that a sample lasts at least about 2 ms.
        lead_in: whether one untimed run precedes each sample. It puts back the state that a user
            sees who runs this model alone: weights in the cache, threads awake. Without it the
            model that ran last has the advantage. It is left out where a run is so long that the
            effect is below the noise.
        clock_ns: a monotonic clock in nanoseconds.
    """

    run: Callable[[], object]
    repeats: int
    lead_in: bool
    clock_ns: Callable[[], int] = time.perf_counter_ns

    def __call__(self) -> float:
        """Take one sample; returns milliseconds per run."""
        if self.lead_in:
            self.run()
        start = self.clock_ns()
        for _ in range(self.repeats):
            self.run()
        return (self.clock_ns() - start) / self.repeats / 1e6

    @classmethod
    def warmed_up(
        cls, run: Callable[[], object], *, clock_ns: Callable[[], int] = time.perf_counter_ns
    ) -> WarmSampler:
        """Run until two runs in a row are no faster than before (at most 20 runs or 1 s)."""
        fastest = _timed_ns(run, clock_ns)
        total, runs, steady = fastest, 1, 0
        while steady < 2 and runs < _WARM_UP_RUNS and total < _WARM_UP_NS:
            elapsed = _timed_ns(run, clock_ns)
            steady = steady + 1 if elapsed > _STILL_FALLING * fastest else 0
            fastest = min(fastest, elapsed)
            total, runs = total + elapsed, runs + 1
        repeats = min(math.ceil(_SAMPLE_NS / max(fastest, 1)), _MOST_REPEATS)
        return cls(run, repeats, fastest < _LEAD_IN_BELOW_NS, clock_ns)


def compare(
    baseline: Session,
    candidate: Session,
    feeds: Mapping[str, Value],
    *,
    min_pairs: int = 9,
    max_pairs: int = 60,
    time_limit_s: float = 20.0,
    precision: float = 0.01,
    rng: np.random.Generator,
    decide: float | None = None,
    give_up: float | None = None,
    futile: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time *baseline* and *candidate* in turn on the same values, after warming both up.

    On a device the values lie in its memory, and a run ends when the outputs are there; what
    copying them takes is for :func:`measure_copies` to say.

    Arguments and result as in :func:`compare_samplers`.

    Raises:
        UsageError: the feeds are not the models', or the numbers of pairs are impossible.
        ExecutionError: one of the models fails on *feeds*.
    """
    run_baseline, run_candidate = baseline.timed_runner(feeds), candidate.timed_runner(feeds)
    with _no_garbage_collection():
        return compare_samplers(
            WarmSampler.warmed_up(run_baseline),
            WarmSampler.warmed_up(run_candidate),
            min_pairs=min_pairs,
            max_pairs=max_pairs,
            time_limit_s=time_limit_s,
            precision=precision,
            rng=rng,
            decide=decide,
            give_up=give_up,
            futile=futile,
            on_progress=on_progress,
        )


def compare_samplers(
    baseline: Sampler,
    candidate: Sampler,
    *,
    min_pairs: int = 9,
    max_pairs: int = 60,
    time_limit_s: float = 20.0,
    precision: float = 0.01,
    rng: np.random.Generator,
    decide: float | None = None,
    give_up: float | None = None,
    futile: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Sample both in pairs; which goes first alternates, so that neither order nor drift counts.

    The pairs are looked at a few times on the way. It ends early once the interval is narrow
    enough, or lies beside *decide*. Whoever looks often sees differences where there are none, so
    the interval must be narrow at two looks in a row, and a decision must also pass an exact sign
    test at a level that keeps all looks together below 5%.

    Args:
        baseline: samples the baseline.
        candidate: samples the candidate.
        min_pairs: pairs to take before the first look.
        max_pairs: pairs to take at most.
        time_limit_s: take no further pairs after this many seconds, except for the first 6
            (*min_pairs* if that is less), below which no 95% interval exists.
        precision: half width of the interval, relative to the speedup, at which to end.
        rng: draws the bootstrap samples.
        decide: a speedup; end once the interval lies to one side of it.
        give_up: a speedup; end after 3 pairs if all of them lie below it. Three say little about
            how large the loss is, and whoever gives up too early only misses a gain.
        futile: a speedup; end at a look at which the interval lies below it. For those who do
            nothing but drop a candidate that shows no gain: no claim follows from it.
        on_progress: called after each pair with the pairs taken and *max_pairs*.
        clock: seconds, for the time limit.

    Raises:
        UsageError: *min_pairs* is below 2 or above *max_pairs*.
    """
    looks = _looks(min_pairs, max_pairs)
    times: list[tuple[float, float]] = []
    narrow = False
    start = clock()
    while len(times) < max_pairs:
        times.append(_pair(baseline, candidate, baseline_first=len(times) % 2 == 0))
        if on_progress is not None:
            on_progress(len(times), max_pairs)
        if give_up is not None and len(times) == _CLEAR_PAIRS and max(_ratios(times)) < give_up:
            break
        if clock() - start > time_limit_s and len(times) >= min(min_pairs, _FEWEST_PAIRS):
            break
        if len(times) not in looks:
            continue
        ratios = _ratios(times)
        speedup, interval = median_interval(ratios, rng)
        was_narrow, narrow = narrow, _is_narrow(speedup, interval, precision)
        if (narrow and was_narrow) or _is_decided(ratios, interval, decide):
            break
        if futile is not None and interval[1] < futile:
            break
    ratios = _ratios(times)
    speedup, interval = median_interval(ratios, rng)
    return Comparison(
        baseline=_latency([a for a, _ in times], rng),
        candidate=_latency([b for _, b in times], rng),
        speedup=speedup,
        ci95=interval,
        pairs=len(times),
        stable=_is_narrow(speedup, interval, precision) or _excludes(interval, decide),
    )


def measure(
    session: Session,
    feeds: Mapping[str, Value],
    *,
    min_runs: int = 9,
    max_runs: int = 60,
    time_limit_s: float = 10.0,
    precision: float = 0.01,
    rng: np.random.Generator,
    on_progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Time one session alone; arguments as in :func:`measure_sampler`.

    An absolute time holds for this machine at this moment only: compare with :func:`compare`.

    Raises:
        UsageError: the feeds are not the model's, or the numbers of runs are impossible.
        ExecutionError: the model fails on *feeds*.
    """
    run = session.timed_runner(feeds)
    with _no_garbage_collection():
        return measure_sampler(
            WarmSampler.warmed_up(run),
            min_runs=min_runs,
            max_runs=max_runs,
            time_limit_s=time_limit_s,
            precision=precision,
            rng=rng,
            on_progress=on_progress,
        )


def measure_copies(
    session: Session, feeds: Mapping[str, Value], *, rng: np.random.Generator
) -> Copies | None:
    """Time copying *feeds* to the device of *session*, and the outputs back.

    Returns:
        ``None`` where nothing is copied: on the CPU, or with values that are no tensors.

    Raises:
        UsageError: the feeds are not the model's.
        ExecutionError: the model fails on *feeds*.
    """
    copiers = session.copiers(feeds)
    if copiers is None:
        return None
    with _no_garbage_collection():
        to_device, to_host = (
            measure_sampler(
                WarmSampler.warmed_up(copy),
                min_runs=_COPY_SAMPLES,
                max_runs=_COPY_SAMPLES,
                rng=rng,
            )
            for copy in copiers
        )
    return Copies(to_device.median_ms, to_host.median_ms)


def measure_sampler(
    sampler: Sampler,
    *,
    min_runs: int = 9,
    max_runs: int = 60,
    time_limit_s: float = 10.0,
    precision: float = 0.01,
    rng: np.random.Generator,
    on_progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Take samples until the interval of their median is within *precision*, or a limit is met.

    The limits are *max_runs* samples and *time_limit_s* seconds by *clock*, as in
    :func:`compare_samplers`; *on_progress* is told the samples taken and *max_runs*.

    Raises:
        UsageError: *min_runs* is below 2 or above *max_runs*.
    """
    looks = _looks(min_runs, max_runs)
    times: list[float] = []
    narrow = False
    start = clock()
    while len(times) < max_runs:
        times.append(sampler())
        if on_progress is not None:
            on_progress(len(times), max_runs)
        if clock() - start > time_limit_s and len(times) >= min(min_runs, _FEWEST_PAIRS):
            break
        if len(times) not in looks:
            continue
        was_narrow, narrow = narrow, _is_narrow(*median_interval(times, rng), precision)
        if narrow and was_narrow:
            break
    return _latency(times, rng)


def _timed_ns(run: Callable[[], object], clock_ns: Callable[[], int]) -> int:
    start = clock_ns()
    run()
    return clock_ns() - start


def _pair(baseline: Sampler, candidate: Sampler, *, baseline_first: bool) -> tuple[float, float]:
    if baseline_first:
        first = baseline()
        return first, candidate()
    first = candidate()
    return baseline(), first


def _ratios(times: Sequence[tuple[float, float]]) -> list[float]:
    return [a / b if b > 0 else math.inf for a, b in times]


def _looks(fewest: int, most: int) -> frozenset[int]:
    """Sample sizes below *most* at which to look, each about 1.3 times the last.

    Even but for the first, so that either side goes first equally often.
    """
    if not 2 <= fewest <= most:
        raise UsageError(f"{fewest} to {most} samples are impossible; give at least 2, in order.")
    looks = [fewest]
    while looks[-1] < most:
        step = math.ceil(looks[-1] * 1.3)
        looks.append(step + step % 2)
    return frozenset(look for look in looks if look < most)


def _is_decided(
    ratios: Sequence[float], interval: tuple[float, float], decide: float | None
) -> bool:
    return decide is not None and _excludes(interval, decide) and _sign_test(ratios, decide)


def _sign_test(ratios: Sequence[float], decide: float) -> bool:
    """Whether so many ratios on one side of *decide* are no accident; exact for any noise."""
    above = sum(ratio > decide for ratio in ratios)
    below = sum(ratio < decide for ratio in ratios)
    count = len(ratios)
    ways = sum(math.comb(count, k) for k in range(max(above, below), count + 1))
    return bool(ways <= _EARLY_ALPHA * 2**count)


def _is_narrow(median: float, interval: tuple[float, float], precision: float) -> bool:
    return interval[1] - interval[0] <= 2 * precision * median


def _excludes(interval: tuple[float, float], decide: float | None) -> bool:
    return decide is not None and not interval[0] <= decide <= interval[1]


def median_interval(
    values: Sequence[float] | npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """Median of two or more *values*, and its percentile bootstrap interval."""
    # The percentile method, not BCa: the median's jackknife, which BCa needs, is degenerate.
    return _bootstrapped(np.median, values, rng)


def mean_interval(
    values: Sequence[float] | npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """Mean of two or more *values*, and its percentile bootstrap interval."""
    return _bootstrapped(np.mean, values, rng)


def _bootstrapped(
    statistic: Callable[..., Any],
    values: Sequence[float] | npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[float, tuple[float, float]]:
    # Importing scipy.stats for this would take most of a second, more than many second runs.
    sample = np.asarray(values, dtype=np.float64)
    batch = max(1, _RESAMPLED_AT_ONCE // len(sample))
    resampled = [
        statistic(sample[rng.integers(len(sample), size=(rows, len(sample)))], axis=1)
        for rows in _portions(_RESAMPLES, batch)
    ]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(resampled), (tail, 1 - tail))
    return float(statistic(sample)), (float(low), float(high))


def _portions(total: int, most: int) -> list[int]:
    """*total* in portions of at most *most*."""
    return [min(most, total - start) for start in range(0, total, most)]


def _latency_from(value: Mapping[str, Any]) -> Latency:
    low, high = value["ci95_ms"]
    return Latency(value["median_ms"], (low, high), value["runs"])


def _latency(times: Sequence[float], rng: np.random.Generator) -> Latency:
    median, interval = median_interval(times, rng)
    return Latency(median_ms=median, ci95_ms=interval, runs=len(times))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running in the middle of a sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
