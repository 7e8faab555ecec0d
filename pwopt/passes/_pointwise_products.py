"""Products over the channels, in either layout: a 1x1 Conv, or a MatMul over the last axis."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor
from pwopt.passes._movable import ELEMENTWISE, Axes, Movable
from pwopt.remark import Decline

__all__ = [
    "OPS",
    "Obstacle",
    "Product",
    "as_conv",
    "as_matmul",
    "find_biased_product",
    "find_conv",
    "find_product",
    "read_product",
    "take_in_bias",
]

OPS = ("MatMul", "Gemm")
_RANKS = (3, 4, 5)
_CONV_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


class Obstacle(StrEnum):
    """Why a MatMul or Gemm is no 1x1 convolution."""

    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    NOT_OVER_LAST_AXIS = "not-over-last-axis"
    UNSUPPORTED_DTYPE = "unsupported-dtype"
    NO_SPATIAL_AXES = "no-spatial-axes"
    BIAS_NOT_PER_CHANNEL = "bias-not-per-channel"


@dataclass(frozen=True, eq=False)
class Product:
    """``y = f(x W + b)`` over the last axis of *source*, for a chain f of elementwise operators.

    Attributes:
        core: the MatMul or Gemm.
        nodes: all of it; the core alone, or from the Reshape to two axes to the one back.
        source, result: tensors of full rank, channels last.
        bias: the constant that is added, and its factor.
        maps: the elementwise operators between the core and the Reshape back.
    """

    core: Node
    nodes: tuple[Node, ...]
    source: Tensor
    result: Tensor
    rank: int
    bias: tuple[Tensor, float] | None = None
    maps: tuple[Node, ...] = ()


def find_product(node: Node, facts: Facts) -> Product | None:
    """The product that *node* is, or that it flattens for or restores."""
    core: Node | None = node
    if facts.is_op(node, "Reshape"):
        core = facts.sole_consumer(node.outputs[0])
        if not facts.is_op(core, *OPS):
            core = _core_before(node, facts)
    if core is None or not facts.is_op(core, *OPS):
        return None
    product = read_product(core, facts)
    if isinstance(product, Decline) or not any(n is node for n in product.nodes):
        return None
    return product


def read_product(core: Node, facts: Facts) -> Product | Decline:
    """The product that *core*, a MatMul or Gemm, is; or an :class:`Obstacle`."""
    source, weight = core.inputs[0], core.inputs[1]
    if facts.is_constant(source) or facts.attr_int(core, "transA", 0):
        return Decline(Obstacle.NOT_OVER_LAST_AXIS)
    if not facts.is_constant(weight):
        return Decline(Obstacle.WEIGHT_NOT_CONSTANT)
    if facts.rank(weight) != 2:
        return Decline(Obstacle.NOT_OVER_LAST_AXIS)
    if facts.dtype(weight) not in _CONV_DTYPES:
        return Decline(Obstacle.UNSUPPORTED_DTYPE, {"dtype": str(facts.dtype(weight))})
    rank = facts.rank(source)
    if rank in _RANKS:
        return Product(core, (core,), source, core.outputs[0], rank)
    if rank != 2:
        return Decline(Obstacle.NO_SPATIAL_AXES, {"rank": rank})
    return _read_flattened(core, facts)


def _read_flattened(core: Node, facts: Facts) -> Product | Decline:
    """A product of matrices, if Reshapes around it flatten and restore the leading axes."""
    no_axes = Decline(Obstacle.NO_SPATIAL_AXES, {"rank": 2})
    flatten = facts.producer(core.inputs[0])
    chain = _up_to_reshape(core, facts)
    if not facts.is_op(flatten, "Reshape") or not facts.is_private(core.inputs[0]) or not chain:
        return no_axes
    assert flatten is not None
    source, result = flatten.inputs[0], chain[-1].outputs[0]
    shape = facts.shape(source)
    if shape is None or len(shape) not in _RANKS or not _keeps_leading(source, result, facts):
        return no_axes
    maps = chain[:-1]
    bias = facts.input(core, 2)
    factor = facts.attr_float(core, "beta", 1.0)
    added = _constant_operand(maps[0], facts) if maps and facts.is_op(maps[0], "Add") else None
    if bias is None and added is not None:
        bias, factor, maps = added, 1.0, maps[1:]
    width = facts.shape(result)
    if bias is not None and not _is_per_channel(bias, (width or (None,))[-1], facts):
        return Decline(Obstacle.BIAS_NOT_PER_CHANNEL, {"shape": facts.shape(bias)})
    if not all(_is_scalar_map(node, facts) for node in maps):
        return no_axes
    return Product(
        core,
        (flatten, core, *chain),
        source,
        result,
        len(shape),
        None if bias is None else (bias, factor),
        tuple(maps),
    )


def find_biased_product(node: Node, facts: Facts) -> Product | None:
    """The product that *node* is or belongs to, with the bias behind it."""
    product = find_product(node, facts)
    if product is None and facts.is_op(node, "Add"):
        before = [facts.producer(t) for t in node.inputs if not facts.is_constant(t)]
        if len(before) == 1 and before[0] is not None:
            product = find_product(before[0], facts)
    if product is None:
        return None
    product = _with_bias(product, facts)
    return product if any(n is node for n in product.nodes) else None


def _with_bias(product: Product, facts: Facts) -> Product:
    """*product* and the Add behind it, if that adds one constant per channel and nothing else."""
    add = facts.sole_consumer(product.result)
    if product.bias is not None or product.maps or not facts.is_op(add, "Add"):
        return product
    assert add is not None
    bias = _constant_operand(add, facts)
    shape = facts.shape(product.result)
    if bias is None or shape is None or not _is_bias(bias, shape[-1], facts):
        return product
    nodes, result = (*product.nodes, add), add.outputs[0]
    return replace(product, nodes=nodes, result=result, bias=(bias, 1.0))


def _is_bias(tensor: Tensor, channels: Dim, facts: Facts) -> bool:
    """Whether *tensor* is a constant that has one element per channel, which come last."""
    shape = facts.static_shape(tensor)
    return bool(shape) and math.prod(shape or ()) == channels == (shape or (0,))[-1]


def find_conv(node: Node, facts: Facts) -> ConvFacts | None:
    """The Conv that *node* is, if it is one matrix over channels, applied at every pixel."""
    conv = facts.conv(node) if facts.is_op(node, "Conv") else None
    if conv is None or not (conv.is_pointwise and conv.is_unit_stride and conv.is_unpadded):
        return None
    if conv.group != 1 or conv.spatial_rank + 2 not in _RANKS:
        return None
    has_weights = facts.is_constant(conv.weight) and (
        conv.bias is None or facts.is_constant(conv.bias)
    )
    is_ready = has_weights and facts.is_float(conv.weight) and facts.has_op("Add", since=7)
    return conv if is_ready and facts.rank(conv.input) is not None else None


def as_matmul(conv: ConvFacts) -> Movable:
    """*conv* as an operator that becomes a MatMul, and an Add for its bias, channels last."""

    def transform(rewriter: Rewriter, _: Axes) -> None:
        _write_matmul(conv, rewriter)

    return Movable((conv.node,), (conv.input,), (conv.output,), transform)


def _write_matmul(conv: ConvFacts, rewriter: Rewriter) -> None:
    """Put a MatMul in place of *conv*, whose ends already hold tensors with channels last."""
    facts = Facts(rewriter.model)
    node = conv.node
    source, result = node.inputs[0], node.outputs[0]
    weight, bias = facts.constant(conv.weight), facts.constant(conv.bias)
    assert weight is not None
    matrix = np.array(weight.reshape(conv.cout, conv.cin).T, order="C")
    operands = [source, rewriter.constant(f"{conv.weight.name}/matrix", matrix)]
    rewriter.remove(node)
    if bias is None or conv.bias is None:
        rewriter.add("MatMul", operands, [result], near=node)
        return
    product = rewriter.variable(f"{result.name}/product", result)
    rewriter.add("MatMul", operands, [product], near=node)
    rewriter.add("Add", [product, conv.bias], [result], near=node)


def as_conv(product: Product) -> Movable:
    """*product* as an operator that becomes a Conv, channels in front."""

    def transform(rewriter: Rewriter, _: Axes) -> None:
        _write_conv(product, rewriter)

    return Movable(product.nodes, (product.source,), (product.result,), transform)


def _write_conv(product: Product, rewriter: Rewriter) -> None:
    """Put a Conv in place of *product*, whose ends already hold tensors with channels in front."""
    facts = Facts(rewriter.model)
    core = product.core
    source, result = product.nodes[0].inputs[0], product.nodes[-1].outputs[0]
    weight = core.inputs[1]
    matrix = facts.constant(weight)
    assert matrix is not None
    if not facts.attr_int(core, "transB", 0):
        matrix = matrix.T
    matrix = matrix * matrix.dtype.type(facts.attr_float(core, "alpha", 1.0))
    cout, cin = matrix.shape
    ones = (1,) * (product.rank - 2)
    hint = f"{weight.name}/conv"
    operands = [
        source,
        rewriter.constant(hint, np.array(matrix, order="C").reshape(cout, cin, *ones)),
    ]
    if product.bias is not None:
        tensor, factor = product.bias
        values = facts.constant(tensor)
        assert values is not None
        scaled = values.reshape(-1) * values.dtype.type(factor)
        operands.append(rewriter.constant(f"{tensor.name}/conv", _per_channel(scaled, cout)))
    inner = [core.outputs[0], *(node.outputs[0] for node in product.maps)]
    for node in product.nodes:
        if not any(node is kept for kept in product.maps):
            rewriter.remove(node)
    shape = facts.shape(result)
    written = [rewriter.variable(f"{t.name}/conv", result, shape) for t in inner[:-1]] + [result]
    rewriter.add("Conv", operands, written[:1], {"kernel_shape": list(ones)}, near=core)
    # The first map may read the bias Add, which is gone, instead of the core.
    for node, before, after in zip(product.maps, written[:-1], written[1:], strict=True):
        index = next(i for i, t in enumerate(node.inputs) if not facts.is_constant(t))
        rewriter.set_input(node, index, before)
        rewriter.set_output(node, 0, after)


def take_in_bias(conv: Node, rewriter: Rewriter) -> None:
    """Let *conv* add what an Add behind it adds to each channel."""
    facts = Facts(rewriter.model)
    add = facts.sole_consumer(conv.outputs[0])
    if len(conv.inputs) > 2 or add is None or not facts.is_op(add, "Add"):
        return
    bias = _constant_operand(add, facts)
    values = facts.constant(bias)
    weight = facts.static_shape(conv.inputs[1])
    if values is None or weight is None or values.ndim > len(weight):
        return
    full = (1,) * (len(weight) - values.ndim) + values.shape
    if values.size != 1 and full != (1, weight[0], *weight[2:]):
        return
    hint = bias.name if bias is not None else conv.name
    vector = rewriter.constant(f"{hint}/conv", _per_channel(values.reshape(-1), weight[0]))
    result = add.outputs[0]
    rewriter.set_inputs(conv, [*conv.inputs, vector])
    rewriter.remove(add)
    rewriter.set_output(conv, 0, result)


def _per_channel(values: np.ndarray[Any, Any], channels: int) -> np.ndarray[Any, Any]:
    return np.array(np.broadcast_to(values, (channels,)), order="C")


def _up_to_reshape(core: Node, facts: Facts) -> tuple[Node, ...]:
    """Elementwise operators behind *core*, one after the other, and the Reshape that ends them."""
    chain: list[Node] = []
    last = core
    while not chain or facts.is_op(last, *ELEMENTWISE):
        reader = facts.sole_consumer(last.outputs[0])
        if reader is None:
            return ()
        chain.append(reader)
        last = reader
    return tuple(chain) if facts.is_op(last, "Reshape") else ()


def _core_before(node: Node, facts: Facts) -> Node | None:
    """What stands in front of elementwise operators in front of *node*."""
    tensor = node.inputs[0]
    producer = facts.producer(tensor)
    while facts.is_op(producer, *ELEMENTWISE):
        assert producer is not None
        variables = [t for t in producer.inputs if not (t.is_empty() or facts.is_constant(t))]
        if len(variables) != 1:
            return None
        producer = facts.producer(variables[0])
    return producer


def _keeps_leading(source: Tensor, result: Tensor, facts: Facts) -> bool:
    """Whether both have the same axes but for the last; one may be left to the element count."""
    before, after = facts.shape(source), facts.shape(result)
    if before is None or after is None or len(before) != len(after) or 0 in (*before, *after):
        return False
    if not isinstance(before[-1], int) or not isinstance(after[-1], int):
        return False
    differing = [
        (a, b) for a, b in zip(before[:-1], after[:-1], strict=True) if a != b or a is None
    ]
    is_known = any(isinstance(a, int) and isinstance(b, int) for a, b in differing)
    return len(differing) <= 1 and not is_known


def _constant_operand(node: Node, facts: Facts) -> Tensor | None:
    """The constant among the operands of a binary operator, if it has just one."""
    constants = [t for t in node.inputs if facts.is_constant(t)]
    return constants[0] if len(constants) == 1 else None


def _is_per_channel(tensor: Tensor, channels: Dim, facts: Facts) -> bool:
    """Whether *tensor* is a constant that broadcasts along the rows of a matrix."""
    values = facts.constant(tensor)
    if values is None or values.ndim > 2:
        return False
    return values.size == 1 or values.size == channels == values.shape[-1]


def _is_scalar_map(node: Node, facts: Facts) -> bool:
    """Whether *node* maps one tensor element by element, with scalars beside it at most."""
    others = [t for t in node.inputs if facts.is_constant(t)]
    tensors = [t for t in node.inputs if not (t.is_empty() or facts.is_constant(t))]
    is_single = len(tensors) == 1 and len(node.outputs) == 1
    return is_single and all(facts.scalar(t) is not None for t in others)
