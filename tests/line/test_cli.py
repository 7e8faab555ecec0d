"""The command line as a user meets it: outputs, exit codes, one-line errors, no half files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from pwopt.cli import main
from pwopt.graph import file_sha256, save
from pwopt.runtime import Comparison, Latency, Reference
from pwopt.tuning import workbench
from pwopt.tuning.cache import Cache
from tests.passes.harness import model, node


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def conv_bn(channels: int = 8, batch: int | str = 1, size: int | str = 16) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((channels, 3, 3, 3)).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        "shift": rng.standard_normal(channels).astype(np.float32),
        "mean": rng.standard_normal(channels).astype(np.float32),
        "var": rng.uniform(0.5, 1.5, channels).astype(np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["b"]),
        node("Relu", ["b"], ["y"]),
    ]
    return model(
        nodes, {"x": [batch, 3, size, size]}, {"y": [batch, channels, size, size]}, weights
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(conv_bn(), str(path))
    return path


def assert_one_line_error(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("pwopt: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def leftovers(folder: Path, *expected: str) -> set[str]:
    return {p.name for p in folder.iterdir()} - set(expected)


def test_optimize_writes_a_verified_model_and_reports(source: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    page = tmp_path / "r.html"
    result = invoke("optimize", source, "--effort", "none", "--report", report, "--report", page)
    assert result.exit_code == 0, result.output
    output = tmp_path / "model.opt.onnx"
    optimized = onnx.load(str(output))
    assert [n.op_type for n in optimized.graph.node] == ["Conv", "Relu"]
    data = json.loads(report.read_text())
    assert data["schema"] == 1
    assert data["output"]["size_bytes"] == output.stat().st_size
    assert data["error"]["max_relative"] <= data["error"]["tolerance"]
    for row in data["passes"]:
        sites = [r for r in data["remarks"] if r["pass"] == row["name"]]
        assert len(sites) == sum(row[k] for k in ("applied", "declined", "rejected", "held"))
    assert "fold-batch-normalization" in page.read_text()
    assert "fold-batch-normalization" in result.stdout


def test_json_prints_one_object_and_nothing_else(source: Path) -> None:
    result = invoke("optimize", source, "--effort", "none", "--json")
    keys = ["schema", "pwopt", "model", "output", "target", "latency", "error", "accuracy"]
    keys += ["cost", "passes", "remarks", "seconds", "stop_reason"]
    data = json.loads(result.stdout)
    assert set(keys) <= set(data)
    assert set(data["model"]) == {"path", "sha256", "opset", "size_bytes"}
    assert set(data["cost"]) == {"params", "macs", "size_bytes"}
    for key in ("provider", "device", "threads", "ort", "options"):
        assert key in data["target"]


def test_a_quick_run_is_timed_and_never_slower(source: Path) -> None:
    data = json.loads(invoke("optimize", source, "--threads", 1, "--json").stdout)
    latency = data["latency"]
    if latency is None:
        assert "as fast as the original" in data["stop_reason"]
        return
    assert latency["pairs"] >= 7
    assert latency["ci95"][0] <= latency["speedup"] <= latency["ci95"][1]
    assert latency["speedup"] >= 0.99


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = invoke("optimize", source, "--effort", "none", "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert leftovers(tmp_path, "model.onnx") == set()


def test_the_output_keeps_dynamic_dimensions(tmp_path: Path) -> None:
    source = tmp_path / "dynamic.onnx"
    onnx.save(conv_bn(batch="N", size="S"), str(source))
    refused = invoke("optimize", source, "--effort", "none")
    assert_one_line_error(refused, "--input-shape x:")
    result = invoke("optimize", source, "--effort", "none", "--input-shape", "x:2x3x8x8")
    assert result.exit_code == 0, result.output
    graph = onnx.load(str(tmp_path / "dynamic.opt.onnx")).graph
    assert [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim][0::2] == ["N", "S"]
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_verify_agrees_and_refuses(source: Path, tmp_path: Path) -> None:
    invoke("optimize", source, "--effort", "none")
    good = invoke("verify", source, tmp_path / "model.opt.onnx", "--json")
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["ok"] is True
    wrong = onnx.load(str(source))
    weight = next(t for t in wrong.graph.initializer if t.name == "w")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, "w"))
    onnx.save(wrong, str(tmp_path / "wrong.onnx"))
    bad = invoke("verify", source, tmp_path / "wrong.onnx")
    assert bad.exit_code == 3
    assert "differ" in bad.stdout


def test_verify_with_real_inputs_checks_their_names(source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.ones((1, 3, 16, 16), np.float32))
    np.savez(tmp_path / "bad.npz", image=np.ones((1, 3, 16, 16), np.float32))
    assert invoke("verify", source, source, "--inputs", tmp_path / "good.npz").exit_code == 0
    assert_one_line_error(invoke("verify", source, source, "--inputs", tmp_path / "bad.npz"), "x")


def test_bench_alone_and_in_pairs(source: Path) -> None:
    alone = json.loads(invoke("bench", source, "--pairs", 5, "--threads", 1, "--json").stdout)
    assert alone["runs"] == 5
    assert alone["median_ms"] > 0
    pair = invoke("bench", source, source, "--pairs", 5, "--threads", 1, "--json")
    assert json.loads(pair.stdout)["pairs"] == 5
    refused = invoke("bench", source, source, "--pairs", 5, "--fail-below", 1000)
    assert refused.exit_code == 3


def test_inspect_counts(source: Path) -> None:
    data = json.loads(invoke("inspect", source, "--json").stdout)
    assert data["total"]["macs"] == 8 * 3 * 9 * 16 * 16
    text = invoke("inspect", source, "--profile", "--threads", 1).stdout
    assert "total" in text
    assert "FLOP/byte" in text
    timed = json.loads(invoke("inspect", source, "--profile", "--threads", 1, "--json").stdout)
    # The runtime fuses and renames; the time must still stand at nodes of the model.
    assert {n["site"] for n in timed["nodes"]} & set(timed["time_us"])


def test_explain_names_every_site(source: Path) -> None:
    result = invoke("explain", source)
    assert result.exit_code == 0, result.output
    assert "fold-batch-normalization" in result.stdout
    data = json.loads(invoke("explain", source, "--json", "--node", "n_c").stdout)
    assert {r["site"] for r in data["remarks"]} == {"n_c"}
    assert_one_line_error(invoke("explain", source, "--node", "nowhere"), "nowhere")


def test_the_catalogue_shows_every_pass() -> None:
    listing = invoke("passes").stdout
    names = [p["name"] for p in json.loads(invoke("passes", "--json").stdout)["passes"]]
    assert names
    assert all(name in listing for name in names)
    page = invoke("passes", "lower-pointwise-conv").stdout
    assert "## Algebra" in page


def test_models_are_listed_and_exported(tmp_path: Path) -> None:
    assert "resnet50" in invoke("models", "list").stdout
    result = invoke("models", "export", "xor", "-o", tmp_path / "xor.onnx")
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(onnx.load(str(tmp_path / "xor.onnx")))
    assert_one_line_error(invoke("models", "export", "xorr"), "xor")


def test_example_models_write_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("optimize", "example:xor", "--effort", "none", "--input-shape", "x:1x2x4x4")
    if result.exit_code:
        result = invoke("optimize", "example:xor", "--effort", "none")
    assert result.exit_code == 0, result.output
    assert leftovers(tmp_path) == {"xor.opt.onnx"}


# -- bad input -----------------------------------------------------------------------------------


def garbage(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def invalid(path: Path, change: Any) -> Path:
    proto = conv_bn()
    change(proto)
    path.write_bytes(proto.SerializePartialToString())
    return path


def make_cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


def dangle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "nowhere"


def wrong_type(proto: onnx.ModelProto) -> None:
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.int32), "w"))


def bad_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("no_such_attribute", 1))


def future_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 9999


def nan_weight(proto: onnx.ModelProto) -> None:
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, "w"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (make_cycle, ["cycle"]),
        (dangle, ["nowhere"]),
        (wrong_type, ["model.onnx"]),
        (bad_attribute, ["no_such_attribute"]),
        (future_opset, ["9999", "opset"]),
        (nan_weight, ["NaN", "'w'"]),
    ],
)
def test_an_invalid_model_is_one_line_and_no_output(
    tmp_path: Path, change: Any, words: list[str]
) -> None:
    path = invalid(tmp_path / "model.onnx", change)
    assert_one_line_error(invoke("optimize", path, "--effort", "none"), *words)
    assert leftovers(tmp_path, "model.onnx") == set()


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"not a model at all", os.urandom(4096)])
def test_other_bytes_are_not_onnx(tmp_path: Path, data: bytes) -> None:
    path = garbage(tmp_path / "model.onnx", data)
    assert_one_line_error(invoke("optimize", path), "model.onnx")
    assert leftovers(tmp_path, "model.onnx") == set()


def test_a_truncated_model_is_refused(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    for keep in (len(data) // 3, len(data) - 7):
        path = garbage(tmp_path / "cut.onnx", data[:keep])
        assert_one_line_error(invoke("optimize", path, "--effort", "none"), "cut.onnx")


def test_missing_file_unknown_provider_unknown_pass(source: Path, tmp_path: Path) -> None:
    assert_one_line_error(invoke("optimize", tmp_path / "none.onnx"), "no such file")
    assert_one_line_error(invoke("optimize", source, "--provider", "npu"), "npu")
    assert_one_line_error(
        invoke("optimize", source, "--passes", "fold-afine"), "did you mean fold-affine"
    )
    assert_one_line_error(invoke("optimize", source, "--skip-passes", "fold-afine"), "fold-affine")
    assert_one_line_error(invoke("optimize", "example:resnet51"), "resnet50")
    assert leftovers(tmp_path, "model.onnx") == set()


def test_the_input_is_not_replaced_unless_asked(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    assert_one_line_error(
        invoke("optimize", source, "-o", source, "--effort", "none"), "--overwrite"
    )
    assert source.read_bytes() == before
    result = invoke("optimize", source, "-o", source, "--effort", "none", "--overwrite")
    assert result.exit_code == 0, result.output
    assert source.read_bytes() != before


def test_no_folder_no_output(source: Path, tmp_path: Path) -> None:
    refused = invoke("optimize", source, "-o", tmp_path / "no" / "x.onnx", "--effort", "none")
    assert_one_line_error(refused, "does not exist")
    assert_one_line_error(invoke("optimize", source, "-o", tmp_path, "--effort", "none"), "folder")


def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pwopt.graph.io.os.fsync", full)
    assert_one_line_error(invoke("optimize", source, "--effort", "none"), "No space left")
    assert leftovers(tmp_path, "model.onnx") == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(source: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused = invoke("optimize", source, "-o", locked / "x.onnx", "--effort", "none")
    assert_one_line_error(refused, "cannot be written")


def test_an_interrupt_leaves_no_half_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pwopt.graph.io.os.fsync", interrupt)
    result = invoke("optimize", source, "--effort", "none")
    assert result.exit_code == 130
    assert leftovers(tmp_path, "model.onnx") == set()


def test_wrong_usage_exits_with_two(source: Path) -> None:
    assert invoke("optimize").exit_code == 2
    assert invoke("optimize", source, "--effort", "much").exit_code == 2
    assert invoke("optimize", source, "--input-shape", "x=1x2").exit_code == 2
    assert invoke("bench", source, "--fail-below", 1).exit_code == 2
    assert invoke("optimize", source, "--report", "r.txt").exit_code == 2


def every_command() -> list[click.Command]:
    groups = [c for c in main.commands.values() if isinstance(c, click.Group)]
    return [
        main,
        *(c for c in main.commands.values() if c not in groups),
        *(c for group in groups for c in group.commands.values()),
    ]


@pytest.mark.parametrize("command", every_command(), ids=lambda c: str(c.name))
def test_every_command_shows_an_example(command: click.Command) -> None:
    text = command.get_help(main.make_context("pwopt", [], resilient_parsing=True))
    example = text.partition("\n  Example:\n")[2]  # on lines of its own, not wrapped
    assert example.strip().startswith("pwopt ")


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pwopt", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pwopt, version ")


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys, pwopt.cli;"
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'scipy', 'rich', 'onnx_graphsurgeon'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_listed_initializers_are_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 1, 1)).astype(np.float32)}
    proto = model(
        [node("Conv", ["x", "w"], ["y"])],
        {"x": [1, 3, 4, 4]},
        {"y": [1, 4, 4, 4]},
        weights,
        opset=8,
        ir=3,
    )
    assert len(proto.graph.input) == 2
    path = tmp_path / "old.onnx"
    onnx.save(proto, str(path))
    result = invoke("optimize", path, "--effort", "none")
    assert "1 initializers were listed among the inputs" in result.stdout
    assert len(onnx.load(str(tmp_path / "old.opt.onnx")).graph.input) == 1
    kept = invoke("optimize", path, "--effort", "none", "--keep-overridable-initializers")
    assert kept.exit_code == 0, kept.output
    assert len(onnx.load(str(tmp_path / "old.opt.onnx")).graph.input) == 2


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compared, the candidate is a tenth faster."""
    latency = Latency(1.0, (1.0, 1.0), 9)
    faster = Comparison(latency, latency, 1.1, (1.09, 1.11), 9, stable=True)
    monkeypatch.setattr(workbench, "compare", lambda *_, **__: faster)


def test_a_disturbed_machine_is_a_note(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latency = Latency(1.0, (1.0, 1.0), 9)
    wide = Comparison(latency, latency, 1.1, (1.02, 1.18), 9, stable=False)
    monkeypatch.setattr(workbench, "compare", lambda *_, **__: wide)
    assert any("disturbed" in note and "8%" in note for note in quick(source)["notes"])


@pytest.mark.usefixtures("no_clock")
def test_a_quiet_machine_is_no_note(source: Path) -> None:
    assert not any("disturbed" in note for note in quick(source)["notes"])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: what runs in the background may have inherited deafness to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_ends_the_trials_with_the_best_so_far(
    at: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = Latency(1.0, (1.0, 1.0), 9)
    faster = Comparison(latency, latency, 1.1, (1.09, 1.11), 9, stable=True)
    calls = 0

    def compare(*_: Any, on_progress: Any, **__: Any) -> Comparison:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
        on_progress(1, 2)
        return faster

    monkeypatch.setattr(workbench, "compare", compare)
    report = quick(source, "--cache", tmp_path / "cache")
    assert report["stop_reason"] == "interrupted"
    assert (tmp_path / "model.opt.onnx").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    calls = 99
    again = quick(source, "--cache", tmp_path / "cache")
    assert "earlier search" not in again["stop_reason"], "half a search was remembered"


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_ends_everything(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: Any, **__: Any) -> Comparison:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(workbench, "compare", compare)
    result = invoke("optimize", source, "--no-cache", "--threads", 1)
    assert_one_line_error(result, "interrupted", code=130)
    assert leftovers(tmp_path, "model.onnx") == set()


def quick(source: Path, *args: object) -> dict[str, Any]:
    """A short measured run; its report."""
    result = invoke("optimize", source, "--overwrite", "--threads", 1, "--json", *args)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.usefixtures("no_clock")
def test_a_second_run_measures_nothing_but_the_confirmation(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = quick(source, "--cache", cache)
    entries = json.loads(invoke("cache", "info", "--cache", cache, "--json").stdout)["entries"]
    assert entries > 1
    second = quick(source, "--cache", cache)
    assert "earlier search" in second["stop_reason"]
    assert second["output"]["sha256"] == first["output"]["sha256"]
    after = json.loads(invoke("cache", "info", "--cache", cache, "--json").stdout)["entries"]
    assert after <= entries + 1
    other = quick(source, "--cache", cache, "--skip-passes", "fold-affine")
    assert "earlier search" not in other["stop_reason"]
    assert "freed" in invoke("cache", "clear", "--cache", cache).stdout
    assert json.loads(invoke("cache", "info", "--cache", cache, "--json").stdout)["entries"] == 0


@pytest.mark.usefixtures("no_clock")
def test_a_second_run_runs_the_original_again_only_if_its_end_does_not_hold(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = quick(source, "--cache", cache)
    asked = 0
    of = Reference.of

    def counted(*args: Any, **kwargs: Any) -> Reference:
        nonlocal asked
        asked += 1
        return of(*args, **kwargs)

    monkeypatch.setattr(Reference, "of", counted)
    second = quick(source, "--cache", cache)
    assert asked == 0
    assert second["error"] == first["error"]
    monkeypatch.setattr("pwopt.line.run.confirm", lambda *_: None)
    third = quick(source, "--cache", cache)
    assert asked == 1
    assert "earlier search" not in third["stop_reason"]
    assert third["output"]["sha256"] == first["output"]["sha256"]


@pytest.mark.usefixtures("no_clock")
def test_an_end_that_gained_nothing_and_does_not_hold_leaves_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "model.onnx", tmp_path / "cache"
    model = conv_bn()
    del model.graph.node[1:]
    model.graph.node[0].output[0] = "same"
    model.graph.node.append(onnx.helper.make_node("Identity", ["same"], ["y"]))
    onnx.save(model, str(path))
    alone = ("--passes", "fold-affine", "--cache", cache)
    first = quick(path, *alone)
    assert [p["name"] for p in first["passes"] if p["applied"]] == ["canonicalise"]
    monkeypatch.setattr("pwopt.line.run.confirm", lambda *_: None)
    second = quick(path, *alone)
    assert "earlier search" in second["stop_reason"]
    assert second["latency"] is None
    assert (tmp_path / "model.opt.onnx").read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("no_clock")
def test_a_second_run_opens_each_model_once_and_writes_what_is_there_already_not_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "model.opt.onnx"
    first = quick(source, "--cache", cache)
    opened: list[str] = []
    saved: list[Path] = []
    session = onnxruntime.InferenceSession

    def opening(path: str, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name)
        return session(path, *args, **kwargs)

    def saving(model: Any, path: Path, **kwargs: Any) -> Any:
        saved.append(path)
        return save(model, path, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opening)
    monkeypatch.setattr("pwopt.tuning.workbench.save", saving)
    os.utime(output, (0, 0))
    place = output.stat().st_ino
    second = quick(source, "--cache", cache)
    assert "earlier search" in second["stop_reason"]
    assert second["output"] == first["output"]
    assert sorted(opened) == ["model.onnx", "model.opt.onnx"]
    assert not saved
    assert output.stat().st_ino == place
    assert output.stat().st_mtime > 0, "whoever waits for it must see that it is up to date"
    text = bytearray(output.read_bytes())
    text[-1] ^= 1
    output.write_bytes(text)
    assert quick(source, "--cache", cache)["output"] == first["output"]
    assert len(saved) == 1
    assert file_sha256(output) == first["output"]["sha256"]


@pytest.mark.usefixtures("no_clock")
def test_another_file_than_the_one_that_was_verified_is_searched_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    quick(source, "--cache", cache)
    get = Cache.get

    def forged(self: Cache, *key: object) -> Any:
        found = get(self, *key)
        return {**found, "sha256": "another"} if key[0] == "end of a search" and found else found

    monkeypatch.setattr(Cache, "get", forged)
    assert "earlier search" not in quick(source, "--cache", cache)["stop_reason"]


@pytest.mark.usefixtures("no_clock")
def test_without_a_cache_nothing_is_kept(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    report = quick(source, "--cache", cache, "--no-cache")
    assert "earlier search" not in report["stop_reason"]
    assert not cache.exists()


@pytest.mark.usefixtures("no_clock")
def test_a_damaged_cache_is_a_note(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "measurements.sqlite").write_bytes(b"garbage" * 999)
    report = quick(source, "--cache", cache)
    assert any("set aside" in note for note in report["notes"])


def test_a_report_is_replayed_and_bisected(source: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    first = invoke("optimize", source, "--effort", "none", "--report", report)
    assert first.exit_code == 0, first.output
    written = (tmp_path / "model.opt.onnx").read_bytes()
    again = invoke("optimize", source, "-o", tmp_path / "again.onnx", "--replay", report)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.onnx").read_bytes() == written
    found = invoke("bisect", source, "--replay", report, "--check", "verify")
    assert found.exit_code == 0, found.output
    assert "no rewrite" in found.stdout
    other = tmp_path / "other.onnx"
    onnx.save(conv_bn(channels=4), str(other))
    refused = invoke("optimize", other, "--replay", report)
    assert_one_line_error(refused, "other.onnx", "not the model")
    assert not (tmp_path / "other.opt.onnx").exists()
    assert_one_line_error(
        invoke("bisect", other, "--replay", report, "--check", "verify"), "not the model"
    )


def test_several_models_end_in_an_overview(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(conv_bn(channels=4), str(other))
    folder = tmp_path / "out"
    result = invoke("optimize", source, other, "--output-dir", folder, "--effort", "none")
    assert result.exit_code == 0, result.output
    assert {p.name for p in folder.iterdir()} == {"model.opt.onnx", "other.opt.onnx"}
    assert "model.onnx" in result.stdout
    assert "other.onnx" in result.stdout


def test_one_bad_model_among_several_does_not_keep_the_others(source: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.onnx"
    result = invoke("optimize", missing, source, "--effort", "none", "--json")
    assert_one_line_error(result, "missing.onnx")
    (report,) = json.loads(result.stdout)["reports"]
    assert report["model"]["path"] == str(source)
    assert (tmp_path / "model.opt.onnx").exists()


def test_options_for_one_model_are_refused_for_several(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "sub" / "model.onnx"
    assert invoke("optimize", source, other, "-o", tmp_path / "x.onnx").exit_code == 2
    assert invoke("optimize", source, other, "--report", tmp_path / "r.json").exit_code == 2
    clash = invoke("optimize", source, other, "--output-dir", tmp_path / "out")
    assert clash.exit_code == 2
    assert "model.opt.onnx" in clash.stderr
    both = invoke("optimize", source, "-o", tmp_path / "x.onnx", "--output-dir", tmp_path)
    assert both.exit_code == 2
