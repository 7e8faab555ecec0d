"""The benchmark of factorised models: what its cases are called, and what its tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.factorize import CASES, MOST_DB, chosen, named, own_psnr
from benchmarks.render import factorize_table
from pwopt.calibration import Batch


def accuracy(drop: float) -> dict[str, Any]:
    return {
        "baseline": 80.0,
        "optimized": 80 - drop,
        "drop": drop,
        "ci95": [drop - 1, drop + 1],
        "samples": 300,
    }


def row(**others: Any) -> dict[str, Any]:
    point = {"speedup": 1.2, "macs": 2e6, "forms": ["spatial-8"], "accuracy": accuracy(0.5)}
    found = {
        "name": "net",
        "asked": "much",
        "latency": {"speedup": 1.5, "ci95": [1.4, 1.6]},
        "accuracy": accuracy(0.75),
        "macs": [4e6, 2e6],
        "fitted_to": 200,
        "seconds": 61.2,
        "points": [point, point | {"final": accuracy(0.7)}],
        "conditions": {
            "device": "d",
            "python": "3",
            "onnxruntime": "1",
            "onnx": "1",
            "commit": "abc",
        },
    }
    return found | others


def test_files_of_cases_differ_and_keep_their_dots() -> None:
    names = [named(Path(), case).with_suffix(".onnx") for case in CASES]
    assert len(set(names)) == len(CASES)
    assert Path("squeezenet1-1_gluon.onnx") in names


def test_a_whole_name_picks_one_case() -> None:
    assert [case.name for case in chosen("cifar10_resnet20")] == ["cifar10_resnet20"]
    assert len(chosen("cifar10")) > 2


def test_the_table_tells_what_was_chosen_on_from_what_was_judged_on() -> None:
    new, old = row(selected_on=300, peak_mib=588.4), row()
    lines = factorize_table([new]).splitlines()
    assert lines[2].endswith("| 0.75 | -0.25 to 1.75 | 300 | 300 | 200 | 61 | 588 |")
    points = [line for line in lines if line.startswith("| net | 1 |")]
    assert points[0].endswith("| 0.50 | -0.50 to 1.50 |  |  |")
    assert points[1].endswith("| 0.50 | -0.50 to 1.50 | 0.70 | -0.30 to 1.70 |")
    assert factorize_table([old]).splitlines()[2].endswith("| 300 |  | 200 | 61 |  |")


def test_decibels_have_a_most() -> None:
    targets = np.zeros((2, 3, 4, 4), np.float32)
    outputs = {"y": targets + np.asarray([0.01, 0], np.float32).reshape(2, 1, 1, 1)}
    batch = Batch({}, 2, 2, targets=targets)
    assert own_psnr(outputs, batch) == pytest.approx([40, MOST_DB], abs=1e-3)
