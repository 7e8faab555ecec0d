"""Sessions of ONNX Runtime for a target: opened, described, run and closed.

The only place that imports ``onnxruntime``, and only when it is called, so that everything which
needs no runtime works without one. Whatever ONNX Runtime throws leaves as a one-line pwopt error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pwopt.errors import InvalidModelError, PwoptError, RuntimeUnavailableError, UsageError
from pwopt.runtime.providers import PROVIDERS, Provider, Trouble, find_provider
from pwopt.target import Target

__all__ = [
    "ExecutionError",
    "Feeds",
    "Interface",
    "MissingKernelError",
    "OutOfMemoryError",
    "Outputs",
    "Session",
    "TensorSpec",
    "UntestableError",
    "Value",
    "load_onnxruntime",
    "open_session",
    "readable_error",
    "reference_target",
    "resolve",
    "return_memory",
    "verification_target",
    "without_capture",
]

Value: TypeAlias = npt.NDArray[Any] | list[Any] | dict[Any, Any] | None
"""What a graph input or output holds: a tensor, a sequence, a map, or an empty optional."""
Feeds: TypeAlias = dict[str, Value]
"""Values by input name."""
Outputs: TypeAlias = dict[str, Value]
"""Values by output name, in the order of the model's outputs."""

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {
        "float": np.dtype(np.float32),
        "double": np.dtype(np.float64),
        "float16": np.dtype(np.float16),
        "bfloat16": np.dtype(np.float32),
        "int8": np.dtype(np.int8),
        "int16": np.dtype(np.int16),
        "int32": np.dtype(np.int32),
        "int64": np.dtype(np.int64),
        "uint8": np.dtype(np.uint8),
        "uint16": np.dtype(np.uint16),
        "uint32": np.dtype(np.uint32),
        "uint64": np.dtype(np.uint64),
        "bool": np.dtype(np.bool_),
        "string": np.dtype(np.object_),
    }
)
_BITS_OF_RAW_TYPES: Final = MappingProxyType(
    {
        "bfloat16": 16,
        "float8e4m3fn": 8,
        "float8e4m3fnuz": 8,
        "float8e5m2": 8,
        "float8e5m2fnuz": 8,
        "int4": 4,
        "uint4": 4,
    }
)
"""Element types that ONNX Runtime cannot hand over as numpy arrays."""
_BFLOAT16_ONNX_TYPE: Final = 16
_CPU: Final = "CPUExecutionProvider"
_PACKAGES: Final = ("onnxruntime", "onnxruntime-gpu")
_RECORDING_OF_RUN: Final = "gpu_graph_id"
_NO_RECORDING: Final = "-1"
"""What a run is asked that is neither to be recorded nor replayed."""
_NESTED_LOCATIONS: Final = 4
_FATAL_ONLY: Final = 4
_LONGEST_MESSAGE: Final = 600


class ExecutionError(PwoptError):
    """A model that loaded failed to run on the values it was fed."""


class OutOfMemoryError(ExecutionError):
    """The provider's memory does not hold the model or a value of it."""


class UntestableError(PwoptError):
    """The original model cannot be run here, so nothing can be compared with it."""


class MissingKernelError(UntestableError):
    """The model may be valid, but the installed ONNX Runtime has no kernel for one of its nodes."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output as a session reports it.

    Attributes:
        name: its name in the graph.
        type: ONNX Runtime's type string, such as ``"tensor(float)"`` or ``"seq(tensor(int64))"``.
        shape: per axis the size, the symbol of a dynamic axis, or ``None`` for one without a
            symbol. ``()`` stands for a scalar, for an unknown rank (ONNX Runtime does not tell
            them apart), and for anything that is not a tensor.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def element(self) -> str | None:
        """Element type of a tensor in ONNX Runtime's words (``"float"``); ``None`` for others."""
        match = re.fullmatch(r"tensor\((\w+)\)", self.type)
        return match[1] if match else None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Numpy type that carries the values in feeds and outputs.

        bfloat16 travels as float32. ``None`` for what numpy has no type for (4- and 8-bit floats,
        4-bit integers) and for sequences, maps and optionals.
        """
        return _DTYPES.get(self.element or "")

    @property
    def is_dynamic(self) -> bool:
        """Whether some axis has no fixed size."""
        return not all(isinstance(size, int) for size in self.shape)


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a model, in order, as a session reports them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def load_onnxruntime() -> ModuleType:
    """Import ONNX Runtime.

    Raises:
        RuntimeUnavailableError: it is not installed, or does not load.
    """
    try:
        onnxruntime: ModuleType = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise RuntimeUnavailableError(_broken_runtime(error)) from error
        raise RuntimeUnavailableError(
            "ONNX Runtime is not installed. Install pwopt[cpu] or pwopt[gpu]."
        ) from error
    except ImportError as error:
        raise RuntimeUnavailableError(_broken_runtime(error)) from error
    # Removing one of two installed runtime packages leaves a folder that imports, but is empty.
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeUnavailableError(_broken_runtime("the package is incomplete"))
    return onnxruntime


def resolve(target: Target) -> Target:
    """Check that *target* can be used here, and fill in its device and runtime version.

    Raises:
        UsageError: the provider is unknown, it has no such option, or the number of threads is
            negative.
        RuntimeUnavailableError: no runtime is installed, it lacks the provider, or that cannot
            start.
    """
    provider = find_provider(target.provider)
    if target.threads < 0:
        raise UsageError(
            f"{target.threads} threads are impossible; give 1 or more, or 0 for the default."
        )
    checked = replace(target, provider_options=provider.checked_options(target.provider_options))
    ort = load_onnxruntime()
    provider.prepare(ort)
    if not target.allow_fallback:
        _require_available(ort, provider)
        problem = provider.diagnose(ort)
        if problem is not None:  # before anything is computed that would be lost
            raise _not_started(provider, problem)
    return replace(checked, device=provider.describe(checked), ort=str(ort.__version__))


def reference_target(target: Target) -> Target:
    """Where reference outputs for *target* are computed: on the CPU, with the same shapes."""
    return Target(
        provider="cpu", threads=target.threads, input_shapes=target.input_shapes, ort=target.ort
    )


def verification_target(target: Target) -> Target:
    """*target* set up for correctness instead of speed: on CUDA without TF32 or a recorded run.

    TF32 keeps 10 bits of mantissa; no fp32 tolerance would hold with it.
    """
    plain = without_capture(target)
    exact = find_provider(target.provider).exact_options
    return replace(plain, provider_options={**plain.provider_options, **exact})


def without_capture(target: Target) -> Target:
    """*target* without a recorded run, which reads and writes the same buffers each time."""
    dropped = find_provider(target.provider).capture_option
    kept = {key: value for key, value in target.provider_options.items() if key != dropped}
    return replace(target, provider_options=kept)


class Session:
    """A loaded model that runs; built by :func:`open_session`, a context manager.

    Attributes:
        path: the model file.
        target: what it was opened for.
        optimized: whether ONNX Runtime's graph optimizations are on.
        interface: inputs and outputs.
        providers: execution providers in use, in ONNX Runtime's words and order of precedence.
        load_seconds: wall time of loading, optimizing and preparing.
    """

    def __init__(
        self, session: Any, path: Path, target: Target, *, optimized: bool, load_seconds: float
    ) -> None:
        self._session = session
        self._provider = find_provider(target.provider)
        self.path = path
        self.target = target
        self.optimized = optimized
        self.load_seconds = load_seconds
        self.interface = Interface(_specs(session.get_inputs()), _specs(session.get_outputs()))
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        # Initializers listed as inputs may be overridden, but are not part of the interface.
        overridable = _specs(session.get_overridable_initializers())
        self._accepted = {spec.name: spec for spec in (*self.interface.inputs, *overridable)}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return self._session is not None

    def close(self) -> None:
        """Free the model's memory and threads; the session cannot run afterwards."""
        self._session = None
        return_memory()

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Run once and return the outputs in the model's order.

        Raises:
            UsageError: a name or dtype is not the model's.
            ExecutionError: ONNX Runtime cannot run the model on these values.
        """
        names = [spec.name for spec in self.interface.outputs]
        run = self._runner(feeds)
        with self._readable_failures():
            return dict(zip(names, map(_value, run()), strict=True))

    def runner(self, feeds: Mapping[str, Value]) -> Callable[[], object]:
        """Return a function that runs once; feeds are checked and converted now, not each time.

        Raises:
            UsageError: a name or dtype is not the model's.
            ExecutionError: (by the function) ONNX Runtime cannot run the model on these values.
        """
        run = self._runner(feeds)

        def guarded() -> object:
            with self._readable_failures():
                return run()

        return guarded

    def timed_runner(self, feeds: Mapping[str, Value]) -> Callable[[], object]:
        """What to time: as :meth:`runner`, without copies to and from the provider's memory.

        Raises:
            UsageError: a name or dtype is not the model's.
            ExecutionError: (also by the function) the model fails on these values.
        """
        return self.bound_runner(feeds) if self._is_on_device else self.runner(feeds)

    def bound_runner(self, feeds: Mapping[str, Value]) -> Callable[[], object]:
        """As :meth:`runner`, with inputs and outputs in buffers of the provider's memory.

        The buffers stay the same, which a run that is recorded and replayed needs. The function
        returns when the outputs are there. Values that cannot be bound (strings, sequences, maps)
        make it a plain runner.

        Raises:
            UsageError: a name or dtype is not the model's.
            ExecutionError: (also by the function) the model fails on these values.
        """
        session = self._live()
        self._check_names(feeds)
        arrays = self._bindable(feeds)
        if arrays is None:
            return self.runner(feeds)
        ort = load_onnxruntime()
        place = self._place
        unrecorded = ort.RunOptions()
        if self._provider.captures(self.target.provider_options):
            unrecorded.add_run_config_entry(_RECORDING_OF_RUN, _NO_RECORDING)
        with self._readable_failures():
            binding = session.io_binding()
            for name, array in arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array, *place)
                binding.bind_ortvalue_input(name, value)
            for spec in self.interface.outputs:
                binding.bind_output(spec.name, *place)
            binding.synchronize_inputs()
            # Once without a recording, to learn the shapes of the outputs and keep their buffers.
            session.run_with_iobinding(binding, unrecorded)
            for spec, value in zip(self.interface.outputs, binding.get_outputs(), strict=True):
                binding.bind_ortvalue_output(spec.name, value)

        def run() -> object:
            with self._readable_failures():
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            return binding

        return run

    def copiers(
        self, feeds: Mapping[str, Value]
    ) -> tuple[Callable[[], object], Callable[[], object]] | None:
        """Functions that copy all inputs to the provider's memory, and all outputs back.

        ``None`` on the CPU, and if there is something that cannot be bound.

        Raises:
            UsageError: a name or dtype is not the model's.
            ExecutionError: the model fails on these values.
        """
        self._check_names(feeds)
        arrays = self._bindable(feeds) if self._is_on_device else None
        if arrays is None:
            return None
        ort = load_onnxruntime()
        binding = self.bound_runner(feeds)()
        pairs = [(ort.OrtValue.ortvalue_from_numpy(a, *self._place), a) for a in arrays.values()]
        outputs = binding.get_outputs()  # type: ignore[attr-defined]
        return (
            lambda: [value.update_inplace(array) for value, array in pairs],
            lambda: [value.numpy() for value in outputs],
        )

    @property
    def _is_on_device(self) -> bool:
        """Whether there is a device, and the CPU does not stand in for it."""
        return self._provider.is_device and self._provider.runtime_name in self.providers

    @property
    def _place(self) -> tuple[str, int]:
        """Device type and number, as ONNX Runtime's values take them."""
        index = int(self.target.provider_options.get("device_id", "0"))
        return self._provider.device_type, index

    def _bindable(self, feeds: Mapping[str, Value]) -> dict[str, npt.NDArray[Any]] | None:
        """*feeds* as arrays; ``None`` if they or the outputs cannot be bound."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, value in feeds.items():
            spec = self._accepted[name]
            fed = _fed(spec, value)
            if not _is_plain(spec) or not isinstance(fed, np.ndarray):
                return None
            arrays[name] = fed
        return arrays if all(map(_is_plain, self.interface.outputs)) else None

    def end_profiling(self) -> Path:
        """Write the profile of a session opened with ``profile_to``; return where it lies."""
        return Path(self._live().end_profiling())

    def _live(self) -> Any:
        if self._session is None:
            raise ValueError(f"the session of {self.path.name} is closed")
        return self._session

    def _runner(self, feeds: Mapping[str, Value]) -> Callable[[], list[Any]]:
        session = self._live()
        self._check_names(feeds)
        arrays = {name: _fed(self._accepted[name], value) for name, value in feeds.items()}
        specs = (*self._accepted.values(), *self.interface.outputs)
        if not any(spec.element in _BITS_OF_RAW_TYPES for spec in specs):
            return lambda: session.run(None, arrays)
        ort = load_onnxruntime()
        values = {name: _ort_value(ort, self._accepted[name], a) for name, a in arrays.items()}
        return lambda: session.run_with_ort_values(None, values)

    def _check_names(self, feeds: Mapping[str, Value]) -> None:
        required = [spec.name for spec in self.interface.inputs]
        missing = [name for name in required if name not in feeds]
        unknown = [name for name in feeds if name not in self._accepted]
        if not missing and not unknown:
            return
        problem = f"lacks {_quoted(missing)}" if missing else f"has unknown {_quoted(unknown)}"
        raise UsageError(
            f"The feed {problem}; the inputs of {self.path.name} are {_quoted(required)}."
        )

    @contextlib.contextmanager
    def _readable_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            advised = _advised(self._provider, self.path, error)
            if advised is not None:
                raise advised from error
            raise ExecutionError(f"{self.path.name}: {readable_error(error)}") from error


def open_session(
    path: Path,
    target: Target,
    *,
    optimized: bool = True,
    profile_to: Path | None = None,
) -> Session:
    """Load the model at *path* for *target*.

    Args:
        path: the model file.
        target: provider, provider options, threads, and whether the CPU may stand in for a
            provider that does not start.
        optimized: all of ONNX Runtime's graph optimizations, or none.
        profile_to: path prefix of a profile to record; see :meth:`Session.end_profiling`.

    Raises:
        UsageError: unknown provider or provider option.
        InvalidModelError: the file is missing or is no model that ONNX Runtime accepts.
        MissingKernelError: the runtime has no kernel for one of its nodes.
        OutOfMemoryError: the model is too large for the provider's memory.
        RuntimeUnavailableError: no runtime, or the provider is missing or does not start.
    """
    provider = find_provider(target.provider)
    checked = provider.checked_options(target.provider_options)
    ort = load_onnxruntime()
    if not target.allow_fallback:
        _require_available(ort, provider)
    if not path.is_file():
        raise InvalidModelError(f"{path} does not exist or is not a file.")
    provider.prepare(ort)
    options = _session_options(ort, target, optimized=optimized, profile_to=profile_to)
    return_memory()
    providers: list[Any] = [] if provider.runtime_name == _CPU else [_CPU]
    if not target.allow_fallback or _can_start(ort, provider):
        providers.insert(0, (provider.runtime_name, checked))
    start = time.perf_counter()
    try:
        session = ort.InferenceSession(
            os.fspath(path),
            options,
            providers=providers,
            enable_fallback=int(target.allow_fallback),
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise _load_failure(provider, path, error) from error
    load_seconds = time.perf_counter() - start
    if provider.runtime_name not in session.get_providers() and not target.allow_fallback:
        problem = provider.diagnose(ort) or f"running: {_short(session.get_providers())}"
        raise _not_started(provider, problem)
    return Session(session, path, target, optimized=optimized, load_seconds=load_seconds)


def return_memory() -> None:
    """Give what this process has freed back to the system, where the C library keeps it.

    A closed session's weights are many blocks, which glibc holds for later: up to three times the
    model that no other process can use. Takes less than a millisecond if there is nothing.
    """
    trim = _find_trim()
    if trim is not None:
        trim(0)


@cache
def _find_trim() -> Callable[[int], object] | None:
    """The function of glibc, if that is the C library."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


def readable_error(error: BaseException) -> str:
    """One line that says what ONNX Runtime complained about, without its source locations."""
    if isinstance(error, MemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    text = _without_source_location(text)
    text = re.sub(
        r'^(?:This is an invalid model\. )?In Node, \("([^"]*)", (\w+), .*? , Error ',
        r"node '\1' (\2): ",
        text,
    )
    text = re.sub(
        r"^Non-zero status code returned while running (\w+) node\. Name:'([^']*)' "
        r"Status Message: ",
        r"node '\2' (\1): ",
        text,
    )
    text = text.strip() or type(error).__name__
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 4] + " ..."


def _without_source_location(text: str) -> str:
    """Drop ``/onnxruntime_src/file.cc:12 void ns::function(args) const`` wherever it stands."""
    text = re.sub(r" ; GPU=-?\d+ ; hostname=.*$", "", text)
    for _ in range(_NESTED_LOCATIONS):
        match = re.search(r"\S*/\S*\.(?:h|cc|cpp|cu|cuh):\d+ ", text)
        if not match:
            break
        end = _signature_end(text, match.end())
        text = text[: match.start()] + text[end:].lstrip()
    return text


def _signature_end(text: str, start: int) -> int:
    """Index behind the C++ function signature at *start*; *start* itself if there is none."""
    depth = 0
    has_arguments = False
    for index in range(start, len(text)):
        depth += text[index] in "(<"
        depth -= text[index] in ")>"
        if text[index] not in ")>" or depth > 0:
            continue
        # The return type may end in ">" before any argument list, and behind one
        # "::<lambda(int)>" or the second half of "operator()(int)" may follow.
        has_arguments = has_arguments or text[index] == ")"
        if not has_arguments or re.match(r"::|\(", text[index + 1 :]):
            continue
        if "::" not in text[start:index]:
            return start
        tail = re.match(r"(?: const| noexcept| \[with [^\]]*\])*", text[index + 1 :])
        return index + 1 + (tail.end() if tail else 0)
    return start


def _load_failure(provider: Provider, path: Path, error: Exception) -> PwoptError:
    advised = _advised(provider, path, error)
    if advised is not None:
        return advised
    reason = readable_error(error)
    if type(error).__name__ == "NotImplemented":
        return MissingKernelError(f"{path.name}: ONNX Runtime cannot run it: {reason}")
    if "provider option" in reason.lower():
        return UsageError(f"A provider option was refused: {reason}")
    return InvalidModelError(f"{path.name}: {reason}")


def _advised(provider: Provider, path: Path, error: Exception) -> PwoptError | None:
    """*error* with what the provider advises against it, if it does."""
    found = provider.remedy(" ".join(str(error).split()))
    if found is None:
        return None
    problem, remedy = found
    if remedy.trouble is Trouble.SETUP:
        return RuntimeUnavailableError(f"{provider.runtime_name}: {problem}. {remedy.advice}")
    kind = OutOfMemoryError if remedy.trouble is Trouble.MEMORY else UsageError
    return kind(f"{path.name}: {problem}. {remedy.advice}")


def _not_started(provider: Provider, problem: str) -> PwoptError:
    """The runtime only logs why a provider does not start; *problem* is what it says if asked."""
    found = provider.remedy(problem)
    advice = "Check its driver and libraries, or pass --provider cpu."
    if found is not None:
        problem, advice = found[0], found[1].advice
    return RuntimeUnavailableError(
        f"{provider.runtime_name} is installed, but did not start: {problem}. {advice}"
    )


def _session_options(
    ort: ModuleType, target: Target, *, optimized: bool, profile_to: Path | None
) -> Any:
    level = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    # One intra-op thread means the caller's own: ONNX Runtime then creates no pool at all.
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL_ONLY
    # Workers otherwise spin on after a run and take the cores from the session measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile_to)
    return options


def _require_available(ort: ModuleType, provider: Provider) -> None:
    names = {p.runtime_name for p in PROVIDERS.values()}
    available = [name for name in ort.get_available_providers() if name in names]
    if provider.runtime_name in available:
        return
    advice = f"Install {provider.extra}, or pass --provider cpu."
    twice = _installed_twice()
    if twice:
        advice = (
            f"{' and '.join(twice)} are both installed and overwrite each other: uninstall them,"
            f" then install {provider.extra}; or pass --provider cpu."
        )
    raise RuntimeUnavailableError(
        f"{provider.runtime_name} is not available (available: {_short(available)}). {advice}"
    )


def _can_start(ort: ModuleType, provider: Provider) -> bool:
    """Asking the runtime for one that cannot makes it write pages to standard error."""
    is_there = provider.runtime_name in ort.get_available_providers()
    return is_there and provider.diagnose(ort) is None


def _installed_twice() -> tuple[str, ...]:
    """Packages that bring the same runtime, if there is more than one."""
    found = tuple(name for name in _PACKAGES if _is_installed(name))
    return found if len(found) > 1 else ()


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _short(provider_names: list[str]) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in provider_names) or "none"


def _broken_runtime(reason: object) -> str:
    return (
        f"ONNX Runtime is installed, but does not load: {reason}. "
        "Reinstall pwopt[cpu] or pwopt[gpu], only one of them."
    )


def _specs(arguments: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(a.name, a.type, tuple(map(_size, a.shape))) for a in arguments)


def _size(size: object) -> int | str | None:
    if isinstance(size, int):
        return size if size >= 0 else None
    return str(size) if size else None


def _is_plain(spec: TensorSpec) -> bool:
    """Whether its values are tensors of numbers that numpy has a type for."""
    return (
        spec.dtype is not None
        and spec.dtype != np.dtype(np.object_)
        and spec.element not in _BITS_OF_RAW_TYPES
    )


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _fed(spec: TensorSpec, value: Value) -> Value:
    """*value* in the input's dtype, and contiguous so that no run pays for a copy."""
    if spec.element is None or value is None:
        return value
    if spec.dtype is None:
        raise UsageError(f"Input '{spec.name}' has type {spec.type}, which cannot be fed.")
    if not isinstance(value, np.ndarray):
        try:
            return np.asarray(value, dtype=spec.dtype)
        except (TypeError, ValueError) as error:
            raise UsageError(f"Input '{spec.name}' takes {spec.dtype}: {error}.") from error
    if value.dtype != spec.dtype and not (spec.element == "string" and value.dtype.kind in "US"):
        raise UsageError(f"Input '{spec.name}' takes {spec.dtype}, not {value.dtype}.")
    return np.asarray(value, order="C")


def _ort_value(ort: ModuleType, spec: TensorSpec, value: Value) -> Any:
    if not isinstance(value, np.ndarray):
        raise UsageError(f"Input '{spec.name}' has type {spec.type}, which cannot be fed here.")
    if spec.element == "bfloat16":
        bits = _bfloat16_bits(value)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16_ONNX_TYPE)
    return ort.OrtValue.ortvalue_from_numpy(value)


def _bfloat16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest and ties to even; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _value(value: Any) -> Value:
    """An output as :data:`Value`; an ``OrtValue`` is copied into numpy first."""
    if not hasattr(value, "data_ptr"):
        return value  # type: ignore[no-any-return]
    element = value.data_type().removeprefix("tensor(").removesuffix(")")
    bits = _BITS_OF_RAW_TYPES.get(element)
    if bits is None:
        return value.numpy()  # type: ignore[no-any-return]
    shape = tuple(value.shape())
    elements = int(np.prod(shape, dtype=np.int64))
    raw = ctypes.string_at(value.data_ptr(), (elements * bits + 7) // 8) if elements else b""
    if element != "bfloat16":
        codes = np.frombuffer(raw, np.uint8)
        return codes.reshape(shape) if bits == 8 else codes
    widened = np.frombuffer(raw, np.uint16).astype(np.uint32) << np.uint32(16)
    return widened.view(np.float32).reshape(shape)
