"""The part of onnx-graphsurgeon's API that pwopt uses (the package ships no types)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx_graphsurgeon.ir.tensor import LazyValues

class Tensor:
    name: str
    inputs: list[Node]
    outputs: list[Node]
    shape: Any
    dtype: Any
    def is_empty(self) -> bool: ...

class Variable(Tensor):
    type: str
    def __init__(
        self,
        name: str,
        dtype: Any = ...,
        shape: Sequence[int | str | None] | None = ...,
        type: str = ...,
    ) -> None: ...
    @staticmethod
    def empty() -> Variable: ...

class Constant(Tensor):
    _values: Any
    values: np.ndarray[Any, Any]
    def __init__(
        self, name: str, values: np.ndarray[Any, Any] | LazyValues, data_location: int | None = ...
    ) -> None: ...

class Node:
    op: str
    name: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = ...,
        attrs: dict[str, Any] | None = ...,
        inputs: Sequence[Tensor] | None = ...,
        outputs: Sequence[Tensor] | None = ...,
        domain: str | None = ...,
    ) -> None: ...
    def subgraphs(self, recursive: bool = ...) -> Any: ...

class Graph:
    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]
    name: str
    opset: int
    def tensors(self) -> dict[str, Tensor]: ...

def import_onnx(model: onnx.ModelProto) -> Graph: ...
def export_onnx(graph: Graph, do_type_check: bool = ...) -> onnx.ModelProto: ...
