"""CUDA: NVIDIA's GPUs, through cuDNN and cuBLAS.

Options, and what the kernels do with them, were read in ONNX Runtime's sources
(``core/providers/cuda/cuda_execution_provider_info.cc``, ``nn/conv.cc``, ``math/gemm.cc``,
``contrib_ops/cuda/fused_conv.cc``) and in the provider library of release 1.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final

from pwopt.runtime.providers.contract import Provider, Read, Remedy, Trouble, flag, number, one_of
from pwopt.target import Target

__all__ = ["CUDA", "describe_device"]

_OPTIONS: Final[Mapping[str, Read]] = MappingProxyType(
    {
        "device_id": number,
        "prefer_nhwc": flag,
        "use_tf32": flag,
        "cudnn_conv_algo_search": one_of("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
        "cudnn_conv_use_max_workspace": flag,
        "cudnn_conv1d_pad_to_nc1d": flag,
        "fuse_conv_bias": flag,
        "enable_cuda_graph": flag,
        "enable_skip_layer_norm_strict_mode": flag,
        "gpu_mem_limit": number,
        "arena_extend_strategy": one_of("kNextPowerOfTwo", "kSameAsRequested"),
        "do_copy_in_default_stream": flag,
        "use_ep_level_unified_stream": flag,
        "sdpa_kernel": number,
        "tunable_op_enable": flag,
        "tunable_op_tuning_enable": flag,
        "tunable_op_max_tuning_duration_ms": number,
    }
)
"""Without those that hold addresses of memory or streams, which mean nothing outside a process."""

_PASSES: Final = (
    # Since 1.20 the runtime fuses neither an activation nor a sum into a convolution, but it
    # keeps the fused kernel. A Gemm fills its result with the bias first, by a kernel of its own.
    "fuse-pointwise-activation:gemm=fused-conv",
    # There is no blocked layout that would take a Transpose in, and the products of cuBLAS want
    # their channels last; whether that pays for the Transposes around them is for the clock.
    "assign-layout:product=1.0:beside_conv=1.0",
)

_ROOFLINE: Final = MappingProxyType(
    {
        # Peaks of NVIDIA's data sheet of the A100 (40 GB): fp32 without tensor cores.
        "gflops": 19_500.0,
        "gbytes_per_s": 1_555.0,
        # Submitting a kernel takes 4 to 6 us (https://susun-blog.com/blog/pegainfer-3-cuda-graph).
        "node_overhead_us": 5.0,
        "channel_block": 0,
        "absorbs": False,
    }
)
"""For ``--effort none`` only; it decides nothing where there is a clock."""

_TRIALS: Final = (
    MappingProxyType({"prefer_nhwc": "1"}),
    MappingProxyType({"fuse_conv_bias": "1"}),
    MappingProxyType({"cudnn_conv_algo_search": "HEURISTIC"}),
    MappingProxyType({"cudnn_conv_use_max_workspace": "0"}),
    MappingProxyType({"enable_cuda_graph": "1"}),
)

_MEMORY: Final = (
    "Free memory on the GPU, measure with a smaller batch (--input-shape), or pass"
    " --provider-option cudnn_conv_use_max_workspace=0 and"
    " --provider-option arena_extend_strategy=kSameAsRequested."
)
_LIBRARIES: Final = (
    "Install pwopt[gpu], which brings CUDA and cuDNN, or put those that this ONNX Runtime was"
    " built for on the library path; or pass --provider cpu."
)
_DRIVER: Final = (
    "Update the NVIDIA driver, or install an onnxruntime-gpu that was built for an older CUDA; or"
    " pass --provider cpu."
)

_REMEDIES: Final = (
    Remedy(
        r"(?:libcuda\.so\.1|nvcuda\.dll)[^\n;]*",
        "There is no NVIDIA driver: install it, in a container pass the GPU on (--gpus all), or"
        " pass --provider cpu.",
    ),
    Remedy(r"(?:libcudnn\w*\.so|cudnn\w*\.dll)[^\n;]*", f"cuDNN is missing. {_LIBRARIES}"),
    Remedy(
        r"(?:lib(?:cublas|cudart|cufft|curand|nvrtc|nvJitLink)\w*\.so"
        r"|(?:cublas|cudart|cufft|curand|nvrtc)\w*\.dll)[^\n;]*",
        f"CUDA is missing, or another version than needed. {_LIBRARIES}",
    ),
    Remedy(r"CUDA driver version is insufficient for CUDA runtime version", _DRIVER),
    Remedy(r"forward compatibility was attempted on non supported HW", _DRIVER),
    Remedy(
        r"no CUDA-capable device is detected",
        "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or pass --provider cpu.",
    ),
    Remedy(
        r"invalid device ordinal|Invalid device ID: \d+[^.;\n]*",
        "Pass --provider-option device_id=N with the number of a GPU that nvidia-smi lists.",
    ),
    Remedy(
        r"no kernel image is available for execution on the device",
        "This build of onnxruntime-gpu does not support this GPU: install another version, or"
        " pass --provider cpu.",
    ),
    Remedy(
        r"CUDNN_STATUS_(?:SUBLIBRARY_)?VERSION_MISMATCH|CUDNN_STATUS_NOT_INITIALIZED"
        r"|CUDNN_BACKEND_API_FAILED",
        "Several versions of cuDNN are mixed, the driver is too old for this one, or the GPU has no"
        f" memory left. {_LIBRARIES}",
    ),
    Remedy(
        r"Failed to allocate memory for requested buffer of size \d+|CUDA failure 2: out of memory"
        r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
        _MEMORY,
        Trouble.MEMORY,
    ),
    Remedy(
        r"cannot use the (?:CUDA Graph|graph capture) feature",
        "The model has control flow, or nodes that run on the CPU: leave out --provider-option"
        " enable_cuda_graph=1.",
        Trouble.OPTIONS,
    ),
)


def _prepare(ort: ModuleType) -> None:
    """Let ONNX Runtime find CUDA and cuDNN in Python packages; failures show at session start."""
    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        preload()


def _diagnose(ort: ModuleType) -> str | None:
    """What the loader says about the provider's library.

    ONNX Runtime only logs it, and goes on with the CPU.
    """
    folder = Path(str(ort.__file__)).parent / "capi"
    form = "{}.dll" if platform.system() == "Windows" else "lib{}.so"
    for name in ("onnxruntime_providers_shared", "onnxruntime_providers_cuda"):
        try:
            # The second finds the symbols that it needs in the first.
            ctypes.CDLL(str(folder / form.format(name)), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return str(error)
    return None


def _describe(target: Target) -> str:
    return describe_device(int(target.provider_options.get("device_id", "0")))


def describe_device(index: int) -> str:
    """Model, compute capability, driver and cuDNN of a GPU; its number only, if none answers."""
    with contextlib.suppress(OSError, AttributeError):
        parts = [_model(index), _driver_version(), _cudnn_version()]
        return ", ".join(part for part in parts if part)
    return f"CUDA device {index}"


def _library(linux: str, windows: str) -> Any:
    return ctypes.CDLL(windows if platform.system() == "Windows" else linux)


def _model(index: int) -> str:
    """By the driver itself, which counts devices as ONNX Runtime does."""
    cuda = _library("libcuda.so.1", "nvcuda.dll")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), index),
        lambda: cuda.cuDeviceGetName(name, len(name), device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    if any(call() != 0 for call in calls):
        return f"CUDA device {index}"
    return f"{name.value.decode(errors='replace')}, compute {major.value}.{minor.value}"


def _driver_version() -> str:
    with contextlib.suppress(OSError, AttributeError):
        nvml = _library("libnvidia-ml.so.1", "nvml.dll")
        version = ctypes.create_string_buffer(81)
        if nvml.nvmlInit_v2() == 0:
            try:
                if nvml.nvmlSystemGetDriverVersion(version, len(version)) == 0:
                    return f"driver {version.value.decode(errors='replace')}"
            finally:
                nvml.nvmlShutdown()
    return ""


def _cudnn_version() -> str:
    """Of the library that is loaded or would be found."""
    with contextlib.suppress(OSError, AttributeError):
        cudnn = _library("libcudnn.so.9", "cudnn64_9.dll")
        cudnn.cudnnGetVersion.restype = ctypes.c_size_t
        found = int(cudnn.cudnnGetVersion())
        return f"cuDNN {found // 10000}.{found // 100 % 100}.{found % 100}"
    return ""


CUDA: Final = Provider(
    "cuda",
    "CUDAExecutionProvider",
    "pwopt[gpu]",
    _describe,
    options=_OPTIONS,
    is_device=True,
    device_type="cuda",
    exact_options=MappingProxyType({"use_tf32": "0"}),
    # Where cuDNN has no plan without tensor cores, a Conv falls back to one with TF32 whatever
    # use_tf32 says (nn/conv.cc); this variable, which NVIDIA's libraries read, does not let it.
    exact_environment=MappingProxyType({"NVIDIA_TF32_OVERRIDE": "0"}),
    coarse="TF32",
    capture_option="enable_cuda_graph",
    roofline=_ROOFLINE,
    passes=_PASSES,
    trials=_TRIALS,
    remedies=_REMEDIES,
    prepare=_prepare,
    diagnose=_diagnose,
)
