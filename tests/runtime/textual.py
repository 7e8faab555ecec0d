"""Small models for the tests of the runtime floor, written in ONNX's textual form."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser


def write(folder: Path, graph: str, *, name: str = "model", opset: int = 17, ir: int = 8) -> Path:
    """Save ``g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }`` and the like; not checked."""
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}, "ai.onnx.ml" : 3]>'
    path = folder / f"{name}.onnx"
    onnx.save(onnx.parser.parse_model(f"{header} {graph}"), path)
    return path


RELU = "g (float[N,3] x) => (float[N,3] y) { [act] y = Relu(x) }"
