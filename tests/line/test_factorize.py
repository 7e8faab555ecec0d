"""Convolutions factorised within an accuracy budget, from the command line to a replay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from pwopt.cli import main
from pwopt.line import judging
from pwopt.numerics import lowrank
from pwopt.numerics.lowrank import Method
from pwopt.tuning import allocation, budget
from pwopt.tuning.workbench import Precision
from tests.passes.harness import model, node, run_unoptimized

CHANNELS = 8


def network(rank: int) -> onnx.ModelProto:
    """Two residual 3x3 convolutions whose kernels have that spatial rank, and a classifier."""
    rng = np.random.default_rng(0)

    def kernel(cin: int, cout: int) -> Any:
        shapes = lowrank.factor_shapes(Method.SPATIAL, (cout, cin, 3, 3), (rank,))
        factors = [rng.standard_normal(s) / np.sqrt(s[0] * s[-1]) for s in shapes]
        return lowrank.compose(Method.SPATIAL, factors).astype(np.float32)

    weights = {
        "w0": rng.standard_normal((CHANNELS, 3, 1, 1)).astype(np.float32),
        "w1": kernel(CHANNELS, CHANNELS),
        "w2": kernel(CHANNELS, CHANNELS),
        "b1": rng.standard_normal(CHANNELS).astype(np.float32) * 0.1,
        "fc": rng.standard_normal((4, CHANNELS, 1, 1)).astype(np.float32),
    }
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["a", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w2"], ["d"], pads=[1, 1, 1, 1]),
        node("Add", ["d", "a"], ["s"]),
        node("Relu", ["s"], ["t"]),
        node("GlobalAveragePool", ["t"], ["p"]),
        node("Conv", ["p", "fc"], ["f"]),
        node("Flatten", ["f"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 4]}, weights)


def data(path: Path, proto: onnx.ModelProto, count: int, seed: int) -> Path:
    """Inputs labelled by what the model says of them."""
    rng = np.random.default_rng(seed)
    x = (rng.random((count, 3, 8, 8)) * rng.random((count, 3, 1, 1))).astype(np.float32)
    labels = run_unoptimized(proto, {"x": x})["y"].argmax(axis=1)
    np.savez(path, x=x, labels=labels)
    return path


def filled(tmp_path: Path) -> Path:
    proto = network(2)
    onnx.save(proto, str(tmp_path / "model.onnx"))
    data(tmp_path / "calibration.npz", proto, 60, 1)
    data(tmp_path / "validation.npz", proto, 40, 2)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


def optimize(
    folder: Path, *args: object, validation: str = "validation.npz", cache: bool = False
) -> Result:
    command = [
        "optimize",
        folder / "model.onnx",
        "--effort",
        "none",
        "--calibration",
        folder / "calibration.npz",
        *([] if cache else ["--no-cache"]),
        "--threads",
        1,
        "--report",
        folder / "report.json",
        *(["--validation", folder / validation] if validation else []),
        *args,
    ]
    return CliRunner().invoke(main, [str(a) for a in command])


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a model was factorised, and what a cache keeps of that."""
    folder = filled(tmp_path_factory.mktemp("finished"))
    result = optimize(folder, "--max-accuracy-drop", 5, "--cache", folder / "cache", cache=True)
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return folder


def test_a_budget_makes_a_smaller_model_that_keeps_it(finished: Path) -> None:
    found = report(finished)
    factorization = found["factorization"]
    assert found["cost"]["macs"]["after"] < 0.6 * found["cost"]["macs"]["before"]
    assert found["accuracy"]["drop"] <= 5
    assert found["accuracy"]["samples"] == 20
    assert factorization["samples"] == 60
    assert factorization["selected_on"] == 20
    taken = factorization["points"][factorization["chosen"] - 1]
    assert taken["accuracy"]["samples"] == taken["final"]["samples"] == 20
    assert taken["final"]["drop"] == pytest.approx(found["accuracy"]["drop"])
    assert set(taken["plan"]) == {"n_c", "n_d"}
    macs = [point["macs"] for point in factorization["points"]]
    assert macs == sorted(macs, reverse=True)
    output = (finished / "output.txt").read_text()
    assert "(taken)" in output
    assert "20 of the samples to judge on are there to choose" in " ".join(output.split())


def test_bisect_fits_the_factors_once_more(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    command = ["bisect", folder / "model.onnx", "--replay", folder / "report.json"]
    command += ["--check", "verify", "--threads", 1]
    data = ["--calibration", folder / "calibration.npz"]
    bare = CliRunner().invoke(main, [str(a) for a in command])
    assert bare.exit_code == 1
    assert "--calibration" in bare.stderr
    other = CliRunner().invoke(main, [str(a) for a in (*command, *data)])
    assert other.exit_code == 1  # a half of it was held out, without data to judge on
    assert "calibration data" in other.stderr
    data += ["--validation", folder / "validation.npz"]
    found = CliRunner().invoke(main, [str(a) for a in (*command, *data)])
    assert found.exit_code == 0, found.output
    assert "no rewrite" in found.output


def test_what_is_counted_is_counted_at_the_size_of_the_calibration_data(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    proto = network(2)
    for axis, name in ((2, "H"), (3, "W")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(proto, str(folder / "model.onnx"))
    plans = []
    for size in (8, 32):
        shape = ("--input-shape", f"x:1x3x{size}x{size}", "-o", folder / f"{size}.onnx")
        result = optimize(folder, "--target-speedup", 1.5, *shape)
        assert result.exit_code == 0, result.output
        (point,) = report(folder)["factorization"]["points"]
        plans.append(point["plan"])
    assert plans[0] == plans[1]


def test_every_point_can_be_made_again(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    written = (folder / "model.opt.onnx").read_bytes()
    found = report(folder)
    replay = ("--replay", folder / "report.json", "--report", folder / "again.json")
    output = folder / "again.onnx"
    result = optimize(folder, "-o", output, *replay)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == written
    for number, point in enumerate(found["factorization"]["points"], start=1):
        (folder / "report.json").write_text(json.dumps(found))
        result = optimize(folder, "-o", output, *replay, "--front-point", number)
        assert result.exit_code == 0, result.output
        again = json.loads((folder / "again.json").read_text())
        assert again["cost"]["macs"]["after"] == point["macs"]
        assert again["accuracy"]["samples"] == 20
        if point["final"] is not None:
            assert again["accuracy"]["drop"] == pytest.approx(point["final"]["drop"])


def test_other_data_make_no_replay(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder / "model.opt.onnx").unlink()
    data(folder / "calibration.npz", network(2), 60, 3)
    result = optimize(folder, "--replay", folder / "report.json")
    assert result.exit_code == 1
    assert "calibration data" in result.output
    assert not (folder / "model.opt.onnx").exists()


def test_nothing_is_approximated_unless_it_is_asked_for(folder: Path) -> None:
    result = optimize(folder)
    assert result.exit_code == 0, result.output
    found = report(folder)
    assert found["factorization"] is None
    assert found["cost"]["macs"]["after"] == found["cost"]["macs"]["before"]


def test_a_speedup_that_is_not_to_be_had_is_an_error(folder: Path) -> None:
    result = optimize(folder, "--target-speedup", 50, "--max-accuracy-drop", 5)
    assert result.exit_code == 1
    assert "no factorised model is 50x as fast and losing at most 5" in result.output
    assert "the closest is" in result.output
    assert not (folder / "model.opt.onnx").exists()


def test_a_budget_that_nothing_keeps_leaves_the_exact_model(folder: Path) -> None:
    onnx.save(network(40), str(folder / "model.onnx"))  # labels of another one: any change hurts
    with np.load(folder / "validation.npz") as held:
        x = held["x"]
    labels = run_unoptimized(network(40), {"x": x})["y"].argmax(axis=1)
    np.savez(folder / "validation.npz", x=np.repeat(x, 3, 0), labels=np.repeat(labels, 3))
    result = optimize(folder, "--max-accuracy-drop", 0)
    assert result.exit_code == 0, result.output
    found = report(folder)
    assert found["accuracy"]["drop"] == 0
    if found["factorization"]["chosen"] is None:
        assert "Nothing was approximated" in result.output
        assert found["cost"]["macs"]["after"] == found["cost"]["macs"]["before"]


def test_a_second_run_searches_no_more(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    arguments = ("--max-accuracy-drop", 5, "--cache", folder / "cache")
    first, written = report(folder), (folder / "model.opt.onnx").read_bytes()

    def forbidden(*_: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(judging, "factorize", forbidden)
    result = optimize(folder, *arguments, cache=True)
    assert result.exit_code == 0, result.output
    assert report(folder)["factorization"] == first["factorization"]
    assert (folder / "model.opt.onnx").read_bytes() == written
    data(folder / "calibration.npz", network(2), 50, 7)
    assert isinstance(optimize(folder, *arguments, cache=True).exception, AssertionError)


def test_too_few_samples_to_fit_to(folder: Path) -> None:
    data(folder / "calibration.npz", network(2), 1, 1)
    result = optimize(folder, "--max-accuracy-drop", 5)
    assert result.exit_code == 1
    assert "1 calibration samples say too little" in result.output
    assert not (folder / "model.opt.onnx").exists()


def test_a_metric_without_a_baseline_has_no_drop(folder: Path) -> None:
    result = optimize(folder, "--max-accuracy-drop", 5, "--metric", "psnr")
    assert result.exit_code == 1
    assert "psnr" in result.output


def test_a_speedup_alone_is_met_at_least_loss(folder: Path) -> None:
    result = optimize(folder, "--target-speedup", 1.5)
    assert result.exit_code == 0, result.output
    found = report(folder)
    macs = found["cost"]["macs"]
    assert macs["before"] / macs["after"] >= 1.5
    # Accuracy had no part in the choice, so that all samples judge the result.
    assert found["accuracy"]["samples"] == 40
    assert found["factorization"]["selected_on"] == 0


def test_too_few_samples_to_choose_and_to_judge_on(folder: Path) -> None:
    data(folder / "validation.npz", network(2), 3, 2)
    result = optimize(folder, "--max-accuracy-drop", 50)
    assert result.exit_code == 1
    assert "3 samples to judge on are too few to choose on some" in result.output
    data(folder / "validation.npz", network(2), 30, 2)
    result = optimize(folder, "--max-accuracy-drop", 5)
    assert result.exit_code == 1
    assert "give at least 40" in result.output


def test_the_search_for_exact_rewrites_goes_on_from_factors_that_were_timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = Precision(3, 4, 0.01)
    monkeypatch.setattr(allocation, "_WINDOW", hasty)
    monkeypatch.setattr(budget, "_TIMING", hasty)
    timed = ("--effort", "quick", "--time-limit", 1)
    result = optimize(folder, "--max-accuracy-drop", 50, *timed)
    assert result.exit_code == 0, result.output
    points = report(folder)["factorization"]["points"]
    assert all(point["speedup"] is not None for point in points)


def test_without_data_to_fit_to_nothing_is_factorised(folder: Path) -> None:
    command = ["optimize", folder / "model.onnx", "--effort", "none", "--no-cache"]
    command += ["--validation", folder / "validation.npz"]
    result = CliRunner().invoke(main, [str(a) for a in (*command, "--target-speedup", 2)])
    assert result.exit_code == 1
    assert "--calibration" in result.output
    result = CliRunner().invoke(main, [str(a) for a in (*command, "--max-accuracy-drop", 5)])
    assert result.exit_code == 0, result.output
    assert "Nothing was approximated" in result.output
