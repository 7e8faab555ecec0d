"""The benchmark for a GPU, tried out without one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from benchmarks import cuda
from benchmarks.cuda import CHAIN, PRECISIONS, Row, bottlenecks, collect, measure_apart, rows
from benchmarks.render import RESULTS_CUDA, cuda_table, fill
from pwopt import models
from pwopt.line import default_passes
from pwopt.target import Target
from pwopt.tuning.workbench import Precision
from tests.line.test_device import hasty
from tests.passes import harness


def test_what_matters_most_comes_first() -> None:
    order = list(rows("cuda"))
    assert order[:2] == [Row("resnet50", 1, "fp32"), Row(CHAIN, 1, "fp32")]
    assert {(row.model, row.batch) for row in order[:12]} == {
        (name, batch) for name in ("resnet50", CHAIN) for batch in (1, 32)
    }
    assert {row.precision for row in order} == {"fp32", "fp32, TF32", "fp16"}
    assert len(set(order)) == len(order)
    assert {row.model for row in order} <= {*models.names(), CHAIN}


def test_precisions_say_what_they_are() -> None:
    assert PRECISIONS["cuda"]["fp32"] == {"use_tf32": "0"}
    assert PRECISIONS["cuda"]["fp32, TF32"] == {"use_tf32": "1"}


def test_the_chain_becomes_fused_convolutions_on_cuda() -> None:
    chain = bottlenecks(1, blocks=2, width=8, size=6)
    onnx.checker.check_model(chain, full_check=True)
    fuse = next(p for p in default_passes(Target("cuda")) if p.name.startswith("fuse-pointwise"))
    after = harness.run_pass(fuse, chain)
    assert after.ops == ["FusedConv"] * 6
    harness.assert_same_outputs(chain, after.model, np.random.default_rng(0))


def row(name: str, speedup: float | None, **others: Any) -> dict[str, Any]:
    def latency(value: float) -> dict[str, Any]:
        return {"baseline_ms": 1.5, "speedup": value, "ci95": [value - 0.01, value + 0.01]}

    report = {
        "latency": None if speedup is None else latency(speedup),
        "error": {"max_relative": 1e-6, "tolerance": 2e-5},
        "passes": [{"name": "fuse-pointwise-activation", "applied": 9}],
        "fp16": None,
        "options": None,
    }
    for key, value in others.items():
        report[key] = value(latency)
    return {"model": name, "batch": 1, "precision": "fp32", "report": report}


RECORD = {
    "conditions": {
        "device": "NVIDIA H100, driver 580.65, cuDNN 9.28.1",
        "python": "3.12",
        "onnxruntime": "1.31.1",
        "onnx": "1.23",
        "commit": "abc",
        "onnxruntime-gpu": "1.31.1",
        "nvidia-cudnn-cu13": "9.28.1.4",
    },
    "rows": [
        row("resnet50", 1.2),
        row("vgg16", 0.98, options=lambda of: {"settings": {"a": "1"}, "optimized": of(1.3)}),
        row("googlenet", 2.0, fp16=lambda of: {"conversion": of(1.8), "rewriting": of(1.1)}),
        row("nin", None, options=lambda _: {"settings": {}, "optimized": None}),
        {"model": "late", "batch": 32, "precision": "fp16", "failed": "not reached in the time"},
    ],
}


def test_the_table_keeps_the_three_gains_apart() -> None:
    table = cuda_table(RECORD)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if "|" in line}
    assert "| 1.5 | 1.200 (1.190 to 1.210) |  |  |" in lines["resnet50"]
    assert "1.300 (1.290 to 1.310) a=1" in lines["vgg16"]
    assert "| 1.100 (1.090 to 1.110) | 1.800 (1.790 to 1.810) |" in lines["googlenet"]
    assert "2.0" not in lines["googlenet"].split("|")[5]
    assert "1 (original kept)" in lines["nin"]
    assert "none gains" in lines["nin"]
    assert lines["late"].endswith("| not reached in the time |")
    assert "4 of 5 rows were reached; slower by more than 1%: vgg16 at batch 1 in fp32." in table
    assert "driver 580.65" in table
    assert "nvidia-cudnn-cu13 9.28.1.4" in table


def test_the_time_is_kept() -> None:
    now = iter(range(0, 1000, 20))
    wanted: Iterator[Row] = iter([Row(f"m{i}", 1, "fp32") for i in range(5)])
    given: list[float] = []

    def slow(wanted_row: Row, provider: str, seconds: float) -> dict[str, Any]:
        given.append(seconds)
        return {**vars(wanted_row), "failed": "x"}

    found = collect(wanted, "cuda", slow, seconds=100.0, clock=lambda: float(next(now)))
    assert given == [80.0, 60.0, 40.0]
    assert [r["failed"] for r in found[3:]] == ["not reached in the time"] * 2


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this machine has a CUDA provider",
)
def test_without_a_gpu_it_says_so_and_leaves_the_table_alone() -> None:
    before = RESULTS_CUDA.read_text()
    done = CliRunner().invoke(cuda.main, [])
    assert done.exit_code == 1
    assert done.output.startswith("no GPU: CUDAExecutionProvider is not available")
    assert RESULTS_CUDA.read_text() == before


def test_the_page_has_a_place_for_the_table(tmp_path: Path) -> None:
    copy = tmp_path / "results-cuda.md"
    copy.write_text(RESULTS_CUDA.read_text())
    fill(copy, "cuda", cuda_table(RECORD))
    assert "| resnet50 | 1 | fp32 | 1.5 |" in copy.read_text()


def test_without_a_record_no_figure_stands_on_the_page() -> None:
    if cuda.RECORD.exists():
        assert cuda_table(json.loads(cuda.RECORD.read_text())) in RESULTS_CUDA.read_text()
        return
    assert "Nothing has been measured yet" in RESULTS_CUDA.read_text()
    assert "| model |" not in RESULTS_CUDA.read_text()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_row_is_measured_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    hasty(monkeypatch)
    monkeypatch.setattr("pwopt.line.run._APART", Precision(2, 4, 0.1))
    monkeypatch.setattr(cuda, "bottlenecks", lambda batch: bottlenecks(batch, 1, 8, 8))
    monkeypatch.setattr(cuda, "SEARCH_SECONDS", 0.0)
    asked = json.dumps({**vars(Row(CHAIN, 2, precision)), "provider": "cpu", "seconds": 60.0})
    answer = tmp_path / "row.json"
    done = CliRunner().invoke(cuda.main, ["--row", asked, str(answer)])
    assert done.exit_code == 0, done.output
    found = json.loads(answer.read_text())
    assert (found["model"], found["batch"]) == (CHAIN, 2)
    assert (found["report"]["fp16"] is not None) == (precision == "fp16")
    assert cuda_table({**RECORD, "rows": [found]})


def test_a_row_that_fails_or_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], timeout: float, **_: object) -> object:
        raise subprocess.TimeoutExpired(command, timeout)

    wanted = Row(CHAIN, 1, "fp32")
    monkeypatch.setattr(subprocess, "run", late)
    assert measure_apart(wanted, "cpu", 5.0)["failed"] == "the time was over"
    died = SimpleNamespace(stderr="trace\npwopt: out of memory\n", returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    assert measure_apart(wanted, "cpu", 5.0)["failed"] == "pwopt: out of memory"
