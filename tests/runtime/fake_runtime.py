"""A stand-in for ONNX Runtime on a machine with other providers than this one."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

__all__ = ["fake_runtime"]


class FakeOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


def fake_runtime(
    monkeypatch: pytest.MonkeyPatch,
    available: list[str],
    started: list[str],
    *,
    thrown: Exception | None = None,
) -> list[Any]:
    """A runtime with *available* providers whose sessions start with the *started* ones.

    Or throw *thrown*. Returns what they are opened with, as it comes.
    """
    opened: list[Any] = []

    def session(path: str, options: object, *, providers: list[Any], enable_fallback: int) -> Any:
        opened.append(
            SimpleNamespace(options=options, providers=providers, fallback=enable_fallback)
        )
        if thrown is not None:
            raise thrown
        return SimpleNamespace(
            get_providers=lambda: started,
            get_inputs=list,
            get_outputs=list,
            get_overridable_initializers=list,
        )

    fake = SimpleNamespace(
        __version__="9.9",
        __file__="/nowhere/onnxruntime/__init__.py",
        InferenceSession=session,
        SessionOptions=FakeOptions,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        ExecutionMode=onnxruntime.ExecutionMode,
        get_available_providers=lambda: available,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    if "CUDAExecutionProvider" in started:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    return opened
