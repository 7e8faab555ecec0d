from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pwopt.calibration import Data, Preprocess
from pwopt.runtime import Feeds
from pwopt.target import Target
from tests.calibration.data import write_classes
from tests.passes.harness import model, node


def relu(path: Path, batch: int | str) -> Path:
    shape = [batch, 3, 8, 8]
    onnx.save(model([node("Relu", ["x"], ["y"])], {"x": shape}, {"y": shape}, {}), str(path))
    return path


def sizes(feeds: list[Feeds]) -> list[int]:
    return [len(np.asarray(feed["x"])) for feed in feeds]


def input_sets(model_path: Path, data: Path | None, **options: object) -> list[int]:
    preprocess = options.get("preprocess")
    assert preprocess is None or isinstance(preprocess, Preprocess)
    found = Data(model_path, Target(), calibration=data, preprocess=preprocess)
    return sizes(found.input_sets(np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("batch", "count", "wanted"),
    [
        ("N", 100, [32, 32, 32, 4]),
        ("N", 300, [32] * 4),
        (1, 100, [1] * 100),
        (1, 300, [1] * 32),
        (2, 300, [2] * 32),
        (64, 256, [64] * 2),
    ],
)
def test_of_very_many_arrays_only_some_are_taken(
    tmp_path: Path, batch: int | str, count: int, wanted: list[int]
) -> None:
    x = np.zeros((count, 3, 8, 8), np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=np.zeros(count, int))
    assert input_sets(relu(tmp_path / "m.onnx", batch), tmp_path / "data.npz") == wanted


@pytest.mark.parametrize(("batch", "wanted"), [("N", [1] * 4), (1, [1] * 4), (2, [2] * 4)])
def test_a_few_images_are_taken(tmp_path: Path, batch: int | str, wanted: list[int]) -> None:
    write_classes(tmp_path / "images", {"a": 6, "b": 6})
    assert input_sets(relu(tmp_path / "m.onnx", batch), tmp_path / "images") == wanted


def test_without_data_inputs_are_generated(tmp_path: Path) -> None:
    assert input_sets(relu(tmp_path / "m.onnx", "N"), None) == [1, 1, 1]


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_timed_has_the_shape_of_the_target(tmp_path: Path, is_file: bool) -> None:
    shape: list[int | str] = ["N", 3, "H", "W"]
    path = tmp_path / "m.onnx"
    onnx.save(model([node("Relu", ["x"], ["y"])], {"x": shape}, {"y": shape}, {}), str(path))
    x = np.ones((5, 3, 8, 8), np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    given = tmp_path / "data.npz" if is_file else [{"x": one[None]} for one in x]

    def shapes(*wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
        target = Target(input_shapes={"x": wanted[0]} if wanted else {})
        found = Data(path, target, calibration=given).input_sets(np.random.default_rng(0))
        return [np.asarray(feeds["x"]).shape for feeds in found]

    own = shapes()
    assert {shape[1:] for shape in own} == {(3, 8, 8)}
    assert shapes(own[0]) == own
    generated, *rest = shapes((1, 3, 16, 16))
    assert generated == (1, 3, 16, 16)
    assert {shape[1:] for shape in rest} == {(3, 8, 8)}


def test_samples_are_loaded_once(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", {"a": 6, "b": 6})
    path = relu(tmp_path / "m.onnx", "N")
    data = Data(path, Target(), calibration=tmp_path / "images", preprocess=Preprocess())
    assert data.calibration is data.calibration is not None
    assert data.validation is None
    assert len(data.held_out(0).validation) == 6
