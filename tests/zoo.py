"""The trained models that ``PWOPT_ZOO`` leads to."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest

__all__ = ["folder", "trained"]


def folder() -> Path:
    """Where the models are; skips the test if the collection is not at hand."""
    found = os.environ.get("PWOPT_ZOO")
    if not found:
        pytest.skip("PWOPT_ZOO does not name the model collection")
    return Path(found) / "models"


def trained(name: str) -> onnx.ModelProto:
    """The model of that file name; skips the test if the collection is not at hand."""
    return onnx.load(folder() / name)
