"""Parameters, MACs, FLOPs and bytes of nodes and models, counted from shapes.

How operations are counted is said in :mod:`pwopt.cost.operators`. Further conventions:

* **Parameters** are the elements of trained initializers: weights, biases, per-channel scales,
  slopes and the gamma and beta of a BatchNormalization. Its running mean and variance are
  statistics, not parameters, as in the published totals; neither are shapes, indices, bounds
  (the limits of a Clip, the scales of a Resize), quantization scales, or the scalar operands of
  elementwise operators. An initializer that several nodes read counts once in a model's total.
* **Bytes** are what an execution node by node moves: every input tensor is read once, every output
  written once, whatever a cache may save. Reshape and its kin are views and move nothing; Gather
  and Slice read only what they write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from pwopt.cost.operators import RULES, VIEWS, Operation, WorkClass
from pwopt.graph import Constant, Facts, Model, Node, Tensor
from pwopt.graph.concrete import TensorType, concrete_types, element_bits

__all__ = ["ModelCost", "NodeCost", "Operand", "model_cost", "node_cost"]

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor that a node reads or writes; ``shape`` and ``bytes`` are ``None`` if unknown."""

    name: str
    shape: Dims | None
    bytes: int | None
    is_constant: bool = False
    is_output: bool = False
    """Whether it is an output of the graph."""


@dataclass(frozen=True)
class NodeCost:
    """What one node costs.

    Attributes:
        site: the node's name in reports.
        op: operator, prefixed with its domain unless standard.
        work_class: the kind of kernel.
        inputs, outputs: the tensors read (each once) and written; omitted ones are left out.
        params: elements of the trained initializers that the node reads.
        macs: multiply-accumulates.
        flops: floating-point operations, those of the MACs included.
        bytes_read: bytes of all inputs, weights included.
        bytes_written: bytes of all outputs.
        weight_bytes: the part of ``bytes_read`` that comes from initializers.
        unknown_because: why the node could not be counted; empty if it could.
    """

    site: str
    op: str
    work_class: WorkClass
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    params: int
    macs: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    weight_bytes: int = 0
    unknown_because: str = ""

    @property
    def known(self) -> bool:
        """Whether the figures are a count; if not, all but ``params`` are zero."""
        return not self.unknown_because

    @property
    def output_shapes(self) -> tuple[Dims | None, ...]:
        """Shapes of the outputs."""
        return tuple(operand.shape for operand in self.outputs)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs per byte moved; 0 where nothing is moved."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class ModelCost:
    """What one run of a model costs; totals cover the nodes that could be counted.

    Attributes:
        nodes: cost by node, in topological order.
        params: elements of all trained initializers, each counted once.
        unknown: ``Op 'site': reason`` for every node that could not be counted.
    """

    nodes: tuple[NodeCost, ...]
    params: int
    unknown: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(node.macs for node in self.nodes)

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(node.flops for node in self.nodes)

    @property
    def bytes_read(self) -> int:
        """Bytes read by all nodes."""
        return sum(node.bytes_read for node in self.nodes)

    @property
    def bytes_written(self) -> int:
        """Bytes written by all nodes."""
        return sum(node.bytes_written for node in self.nodes)

    @property
    def bytes(self) -> int:
        """Bytes moved by all nodes."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0


def node_cost(node: Node, facts: Facts, dims: Mapping[str, int] | None = None) -> NodeCost:
    """The cost of *node*, from the shapes that its tensors carry.

    Args:
        node: a node of the model, or one that a rewrite has taken out of it.
        facts: of the model.
        dims: sizes of symbolic dimensions (:func:`pwopt.graph.concrete.concrete_dims` gives them).

    A tensor without a dtype, as a rewrite may add it, is taken to have its node's first one.
    """
    sizes = dims or {}

    def type_of(tensor: Tensor) -> TensorType:
        return TensorType(_bound(facts, tensor, sizes), element_bits(tensor))

    return _count(node, facts, type_of)


def model_cost(model: Model, input_shapes: Mapping[str, Dims] | None = None) -> ModelCost:
    """The cost of one run of *model*.

    Args:
        model: left as it is; its shapes need not have been inferred.
        input_shapes: sizes of the inputs, by name, as far as they are dynamic. A dynamic batch
            that is not given is 1.

    Raises:
        UsageError: *input_shapes* does not fit the model's inputs.
        InvalidModelError: the graph has a cycle, or shape inference finds it invalid.
    """
    types = concrete_types(model, input_shapes)
    facts = Facts(model)
    nothing = TensorType(None, None)
    ordered = model.sorted_nodes()
    nodes = tuple(_count(node, facts, lambda t: types.get(t.name, nothing)) for node in ordered)
    weights = {id(t): t for node in ordered for t in _parameters(node, facts)}
    params = sum(_elements(weight) for weight in weights.values())
    unknown = tuple(f"{n.op} '{n.site}': {n.unknown_because}" for n in nodes if not n.known)
    return ModelCost(nodes, params, unknown)


# -- counting ------------------------------------------------------------------------------------

TypeOf = Callable[[Tensor], TensorType]

_READS_WHAT_IT_WRITES = frozenset(
    {"Compress", "Crop", "Gather", "GatherElements", "GatherND", "Slice"}
)
"""Operators that read no more elements of their first input than they write."""


def _bound(facts: Facts, tensor: Tensor, sizes: Mapping[str, int]) -> Dims | None:
    shape = facts.shape(tensor)
    if shape is None:
        return None
    bound = [sizes.get(dim) if isinstance(dim, str) else dim for dim in shape]
    known = tuple(size for size in bound if size is not None and size >= 0)
    return known if len(known) == len(bound) else None


def _count(node: Node, facts: Facts, type_of: TypeOf) -> NodeCost:
    op = facts.op(node)
    types = {id(t): type_of(t) for t in (*node.inputs, *node.outputs) if not t.is_empty()}
    inputs = _operands(node.inputs, node, facts, types)
    outputs = _operands(node.outputs, node, facts, types)
    params = sum(_elements(weight) for weight in _parameters(node, facts))
    bare = NodeCost(facts.site(node), op, WorkClass.UNKNOWN, inputs, outputs, params)
    reason = _uncountable(node, op, (*inputs, *outputs))
    if reason:
        return replace(bare, unknown_because=reason)
    if op in VIEWS:
        return replace(bare, work_class=WorkClass.VIEW)
    work = RULES[op](
        Operation(node, facts, _shapes(node.inputs, types), _shapes(node.outputs, types))
    )
    if work is None:
        return replace(bare, unknown_because="this form of the operator has no cost rule")
    read = {operand.name: operand.bytes or 0 for operand in inputs}
    written = sum(operand.bytes or 0 for operand in outputs)
    if op in _READS_WHAT_IT_WRITES:
        read[inputs[0].name] = min(read[inputs[0].name], written)
    return replace(
        bare,
        work_class=work.work_class,
        macs=work.macs,
        flops=work.flops,
        bytes_read=sum(read.values()),
        bytes_written=written,
        weight_bytes=sum(read[operand.name] for operand in inputs if operand.is_constant),
    )


def _shapes(tensors: Iterable[Tensor], types: Mapping[int, TensorType]) -> tuple[Dims | None, ...]:
    return tuple(None if t.is_empty() else types[id(t)].shape for t in tensors)


def _operands(
    tensors: Iterable[Tensor], node: Node, facts: Facts, types: Mapping[int, TensorType]
) -> tuple[Operand, ...]:
    """One operand per distinct tensor."""
    distinct = {id(t): t for t in tensors if not t.is_empty()}
    reads = (types[id(t)].bits for t in node.inputs if not t.is_empty())
    default = next((bits for bits in reads if bits is not None), None)
    operands = []
    for key, tensor in distinct.items():
        shape, bits = types[key].shape, types[key].bits
        size = _size(shape, default if bits is None else bits)
        is_constant = _initializer(tensor) is not None
        operands.append(Operand(tensor.name, shape, size, is_constant, facts.is_output(tensor)))
    return tuple(operands)


def _size(shape: Dims | None, bits: int | None) -> int | None:
    """Bytes of a tensor; elements smaller than a byte are packed."""
    if shape is None or bits is None:
        return None
    return math.ceil(math.prod(shape) * bits / 8)


def _uncountable(node: Node, op: str, operands: Iterable[Operand]) -> str:
    """Why *node* cannot be counted; empty if nothing stands in the way."""
    if any(True for _ in node.subgraphs()):
        return "it runs subgraphs"
    if op in VIEWS:
        return ""
    if op not in RULES:
        return "the operator has no cost rule"
    for operand in operands:
        if operand.shape is None:
            return f"the shape of '{operand.name}' is unknown"
        if operand.bytes is None:
            return f"the element type of '{operand.name}' is unknown"
    return ""


# -- parameters ----------------------------------------------------------------------------------

_WEIGHT_INPUTS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "BatchNormalization": (1, 2),
        "Conv": (1, 2),
        "ConvInteger": (1,),
        "ConvTranspose": (1, 2),
        "DeformConv": (1, 3),
        "DequantizeLinear": (0,),
        "Einsum": (0, 1),
        "GRU": (1, 2, 3),
        "Gather": (0,),
        "Gemm": (0, 1, 2),
        "GroupNormalization": (1, 2),
        "InstanceNormalization": (1, 2),
        "LSTM": (1, 2, 3, 7),
        "LayerNormalization": (1, 2),
        "MatMul": (0, 1),
        "MatMulInteger": (0, 1),
        "PRelu": (1,),
        "QLinearConv": (3, 8),
        "QLinearMatMul": (0, 3),
        "RMSNormalization": (1,),
        "RNN": (1, 2, 3),
        "com.microsoft.BiasGelu": (1,),
        "com.microsoft.FusedConv": (1, 2),
        "com.microsoft.FusedGemm": (0, 1, 2),
        "com.microsoft.FusedMatMul": (0, 1),
    }
)
"""The inputs that hold trained weights, whatever their size."""

_ANY_OPERAND = frozenset({"Add", "Concat", "Div", "Max", "Min", "Mul", "Sub", "Sum", "Where"})
"""Operators whose constant operands of more than one element are trained weights."""


def _parameters(node: Node, facts: Facts) -> list[Constant]:
    """Trained initializers that *node*, or a node of its subgraphs, reads; each once."""
    found: dict[int, Constant] = {}
    inner = (n for subgraph in node.subgraphs(recursive=True) for n in subgraph.nodes)
    for reader in (node, *inner):
        op = facts.op(reader)
        always = _WEIGHT_INPUTS.get(op, ())
        # Elsewhere the first input is data: a weight that is transposed or converted on its way.
        sized = range(len(reader.inputs)) if op in _ANY_OPERAND else () if always else (0,)
        for index, tensor in enumerate(reader.inputs):
            weight = _initializer(tensor)
            if weight is None or not _is_trainable(weight, facts):
                continue
            if index in always or (index in sized and _elements(weight) > 1):
                found[id(weight)] = weight
    return list(found.values())


def _initializer(tensor: Tensor) -> Constant | None:
    """The initializer that *tensor* is, or the value of the ``Constant`` node that makes it."""
    if isinstance(tensor, Constant):
        return tensor
    for producer in tensor.inputs:
        value = producer.attrs.get("value")
        if producer.op == "Constant" and isinstance(value, Constant):
            return value
    return None


def _elements(constant: Constant) -> int:
    return math.prod(constant.shape)


def _is_trainable(constant: Constant, facts: Facts) -> bool:
    """Whether its type is one for weights: 64-bit integers are shapes and indices."""
    if isinstance(constant.dtype, int):
        return True
    dtype = facts.dtype(constant)
    return dtype is not None and dtype.kind not in "bOSU" and dtype.name not in _INDEX_TYPES


_INDEX_TYPES = frozenset({"int64", "uint64"})
