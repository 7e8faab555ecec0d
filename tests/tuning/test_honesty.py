"""What the search claims on a simulated machine with the noise of shared ones; no real clock.

Times drift, come in bursts that last (autocorrelated noise), spike, and depend on where a session's
memory happens to lie, which is drawn anew when a session is opened.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pwopt.graph import Written
from pwopt.runtime import Comparison
from pwopt.runtime.measure import Sampler, compare_samplers
from pwopt.tuning.clock import Clock
from pwopt.tuning.effort import ALLOWANCES, Effort
from pwopt.tuning.pipeline import Rulings, StopReason
from pwopt.tuning.timing import Timing
from pwopt.tuning.verdicts import is_gain, is_loss
from pwopt.tuning.workbench import Build, Precision, Workbench

TRIALS = 100


class SharedMachine:
    """Virtual milliseconds of models on a machine that others use, too."""

    def __init__(self, seed: int, *, noise: float, burst: float, spikes: float, drift: float):
        self.now_ms = 0.0
        self._rng = np.random.default_rng(seed)
        self._noise, self._burst, self._spikes, self._drift = noise, burst, spikes, drift
        self._state = 0.0

    def clock(self) -> float:
        return self.now_ms / 1e3

    def sampler(self, milliseconds: float) -> Sampler:
        def sample() -> float:
            self._state = 0.95 * self._state + math.sqrt(1 - 0.95**2) * self._rng.standard_normal()
            factor = 1 + abs(self._burst * self._state) + self._noise * self._rng.standard_normal()
            factor += self._drift * self.now_ms / 1e3
            if self._rng.random() < self._spikes:
                factor += self._rng.exponential(2.0)
            elapsed = milliseconds * max(factor, 0.1)
            self.now_ms += elapsed
            return elapsed

        return sample


class SharedBench:
    """A workbench for two models on such a machine; placements come in two kinds, at random."""

    def __init__(self, seed: int, candidate_ms: float, placement: float, **noise: float) -> None:
        self.machine = SharedMachine(seed, **noise)
        self.rng = np.random.default_rng(seed)
        self.original = Written(Path("original"), "original", 0)
        self.candidate = Written(Path("candidate"), "candidate", 0)
        self.ms = {"original": 5.0, "candidate": candidate_ms}
        self.placement = placement
        self.placed: dict[str, float] = {}

    def compare(
        self,
        baseline: Written,
        candidate: Written,
        precision: Precision,
        _: str,
        *,
        decide: float | None = None,
        reopened: int = 0,
        **__: Any,
    ) -> Comparison:
        if reopened:
            self.placed.clear()
        times = []
        for model in (baseline, candidate):
            kind = self.placed.setdefault(model.sha256, self.rng.integers(2) * self.placement)
            times.append(self.ms[model.sha256] * (1 + kind))
        return compare_samplers(
            self.machine.sampler(times[0]),
            self.machine.sampler(times[1]),
            min_pairs=precision.min_pairs,
            max_pairs=precision.max_pairs,
            time_limit_s=precision.seconds,
            precision=0.005,
            rng=self.rng,
            decide=decide,
            give_up=None if decide is None else 0.9,
            clock=self.machine.clock,
        )


NOISES = [
    pytest.param(
        {"noise": 0.02, "burst": 0.0, "spikes": 0.0, "drift": 0.0},
        id="steady",
        marks=pytest.mark.slow,
    ),
    pytest.param({"noise": 0.01, "burst": 0.04, "spikes": 0.0, "drift": 0.0}, id="bursts"),
    pytest.param(
        {"noise": 0.01, "burst": 0.0, "spikes": 0.1, "drift": 0.0},
        id="spikes",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"noise": 0.01, "burst": 0.0, "spikes": 0.0, "drift": 0.05},
        id="drift",
        marks=pytest.mark.slow,
    ),
]


def timing(bench: SharedBench) -> Timing:
    """How a search at quick effort compares."""
    allowance = ALLOWANCES[Effort.QUICK]
    return Timing(cast("Workbench", bench), allowance, Clock(allowance.total_s))


def build(written: Written) -> Build:
    return Build(Rulings(), written, (), 0, StopReason.FIXED_POINT)


@pytest.mark.parametrize("placement", [0.0, 0.02])
@pytest.mark.parametrize("noise", NOISES)
def test_a_model_beside_itself_claims_no_gain(noise: dict[str, float], placement: float) -> None:
    claimed = 0
    for seed in range(TRIALS):
        bench = SharedBench(seed, 5.0, placement, **noise)
        models = build(bench.original), build(bench.candidate)
        claimed += is_gain(timing(bench).compare(*models, "itself"))
    assert claimed <= 0.05 * TRIALS


@pytest.mark.parametrize("noise", NOISES)
def test_confirming_a_model_beside_itself_claims_no_gain(noise: dict[str, float]) -> None:
    claimed = 0
    for seed in range(TRIALS):
        bench = SharedBench(seed, 5.0, 0.02, **noise)
        claimed += timing(bench).against_original(build(bench.candidate)).ci95[0] > 1
    assert claimed <= 0.05 * TRIALS


@pytest.mark.parametrize("noise", NOISES)
def test_a_slowdown_of_three_percent_does_not_pass_for_confirmed(noise: dict[str, float]) -> None:
    found = 0
    for seed in range(TRIALS):
        bench = SharedBench(seed, 5.0 * 1.03, 0.0, **noise)
        found += is_loss(timing(bench).against_original(build(bench.candidate)))
    assert found >= 0.9 * TRIALS
