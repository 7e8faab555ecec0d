"""Real data and accuracy, from the command line to the report; docs/calibration.md runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

import pwopt
from pwopt.calibration import Judge, feeds_digest
from pwopt.cli import main
from pwopt.line import Options
from pwopt.runtime import Feeds
from pwopt.tuning.effort import Effort
from tests.calibration.data import write_image
from tests.passes.harness import model, node

DOCS = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
CLASSES = ("blue", "green", "red")
STEPS = "torch,resize=256,crop=224"
OPTIONS = Options(effort=Effort.NONE, preprocess=pwopt.Preprocess.parse(STEPS))


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def channel_mean(weights: Any, side: int = 224) -> onnx.ModelProto:
    """Names the class whose channel is the brightest: a convolution to class scores, averaged."""
    nodes = [
        node("Conv", ["input", "w"], ["map"]),
        node("GlobalAveragePool", ["map"], ["mean"]),
        node("Flatten", ["mean"], ["logits"]),
    ]
    w = np.asarray(weights, np.float32)[:, :, None, None]
    return model(nodes, {"input": ["N", 3, side, side]}, {"logits": ["N", 3]}, {"w": w})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that finds three colours, one blind to blue, and 12 images; two are mislabelled."""
    onnx.save(channel_mean([[0, 0, 1], [0, 1, 0], [1, 0, 0]]), str(tmp_path / "model.onnx"))
    onnx.save(channel_mean([[1, 1, 0], [0, 1, 0], [1, 0, 0]]), str(tmp_path / "blind.onnx"))
    rng = np.random.default_rng(0)
    for number in range(12):
        label = number % 3
        shown = (label + 1) % 3 if number < 2 else label
        pixels = rng.integers(0, 40, (260, 300, 3))
        pixels[..., 2 - shown] += 150
        path = tmp_path / "images" / CLASSES[label] / f"{number}.png"
        write_image(path, pixels.astype(np.uint8))
    images = rng.standard_normal((4, 3, 224, 224)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=images, labels=np.zeros(4, np.int64))
    (tmp_path / "my_metric.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_commands_of_the_documentation_run(folder: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "pwopt"
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_python_lines_of_the_documentation_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pwopt.optimize("model.onnx", options=OPTIONS)
    exec(compile(blocks("python")[1], "docs/calibration.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("top1 83.3")
    assert second == "8"
    assert pwopt.Preprocess.parse("torch224.json") == OPTIONS.preprocess


def test_optimize_reports_accuracy_on_given_samples(folder: Path) -> None:
    result = invoke(
        *("optimize", "model.onnx", "--effort", "none", "--validation", "images"),
        *("--preprocess", STEPS, "--report", "report.json", "--report", "report.html"),
    )
    assert result.exit_code == 0, result.output
    assert "top1 83.33 -> 83.33 %: 0 lost [0, 0], 12 samples; agreement 100" in result.stdout
    assert "83.33" in (folder / "report.html").read_text()
    accuracy = json.loads((folder / "report.json").read_text())["accuracy"]
    assert accuracy["metric"] == "top1"
    assert accuracy["baseline"] == accuracy["optimized"] == pytest.approx(83.333, abs=1e-3)
    assert (accuracy["samples"], accuracy["drop"], accuracy["ci95"]) == (12, 0, [0, 0])


def test_without_a_question_nothing_is_judged(folder: Path) -> None:
    result = invoke(
        *("optimize", "model.onnx", "--effort", "none", "--calibration", "images", "--json"),
        *("--preprocess", STEPS),
    )
    report = json.loads(result.stdout)
    assert report["accuracy"] is None
    assert report["error"]["inputs"] == 4


def test_samples_are_held_out_of_the_calibration_data(folder: Path) -> None:
    result = invoke(
        *("optimize", "model.onnx", "--effort", "none", "--calibration", "images", "--json"),
        *("--preprocess", STEPS, "--metric", "top1"),
    )
    report = json.loads(result.stdout)
    assert report["accuracy"]["samples"] == 6
    assert report["notes"][0].startswith("6 of the samples of --calibration were held out")


def test_feeds_serve_both_purposes(folder: Path) -> None:
    def feeds() -> Iterator[dict[str, Any]]:
        for k in range(8):
            yield {"input": np.full((1, 3, 224, 224), k, np.float32), "labels": [k % 3]}

    options = Options(effort=Effort.NONE, calibration=feeds(), metric="top1")
    report = pwopt.optimize("model.onnx", options=options)
    assert report.error.inputs == 4
    assert report.accuracy is not None
    assert report.accuracy.samples == 4


def test_what_loses_too_much_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(self: Judge, *_: object) -> Any:
        return original(self, folder / "blind.onnx")

    original = Judge.figures
    monkeypatch.setattr(Judge, "figures", lossy)
    # Nothing exact loses accuracy, so what an approximate rewrite would do stands in for it.
    onnx.save(with_identity(onnx.load("model.onnx")), "changed.onnx")
    for most, kept in ((20.0, True), (60.0, False)):
        options = Options(
            effort=Effort.NONE,
            validation="images",
            preprocess=OPTIONS.preprocess,
            max_accuracy_drop=most,
        )
        report = pwopt.optimize("changed.onnx", options=options)
        assert report.accuracy is not None
        assert (report.output.sha256 == report.model.sha256) is kept
        assert report.accuracy.drop == pytest.approx(0 if kept else 25)
        assert any("the original is kept" in note for note in report.notes) is kept


def with_identity(changed: onnx.ModelProto) -> onnx.ModelProto:
    """Something for canonicalise to take away."""
    changed.graph.node[0].input[0] = "same"
    changed.graph.node.insert(0, node("Identity", ["input"], ["same"]))
    return changed


def test_verify_judges_with_an_exit_code(folder: Path) -> None:
    args = ("verify", "model.onnx", "blind.onnx", "--validation", "images", "--preprocess", STEPS)
    told = invoke(*args)
    assert told.exit_code == 0
    assert told.stdout.startswith("top1 83.33 -> 58.33 %: 25 lost [")
    assert invoke(*args, "--max-accuracy-drop", 25).exit_code == 0
    refused = invoke(*args, "--max-accuracy-drop", 20, "--json")
    assert refused.exit_code == 3
    assert json.loads(refused.stdout)["drop"] == 25


def test_verify_with_a_few_images(folder: Path) -> None:
    args = ("--calibration", "images", "--preprocess", STEPS)
    good = invoke("verify", "model.onnx", "model.onnx", *args, "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["inputs"] == 4
    assert invoke("verify", "model.onnx", "blind.onnx", *args).exit_code == 3


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--metric", "top1"), 2, "need --validation"),
        (("--validation", "images", "--inputs", "data.npz"), 2, "excludes --inputs"),
        (("--validation", "images", "--preprocess", "pytorch"), 2, "no preset 'pytorch'"),
        (("--validation", "images"), 1, "is 260x300, but the input is 224x224; add crop=224x224"),
        (("--validation", "none"), 1, "none cannot be read as .npz or .npy"),
        (("--validation", "data.npz", "--metric", "psnr"), 1, "psnr needs one output"),
        (("--calibration", "images"), 1, "is 260x300, but the input is 224x224"),
    ],
)
def test_what_does_not_fit_is_said(
    folder: Path, args: tuple[object, ...], code: int, says: str
) -> None:
    result = invoke("verify", "model.onnx", "blind.onnx", *args)
    assert result.exit_code == code
    assert says in " ".join(result.stderr.split())
    if code == 1:
        assert result.stderr.count("\n") == 1


def test_optimize_says_early_that_data_do_not_fit(folder: Path) -> None:
    few = ("--validation", "data.npz", "--max-accuracy-drop", 1)
    for args, says in (
        (("--metric", "top1"), "nothing to judge accuracy on; give --validation"),
        (few, "With 4 samples to judge on, one of them is 25 points of top1"),
        (("--validation", "data.npz", "--calibration", "data.npz"), "4 of the 4 samples"),
    ):
        result = invoke("optimize", "model.onnx", "--effort", "none", *args)
        assert result.exit_code == 1
        assert says in result.stderr
        assert not (folder / "model.opt.onnx").exists()


def test_the_digest_of_input_sets_follows_values_and_order() -> None:
    def digest(*values: Any) -> str:
        feeds: list[Feeds] = [{"x": np.array(value, dtype=np.float32)} for value in values]
        return feeds_digest(feeds)

    assert digest(0, 1) == digest(0, 1) != digest(1, 0)
    words = [feeds_digest([{"x": np.array([word], dtype=object)}]) for word in ("a", "b", "a")]
    assert words[0] == words[2] != words[1]


def test_a_model_may_take_the_size_from_the_command_line(tmp_path: Path) -> None:
    nodes = [node("Relu", ["input"], ["y"])]
    shape: list[int | str] = ["N", 3, "H", "W"]
    onnx.save(model(nodes, {"input": shape}, {"y": shape}, {}), str(tmp_path / "m.onnx"))
    for number, side in enumerate((8, 10)):
        write_image(tmp_path / "i" / f"{number}.png", np.zeros((side, side, 3), np.uint8))
    args = ("verify", tmp_path / "m.onnx", tmp_path / "m.onnx", "--calibration", tmp_path / "i")
    given = ("--input-shape", "input:1x3x8x8")
    assert "is 10x10, but the input is 8x8" in invoke(*args, *given).stderr
    assert invoke(*args, *given, "--preprocess", "crop=8").exit_code == 0


def test_outputs_without_a_row_per_sample_take_a_batch_of_one(tmp_path: Path) -> None:
    nodes = [node("ReduceMean", ["input"], ["y"], axes=[0, 2, 3], keepdims=0)]
    shapes: list[int | str] = ["N", 3, 8, 8]
    path = tmp_path / "m.onnx"
    onnx.save(model(nodes, {"input": shapes}, {"y": [3]}, {}), str(path))
    np.savez(tmp_path / "d.npz", input=np.random.default_rng(0).random((4, 3, 8, 8)))
    args = ("verify", path, path, "--validation", tmp_path / "d.npz")
    refused = invoke(*args)
    assert refused.exit_code == 1
    assert "fix the batch to 1 with --input-shape" in refused.stderr
    judged = invoke(*args, "--input-shape", "input:1x3x8x8", "--json")
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["samples"] == 4
