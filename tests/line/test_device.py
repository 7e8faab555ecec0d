"""The whole line on a device: a stand-in that ONNX Runtime's CPU provider plays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import pwopt
from pwopt.errors import RuntimeUnavailableError
from pwopt.report.json import dump, to_json
from pwopt.report.terminal import report_table
from pwopt.runtime import open_session
from pwopt.tuning import confirmation, options, timing, workbench
from pwopt.tuning.effort import ALLOWANCES, Effort
from pwopt.tuning.workbench import Precision
from tests.runtime.stand_in import DEVICE, place_elsewhere, use_stand_in

TARGET = pwopt.Target("device", threads=1)
QUICKLY = pwopt.Options(effort=Effort.NONE)


def write(path: Path) -> Path:
    """Conv -> Mul by a constant -> Relu."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 3, 3, 3)), "s": np.full((8, 1, 1), 2.0)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Mul", ["c", "s"], ["m"], name="mul"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    shapes = ((1, 3, 9, 9), (1, 8, 7, 7))
    x, y = (helper.make_tensor_value_info(n, 1, s) for n, s in zip(("x", "y"), shapes, strict=True))
    initializers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing that proves nothing, but is over soon; so no verdict on the end may follow from it."""
    pairs = Precision(2, 4, 0.1)
    budget = replace(ALLOWANCES[Effort.QUICK], window=pairs, trial=pairs, confirm=pairs)
    monkeypatch.setitem(ALLOWANCES, Effort.QUICK, budget)
    for module in (timing, confirmation):
        monkeypatch.setattr(module, "is_loss", lambda _: False)


def test_a_report_says_where_it_ran_and_how_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    report = pwopt.optimize(write(tmp_path / "m.onnx"), target=TARGET, options=QUICKLY)
    assert report.placement is not None
    assert set(report.placement.nodes) == {"CPUExecutionProvider"}
    assert report.placement.fallback == ()
    assert report.error.coarse is not None
    assert report.error.coarse.name == "rough arithmetic"
    assert report.error.coarse.original < 1e-5
    found = json.loads(dump(to_json(report)))
    assert found["error"]["coarse"]["name"] == "rough arithmetic"
    assert found["placement"]["fallback"] == []
    assert report_table(report) is not None
    exact = replace(TARGET, provider_options={"exact": "1"})
    assert pwopt.optimize(tmp_path / "m.onnx", target=exact, options=QUICKLY).error.coarse is None


def test_falling_back_is_an_error_unless_it_is_allowed_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    place_elsewhere(monkeypatch, lambda event: "Conv" in str(event["args"].get("op_name")))
    path = write(tmp_path / "m.onnx")
    with pytest.raises(RuntimeUnavailableError, match="Pass --allow-fallback to accept that"):
        pwopt.optimize(path, target=TARGET, options=QUICKLY)
    assert not (tmp_path / "m.opt.onnx").exists()
    allowed = replace(TARGET, allow_fallback=True)
    report = pwopt.optimize(path, target=allowed, options=QUICKLY)
    assert report.placement is not None
    assert len(report.placement.fallback) == 1
    assert "Conv" in report.placement.fallback[0]


def test_copies_are_reported_beside_the_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch, replace(DEVICE, trials=()))
    hasty(monkeypatch)
    hurried = pwopt.Options(time_limit_s=0)
    report = pwopt.optimize(write(tmp_path / "m.onnx"), target=TARGET, options=hurried)
    assert report.latency is not None
    assert report.latency.copies_ms is not None
    assert min(report.latency.copies_ms) > 0


def test_options_are_tried_and_reported_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    hasty(monkeypatch)
    seen: list[pwopt.Target] = []

    def record(path: Path, target: pwopt.Target) -> object:
        seen.append(target)
        return open_session(path, target)

    monkeypatch.setattr(workbench, "open_session", record)
    monkeypatch.setattr(options, "_TRIAL", Precision(2, 4, 0.1))
    path = write(tmp_path / "m.onnx")
    report = pwopt.optimize(path, target=TARGET, options=pwopt.Options(time_limit_s=4))
    assert report.options is not None
    settings = [dict(trial.settings) for trial in report.options.trials]
    assert settings == [{"mode": "slow"}, {"replay": "1"}]
    assert dict(report.target.provider_options) == {}
    assert {"mode": "slow"} in [dict(target.provider_options) for target in seen]
    assert json.loads(dump(to_json(report)))["options"]["trials"][0]["settings"] == settings[0]
    without = pwopt.Options(time_limit_s=4, tune_options=False)
    assert pwopt.optimize(path, target=TARGET, options=without).options is None
