"""Running and comparing the single-operator models that ONNX generates for its backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

_SLACK = 4.0
"""Rounding allowed, in units of the last place of each output's largest value."""


def _session(proto: onnx.ModelProto) -> ort.InferenceSession | None:
    """A session that computes as the model says, if the runtime has one."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # unsupported operators, types and opsets come as many kinds
        return None


def run(proto: onnx.ModelProto, inputs: Sequence[Any]) -> list[Any] | None:
    session = _session(proto)
    if session is None:
        return None
    constants = {t.name for t in proto.graph.initializer}
    names = [v.name for v in proto.graph.input if v.name not in constants]
    feeds = {n: v for n, v in zip(names, inputs, strict=False) if v is not None}
    try:
        return list(session.run(None, feeds))
    except Exception:  # a kernel that refuses these inputs
        return None


def difference(expected: Any, actual: Any) -> str | None:
    """What is wrong with *actual*, if anything."""
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(expected) != len(actual):
            return "sequence lengths differ"
        found = [difference(e, a) for e, a in zip(expected, actual, strict=True)]
        return next(filter(None, found), None)
    if not isinstance(expected, np.ndarray):
        return None if expected == actual else f"{expected!r} became {actual!r}"
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return f"{expected.dtype}{expected.shape} became {actual.dtype}{actual.shape}"
    if expected.dtype.kind != "f":
        return None if np.array_equal(expected, actual) else "values differ"
    e, a = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(finite, np.isfinite(a)):
        return "infinities or NaNs differ"
    scale = float(np.abs(e[finite]).max(initial=0.0))
    limit = _SLACK * float(np.finfo(expected.dtype).eps) * scale
    error = float(np.abs(e[finite] - a[finite]).max(initial=0.0))
    return None if error <= limit else f"values differ by {error}, {limit} is allowed"


def interface(proto: onnx.ModelProto) -> list[bytes]:
    constants = {t.name for t in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in constants]
    return [v.SerializeToString(deterministic=True) for v in (*inputs, *proto.graph.output)]


def is_valid(proto: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception:  # the checker refuses some of ONNX's own models
        return False
    return True
