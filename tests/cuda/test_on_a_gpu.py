"""What only a GPU can show; skipped, with the reason, where there is none: ``pytest -m cuda``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import pwopt
from benchmarks.cuda import bottlenecks
from pwopt.errors import PwoptError
from pwopt.line import default_passes
from pwopt.runtime import OutOfMemoryError, Reference, make_inputs, open_session, resolve
from pwopt.runtime.providers import CUDA
from pwopt.tuning.effort import Effort
from tests.passes import harness
from tests.runtime.textual import RELU, write

pytestmark = pytest.mark.cuda

QUICKLY = pwopt.Options(effort=Effort.NONE)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> pwopt.Target:
    """CUDA, if it really starts."""
    wanted = pwopt.Target("cuda")
    try:
        found = resolve(wanted)
        open_session(write(tmp_path_factory.mktemp("start"), RELU), found).close()
    except PwoptError as error:
        pytest.skip(f"no GPU: {error}")
    return found


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    onnx.save(bottlenecks(2, blocks=2, width=32, size=28), str(path))
    return path


def feeds(path: Path, target: pwopt.Target) -> list[dict[str, Any]]:
    with open_session(path, replace(target, provider="cpu", provider_options={})) as session:
        return make_inputs(session.interface.inputs, target, np.random.default_rng(0))


def test_the_device_is_known(target: pwopt.Target) -> None:
    assert "compute" in target.device
    assert "driver" in target.device
    assert "cuDNN" in target.device


def test_a_convolutional_chain_runs_on_the_gpu_alone(chain: Path, target: pwopt.Target) -> None:
    found = Reference.of(chain, target, feeds(chain, target), depth=6)
    assert found.placement is not None
    assert set(found.placement.nodes) == {CUDA.runtime_name}
    assert found.placement.fallen == ()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_convolutions_compute_the_same(
    tmp_path: Path, target: pwopt.Target, residual: bool, bias: bool
) -> None:
    before = _convolution(residual=residual, bias=bias)
    fuse = next(p for p in default_passes(target) if p.name == "fuse-pointwise-activation")
    after = harness.run_pass(fuse, before)
    assert after.ops == ["FusedConv"]
    paths = [tmp_path / "before.onnx", tmp_path / "after.onnx"]
    for path, model in zip(paths, (before, after.model), strict=True):
        onnx.save(model, str(path))
    assert Reference.of(paths[0], target, feeds(paths[0], target)).verify(paths[1]).ok


def _convolution(*, residual: bool, bias: bool) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 8, 3, 3)).astype(np.float32)}
    operands = ["x", "w"]
    inputs = {"x": (2, 8, 14, 14)}
    if bias:
        weights["b"] = rng.standard_normal(16).astype(np.float32)
        operands.append("b")
    nodes = [harness.node("Conv", operands, ["c"], pads=[1] * 4)]
    last = "c"
    if residual:
        inputs["z"] = (2, 16, 14, 14)
        nodes.append(harness.node("Add", ["c", "z"], ["s"]))
        last = "s"
    nodes.append(harness.node("Relu", [last], ["y"]))
    return harness.model(nodes, inputs, {"y": (2, 16, 14, 14)}, weights)


def test_a_dense_layer_as_a_fused_convolution(tmp_path: Path, target: pwopt.Target) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((64, 32)).astype(np.float32),
        "b": rng.standard_normal(32).astype(np.float32),
    }
    nodes = [harness.node("Gemm", ["x", "w", "b"], ["g"]), harness.node("Relu", ["g"], ["y"])]
    before = harness.model(nodes, {"x": (4, 64)}, {"y": (4, 32)}, weights)
    fuse = next(p for p in default_passes(target) if p.name == "fuse-pointwise-activation")
    after = harness.run_pass(fuse, before)
    assert "FusedConv" in after.ops
    paths = [tmp_path / "before.onnx", tmp_path / "after.onnx"]
    for path, model in zip(paths, (before, after.model), strict=True):
        onnx.save(model, str(path))
    assert Reference.of(paths[0], target, feeds(paths[0], target)).verify(paths[1]).ok


@pytest.mark.parametrize("options", [{}, {"enable_cuda_graph": "1"}], ids=str)
def test_bound_and_recorded_runs_compute_the_same(
    chain: Path, target: pwopt.Target, options: Mapping[str, str]
) -> None:
    feed = feeds(chain, target)[0]
    with open_session(chain, target) as session:
        (expected,) = session.run(feed).values()
    with open_session(chain, replace(target, provider_options=options)) as session:
        run: Any = session.timed_runner(feed)
        for _ in range(4):
            (value,) = run().get_outputs()
            assert value.device_name() == "cuda"
            np.testing.assert_allclose(value.numpy(), np.asarray(expected), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("trial", CUDA.trials, ids=str)
def test_every_option_that_is_tried_runs_and_computes_the_same(
    chain: Path, target: pwopt.Target, trial: Mapping[str, str]
) -> None:
    found = Reference.of(chain, target, feeds(chain, target), depth=6)
    with_options = replace(found, target=replace(target, provider_options=trial))
    assert with_options.verify(chain).ok


def test_correctness_runs_keep_out_tf32(chain: Path, target: pwopt.Target) -> None:
    report = pwopt.optimize(chain, target=target, options=QUICKLY)
    assert report.error.max_relative is not None
    assert report.error.max_relative < 2e-5
    assert report.error.coarse is not None
    assert report.error.coarse.name == "TF32"
    assert report.placement is not None
    assert report.placement.fallback == ()


def test_half_precision_is_verified_on_the_gpu(chain: Path, target: pwopt.Target) -> None:
    report = pwopt.optimize(chain, target=target, options=replace(QUICKLY, fp16=True))
    assert report.fp16 is not None
    assert report.error.max_relative is not None
    assert 1e-6 < report.error.max_relative <= report.error.tolerance


def test_nodes_that_the_gpu_lacks_are_named(tmp_path: Path, target: pwopt.Target) -> None:
    graph = "g (float[2,3,3] x) => (float[2] y) { [det] y = Det(x) }"
    path = write(tmp_path, graph)
    with pytest.raises(PwoptError, match=r"left 1 of \d+ nodes to CPU: 'det' \(Det\)"):
        Reference.of(path, target, feeds(path, target))


def test_too_little_memory_is_named(chain: Path, target: pwopt.Target) -> None:
    small = replace(target, provider_options={"gpu_mem_limit": "1000000"})
    with pytest.raises(OutOfMemoryError, match="Free memory on the GPU"):
        Reference.of(chain, small, feeds(chain, target))


def test_a_device_that_is_not_there_is_named(chain: Path, target: pwopt.Target) -> None:
    with pytest.raises(PwoptError, match="device_id=N"):
        open_session(chain, replace(target, provider_options={"device_id": "99"}))
