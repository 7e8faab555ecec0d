"""``--fp16``: asked for, verified with its own tolerance, reported apart, repeatable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import pwopt
from pwopt.line import optimize
from pwopt.report.json import dump, read_script, to_json
from pwopt.report.terminal import report_table
from pwopt.runtime import Feeds, rounding_floor
from pwopt.tuning.effort import Effort
from tests.line.test_device import hasty
from tests.tuning.test_half import chain

ASKED = pwopt.Options(effort=Effort.NONE, fp16=True)
TARGET = pwopt.Target(threads=1, input_shapes={"x": (2, 3, 8, 8)})


def write(path: Path, scale: float = 1.0) -> Path:
    onnx.save(chain(scale), path)
    return path


def weight_types(path: Path) -> set[int]:
    return {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) > 1}


def test_weights_are_halved_and_the_interface_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx")
    report = optimize(source, target=TARGET, options=ASKED)
    output = report.output.path
    assert output is not None
    assert weight_types(output) == {TensorProto.FLOAT16}
    before, after = onnx.load(source), onnx.load(output)
    assert [i.type.tensor_type.elem_type for i in after.graph.input] == [TensorProto.FLOAT]
    assert after.graph.output[0].type == before.graph.output[0].type
    # 1e-6 is what fp32 would be held to.
    assert report.error.max_relative is not None
    assert 1e-5 < report.error.max_relative < report.error.tolerance
    assert report.error.tolerance == rounding_floor("float16", 2)
    assert report.fp16 is not None
    assert report.fp16.kept == ()


def test_it_is_never_on_unless_asked_for(tmp_path: Path) -> None:
    report = optimize(write(tmp_path / "m.onnx"), target=TARGET, options=replace(ASKED, fp16=False))
    assert report.fp16 is None
    assert report.recipe.fp16 is None
    assert report.output.path is not None
    assert weight_types(report.output.path) == {TensorProto.FLOAT}


def test_a_budget_is_held_or_the_original_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx")
    tight = replace(ASKED, max_error=1e-9)
    report = optimize(source, target=TARGET, options=tight)
    assert report.output.sha256 == report.model.sha256
    assert any("the original is kept" in note for note in report.notes)


def test_a_report_repeats_the_conversion(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", 1e6)
    report = optimize(source, target=TARGET, options=replace(ASKED, skip_passes=("fold-affine",)))
    assert report.recipe.fp16 == ("large", "small")
    (tmp_path / "report.json").write_text(dump(to_json(report)))
    script = read_script(tmp_path / "report.json")
    assert script.recipe.fp16 == ("large", "small")
    again = optimize(
        source, tmp_path / "again.onnx", TARGET, replace(pwopt.Options(), replay=script)
    )
    assert again.output.sha256 == report.output.sha256


def test_the_gains_of_conversion_and_of_rewriting_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty(monkeypatch)
    monkeypatch.setattr("pwopt.line.run._APART", replace_pairs())
    options = pwopt.Options(fp16=True, time_limit_s=0)
    report = optimize(write(tmp_path / "m.onnx"), target=TARGET, options=options)
    assert report.fp16 is not None
    assert report.fp16.conversion is not None
    found = json.loads(dump(to_json(report)))["fp16"]
    assert found["conversion"]["speedup"] == report.fp16.conversion.speedup
    if report.latency is None:  # fp16 on a CPU is rarely faster
        assert report.fp16.rewriting is None
    assert report_table(report) is not None


def replace_pairs() -> object:
    from pwopt.tuning.workbench import Precision

    return Precision(2, 4, 0.1)


def test_a_wrong_sign_is_not_excused_by_a_coarse_tolerance(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx")
    report = optimize(source, target=TARGET, options=ASKED)
    assert report.output.path is not None
    model = onnx.load(report.output.path)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = -onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), weight.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    feeds: list[Feeds] = [
        {"x": np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    ]
    tolerance = report.error.tolerance
    verdicts = [
        pwopt.verify(source, path, feeds, target=TARGET, max_error=tolerance).ok
        for path in (report.output.path, tmp_path / "wrong.onnx")
    ]
    assert verdicts == [True, False]
