"""Every trained model of the collection comes through: same interface, verified, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest

import pwopt
from pwopt.tuning.effort import Effort

ZOO = os.environ.get("PWOPT_ZOO")
MODELS = sorted((Path(ZOO) / "models").glob("*.onnx")) if ZOO else []
HEAVY = {"fns_mosaic", "waifu2x_cunet_x2"}
"""Models that run for seconds without the runtime's optimizations."""
SHAPES = {
    "realesr_animevideov3_x2": {"data": (1, 3, 24, 32)},
    "dncnn_sigma25_bn": {"input": (1, 1, 40, 32)},
}
"""Small sizes for the models whose height and width are dynamic."""


def interface(path: Path) -> list[bytes]:
    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in constants]
    return [v.SerializeToString(deterministic=True) for v in (*inputs, *graph.output)]


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO, reason="PWOPT_ZOO names no model collection")
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in HEAVY else [])
        for p in MODELS
    ],
)
def test_a_trained_model_comes_through(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    target = pwopt.Target("cpu", threads=1, input_shapes=SHAPES.get(source.stem, {}))
    report = pwopt.optimize(source, output, target, pwopt.Options(effort=Effort.NONE))
    assert interface(output) == interface(source)
    assert report.error.max_relative is not None
    assert report.error.max_relative <= report.error.tolerance < 0.01
    assert not report.error.untested
    tallies = report.passes.values()
    assert sum(t.visited for t in tallies) == len(report.remarks)


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO, reason="PWOPT_ZOO names no model collection")
def test_the_collection_is_there() -> None:
    assert MODELS, f"no models in {ZOO}"
