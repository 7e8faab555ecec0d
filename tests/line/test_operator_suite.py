"""ONNX's generated operator models through the whole line, without a clock."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

import pwopt
from pwopt.errors import PwoptError
from pwopt.tuning.effort import Effort
from tests.operator_suite import difference, interface, is_valid, run


def verdict(
    proto: onnx.ModelProto, data_sets: Sequence[Any], folder: Path, counts: Counter[str]
) -> str | None:
    """What is wrong with the optimized model, if anything."""
    source, output = folder / "model.onnx", folder / "out.onnx"
    output.unlink(missing_ok=True)
    onnx.save(proto, str(source))
    counts["models"] += 1
    options = pwopt.Options(effort=Effort.NONE)
    try:
        report = pwopt.optimize(source, output, pwopt.Target("cpu", threads=1), options)
    except PwoptError as error:
        counts["refused with a reason"] += 1
        if output.exists() or "\n" in str(error):
            return f"badly refused: {error}"
        return None
    counts["rewritten"] += any(tally.applied for tally in report.passes.values())
    rewritten = onnx.load(str(output))
    if interface(rewritten) != interface(proto):
        return "the interface changed"
    if is_valid(proto) and not is_valid(rewritten):
        return "the result is not valid"
    for inputs, _ in data_sets:
        expected = run(proto, inputs)
        if expected is None:
            continue
        counts["compared"] += 1
        actual = run(rewritten, inputs)
        found = "the runtime refuses it" if actual is None else difference(expected, actual)
        if found:
            return found
    return None


@pytest.mark.slow
def test_operator_suite(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    for case in cases:
        try:
            assert case.model is not None
            found = verdict(case.model, case.data_sets or (), tmp_path, counts)
        except Exception as error:  # counted, so that one crash does not hide the others
            found = f"{type(error).__name__}: {error}"
        if found:
            failures[case.name] = found
    summary = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"operator suite: {summary}, {len(failures)} failed")
    assert not failures, failures
    assert counts["models"] == len(cases) >= 1000
    assert counts["compared"] >= 1000
