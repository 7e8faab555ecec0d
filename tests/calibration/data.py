"""Small data sets and inputs for the tests of calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pwopt.runtime import TensorSpec

__all__ = ["image_spec", "spec", "write_classes", "write_image"]


def spec(name: str, *shape: int | str | None, dtype: str = "float") -> TensorSpec:
    return TensorSpec(name, f"tensor({dtype})", shape)


def image_spec(*shape: int | str | None, dtype: str = "float") -> TensorSpec:
    return spec("input", *(shape or ("N", 3, 8, 8)), dtype=dtype)


def write_image(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_classes(folder: Path, counts: dict[str, int], side: int = 8) -> None:
    """PNG files in a folder per class; the red channel is the class, the green one the number."""
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            pixels = np.full((side, side, 3), (number, index, 200), dtype=np.uint8)
            write_image(folder / name / f"{index:03}.png", pixels)
