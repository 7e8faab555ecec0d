"""Reports as scripts: the same file again, loudly or not at all; and the rewrite that does harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import pwopt
from pwopt import line, passes
from pwopt.errors import ReplayError, UsageError
from pwopt.line import Check
from pwopt.passes.contract import Variant
from pwopt.report.files import write_report
from pwopt.report.json import read_script
from pwopt.result import Script
from pwopt.tuning import pipeline
from pwopt.tuning.effort import Effort
from tests.passes.harness import model, node

TARGET = pwopt.Target(threads=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four convolutions, each with a normalisation and a decomposed hard-swish behind it."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "three": np.array(3, np.float32),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
    }
    nodes = []
    x = "x"
    for i in range(4):
        weights[f"w{i}"] = rng.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32)
        for part in ("scale", "shift", "mean", "var"):
            weights[f"{part}{i}"] = rng.uniform(0.5, 1.5, 8).astype(np.float32)
        normal = [f"c{i}", *(f"{part}{i}" for part in ("scale", "shift", "mean", "var"))]
        nodes += [
            node("Conv", [x, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", normal, [f"b{i}"]),
            node("Add", [f"b{i}", "three"], [f"a{i}"]),
            node("Clip", [f"a{i}", "zero", "six"], [f"k{i}"]),
            node("Mul", [f"b{i}", f"k{i}"], [f"m{i}"]),
            node("Div", [f"m{i}", "six"], [f"h{i}"]),
        ]
        x = f"h{i}"
    shape = [1, 8, 12, 12]
    path = tmp_path / "model.onnx"
    onnx.save(model(nodes, {"x": shape}, {x: shape}, weights), str(path))
    return path


def optimized(source: Path, effort: Effort = Effort.NONE, **options: Any) -> tuple[Path, Script]:
    output = source.with_name("first.onnx")
    report = pwopt.optimize(
        source, output, TARGET, pwopt.Options(effort=effort, overwrite=True, **options)
    )
    write_report(report, source.with_name("report.json"))
    return output, read_script(source.with_name("report.json"))


def test_a_larger_error_reaches_the_passes_that_can_use_it(source: Path) -> None:
    _, script = optimized(source, max_error=1e-3)
    assert "lower-conv-winograd:amplification=1000.0" in script.recipe.passes
    _, script = optimized(source)
    assert "lower-conv-winograd" in script.recipe.passes


def replayed(source: Path, script: Script, **options: Any) -> tuple[Path, pwopt.Report]:
    output = source.with_name("second.onnx")
    report = pwopt.optimize(source, output, TARGET, pwopt.Options(replay=script, **options))
    return output, report


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"opset": 19},
        {"max_error": 1e-3},
        {"passes": (passes.LowerPointwiseConv(), passes.RaiseActivation())},
        {"skip_passes": ("raise-activation",)},
        {"rewrite_limit": 9},
        {"effort": Effort.QUICK, "time_limit_s": 0.0},
    ],
    ids=["default", "opset", "error", "passes", "skip", "limit", "quick"],
)
def test_a_replay_gives_the_same_file(source: Path, settings: dict[str, Any]) -> None:
    first, script = optimized(source, **settings)
    second, report = replayed(source, script)
    assert second.read_bytes() == first.read_bytes()
    assert report.latency is None
    candidates = [r for r in report.remarks if r.ordinal is not None]
    assert candidates == list(script.candidates)


def test_a_report_that_kept_the_original_keeps_it_again(source: Path) -> None:
    clean = source.with_name("clean.onnx")
    relu = model([node("Relu", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]})
    onnx.save(relu, str(clean))
    output, script = optimized(clean, Effort.QUICK)
    assert script.keeps_original
    second, report = replayed(clean, script)
    assert second.read_bytes() == clean.read_bytes() == output.read_bytes()
    assert "kept the original" in report.stop_reason


def test_another_model_is_refused(source: Path) -> None:
    _, script = optimized(source)
    proto = onnx.load(str(source))
    proto.doc_string = "changed"
    onnx.save(proto, str(source))
    with pytest.raises(ReplayError, match=r"model\.onnx: is not the model"):
        replayed(source, script)
    assert not source.with_name("second.onnx").exists()


def test_another_site_is_refused(source: Path) -> None:
    _, script = optimized(source)
    index = next(i for i, r in enumerate(script.candidates) if r.pass_name == "raise-activation")
    candidates = list(script.candidates)
    candidates[index] = replace(candidates[index], site="elsewhere")
    with pytest.raises(ReplayError, match="elsewhere"):
        replayed(source, replace(script, candidates=tuple(candidates)))


def test_a_script_that_lacks_a_rewrite_is_refused(source: Path) -> None:
    _, script = optimized(source)
    with pytest.raises(ReplayError, match="nothing more"):
        replayed(source, replace(script, candidates=script.candidates[:-1]))


def test_another_result_is_refused(source: Path) -> None:
    _, script = optimized(source)
    with pytest.raises(ReplayError, match="another file"):
        replayed(source, replace(script, output_sha256="0" * 64))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "model": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"r\.json"):
        read_script(path)
    with pytest.raises(UsageError, match=r"none\.json"):
        read_script(tmp_path / "none.json")


def kept(report: pwopt.Report) -> list[int]:
    return [r.ordinal for r in report.remarks if r.kind == "applied" and r.ordinal is not None]


def test_rewrites_can_be_left_out_by_number(source: Path) -> None:
    _, script = optimized(source)
    raised = [r.ordinal for r in script.candidates if r.pass_name == "raise-activation"]
    assert len(raised) == 4
    assert raised[1] is not None
    second, _ = replayed(source, script, skip_rewrites=frozenset({raised[1]}))
    ops = [n.op_type for n in onnx.load(str(second)).graph.node]
    assert ops.count("HardSwish") + ops.count("HardSigmoid") == 3
    third, _ = replayed(source, script, only_rewrites=frozenset({raised[1]}), overwrite=True)
    ops = [n.op_type for n in onnx.load(str(third)).graph.node]
    assert ops.count("HardSwish") + ops.count("HardSigmoid") == 1
    assert ops.count("BatchNormalization") == 4
    with pytest.raises(ReplayError, match="no rewrite 999"):
        replayed(source, script, skip_rewrites=frozenset({999}))


def test_the_same_numbers_hold_without_a_report(source: Path) -> None:
    _, script = optimized(source)
    raised = [r.ordinal for r in script.candidates if r.pass_name == "raise-activation"]
    assert raised[-1] is not None
    output, _ = optimized(source, skip_rewrites=frozenset({raised[-1]}))
    ops = [n.op_type for n in onnx.load(str(output)).graph.node]
    assert ops.count("HardSwish") + ops.count("HardSigmoid") == 3


@pytest.mark.parametrize("guilty", [0, 1, 2, 3])
def test_bisect_names_the_rewrite_that_breaks_the_model(
    source: Path, guilty: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, script = optimized(source)
    honest = passes.RaiseActivation.rewrite

    def dishonest(self: Any, match: Any, variant: Variant, rewriter: Any) -> None:
        spoil = any(t.name == f"h{guilty}" for t in match.root.outputs)
        source_tensor = match.root.outputs[0]
        honest(self, match, variant, rewriter)
        if spoil:
            (producer,) = source_tensor.inputs
            inner = rewriter.variable("spoilt", like=source_tensor)
            rewriter.remove(producer)
            rewriter.add(producer.op, list(producer.inputs), [inner], producer.attrs, near=producer)
            rewriter.add("Neg", [inner], [source_tensor], near=producer)

    monkeypatch.setattr(passes.RaiseActivation, "rewrite", dishonest)
    culprit = line.bisect(source, script, Check.VERIFY, TARGET)
    assert culprit is not None
    assert culprit.remark.pass_name == "raise-activation"
    raised = [r for r in script.candidates if r.pass_name == "raise-activation"]
    assert culprit.remark == raised[guilty]
    assert culprit.looks <= 3 + np.ceil(np.log2(len(script.candidates)))
    assert culprit.window is not None
    onnx.checker.check_model(culprit.window)
    assert {n.op_type for n in culprit.window.graph.node} == {"Add", "Clip", "Mul", "Div"}


def test_bisect_names_the_rewrite_that_costs_latency(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time follows from the graph here, not from a clock."""
    _, script = optimized(source)
    raised = [r for r in script.candidates if r.pass_name == "raise-activation"]

    def is_slow(_: Any, build: Any) -> bool:
        proto = onnx.load(str(build.written.path))
        return sum(n.op_type in ("HardSwish", "HardSigmoid") for n in proto.graph.node) >= 3

    monkeypatch.setattr("pwopt.line.run._is_slow", is_slow)
    culprit = line.bisect(source, script, Check.LATENCY, TARGET)
    assert culprit is not None
    assert culprit.remark == raised[2]


def test_bisect_finds_nothing_where_nothing_is_wrong(source: Path) -> None:
    _, script = optimized(source)
    assert line.bisect(source, script, Check.VERIFY, TARGET) is None


def test_numbers_are_stable_between_runs(source: Path) -> None:
    _, first = optimized(source)
    _, second = optimized(source)
    assert first == second


def test_rulings_by_site_come_before_those_by_signature() -> None:
    site = pipeline.Ruling(variant="site")
    rulings = pipeline.Rulings(
        by_site={("p", "s"): site}, by_group={("p", "g"): pipeline.Ruling(variant="group")}
    )
    assert rulings.find("p", "g", "s") is site
    assert rulings.find("p", "g", "t").variant == "group"
