"""What a workbench holds while it builds, verifies and times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pwopt.graph import Written, file_sha256, load
from pwopt.passes.lower_conv_winograd import LowerConvWinograd
from pwopt.remark import Kind, Remark, Verdict
from pwopt.runtime import Reference, resolve
from pwopt.target import Target
from pwopt.tuning import window as window_module
from pwopt.tuning import workbench as workbench_module
from pwopt.tuning.candidate import offered_forms
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.verdicts import groups_of
from pwopt.tuning.workbench import Build, Oracle, Precision, Workbench, silent

HELD = Rulings(default=Ruling(Verdict.HELD))
BRIEF = Precision(2, 4, 0.1)


def convolutions() -> onnx.ModelProto:
    """Three convolutions of 3x3 in a row."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], f"conv{i}", pads=[1] * 4)
        for i in range(3)
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 16, 16, 16])
        for name in ("t0", "t3")
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal((16, 16, 3, 3)).astype(np.float32), f"w{i}")
        for i in range(3)
    ]
    graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    path = tmp_path / "model.onnx"
    onnx.save(convolutions(), path)
    target = resolve(Target(threads=1))
    feeds: list[Any] = [{"t0": np.ones((1, 16, 16, 16), np.float32)}]
    oracle: Future[Oracle] = Future()
    oracle.set_result(Oracle(feeds, Reference.of(path, target, feeds)))
    driver = Driver(load(path))
    driver.rewriter.infer_shapes()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bench = Workbench(
        driver,
        Written(path, file_sha256(path), path.stat().st_size),
        scratch,
        oracle,
        target,
        simplify=(),
        lower=(LowerConvWinograd(),),
        review=None,
        prepared=False,
        seed=0,
        max_bytes=float("inf"),
        progress=silent,
    )
    yield bench
    bench.close()


def held(build: Build) -> Remark:
    return next(r for r in build.remarks if r.kind is Kind.HELD)


def test_the_forms_of_a_window_are_files_that_go_with_the_next_one(bench: Workbench) -> None:
    build = bench.build(HELD)
    forms = offered_forms(held(build))
    first = bench.cut(build, held(build), forms)
    assert first is not None
    assert list(first.after) == forms
    assert bench.estimate(first).keys() == set(forms)
    for variant in forms[:2]:
        timed = bench.compare_window(first, variant, BRIEF, "timing", decide=1.0)
        assert timed.pairs >= 2
    second = bench.cut(build, held(build), forms[:1])
    assert second is not None
    assert second.before.path.exists()
    assert not any(form.path.exists() for form in (first.before, *first.after.values()))


def test_nothing_stays_open_beside_what_is_compared_or_verified(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lowered = bench.build(HELD), bench.build(Rulings())
    for baseline in (bench.original, base.written):
        bench.compare(baseline, lowered.written, BRIEF, "timing")
        assert set(bench._sessions) == {baseline.path, lowered.written.path}
    beside: list[int] = []
    monkeypatch.setattr(Reference, "verify", lambda *_: beside.append(len(bench._sessions)))
    bench.verify(lowered)
    assert beside == [0]


def test_the_file_of_a_build_goes_with_what_refers_to_it(bench: Workbench) -> None:
    kept = bench.build(HELD)
    dropped = bench.build(Rulings())
    path = dropped.written.path
    assert path.exists()
    del dropped
    again = bench.build(HELD)
    gc.collect()
    assert not path.exists()
    assert kept.written.path.exists()
    assert again.written.sha256 == kept.written.sha256


@pytest.mark.parametrize(("seconds", "convolutions"), [(0.001, 3), (1.0, 2)])
def test_the_window_of_a_long_site_goes_without_what_is_before_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, seconds: float, convolutions: int
) -> None:
    monkeypatch.setattr(window_module, "window_seconds", lambda *_: seconds)
    build = bench.build(HELD)
    middle = [r for r in build.remarks if r.kind is Kind.HELD][1]
    window = bench.cut(build, middle, offered_forms(middle)[:1])
    assert window is not None
    ops = [node.op_type for node in onnx.load(window.before.path).graph.node]
    assert ops.count("Conv") == convolutions


def test_what_a_group_is_expected_to_take_is_found_out_once_per_build(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []

    def finding(driver: Any, pass_: Any, remark: Remark) -> Any:
        looked_up.append(remark.site)
        return window_module.find_match(driver, pass_, remark)

    monkeypatch.setattr(workbench_module, "find_match", finding)
    build = bench.build(HELD)
    groups = groups_of(build, LowerConvWinograd.name)
    first = bench.expected_seconds(build, groups)
    assert all(seconds > 0 for seconds in first.values())
    assert bench.expected_seconds(build, groups) == first
    assert len(looked_up) == len(groups)
    bench.build(Rulings())
    assert bench.expected_seconds(build, groups) == first
    assert len(looked_up) == 2 * len(groups)
