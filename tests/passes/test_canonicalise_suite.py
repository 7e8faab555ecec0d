"""Canonicalise on every operator model that ONNX generates for backends, and on trained ones."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.backend.test.case.node import collect_testcases

from pwopt.graph import parse
from pwopt.passes.canonicalise import Canonicalise
from pwopt.tuning.driver import Driver

_ROUNDS = 8
_SLACK = 4.0
"""Rounding allowed, in units of the last place of each output's largest value."""


def _canonicalised(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The model after canonicalising to a fixed point, and the number of rewrites."""
    model = parse(proto)
    model.unlist_initializers()
    driver = Driver(model)
    driver.rewriter.infer_shapes()
    total = 0
    for _ in range(_ROUNDS):
        applied, _ = driver.run(Canonicalise())
        total += applied
        if not applied:
            break
        driver.rewriter.infer_shapes()
    else:
        pytest.fail("canonicalise does not come to rest")
    driver.rewriter.drop_idle_initializers()
    return model.to_proto(), total


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


def _run(proto: onnx.ModelProto, inputs: Sequence[Any]) -> list[Any] | None:
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


def _difference(expected: Any, actual: Any) -> str | None:
    """What is wrong with *actual*, if anything."""
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(expected) != len(actual):
            return "sequence lengths differ"
        found = [_difference(e, a) for e, a in zip(expected, actual, strict=True)]
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


def _interface(proto: onnx.ModelProto) -> list[bytes]:
    constants = {t.name for t in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in constants]
    return [v.SerializeToString(deterministic=True) for v in (*inputs, *proto.graph.output)]


def _is_valid(proto: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception:  # the checker refuses some of ONNX's own models
        return False
    return True


def _verdict(proto: onnx.ModelProto, data_sets: Sequence[Any], counts: Counter[str]) -> str | None:
    before = proto.SerializeToString(deterministic=True)
    rewritten, applied = _canonicalised(proto)
    counts["models"] += 1
    counts["rewritten"] += bool(applied)
    counts["rewrites"] += applied
    if proto.SerializeToString(deterministic=True) != before:
        return "the input model was changed"
    if _interface(proto) != _interface(rewritten):
        return "the interface changed"
    if _is_valid(proto) and not _is_valid(rewritten):
        return "the result is not valid"
    if _canonicalised(rewritten)[1]:
        return "not idempotent"
    if not applied:
        return None
    for inputs, _ in data_sets:
        expected = _run(proto, inputs)
        if expected is None:
            continue
        counts["compared"] += 1
        actual = _run(rewritten, inputs)
        if actual is None:
            return "the runtime refuses the result"
        found = _difference(expected, actual)
        if found:
            return found
    return None


@pytest.mark.slow
def test_operator_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    for case in cases:
        assert case.model is not None
        try:
            found = _verdict(case.model, case.data_sets or (), counts)
        except Exception as error:  # counted, so that one crash does not hide the others
            found = f"{type(error).__name__}: {error}"
        if found:
            failures[case.name] = found
    summary = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    with capsys.disabled():
        sys.stdout.write(f"\noperator suite: {summary}, {len(failures)} failed\n")
    assert not failures, failures
    assert counts["models"] == len(cases) >= 1000
    assert counts["compared"] >= 100


def _feeds(proto: onnx.ModelProto, size: int) -> list[Any]:
    """Random inputs; *size* stands for dynamic spatial dimensions, 1 for a dynamic batch."""
    rng = np.random.default_rng(0)
    constants = {t.name for t in proto.graph.initializer}
    shapes = [
        [
            d.dim_value or (size if axis else 1)
            for axis, d in enumerate(v.type.tensor_type.shape.dim)
        ]
        for v in proto.graph.input
        if v.name not in constants
    ]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.slow
@pytest.mark.zoo
def test_trained_models() -> None:
    """Outputs within a few rounding errors; twice leaves nothing to do."""
    folder = os.environ.get("PWOPT_ZOO")
    if folder is None:
        pytest.skip("PWOPT_ZOO does not name the model collection")
    paths = sorted((Path(folder) / "models").glob("*.onnx"))
    assert paths
    for path in paths:
        proto = onnx.load(path)
        rewritten, _ = _canonicalised(proto)
        assert _interface(rewritten) == _interface(proto), path.name
        assert _canonicalised(rewritten)[1] == 0, path.name
        inputs = _feeds(proto, 64)
        expected = _run(proto, inputs)
        assert expected is not None, path.name
        assert _difference(expected, _run(rewritten, inputs)) is None, path.name
