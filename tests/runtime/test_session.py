from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from pwopt.errors import InvalidModelError, RuntimeUnavailableError, UsageError
from pwopt.runtime import (
    ExecutionError,
    Interface,
    MissingKernelError,
    TensorSpec,
    load_onnxruntime,
    open_session,
    reference_target,
    resolve,
    verification_target,
)
from pwopt.runtime.providers.cpu import cpu_from_cpuinfo
from pwopt.runtime.session import _specs, readable_error
from pwopt.target import Target
from tests.runtime.fake_runtime import fake_runtime
from tests.runtime.textual import RELU, write

CPU = Target(threads=1)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc",
    reason="other C libraries are left to themselves",
)
def test_a_closed_session_leaves_no_memory_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    blocks = [f"w{index}" for index in range(400)]  # too small to be mapped one by one
    nodes = [
        helper.make_node("Conv", [f"t{i}", name], [f"t{i + 1}"], pads=[1] * 4)
        for i, name in enumerate(blocks)
    ]
    value = partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "deep",
        [value("t0", shape=[1, 48, 4, 4])],
        [value("t400", shape=[1, 48, 4, 4])],
        [numpy_helper.from_array(np.zeros((48, 48, 3, 3), np.float32), n) for n in blocks],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    open_session(path, CPU).close()
    before = resident_mib()
    weights = path.stat().st_size / 2**20
    for _ in range(3):
        with open_session(path, CPU) as session:
            session.run({"t0": np.zeros((1, 48, 4, 4), np.float32)})
            assert resident_mib() > before + weights / 2
    assert resident_mib() < before + weights / 2


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_importing_pwopt_runtime_loads_neither_runtime_nor_scipy() -> None:
    code = (
        "import sys, pwopt.runtime; "
        "print([m for m in ('onnxruntime', 'onnx', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_runtime_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match=r"Install pwopt\[cpu\] or pwopt\[gpu\]"):
        load_onnxruntime()


@pytest.mark.parametrize(
    "error",
    [ImportError("libfoo.so.1: cannot open"), ModuleNotFoundError("no numpy", name="numpy")],
)
def test_a_broken_runtime_is_told_apart_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, error: ImportError
) -> None:
    def fail(name: str) -> object:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeUnavailableError, match=f"does not load: {error}"):
        load_onnxruntime()


def test_the_remains_of_an_uninstalled_runtime_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    with pytest.raises(RuntimeUnavailableError, match="incomplete"):
        load_onnxruntime()


def test_resolve_fills_in_device_and_version() -> None:
    resolved = resolve(Target(threads=2, input_shapes={"x": (1, 3)}))
    assert resolved.ort == onnxruntime.__version__
    assert "core" in resolved.device
    assert (resolved.threads, resolved.input_shapes) == (2, {"x": (1, 3)})
    assert resolved.fingerprint == resolve(resolved).fingerprint


def test_an_unknown_provider_is_a_usage_error() -> None:
    for call in (resolve, lambda target: open_session(Path("any.onnx"), target)):
        with pytest.raises(UsageError, match="'tpu' is unknown; choose cpu or cuda"):
            call(Target(provider="tpu"))


def test_negative_threads_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="-1 threads"):
        resolve(Target(threads=-1))


def test_a_missing_provider_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_runtime(monkeypatch, ["AzureExecutionProvider", "CPUExecutionProvider"], [])
    expected = (
        "CUDAExecutionProvider is not available (available: CPU). "
        "Install pwopt[gpu], or pass --provider cpu."
    )
    for call in (resolve, lambda target: open_session(write(tmp_path, RELU), target)):
        with pytest.raises(RuntimeUnavailableError) as caught:
            call(Target(provider="cuda"))
        assert str(caught.value) == expected


def test_silent_fallback_to_the_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path, RELU)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    opened = fake_runtime(monkeypatch, both, ["CPUExecutionProvider"])
    with pytest.raises(
        RuntimeUnavailableError, match=r"CUDAExecutionProvider is installed, but did not start"
    ):
        open_session(path, Target(provider="cuda"))
    assert opened[0].fallback == 0
    session = open_session(path, Target(provider="cuda", allow_fallback=True))
    assert session.providers == ("CPUExecutionProvider",)
    assert opened[1].providers == ["CPUExecutionProvider"], "what cannot start is not asked for"


def test_cuda_comes_first_with_its_options_and_the_cpu_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    opened = fake_runtime(monkeypatch, both, both)
    target = Target(provider="cuda", provider_options={"device_id": "1"})
    open_session(write(tmp_path, RELU), verification_target(target))
    assert opened[0].providers == [
        ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"}),
        "CPUExecutionProvider",
    ]


@pytest.mark.parametrize("optimized", [True, False])
def test_session_options_follow_the_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, optimized: bool
) -> None:
    opened = fake_runtime(monkeypatch, ["CPUExecutionProvider"], ["CPUExecutionProvider"])
    session = open_session(write(tmp_path, RELU), Target(threads=3), optimized=optimized)
    assert session.optimized is optimized
    options = opened[0].options
    level = onnxruntime.GraphOptimizationLevel
    expected = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    assert options.graph_optimization_level == expected
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.entries == {"session.force_spinning_stop": "1"}
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL


def test_the_reference_runs_on_the_cpu_with_the_same_shapes() -> None:
    target = Target("cuda", 2, {"device_id": "1"}, {"x": (1, 3)}, "GPU", "1.2")
    reference = reference_target(target)
    assert (reference.provider, dict(reference.provider_options)) == ("cpu", {})
    assert (reference.threads, reference.input_shapes) == (2, {"x": (1, 3)})
    assert verification_target(Target()) == Target()


def test_a_session_describes_and_runs_the_model(tmp_path: Path) -> None:
    graph = """g (float[N,3] x, int64[1] k) => (int64[1] j, float[N,3] y) {
        y = Relu(x)
        j = Abs(k)
    }"""
    with open_session(write(tmp_path, graph), CPU) as session:
        assert session.interface == Interface(
            inputs=(
                TensorSpec("x", "tensor(float)", ("N", 3)),
                TensorSpec("k", "tensor(int64)", (1,)),
            ),
            outputs=(
                TensorSpec("j", "tensor(int64)", (1,)),
                TensorSpec("y", "tensor(float)", ("N", 3)),
            ),
        )
        outputs = session.run({"k": [-4], "x": np.array([[-1, 0, 2]], np.float32)})
    assert list(outputs) == ["j", "y"]
    np.testing.assert_array_equal(np.asarray(outputs["y"]), [[0, 0, 2]])
    np.testing.assert_array_equal(np.asarray(outputs["j"]), [4])
    assert session.load_seconds > 0


def test_specs_tell_dtypes_and_dynamic_axes() -> None:
    assert TensorSpec("x", "tensor(float16)", (1, 3)).dtype == np.float16
    assert TensorSpec("x", "tensor(bfloat16)", (1, 3)).dtype == np.float32
    assert TensorSpec("x", "tensor(float8e5m2)", ()).dtype is None
    assert TensorSpec("x", "seq(tensor(float))", ()).dtype is None
    assert not TensorSpec("x", "tensor(float)", (1, 3)).is_dynamic
    assert TensorSpec("x", "tensor(float)", ("N", 3)).is_dynamic
    assert TensorSpec("x", "tensor(float)", (None, 3)).is_dynamic


@pytest.mark.parametrize("ir", [3, 8])
def test_initializers_listed_as_inputs_are_not_part_of_the_interface(
    tmp_path: Path, ir: int
) -> None:
    graph = "g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }"
    with open_session(write(tmp_path, graph, ir=ir), CPU) as session:
        assert [spec.name for spec in session.interface.inputs] == ["x"]
        np.testing.assert_array_equal(np.asarray(session.run({"x": [0, 0]})["y"]), [1, 2])


def test_overridable_initializers_may_be_fed(tmp_path: Path) -> None:
    graph = "g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }"
    with open_session(write(tmp_path, graph), CPU) as session:
        outputs = session.run({"x": [0, 0], "w": [5, 5]})
    np.testing.assert_array_equal(np.asarray(outputs["y"]), [5, 5])


def test_a_closed_session_does_not_run(tmp_path: Path) -> None:
    session = open_session(write(tmp_path, RELU), CPU)
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run({"x": np.zeros((1, 3), np.float32)})


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "lacks 'x'; the inputs of model.onnx are 'x'"),
        ({"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)}, "has unknown 'z'"),
        ({"x": np.zeros((1, 3))}, "takes float32, not float64"),
        ({"x": [[1, 2], [3]]}, "Input 'x' takes float32"),
    ],
)
def test_wrong_feeds_are_usage_errors(tmp_path: Path, feeds: dict[str, Any], message: str) -> None:
    with open_session(write(tmp_path, RELU), CPU) as session:
        for call in (session.run, session.runner):
            with pytest.raises(UsageError, match=message):
                call(feeds)


def test_strided_arrays_are_fed_as_they_look(tmp_path: Path) -> None:
    wide = np.arange(12, dtype=np.float32).reshape(2, 6)
    with open_session(write(tmp_path, RELU), CPU) as session:
        np.testing.assert_array_equal(
            np.asarray(session.run({"x": wide[:, ::2]})["y"]), wide[:, ::2]
        )


def test_strings_may_be_fed_as_numpy_strings(tmp_path: Path) -> None:
    path = write(tmp_path, "g (string[N] x) => (string[N] y) { y = Identity(x) }")
    with open_session(path, CPU) as session:
        assert np.asarray(session.run({"x": np.array(["a", "bc"])})["y"]).tolist() == ["a", "bc"]


def test_negative_sizes_are_unknown_ones() -> None:
    arguments = [SimpleNamespace(name="x", type="tensor(float)", shape=[-1, 3, "", "W", None])]
    assert _specs(arguments)[0].shape == (None, 3, None, "W", None)


def test_failing_to_run_names_the_node_on_one_line(tmp_path: Path) -> None:
    graph = "g (float[N] x, float[M] z) => (float[K] y) { [sum] y = Add(x, z) }"
    feeds = {"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)}
    with open_session(write(tmp_path, graph), CPU) as session:
        for call in (lambda: session.run(feeds), session.runner(feeds)):
            with pytest.raises(ExecutionError) as caught:
                call()
            message = str(caught.value)
            assert message.startswith("model.onnx: node 'sum' (Add): ")
            assert "broadcast an axis" in message
            assert "\n" not in message
            assert "onnxruntime_src" not in message


def test_a_wrong_shape_fails_to_run(tmp_path: Path) -> None:
    too_wide = np.zeros((1, 4), np.float32)
    with (
        open_session(write(tmp_path, RELU), CPU) as session,
        pytest.raises(ExecutionError, match="index: 1 Got: 4 Expected: 3"),
    ):
        session.run({"x": too_wide})


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("g (float[3] x) => (float[3] y) { [one] y = Foo(x) }", r"node 'one' \(Foo\): No Op"),
        ("g (float[3] x) => (float16[3] y) { [one] y = Relu(x) }", r"of node \(one\)"),
        ("g (float[3] x) => (float[3] y) { [one] y = Relu(q) }", "'q' is not a graph input"),
        ("g (float[3] x) => (float[3] b) { a = Relu(b) b = Relu(a) }", "acyclic"),
        ("g (float[2,3] x) => (float[2,2] y) { [one] y = MatMul(x, x) }", "Incompatible dim"),
    ],
)
def test_invalid_graphs_are_named_on_one_line(tmp_path: Path, graph: str, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message) as caught:
        open_session(write(tmp_path, graph), CPU)
    assert str(caught.value).startswith("model.onnx: ")
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)


def test_an_unsupported_opset_or_ir_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"^model.onnx: ONNX Runtime only .*Opset 99"):
        open_session(write(tmp_path, RELU, opset=99), CPU)
    with pytest.raises(InvalidModelError, match=r"^model.onnx: Unsupported model IR version: 99"):
        open_session(write(tmp_path, RELU, ir=99), CPU)


@pytest.mark.parametrize("content", [b"", b"not a model at all" * 30, bytes(range(256)) * 8])
def test_what_is_no_model_is_invalid(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModelError, match=r"^junk.onnx: "):
        open_session(path, CPU)


def test_a_missing_file_and_a_folder_are_invalid(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(InvalidModelError, match="does not exist or is not a file"):
            open_session(path, CPU)


def test_missing_weights_beside_the_model_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    proto = onnx.load(path)
    proto.graph.initializer[0].raw_data = np.ones(2, np.float32).tobytes()
    del proto.graph.initializer[0].float_data[:]
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InvalidModelError, match=r"w\.bin"):
        open_session(path, CPU)


def test_a_missing_kernel_is_told_apart_from_an_invalid_model(tmp_path: Path) -> None:
    graph = "g (bfloat16[3] x) => (bfloat16[3] y) { [sum] y = Add(x, x) }"
    with pytest.raises(MissingKernelError, match=r"Add\(14\) node with name 'sum'"):
        open_session(write(tmp_path, graph), CPU)


def test_bfloat16_travels_as_float32(tmp_path: Path) -> None:
    # ONNX Runtime's own cast says how a float rounds: to nearest, ties to even.
    cast = """g (float[N] x) => (bfloat16[N] y, float[N] z) {
        y = Cast <to = 16> (x)
        z = Identity(x)
    }"""
    same = "g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }"
    rng = np.random.default_rng(0)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2**-140, np.inf, np.nan, 3e38])
    x = np.concatenate([ties, rng.standard_normal(1000) * 100]).astype(np.float32)
    with open_session(write(tmp_path, cast, name="cast"), CPU) as session:
        rounded = session.run({"x": x})
    with open_session(write(tmp_path, same, name="same"), CPU) as session:
        fed = session.run({"x": x})
    y = np.asarray(rounded["y"])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y[7:], x[7:], rtol=2**-8)
    assert not np.array_equal(y[7:], x[7:])
    np.testing.assert_array_equal(np.asarray(fed["y"]), y)
    np.testing.assert_array_equal(np.asarray(rounded["z"]), x)


def test_packed_and_eight_bit_outputs_come_as_codes(tmp_path: Path) -> None:
    graph = """g (float[3] x) => (int4[3] a, float8e5m2[3] b) {
        a = Cast <to = 22> (x)
        b = Cast <to = 19> (x)
    }"""
    with open_session(write(tmp_path, graph, opset=21, ir=10), CPU) as session:
        outputs = session.run({"x": np.array([1, 2, 3], np.float32)})
    np.testing.assert_array_equal(np.asarray(outputs["a"]), [0x21, 0x03])
    np.testing.assert_array_equal(np.asarray(outputs["b"]), [0x3C, 0x40, 0x42])


def test_sequences_optionals_and_maps_pass_through(tmp_path: Path) -> None:
    graph = "g (seq(float[N]) s) => (seq(float[N]) t) { t = Identity(s) }"
    with open_session(write(tmp_path, graph), CPU) as session:
        (only,) = session.run({"s": [np.ones(2, np.float32)]}).values()
    assert isinstance(only, list)
    np.testing.assert_array_equal(only[0], [1, 1])


def test_readable_error_drops_nested_signatures() -> None:
    error = RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : Load model from /a b/m.onnx failed:/src/onnxruntime/core/"
        "x.cc:12 std::vector<std::function<void(int)> > onnxruntime::F(const A&, B(*)(int))"
        "::<lambda(int)> const [with T = float] size == 3 was false.\n  Say (why).\n"
    )
    assert readable_error(error) == "size == 3 was false. Say (why)."


def test_readable_error_survives_the_unexpected() -> None:
    assert readable_error(RuntimeError("")) == "RuntimeError"
    assert readable_error(MemoryError()) == "out of memory"
    assert readable_error(RuntimeError("/onnxruntime/x.cc:1 odd")) == "odd"
    assert len(readable_error(RuntimeError("x" * 5000))) <= 600


def test_cpu_description_reads_linux_fields() -> None:
    text = "processor\t: 0\nmodel name\t: Fast CPU 9000\nflags\t\t: fpu avx avx2 avx512f\n"
    assert cpu_from_cpuinfo(text) == ("Fast CPU 9000", "AVX-512")
    assert cpu_from_cpuinfo("processor\t: 0\nFeatures\t: fp asimd\n") == ("", "NEON")
    assert cpu_from_cpuinfo("") == ("", "")
