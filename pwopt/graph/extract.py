"""A window of a graph as a model of its own: to show one site, or to measure some nodes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import onnx

from pwopt.errors import InvalidModelError
from pwopt.graph.model import Constant, Model, Node, Tensor, Variable

__all__ = ["extract"]

_MIN_IR_VERSION = 4
"""Before, every initializer had to be listed among the inputs."""


def extract(
    model: Model, nodes: Iterable[Node], dims: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """Cut *nodes* out of *model*, which stays as it is.

    Args:
        model: the model; its types should have been inferred, for inputs need them.
        nodes: live nodes of *model*, in any order.
        dims: sizes to put in place of dynamic dimensions, by name.

    Returns:
        A model that holds the nodes in topological order, the constants they read, opset imports
        and local functions. Its inputs are the tensors read from outside (by a subgraph, too), in
        the order they are first read; its outputs those that are seen outside: by another node, by
        a subgraph, or as graph outputs. Names are kept.

    Raises:
        InvalidModelError: there are no nodes, nothing outside reads their outputs, or the type of
            an input is not known.
    """
    window = model.sorted_nodes(nodes)
    chosen = {id(node) for node in window}
    if not window:
        raise InvalidModelError("a window of the graph needs at least one node")
    inputs, constants = _sources(model, window)
    outputs = [t for node in window for t in node.outputs if _is_seen(model, t, chosen)]
    if not outputs:
        names = ", ".join(node.name or node.op for node in window)
        raise InvalidModelError(f"nothing reads what the nodes {names} compute")
    proto = _frame(model)
    proto.graph.node.extend(model.node_proto(node) for node in window)
    for tensor in inputs:
        declaration = _declare(tensor, dims or {}) or _declared(model, tensor)
        if declaration is None:
            raise InvalidModelError(f"the type of tensor '{tensor.name}' is not known")
        proto.graph.input.append(declaration)
    for tensor in outputs:
        declaration = _declare(tensor, dims or {}) or _declared(model, tensor)
        proto.graph.output.append(declaration or onnx.ValueInfoProto(name=tensor.name))
    for tensor in constants:
        model.append_constant(proto.graph, tensor)
    return proto


def _frame(model: Model) -> onnx.ModelProto:
    header = model.header
    proto = onnx.ModelProto(ir_version=max(header.ir_version, _MIN_IR_VERSION))
    proto.opset_import.extend(header.opset_import)
    proto.functions.extend(header.functions)
    proto.graph.name = header.graph.name
    return proto


def _sources(model: Model, window: Sequence[Node]) -> tuple[list[Tensor], list[Constant]]:
    """What *window* reads from outside, each once, in the order of first use."""
    inside = {id(t) for node in window for t in node.outputs}
    seen: dict[int, Tensor] = {}
    for node in window:
        for tensor in model.reads(node):
            if not tensor.is_empty() and id(tensor) not in inside:
                seen[id(tensor)] = tensor
    constants = [t for t in seen.values() if isinstance(t, Constant) and model.is_constant(t)]
    fixed = {id(t) for t in constants}
    return [t for t in seen.values() if id(t) not in fixed], constants


def _is_seen(model: Model, tensor: Tensor, chosen: set[int]) -> bool:
    if tensor.is_empty():
        return False
    if model.is_output(tensor):
        return True
    readers = [id(n) for n in tensor.outputs] + model.capturers(tensor)
    return any(key in model.nodes and key not in chosen for key in readers)


def _declare(tensor: Tensor, dims: Mapping[str, int]) -> onnx.ValueInfoProto | None:
    """The type of *tensor* as an input or output; ``None`` if its element type is not known."""
    if tensor.dtype is None or (isinstance(tensor, Variable) and tensor.type != "tensor_type"):
        return None
    elem_type = (
        tensor.dtype
        if isinstance(tensor.dtype, int)
        else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    shape = None
    if tensor.shape is not None:
        shape = [dims.get(d, d) if isinstance(d, str) else d for d in tensor.shape]
    return onnx.helper.make_tensor_value_info(tensor.name, elem_type, shape)


def _declared(model: Model, tensor: Tensor) -> onnx.ValueInfoProto | None:
    """What the model file says of *tensor*, which may be no tensor but a sequence, say."""
    graph = model.header.graph
    values = chain(graph.input, graph.value_info, graph.output)
    return next((v for v in values if v.name == tensor.name), None)
