"""Runs on buffers of a device's memory: bound once, read and written in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pwopt.errors import UsageError
from pwopt.runtime import ExecutionError, compare, measure, measure_copies, open_session
from pwopt.runtime.measure import WarmSampler
from pwopt.target import Target
from tests.runtime.stand_in import use_stand_in
from tests.runtime.textual import RELU, write

DEVICE = Target("device", threads=1)
FEEDS = {"x": np.array([[-1, 0, 2]], np.float32)}


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)


@pytest.mark.parametrize("options", [{}, {"replay": "1"}], ids=str)
def test_a_bound_run_writes_the_same_buffer_each_time(
    tmp_path: Path, options: dict[str, str]
) -> None:
    target = Target("device", threads=1, provider_options=options)
    with open_session(write(tmp_path, RELU), target) as session:
        run: Any = session.bound_runner(FEEDS)
        first = run().get_outputs()[0]
        place, values = first.data_ptr(), first.numpy().copy()
        second = run().get_outputs()[0]
        assert second.data_ptr() == place
    np.testing.assert_array_equal(values, [[0, 0, 2]])
    np.testing.assert_array_equal(second.numpy(), values)


def test_inputs_are_copied_when_they_are_bound(tmp_path: Path) -> None:
    strided = np.array([[1, 9, 2, 9, 3, 9]], np.float32)
    with open_session(write(tmp_path, RELU), DEVICE) as session:
        run: Any = session.bound_runner({"x": strided[:, ::2]})
        np.testing.assert_array_equal(run().get_outputs()[0].numpy(), [[1, 2, 3]])


def test_what_cannot_be_bound_runs_all_the_same(tmp_path: Path) -> None:
    graph = "g (seq(float[N]) s) => (seq(float[N]) t) { t = Identity(s) }"
    with open_session(write(tmp_path, graph), DEVICE) as session:
        feeds = {"s": [np.ones(2, np.float32)]}
        run: Any = session.bound_runner(feeds)
        (only,) = run()
        np.testing.assert_array_equal(only[0], [1, 1])
        assert session.copiers(feeds) is None
    text = write(tmp_path, "g (string[N] x) => (string[N] y) { y = Identity(x) }", name="text")
    with open_session(text, DEVICE) as session:
        assert session.copiers({"x": np.array(["a"])}) is None


def test_wrong_feeds_and_failures_are_told_apart(tmp_path: Path) -> None:
    with open_session(write(tmp_path, RELU), DEVICE) as session:
        with pytest.raises(UsageError, match="lacks 'x'"):
            session.bound_runner({})
        with pytest.raises(ExecutionError, match="Got: 4 Expected: 3"):
            session.bound_runner({"x": np.zeros((1, 4), np.float32)})


def test_devices_are_timed_on_their_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []

    def once(run: Any) -> WarmSampler:
        ran.append(run())
        ticks = iter(range(0, 10**9, 1000))
        return WarmSampler(run, 1, lead_in=False, clock_ns=lambda: next(ticks))

    monkeypatch.setattr(WarmSampler, "warmed_up", once)
    rng = np.random.default_rng(0)
    path = write(tmp_path, RELU)
    with open_session(path, DEVICE) as first, open_session(path, DEVICE) as second:
        compare(first, second, FEEDS, min_pairs=2, max_pairs=2, rng=rng)
        measure(first, FEEDS, min_runs=2, max_runs=2, rng=rng)
        assert all(hasattr(binding, "get_outputs") for binding in ran)
        assert len(ran) == 3
        copies = measure_copies(first, FEEDS, rng=rng)
        assert copies is not None
        assert copies.to_device_ms > 0
        assert copies.to_host_ms > 0
    ran.clear()
    with open_session(path, Target(threads=1)) as session:
        measure(session, FEEDS, min_runs=2, max_runs=2, rng=rng)
        assert isinstance(ran[0], list)
        assert measure_copies(session, FEEDS, rng=rng) is None
