"""The graph floor: the only part of pwopt that knows onnx and onnx-graphsurgeon."""

from pwopt.graph.concrete import concrete_dims
from pwopt.graph.facts import ConvFacts, Facts, ValuesView
from pwopt.graph.io import (
    Written,
    atomic_write,
    file_sha256,
    find_nan,
    has_external_data,
    has_float16,
    load,
    parse,
    raise_opset,
    save,
    save_copy,
    size_on_disk,
)
from pwopt.graph.model import (
    Constant,
    Dim,
    Model,
    ModelProto,
    Node,
    Shape,
    Tensor,
    Variable,
    op_name,
)
from pwopt.graph.rewriter import Rewriter

__all__ = [
    "Constant",
    "ConvFacts",
    "Dim",
    "Facts",
    "Model",
    "ModelProto",
    "Node",
    "Rewriter",
    "Shape",
    "Tensor",
    "ValuesView",
    "Variable",
    "Written",
    "atomic_write",
    "concrete_dims",
    "file_sha256",
    "find_nan",
    "has_external_data",
    "has_float16",
    "load",
    "op_name",
    "parse",
    "raise_opset",
    "save",
    "save_copy",
    "size_on_disk",
]
