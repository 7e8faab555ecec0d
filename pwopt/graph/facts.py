"""What passes may ask about a model: shapes, constants, attributes, normalised and read-only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from pwopt.graph.model import (
    DEFAULT_DOMAINS,
    Constant,
    Model,
    Node,
    Shape,
    Tensor,
    Variable,
    op_name,
)

__all__ = ["ConvFacts", "Facts", "ValuesView"]

Array = np.ndarray[Any, Any]
ValuesView = Array
"""An array that must not be written to: weights are shared."""

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True, eq=False)
class ConvFacts:
    """A Conv or ConvTranspose with everything explicit.

    Attributes:
        input, output: the data tensors, ``[N, C, *spatial]``.
        weight: ``[Cout, Cin/group, *kernel]`` (Conv), ``[Cin, Cout/group, *kernel]``
            (ConvTranspose).
        bias: ``[Cout]`` or ``None``.
        pads: ``(begin..., end...)`` per spatial axis; ``None`` if auto_pad depends on unknown dims.
    """

    node: Node
    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    cin: int
    cout: int
    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None

    @property
    def spatial_rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1 along every axis."""
        return all(k == 1 for k in self.kernel)

    @property
    def is_unit_stride(self) -> bool:
        """Whether no output is skipped."""
        return all(s == 1 for s in self.strides)

    @property
    def is_unpadded(self) -> bool:
        """Whether all pads are known to be zero."""
        return self.pads is not None and not any(self.pads)

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel is convolved on its own (any channel multiplier)."""
        return self.group > 1 and self.group == self.cin


class Facts:
    """Read-only questions about a :class:`Model`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known_ops: dict[tuple[str, int], bool] = {}

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return self._model.opset

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors a caller feeds."""
        return list(self._model.inputs)

    def has_op(self, op: str, since: int = 1) -> bool:
        """Whether the model's standard operator set has *op*, in version *since* or later."""
        key = op, since
        if key not in self._known_ops:
            self._known_ops[key] = self._look_up(op, since)
        return self._known_ops[key]

    def _look_up(self, op: str, since: int) -> bool:
        try:
            schema = onnx.defs.get_schema(op, self.opset)
        except onnx.defs.SchemaError:
            return False
        return not schema.deprecated and schema.since_version >= since

    # -- nodes ---------------------------------------------------------------------------------

    def node_proto(self, node: Node) -> onnx.NodeProto:
        """The message that *node* would be written as."""
        return self._model.node_proto(node)

    def op(self, node: Node) -> str:
        """Operator type, prefixed with its domain unless standard."""
        return op_name(node)

    def is_op(self, node: Node | None, *ops: str) -> bool:
        """Whether *node* exists and is one of the standard operators *ops*."""
        return node is not None and node.domain in DEFAULT_DOMAINS and node.op in ops

    def position(self, node: Node) -> tuple[int, int]:
        """A key that orders nodes as they stand in the file."""
        return self._model.position(node)

    def site(self, node: Node) -> str:
        """What to call *node* in a report: its name, or what it computes."""
        return node.name or f"{node.op}({', '.join(t.name for t in node.outputs)})"

    def input(self, node: Node, index: int) -> Tensor | None:
        """Input *index* of *node*, or ``None`` if omitted."""
        if index >= len(node.inputs) or node.inputs[index].is_empty():
            return None
        return node.inputs[index]

    def attr_int(self, node: Node, key: str, default: int) -> int:
        """Attribute *key* as an int."""
        return int(node.attrs.get(key, default))

    def attr_float(self, node: Node, key: str, default: float) -> float:
        """Attribute *key* as a float."""
        return float(node.attrs.get(key, default))

    def attr_ints(self, node: Node, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Attribute *key* as a tuple of ints."""
        return tuple(int(v) for v in node.attrs.get(key, default))

    def attr_str(self, node: Node, key: str, default: str) -> str:
        """Attribute *key* as a string."""
        return str(node.attrs.get(key, default))

    # -- tensors -------------------------------------------------------------------------------

    def producer(self, tensor: Tensor) -> Node | None:
        """The live node that computes *tensor*, if any."""
        for node in tensor.inputs:
            if id(node) in self._model.nodes:
                return node
        return None

    def consumers(self, tensor: Tensor) -> list[Node]:
        """Live nodes that read *tensor*, each once, in file order."""
        nodes = {id(n): n for n in tensor.outputs if id(n) in self._model.nodes}
        return sorted(nodes.values(), key=self._model.position)

    def is_private(self, tensor: Tensor) -> bool:
        """Whether one live node reads *tensor*, once, and nobody else can see it."""
        return (
            len(tensor.outputs) == 1
            and id(tensor.outputs[0]) in self._model.nodes
            and not self.is_seen_outside(tensor)
        )

    def sole_consumer(self, tensor: Tensor) -> Node | None:
        """The one node that reads *tensor*, if nobody else can see it."""
        return tensor.outputs[0] if self.is_private(tensor) else None

    def is_output(self, tensor: Tensor) -> bool:
        """Whether *tensor* is a graph output."""
        return self._model.is_output(tensor)

    def is_input(self, tensor: Tensor) -> bool:
        """Whether a caller feeds *tensor*."""
        return self._model.is_input(tensor)

    def is_captured(self, tensor: Tensor) -> bool:
        """Whether a subgraph reads *tensor*."""
        return self._model.is_captured(tensor)

    def is_read(self, tensor: Tensor) -> bool:
        """Whether a node, a subgraph or the caller reads *tensor*."""
        return bool(tensor.outputs) or self.is_seen_outside(tensor)

    def is_seen_outside(self, tensor: Tensor) -> bool:
        """Whether *tensor* goes by its name: it is a graph output, or a subgraph reads it."""
        return self._model.is_output(tensor) or self._model.is_captured(tensor)

    def can_bypass(self, node: Node, source: Tensor) -> bool:
        """Whether :meth:`Rewriter.bypass` can let *source* stand for *node*'s first output."""
        return self._model.can_bypass(node.outputs[0], source)

    def has_subgraph(self, node: Node) -> bool:
        """Whether *node* holds a graph of its own, as control flow does."""
        return next(iter(node.subgraphs()), None) is not None

    def is_constant(self, tensor: Tensor | None) -> bool:
        """Whether *tensor* is an initializer that no caller may override."""
        return tensor is not None and self._model.is_constant(tensor)

    def constant(self, tensor: Tensor | None) -> ValuesView | None:
        """The values of a constant tensor, not to be written to; ``None`` if not constant."""
        if tensor is None or not self._model.is_constant(tensor):
            return None
        assert isinstance(tensor, Constant)
        values = tensor._values
        if not isinstance(values, LazyValues):
            return np.asarray(values)
        if isinstance(values, SparseValues):
            return _dense(values.tensor)
        if not values.tensor.HasField("data_location"):
            # Not through graphsurgeon's cache, which would keep a second copy of every weight.
            return numpy_helper.to_array(values.tensor)
        return values.load()

    def scalar(self, tensor: Tensor | None) -> float | None:
        """The value of a constant with exactly one element, as a float; else ``None``."""
        if not self.is_constant(tensor) or tensor is None:
            return None
        if math.prod(tensor.shape) != 1:
            return None
        values = self.constant(tensor)
        if values is None or values.dtype.kind not in "fiu":
            return None
        return float(values.reshape(()))

    def shape(self, tensor: Tensor | None) -> Shape | None:
        """The shape, with symbolic dims as strings and unknown ones as ``None``."""
        if tensor is None or tensor.shape is None:
            return None
        return tuple(d if isinstance(d, str) or d is None else int(d) for d in tensor.shape)

    def static_shape(self, tensor: Tensor | None) -> tuple[int, ...] | None:
        """The shape if every dimension is known."""
        shape = self.shape(tensor)
        if shape is None:
            return None
        dims = tuple(d for d in shape if isinstance(d, int))
        return dims if len(dims) == len(shape) else None

    def rank(self, tensor: Tensor | None) -> int | None:
        """Number of dimensions."""
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def channels(self, tensor: Tensor | None) -> int | None:
        """Size of axis 1, if known."""
        shape = self.shape(tensor)
        if shape is None or len(shape) < 2 or not isinstance(shape[1], int):
            return None
        return shape[1]

    def dtype(self, tensor: Tensor | None) -> np.dtype[Any] | None:
        """The NumPy dtype, or ``None`` if unknown or if NumPy has none."""
        if tensor is None or tensor.dtype is None or isinstance(tensor.dtype, int):
            return None
        if isinstance(tensor, Variable) and tensor.type != "tensor_type":
            return None
        dtype: np.dtype[Any] = np.dtype(tensor.dtype)
        return dtype

    def elem_type(self, tensor: Tensor | None) -> int | None:
        """ONNX's number of the element type, also where NumPy has none; ``None`` if unknown."""
        if tensor is not None and isinstance(tensor.dtype, int):
            return tensor.dtype
        dtype = self.dtype(tensor)
        return None if dtype is None else int(onnx.helper.np_dtype_to_tensor_dtype(dtype))

    def is_float(self, tensor: Tensor | None) -> bool:
        """Whether the dtype is float16, float32 or float64."""
        dtype = self.dtype(tensor)
        # NumPy holds None to be equal to float64.
        return dtype is not None and dtype in _FLOATS

    # -- convolutions --------------------------------------------------------------------------

    def conv(self, node: Node | None) -> ConvFacts | None:
        """Normalised facts of a Conv or ConvTranspose whose weight shape is known."""
        if node is None or not self.is_op(node, "Conv", "ConvTranspose"):
            return None
        weight = self.input(node, 1)
        shape = self.static_shape(weight)
        if weight is None or shape is None or len(shape) < 3:
            return None
        group = self.attr_int(node, "group", 1)
        kernel = shape[2:]
        rank = len(kernel)
        ones = (1,) * rank
        strides = self.attr_ints(node, "strides", ones)
        dilations = self.attr_ints(node, "dilations", ones)
        if not len(strides) == len(dilations) == rank:
            return None
        transposed = node.op == "ConvTranspose"
        return ConvFacts(
            node=node,
            input=node.inputs[0],
            output=node.outputs[0],
            weight=weight,
            bias=self.input(node, 2),
            cin=shape[0] if transposed else shape[1] * group,
            cout=shape[1] * group if transposed else shape[0],
            group=group,
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            pads=self.window_pads(node, kernel, strides, dilations),
        )

    def window_pads(
        self,
        node: Node,
        kernel: tuple[int, ...],
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> tuple[int, ...] | None:
        """Explicit ``(begin..., end...)`` pads of a sliding-window operator.

        ``auto_pad`` is resolved from the input's spatial size; ``None`` if that is not known, if a
        stride passes over more than one element behind the window (then ONNX pads by nothing, but
        ONNX Runtime by less), or for a ConvTranspose whose pads follow from ``output_shape``.
        """
        zeros = (0,) * (2 * len(kernel))
        auto_pad = self.attr_str(node, "auto_pad", "NOTSET")
        if node.op == "ConvTranspose" and (auto_pad != "NOTSET" or "output_shape" in node.attrs):
            return zeros if auto_pad == "VALID" and "output_shape" not in node.attrs else None
        if auto_pad == "NOTSET":
            return self.attr_ints(node, "pads", zeros)
        if auto_pad == "VALID":
            return zeros
        shape = self.shape(node.inputs[0])
        if shape is None or len(shape) != len(kernel) + 2:
            return None
        begins: list[int] = []
        ends: list[int] = []
        for size, k, s, d in zip(shape[2:], kernel, strides, dilations, strict=True):
            total = _same_padding(size, s, (k - 1) * d + 1)
            if total is None:
                return None
            small = total // 2
            begins.append(total - small if auto_pad == "SAME_LOWER" else small)
            ends.append(small if auto_pad == "SAME_LOWER" else total - small)
        return (*begins, *ends)


def _same_padding(size: int | str | None, stride: int, reach: int) -> int | None:
    """What SAME adds to an axis, so that the output has ``ceil(size / stride)`` elements."""
    if isinstance(size, int):
        total = (math.ceil(size / stride) - 1) * stride + reach - size
    elif stride == 1 or (stride == 2 and reach == 1):
        total = reach - 1
    else:
        return None
    return max(total, 0) if total >= -1 else None


def _dense(sparse: onnx.SparseTensorProto) -> Array:
    """Graphsurgeon's own conversion forgets the dtype and reads no raw data."""
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    shape = tuple(sparse.dims)
    dense = np.zeros(shape, values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return dense
