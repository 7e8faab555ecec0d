"""The collection that benchmarks run on: trained models, reference models, light networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pwopt import models

__all__ = ["Entry", "collection"]

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "realesr_animevideov3_x2": {"data": (1, 3, 128, 128)},
    "dncnn_sigma25_bn": {"input": (1, 1, 160, 160)},
}
"""Sizes for trained models whose height and width are dynamic."""


@dataclass(frozen=True)
class Entry:
    """One model of the collection; ``write`` puts it at the given path."""

    name: str
    kind: str
    write: Callable[[Path], None]
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def collection(pattern: str = "") -> Iterator[Entry]:
    """Every model whose name contains *pattern*; trained ones need ``PWOPT_ZOO``."""
    for entry in (*_trained(), *_reference(), *_light()):
        if pattern in entry.name:
            yield entry


def _trained() -> Iterator[Entry]:
    zoo = os.environ.get("PWOPT_ZOO")
    if not zoo:
        return
    for path in sorted((Path(zoo) / "models").glob("*.onnx")):
        yield Entry(path.stem, "trained", _copier(path), SHAPES.get(path.stem, {}))


def _reference() -> Iterator[Entry]:
    for name in models.names():
        yield Entry(name, "reference", _builder(name))


def _light() -> Iterator[Entry]:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("light_*.onnx")):
        yield Entry(path.stem, "light", _randomizer(path))


def _copier(source: Path) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(source.read_bytes())

    return write


def _builder(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        onnx.save(models.build(name), str(path))

    return write


def _randomizer(source: Path) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        onnx.save(with_random_weights(onnx.load(str(source)), np.random.default_rng(0)), str(path))

    return write


def with_random_weights(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """A light model with random weights for its generated constants.

    The light models of the onnx package keep their structure but fill every weight with one
    value. Weights become initializers that are listed as inputs, as in the models they were
    made from (IR version 3).
    """
    graph = model.graph
    roles = {
        name: (node.op_type, index) for node in graph.node for index, name in enumerate(node.input)
    }
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    generated = [n for n in graph.node if n.op_type == "ConstantOfShape"]
    kept = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    used_shapes = {n.input[0] for n in generated}
    weights = {n.output[0]: tuple(int(d) for d in shapes[n.input[0]]) for n in generated}
    weights.update(
        {
            t.name: tuple(t.dims)
            for t in graph.initializer
            if t.data_type == TensorProto.FLOAT and len(t.dims) == 1
        }
    )
    initializers = [
        t for t in graph.initializer if t.name not in used_shapes and t.name not in weights
    ]
    for name, shape in weights.items():
        values = _draw(roles.get(name, ("", 0)), shape, rng)
        initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
    listed = {i.name for i in initializers}
    inputs = [v for v in graph.input if v.name not in used_shapes | listed]
    inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
    for field_name, values_list in (
        ("node", kept),
        ("initializer", initializers),
        ("input", inputs),
    ):
        copies: list[Any] = [type(v).FromString(v.SerializeToString()) for v in values_list]
        del getattr(graph, field_name)[:]
        getattr(graph, field_name).extend(copies)
    return model


def _draw(
    role: tuple[str, int], shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    op, index = role
    if op == "BatchNormalization" and index in (1, 4):
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) < 2:
        return rng.normal(0, 0.1, shape)
    fan_in = int(np.prod(shape[1:]))
    return rng.normal(0, np.sqrt(1.5 / fan_in), shape)
