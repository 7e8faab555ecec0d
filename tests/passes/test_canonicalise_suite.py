"""Canonicalise on every operator model that ONNX generates for backends, and on trained ones."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from pwopt.graph import parse
from pwopt.passes.canonicalise import Canonicalise
from pwopt.tuning.driver import Driver
from tests import zoo
from tests.operator_suite import difference, interface, is_valid, run

_ROUNDS = 8


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


def _verdict(proto: onnx.ModelProto, data_sets: Sequence[Any], counts: Counter[str]) -> str | None:
    before = proto.SerializeToString(deterministic=True)
    rewritten, applied = _canonicalised(proto)
    counts["models"] += 1
    counts["rewritten"] += bool(applied)
    counts["rewrites"] += applied
    if proto.SerializeToString(deterministic=True) != before:
        return "the input model was changed"
    if interface(proto) != interface(rewritten):
        return "the interface changed"
    if is_valid(proto) and not is_valid(rewritten):
        return "the result is not valid"
    if _canonicalised(rewritten)[1]:
        return "not idempotent"
    if not applied:
        return None
    for inputs, _ in data_sets:
        expected = run(proto, inputs)
        if expected is None:
            continue
        counts["compared"] += 1
        actual = run(rewritten, inputs)
        if actual is None:
            return "the runtime refuses the result"
        found = difference(expected, actual)
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
    paths = sorted(zoo.folder().glob("*.onnx"))
    assert paths
    for path in paths:
        proto = onnx.load(path)
        rewritten, _ = _canonicalised(proto)
        assert interface(rewritten) == interface(proto), path.name
        assert _canonicalised(rewritten)[1] == 0, path.name
        inputs = _feeds(proto, 64)
        expected = run(proto, inputs)
        assert expected is not None, path.name
        assert difference(expected, run(rewritten, inputs)) is None, path.name
