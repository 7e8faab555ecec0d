"""Models run here and in a process of their own, exactly and as timed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pwopt.errors import InvalidModelError
from pwopt.runtime import ExecutionError, Reference, Value, verification_target, verify
from pwopt.runtime.providers import CUDA
from pwopt.runtime.runs import Runs, run_all, run_apart
from pwopt.target import Target
from tests.runtime.stand_in import DEVICE, use_stand_in
from tests.runtime.textual import write

CPU = Target(threads=1)
GRAPH = "g (float[N,3] x) => (float[N,3] y) { [act] y = Erf(x) }"
FEEDS = {0: {"x": np.full((2, 3), 0.5, np.float32)}, 2: {"x": np.zeros((1, 3), np.float32)}}


def test_a_process_of_its_own_computes_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, GRAPH)
    here, apart = run_all(path, CPU, FEEDS), run_apart(path, CPU, FEEDS, {})
    assert here.interface == apart.interface
    assert list(apart.outputs) == [0, 2]
    for index, outputs in here.outputs.items():
        np.testing.assert_array_equal(
            np.asarray(apart.outputs[index]["y"]), np.asarray(outputs["y"])
        )


def test_a_process_of_its_own_gets_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, str]] = []
    real: Any = subprocess.run

    def run(*args: Any, env: Mapping[str, str], **options: Any) -> object:
        asked.append(env)
        return real(*args, env=env, **options)

    monkeypatch.setattr(subprocess, "run", run)
    run_apart(write(tmp_path, GRAPH), CPU, FEEDS, CUDA.exact_environment)
    assert asked[0]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "PATH" in asked[0]


def test_errors_and_failures_come_back(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="does not exist"):
        run_apart(tmp_path / "none.onnx", CPU, FEEDS, {})
    bad = {0: {"x": np.zeros((2, 4), np.float32)}}
    failures = run_apart(write(tmp_path, GRAPH), CPU, bad, {}).failures
    assert "Expected: 3" in failures[0]


def test_a_process_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="the process that ran it ended with"):
        run_apart(write(tmp_path, GRAPH), CPU, FEEDS, {"PYTHONHOME": "/nowhere"})


def test_correctness_runs_are_exact_and_not_recorded() -> None:
    target = Target("cuda", provider_options={"enable_cuda_graph": "1", "prefer_nhwc": "1"})
    assert verification_target(target).provider_options == {"prefer_nhwc": "1", "use_tf32": "0"}
    timed = Target("cuda", provider_options={"use_tf32": "0"})
    assert verification_target(timed) == timed
    assert CUDA.is_coarse({})
    assert CUDA.is_coarse({"use_tf32": "1"})
    assert not CUDA.is_coarse({"use_tf32": "0"})


# -- where options leave gaps ----------------------------------------------------------------------

ORIGINAL = "g (float[4,3] x) => (float[4,3] y) { y = Mul(x, x) }"
OTHER = """g (float[4,3] x) => (float[4,3] y) <float[1] c = {1.001}> {
    s = Mul(x, x)
    y = Mul(s, c)
}"""


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """A device whose options do not make it exact; collects the environments asked for."""
    use_stand_in(monkeypatch, replace(DEVICE, exact_environment={"EXACT": "1"}))
    asked: list[Mapping[str, str]] = []

    def apart(
        path: Path,
        target: Target,
        feeds: Mapping[int, Mapping[str, Value]],
        environment: Mapping[str, str],
    ) -> Runs:
        asked.append(environment)
        # What deviates here does not there.
        return run_all(path.with_name("original.onnx"), target, feeds)

    monkeypatch.setattr(verify, "run_apart", apart)
    return asked


def test_what_deviates_is_run_again_where_no_gap_is_left(
    tmp_path: Path, gaps: list[Mapping[str, str]]
) -> None:
    path = write(tmp_path, ORIGINAL, name="original")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 3)).astype(np.float32)} for _ in range(2)]
    found = Reference.of(path, Target("device", threads=1), feeds)
    assert gaps == [{"EXACT": "1"}]
    assert found.verify(path).ok
    assert len(gaps) == 1, "what agrees is not run again"
    other = write(tmp_path, OTHER, name="other")
    assert found.verify(other).ok
    assert len(gaps) == 2


def test_what_deviates_on_a_provider_without_gaps_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    path = write(tmp_path, ORIGINAL, name="original")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 3)).astype(np.float32)} for _ in range(2)]
    found = Reference.of(path, Target("device", threads=1), feeds)
    other = write(tmp_path, OTHER, name="other")
    assert not found.verify(other).ok
    assert found.deviation(other, found.target) == pytest.approx(1e-3, rel=1e-2)
    assert found.deviation(path, found.target) == 0.0
