"""The CUDA provider where there is no GPU: its options, its errors in the runtime's own words."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pwopt.errors import PwoptError, RuntimeUnavailableError, UsageError
from pwopt.runtime import ExecutionError, OutOfMemoryError, Session, open_session, resolve
from pwopt.runtime.providers import CUDA, PROVIDERS, find_provider
from pwopt.runtime.providers import cuda as cuda_provider
from pwopt.target import Target
from tests.runtime.fake_runtime import fake_runtime
from tests.runtime.textual import RELU, write

BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]
CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:{} std::conditional_t<THRW,"
    " void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*,"
    " SUCCTYPE, const char*, const char*, int) [with ERRTYPE = {}; bool THRW = true; SUCCTYPE ="
    " {}; std::conditional_t<THRW, void, common::Status> = void] "
)
BEHIND = " ; GPU={} ; hostname=c4327188c000000 ; file={} ; line=336 ; expr={}; "


def cuda_call(kind: str, says: str, gpu: int, expr: str) -> str:
    """What ONNX Runtime throws where a call of CUDA, cuBLAS or cuDNN fails."""
    nested = CALL.format(122, kind, kind) + CALL.format(114, kind, kind)
    file = "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc"
    return nested + says + BEHIND.format(gpu, file, expr)


THROWN = {
    # https://github.com/onnxruntime/mobius/issues/316
    "old driver": (
        cuda_call(
            "cudaError",
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
            -1,
            "cudaSetDevice(info_.device_id)",
        ),
        RuntimeUnavailableError,
        "CUDA driver version is insufficient for CUDA runtime version. Update the NVIDIA driver",
    ),
    # https://github.com/microsoft/onnxruntime/issues/17337
    "wrong cuDNN": (
        cuda_call(
            "cudnnStatus_t",
            "CUDNN failure 1: CUDNN_STATUS_NOT_INITIALIZED",
            0,
            "cudnnCreate(&cudnn_handle_)",
        ),
        RuntimeUnavailableError,
        "CUDNN_STATUS_NOT_INITIALIZED. Several versions of cuDNN are mixed",
    ),
    "no device": (
        cuda_call(
            "cudaError",
            "CUDA failure 100: no CUDA-capable device is detected",
            -1,
            "cudaSetDevice(info_.device_id)",
        ),
        RuntimeUnavailableError,
        "no CUDA-capable device is detected. Check nvidia-smi",
    ),
    # cuda_execution_provider_info.cc
    "no such device": (
        (
            "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider_info.cc:57"
            " onnxruntime::CUDAExecutionProviderInfo::FromProviderOptions(const ProviderOptions&)::"
            "<lambda(const string&)> Invalid device ID: 3, must be between 0 (inclusive) and 1"
            " (exclusive)."
        ),
        RuntimeUnavailableError,
        (
            "Invalid device ID: 3, must be between 0 (inclusive) and 1 (exclusive). Pass"
            " --provider-option device_id=N"
        ),
    ),
    # https://github.com/microsoft/onnxruntime/issues/12977, inference_session.cc
    "graph capture": (
        (
            "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as"
            " requested by the user as all compute graph nodes have not been partitioned to the"
            " CUDAExecutionProvider"
        ),
        UsageError,
        "cannot use the graph capture feature. The model has control flow, or nodes that run on",
    ),
    "out of memory": (
        cuda_call("cudaError", "CUDA failure 2: out of memory", 0, "cudaMalloc((void**)&p, size)"),
        OutOfMemoryError,
        "model.onnx: CUDA failure 2: out of memory. Free memory on the GPU",
    ),
}


@pytest.mark.parametrize("case", THROWN)
def test_what_a_session_throws_comes_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    text, kind, expected = THROWN[case]
    fake_runtime(monkeypatch, BOTH, BOTH, thrown=RuntimeError(text))
    with pytest.raises(PwoptError) as caught:
        open_session(write(tmp_path, RELU), Target("cuda"))
    assert type(caught.value) is kind
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hostname" not in str(caught.value)


# https://github.com/microsoft/onnxruntime/issues/22702
NO_BUFFER = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv"
    " node. Name:'/stem/Conv' Status Message: /onnxruntime_src/onnxruntime/core/framework/"
    "bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool,"
    " onnxruntime::Stream*, bool, onnxruntime::WaitNotificationFn) Failed to allocate memory for"
    " requested buffer of size 2830172160\n"
)


def failing(tmp_path: Path, text: str, provider: str) -> Session:
    """A session whose runs fail with *text*."""

    def fail(*_: object) -> object:
        raise RuntimeError(text)

    with open_session(write(tmp_path, RELU), Target()) as real:
        inputs, outputs = real._live().get_inputs(), real._live().get_outputs()
    inner = SimpleNamespace(
        get_inputs=lambda: inputs,
        get_outputs=lambda: outputs,
        get_overridable_initializers=list,
        get_providers=lambda: BOTH,
        run=fail,
        io_binding=fail,
    )
    return Session(inner, tmp_path / "m.onnx", Target(provider), optimized=True, load_seconds=0)


def test_running_out_of_memory_comes_with_a_remedy(tmp_path: Path) -> None:
    feeds = {"x": np.zeros((1, 3), np.float32)}
    session = failing(tmp_path, NO_BUFFER, "cuda")
    for call in (session.run, session.timed_runner):
        with pytest.raises(OutOfMemoryError, match=r"of size 2830172160\. Free memory on the GPU"):
            call(feeds)
    with pytest.raises(ExecutionError, match=r"'/stem/Conv' \(Conv\): Failed to allocate"):
        failing(tmp_path, NO_BUFFER, "cpu").run(feeds)


def test_errors_without_a_remedy_lose_their_nested_places(tmp_path: Path) -> None:
    text = cuda_call("cudaError", "CUDA failure 700: an illegal memory access", 0, "cudaFree(p)")
    with pytest.raises(ExecutionError) as caught:
        failing(tmp_path, text, "cuda").run({"x": np.zeros((1, 3), np.float32)})
    assert str(caught.value) == "m.onnx: CUDA failure 700: an illegal memory access"


MISSING = {
    # As onnxruntime-gpu 1.31.1 logs them before it goes on with the CPU.
    "libcublasLt.so.13": "CUDA is missing, or another version than needed. Install pwopt[gpu]",
    "libcudnn.so.9": "cuDNN is missing. Install pwopt[gpu]",
    "libcudnn_adv.so.9": "cuDNN is missing. Install pwopt[gpu]",
    "libcuda.so.1": "There is no NVIDIA driver: install it, in a container pass the GPU on",
}


@pytest.mark.parametrize("library", MISSING)
def test_a_missing_library_is_named_though_the_runtime_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str
) -> None:
    reason = f"{library}: cannot open shared object file: No such file or directory"
    loaded: list[str] = []

    def load(name: str, mode: int = 0) -> object:
        loaded.append(Path(name).name)
        if "cuda" in name:
            raise OSError(reason)
        return object()

    fake_runtime(monkeypatch, BOTH, ["CPUExecutionProvider"])
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(RuntimeUnavailableError) as caught:
        open_session(write(tmp_path, RELU), Target("cuda"))
    assert str(caught.value).startswith(
        f"CUDAExecutionProvider is installed, but did not start: {reason}. {MISSING[library]}"
    )
    assert loaded == [
        "libonnxruntime_providers_shared.so",
        "libonnxruntime_providers_cuda.so",
    ]


def test_two_runtimes_side_by_side_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runtime(monkeypatch, ["CPUExecutionProvider"], [])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: name)
    with pytest.raises(RuntimeUnavailableError, match="both installed and overwrite each other"):
        resolve(Target("cuda"))


def test_options_are_spelled_as_the_runtime_does() -> None:
    given = {
        "use_tf32": "False",
        "prefer_nhwc": "1",
        "cudnn_conv_algo_search": "heuristic",
        "cudnn_conv_use_max_workspace": "0",
        "fuse_conv_bias": "true",
        "gpu_mem_limit": "0100",
    }
    assert CUDA.checked_options(given) == {
        "use_tf32": "0",
        "prefer_nhwc": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
        "fuse_conv_bias": "1",
        "gpu_mem_limit": "100",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefer_nwhc": "1"}, "has no provider option 'prefer_nwhc'; did you mean prefer_nhwc"),
        ({"zzz": "1"}, "known: device_id, prefer_nhwc, use_tf32, cudnn_conv_algo_search"),
        ({"use_tf32": "maybe"}, "use_tf32 of CUDAExecutionProvider does not take 'maybe'; it tak"),
        ({"device_id": "-1"}, "takes a whole number"),
        ({"cudnn_conv_algo_search": "best"}, "it takes EXHAUSTIVE, HEURISTIC, DEFAULT"),
    ],
)
def test_wrong_options_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], message: str
) -> None:
    opened = fake_runtime(monkeypatch, BOTH, BOTH)
    target = Target("cuda", provider_options=given)
    for call in (resolve, lambda target: open_session(write(tmp_path, RELU), target)):
        with pytest.raises(UsageError, match=message):
            call(target)
    assert not opened


def test_the_cpu_takes_no_options() -> None:
    with pytest.raises(UsageError, match="CPUExecutionProvider takes no provider options"):
        resolve(Target(provider_options={"use_tf32": "0"}))


def test_options_are_passed_on_and_part_of_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = fake_runtime(monkeypatch, BOTH, BOTH)
    seen = set()
    for key, value in (
        ("prefer_nhwc", "1"),
        ("use_tf32", "0"),
        ("cudnn_conv_algo_search", "HEURISTIC"),
        ("fuse_conv_bias", "1"),
        ("cudnn_conv_use_max_workspace", "0"),
    ):
        target = resolve(Target("cuda", provider_options={key: value}))
        open_session(write(tmp_path, RELU), target)
        assert opened[-1].providers[0] == ("CUDAExecutionProvider", {key: value})
        seen.add(target.fingerprint)
    assert len(seen) == 5


def test_spellings_of_an_option_share_a_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runtime(monkeypatch, BOTH, BOTH)
    said = [resolve(Target("cuda", provider_options={"use_tf32": v})) for v in ("0", "false")]
    assert said[0].fingerprint == said[1].fingerprint


def test_every_option_and_pass_that_is_tried_exists() -> None:
    from pwopt import passes

    for provider in PROVIDERS.values():
        for trial in provider.trials:
            assert provider.checked_options(trial) == dict(trial)
        for spec in provider.passes:
            assert passes.parse_spec(spec).spec() == spec
    assert CUDA.trials


def test_the_device_is_described_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {
        "libcuda.so.1": SimpleNamespace(
            cuInit=lambda flags: 0,
            cuDeviceGet=lambda device, index: 0,
            cuDeviceGetName=_writes(b"NVIDIA H100 80GB HBM3"),
            cuDeviceGetAttribute=lambda value, which, device: _put(value, 9 if which == 75 else 0),
        ),
        "libnvidia-ml.so.1": SimpleNamespace(
            nvmlInit_v2=lambda: 0,
            nvmlSystemGetDriverVersion=_writes(b"580.65.06"),
            nvmlShutdown=lambda: 0,
        ),
        "libcudnn.so.9": SimpleNamespace(cudnnGetVersion=_Version()),
    }
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libraries[name])
    assert cuda_provider.describe_device(0) == (
        "NVIDIA H100 80GB HBM3, compute 9.0, driver 580.65.06, cuDNN 9.28.1"
    )
    libraries["libcuda.so.1"].cuInit = lambda flags: 100
    assert cuda_provider.describe_device(1).startswith("CUDA device 1, driver")


class _Version:
    restype: Any = None

    def __call__(self) -> int:
        return 92801


def _writes(text: bytes) -> Any:
    def write_into(buffer: Any, *_: object) -> int:
        buffer.value = text
        return 0

    return write_into


def _put(reference: Any, value: int) -> int:
    reference._obj.value = value
    return 0


def test_a_gpu_that_does_not_answer_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cuda_provider.describe_device(2) == "CUDA device 2"


def test_only_known_providers_are_found() -> None:
    assert find_provider("cuda") is CUDA
    with pytest.raises(UsageError, match="'tpu' is unknown"):
        find_provider("tpu")
