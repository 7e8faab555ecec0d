"""The work of one operator, from its concrete shapes: a table from operator to counting rule.

Conventions, which are those of the published tables of network complexity:

* A multiply-accumulate (MAC) is a multiplication whose product is added up in a convolution or a
  matrix product. Taps that fall on padding count, as the kernels compute them; bias additions do
  not.
* Floating-point operations (FLOPs) are two per MAC, plus one per addition, multiplication,
  division, comparison, rounding or call of an elementary function (``exp``, ``erf``, ``tanh``,
  ``pow``, ...) anywhere else: a Relu is 1 per element, a Sigmoid 4 (negate, exp, add, divide).
* Moving, converting and reinterpreting data is no FLOP; it shows in the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from pwopt.graph import Facts, Node

__all__ = ["RULES", "VIEWS", "Operation", "Rule", "Work", "WorkClass"]

Dims = tuple[int, ...]


class WorkClass(StrEnum):
    """What kind of kernel does the work; operators of one class run at like efficiency."""

    DENSE_CONV = "dense-conv"
    """One group, a kernel larger than 1."""
    POINTWISE_CONV = "pointwise-conv"
    """One group, a kernel of 1."""
    DEPTHWISE_CONV = "depthwise-conv"
    """As many groups as input channels."""
    GROUPED_CONV = "grouped-conv"
    """Anything between."""
    CONV_TRANSPOSE = "conv-transpose"
    MATMUL = "matmul"
    ELEMENTWISE = "elementwise"
    POOL = "pool"
    REDUCTION = "reduction"
    """Reductions, Softmax and normalizations whose statistics come from the data."""
    COPY = "copy"
    """Data is moved in runs: Concat, Slice, Pad."""
    TRANSPOSE = "transpose"
    """Data is moved element by element: Transpose, DepthToSpace."""
    VIEW = "view"
    """Nothing is read or written: Reshape, Identity, Shape."""
    OTHER = "other"
    """Bytes are all that is counted: TopK, NonMaxSuppression."""
    UNKNOWN = "unknown"
    """No rule, or unknown shapes."""


@dataclass(frozen=True)
class Work:
    """MACs, and floating-point operations that are not part of one."""

    work_class: WorkClass
    macs: int = 0
    other_flops: int = 0

    @property
    def flops(self) -> int:
        """Two per MAC, and the others."""
        return 2 * self.macs + self.other_flops


@dataclass(frozen=True, eq=False)
class Operation:
    """A node whose shapes are all known.

    Attributes:
        inputs, outputs: shapes by position; ``None`` for an omitted optional one.
    """

    node: Node
    facts: Facts
    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims | None, ...]

    def input(self, index: int) -> Dims | None:
        """The shape of input *index*, ``None`` if omitted."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def source(self) -> Dims:
        """The shape of the first input."""
        return self.input(0) or ()

    @property
    def result(self) -> Dims:
        """The shape of the first output."""
        return self.outputs[0] or ()

    @property
    def read(self) -> int:
        """Elements of the first input."""
        return math.prod(self.source)

    @property
    def written(self) -> int:
        """Elements of the first output."""
        return math.prod(self.result)

    def int_attribute(self, key: str, default: int) -> int:
        """Integer attribute *key*."""
        return self.facts.attr_int(self.node, key, default)


Rule = Callable[[Operation], Work | None]
"""Counts one operation; ``None`` if it cannot count this form of the operator."""


# -- convolutions and matrix products ------------------------------------------------------------


def _conv_class(cin: int, group: int, kernel: Dims) -> WorkClass:
    if group == 1:
        is_pointwise = all(size == 1 for size in kernel)
        return WorkClass.POINTWISE_CONV if is_pointwise else WorkClass.DENSE_CONV
    return WorkClass.DEPTHWISE_CONV if group == cin else WorkClass.GROUPED_CONV


def _conv(weight_index: int, bias_index: int) -> Rule:
    def count(operation: Operation) -> Work | None:
        weight = operation.input(weight_index)
        if weight is None or len(weight) < 3 or len(operation.source) < 3:
            return None
        group = operation.int_attribute("group", 1)
        bias = operation.written if operation.input(bias_index) is not None else 0
        return Work(
            _conv_class(operation.source[1], group, weight[2:]),
            operation.written * math.prod(weight[1:]),
            bias,
        )

    return count


def _conv_transpose(operation: Operation) -> Work | None:
    weight = operation.input(1)
    if weight is None or len(weight) < 3:
        return None
    bias = operation.written if operation.input(2) is not None else 0
    return Work(WorkClass.CONV_TRANSPOSE, operation.read * math.prod(weight[1:]), bias)


def _deform_conv(operation: Operation) -> Work | None:
    weight = operation.input(1)
    if weight is None or len(weight) < 3:
        return None
    bias = operation.written if operation.input(3) is not None else 0
    taps = math.prod(weight[2:])
    pixels = operation.result[0] * math.prod(operation.result[2:])
    # Every tap of every channel interpolates between 2^d neighbours, a product and a sum each.
    sampling = pixels * operation.source[1] * taps * (2 << len(weight) - 2)
    return Work(WorkClass.OTHER, operation.written * math.prod(weight[1:]), bias + sampling)


def _fused_conv(operation: Operation) -> Work | None:
    plain = _conv(1, 2)(operation)
    if plain is None:
        return None
    residual = operation.written if operation.input(3) is not None else 0
    activation = _activation_flops(operation) * operation.written
    return Work(plain.work_class, plain.macs, plain.other_flops + residual + activation)


def _activation_flops(operation: Operation) -> int:
    name = operation.facts.attr_str(operation.node, "activation", "")
    return _FLOPS_PER_ELEMENT.get(name, 0)


def _matmul(second: int) -> Rule:
    def count(operation: Operation) -> Work | None:
        if not operation.source or not operation.input(second):
            return None
        inner = operation.source[-1]
        return Work(WorkClass.MATMUL, operation.written * inner)

    return count


def _fused_matmul(operation: Operation) -> Work | None:
    if operation.int_attribute("transBatchA", 0):
        return None
    axis = -2 if operation.int_attribute("transA", 0) else -1
    if len(operation.source) < 2:
        return None
    return Work(WorkClass.MATMUL, operation.written * operation.source[axis])


def _gemm(operation: Operation) -> Work | None:
    if len(operation.source) != 2:
        return None
    inner = operation.source[0 if operation.int_attribute("transA", 0) else 1]
    bias = operation.written if operation.input(2) is not None else 0
    activation = _activation_flops(operation) * operation.written
    return Work(WorkClass.MATMUL, operation.written * inner, bias + activation)


def _einsum(operation: Operation) -> Work | None:
    """One or two operands without repeated indices or an ellipsis."""
    equation = operation.facts.attr_str(operation.node, "equation", "").replace(" ", "")
    terms = equation.split("->")[0].split(",")
    shapes = [shape for shape in operation.inputs if shape is not None]
    if "." in equation or len(terms) != len(shapes) or len(terms) > 2:
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if len(set(term)) != len(term) or len(term) != len(shape):
            return None
        # A dimension of 1 broadcasts.
        sizes.update({i: max(n, sizes.get(i, 1)) for i, n in zip(term, shape, strict=True)})
    total = math.prod(sizes.values())
    if len(terms) == 2:
        return Work(WorkClass.MATMUL, total)
    if total == operation.written:
        return Work(WorkClass.TRANSPOSE)
    return Work(WorkClass.REDUCTION, 0, total)


def _recurrent(flops_per_state: int) -> Rule:
    """RNN, GRU, LSTM: two matrix products per step, then elementwise gates."""

    def count(operation: Operation) -> Work | None:
        weight, recurrence = operation.input(1), operation.input(2)
        if weight is None or recurrence is None or len(operation.source) != 3:
            return None
        # The first two axes are steps and batch, in the order that `layout` says.
        steps = operation.source[0] * operation.source[1]
        states = steps * recurrence[0] * recurrence[2]
        macs = steps * (math.prod(weight) + math.prod(recurrence))
        return Work(WorkClass.MATMUL, macs, states * flops_per_state)

    return count


# -- per element ---------------------------------------------------------------------------------

_FLOPS_PER_ELEMENT: Mapping[str, int] = MappingProxyType(
    {
        "Abs": 1,
        "Acos": 1,
        "Acosh": 1,
        "Add": 1,
        "Affine": 2,
        "And": 1,
        "Asin": 1,
        "Asinh": 1,
        "Atan": 1,
        "Atanh": 1,
        "BatchNormalization": 2,  # scale and shift, prepared from the statistics
        "BitShift": 1,
        "BitwiseAnd": 1,
        "BitwiseNot": 1,
        "BitwiseOr": 1,
        "BitwiseXor": 1,
        "Cast": 0,
        "CastLike": 0,
        "Ceil": 1,
        "Celu": 7,  # max, min, divide, exp, subtract, multiply, add
        "Clip": 2,  # two comparisons
        "Cos": 1,
        "Cosh": 1,
        "DequantizeLinear": 2,  # subtract the zero point, scale
        "Div": 1,
        "DynamicQuantizeLinear": 7,  # minimum, maximum, and as QuantizeLinear
        "Elu": 4,  # compare, exp, subtract, multiply
        "Equal": 1,
        "Erf": 1,
        "Exp": 1,
        "Floor": 1,
        "Gelu": 5,  # divide, erf, add, multiply, multiply
        "Greater": 1,
        "GreaterOrEqual": 1,
        "HardSigmoid": 4,  # multiply, add, two comparisons
        "HardSwish": 5,  # as HardSigmoid, and a product
        "ImageScaler": 2,  # scale, and a bias per channel
        "IsInf": 1,
        "IsNaN": 1,
        "LeakyRelu": 2,  # compare, multiply
        "Less": 1,
        "LessOrEqual": 1,
        "Log": 1,
        "Mish": 5,  # exp, add, log, tanh, multiply
        "Mod": 1,
        "Mul": 1,
        "Neg": 1,
        "Not": 1,
        "Or": 1,
        "PRelu": 2,  # compare, multiply
        "ParametricSoftplus": 5,  # as Softplus, with two factors
        "Pow": 1,
        "QuantizeLinear": 5,  # divide, round, add, two comparisons
        "Reciprocal": 1,
        "Relu": 1,
        "Round": 1,
        "Scale": 1,
        "ScaledTanh": 3,  # tanh, and two factors
        "Selu": 5,  # as Elu, and a scale
        "Shrink": 3,  # two comparisons, an addition
        "Sigmoid": 4,  # negate, exp, add, divide
        "Sign": 1,
        "Sin": 1,
        "Sinh": 1,
        "Softplus": 3,  # exp, add, log
        "Softsign": 3,  # absolute value, add, divide
        "Sqrt": 1,
        "Sub": 1,
        "Swish": 5,  # as Sigmoid, and a product
        "Tan": 1,
        "Tanh": 1,
        "ThresholdedRelu": 1,
        "Where": 1,
        "Xor": 1,
        "com.microsoft.BiasGelu": 6,  # as Gelu, and an addition
        "com.microsoft.FastGelu": 8,  # the tanh form
        "com.microsoft.Gelu": 5,
        "com.microsoft.QuickGelu": 6,  # as Sigmoid, with a scale and a product
    }
)

_REDUCTION_FLOPS: Mapping[str, int] = MappingProxyType(
    {
        "ArgMax": 1,
        "ArgMin": 1,
        "CumSum": 1,
        "GroupNormalization": 7,
        "Hardmax": 2,  # maximum, compare
        "InstanceNormalization": 7,  # sum; subtract, square, sum; subtract, scale, shift
        "LayerNormalization": 7,
        "LogSoftmax": 5,
        "LpNormalization": 3,  # power, sum, divide
        "MeanVarianceNormalization": 6,  # as InstanceNormalization, without the shift
        "RMSNormalization": 4,  # square, sum, scale, scale
        "ReduceL1": 2,
        "ReduceL2": 2,
        "ReduceLogSum": 1,
        "ReduceLogSumExp": 2,
        "ReduceMax": 1,
        "ReduceMean": 1,
        "ReduceMin": 1,
        "ReduceProd": 1,
        "ReduceSum": 1,
        "ReduceSumSquare": 2,
        "Softmax": 5,  # maximum, subtract, exp, sum, divide
    }
)
"""FLOPs per element of the input."""


def _per_output(flops: int) -> Rule:
    return lambda o: Work(WorkClass.ELEMENTWISE, 0, flops * o.written)


def _per_input(work_class: WorkClass, flops: int) -> Rule:
    return lambda o: Work(work_class, 0, flops * o.read)


def _variadic(extra: int) -> Rule:
    """The operands, n of them, are joined by n - 1 operations, then *extra* more per element."""

    def count(operation: Operation) -> Work:
        operands = sum(shape is not None for shape in operation.inputs)
        return Work(WorkClass.ELEMENTWISE, 0, (operands - 1 + extra) * operation.written)

    return count


# -- windows -------------------------------------------------------------------------------------


def _pool(flops_per_tap: int) -> Rule:
    def count(operation: Operation) -> Work:
        kernel = operation.facts.attr_ints(operation.node, "kernel_shape", ())
        return Work(WorkClass.POOL, 0, flops_per_tap * math.prod(kernel) * operation.written)

    return count


def _lrn(operation: Operation) -> Work:
    size = operation.int_attribute("size", 1)
    # Square; size - 1 sums; scale, add, power, divide.
    return Work(WorkClass.REDUCTION, 0, (size + 4) * operation.written)


def _interpolation(mode: str, axes: int) -> int:
    """FLOPs per output element: a product and a sum per neighbour."""
    if mode in ("linear", "bilinear"):
        return 2 << axes
    if mode in ("cubic", "bicubic"):
        return 2 << 2 * axes
    return 0


def _resize(operation: Operation) -> Work:
    mode = operation.facts.attr_str(operation.node, "mode", "nearest")
    axes = sum(a != b for a, b in zip(operation.source, operation.result, strict=False))
    flops = _interpolation(mode, axes) if axes else 0
    work_class = WorkClass.REDUCTION if flops else WorkClass.COPY
    return Work(work_class, 0, flops * operation.written)


def _grid_sample(operation: Operation) -> Work:
    mode = operation.facts.attr_str(operation.node, "mode", "linear")
    flops = _interpolation(mode, len(operation.source) - 2)
    return Work(WorkClass.OTHER, 0, flops * operation.written)


def _roi_align(operation: Operation) -> Work:
    # The adaptive ratio 0 depends on the boxes; it counts as one sample per bin.
    samples = max(operation.int_attribute("sampling_ratio", 0), 1) ** 2
    return Work(WorkClass.OTHER, 0, 8 * samples * operation.written)


# -- movement ------------------------------------------------------------------------------------


def _moves(work_class: WorkClass) -> Rule:
    return lambda _: Work(work_class)


def _transpose(operation: Operation) -> Work:
    rank = len(operation.source)
    perm = operation.facts.attr_ints(operation.node, "perm", tuple(reversed(range(rank))))
    moved = [axis for axis in perm if operation.source[axis] != 1]
    # Only axes of size 1 change places: the data stays in order.
    return Work(WorkClass.COPY if moved == sorted(moved) else WorkClass.TRANSPOSE)


_COPIES = (
    "Bernoulli",
    "Compress",
    "Concat",
    "ConstantOfShape",
    "Crop",
    "Expand",
    "EyeLike",
    "Gather",
    "GatherElements",
    "GatherND",
    "MaxUnpool",
    "Multinomial",
    "NonZero",
    "OneHot",
    "Pad",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Range",
    "ReverseSequence",
    "Scatter",
    "ScatterElements",
    "ScatterND",
    "Slice",
    "Split",
    "TensorScatter",
    "Tile",
    "Trilu",
)
_ELEMENT_MOVES = ("CenterCropPad", "Col2Im", "DepthToSpace", "SpaceToDepth")
_BYTES_ONLY = ("MaxRoiPool", "NonMaxSuppression", "TopK", "Unique")

VIEWS = frozenset(
    {
        "Constant",
        "Dropout",
        "Flatten",
        "Identity",
        "Reshape",
        "Shape",
        "Size",
        "Squeeze",
        "Unsqueeze",
    }
)
"""Operators that cost nothing, whatever their shapes."""

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **{op: _per_output(flops) for op, flops in _FLOPS_PER_ELEMENT.items()},
        **{op: _per_input(WorkClass.REDUCTION, f) for op, f in _REDUCTION_FLOPS.items()},
        **{op: _variadic(0) for op in ("Max", "Min", "Sum")},
        **{op: _moves(WorkClass.COPY) for op in _COPIES},
        **{op: _moves(WorkClass.TRANSPOSE) for op in _ELEMENT_MOVES},
        **{op: _moves(WorkClass.OTHER) for op in _BYTES_ONLY},
        "AveragePool": _pool(1),
        "Conv": _conv(1, 2),
        "ConvInteger": _conv(1, 4),
        "ConvTranspose": _conv_transpose,
        "DeformConv": _deform_conv,
        "Einsum": _einsum,
        # Three gates sum two products and a bias each; two sigmoids, a tanh; r h; (1 - z) n + z h.
        "GRU": _recurrent(20),
        "Gemm": _gemm,
        "GlobalAveragePool": _per_input(WorkClass.POOL, 1),
        "GlobalLpPool": _per_input(WorkClass.POOL, 2),
        "GlobalMaxPool": _per_input(WorkClass.POOL, 1),
        "GridSample": _grid_sample,
        "LRN": _lrn,
        # Four gates as above; three sigmoids, two tanhs; f c + i g; o tanh(c).
        "LSTM": _recurrent(26),
        "LpPool": _pool(2),
        "MatMul": _matmul(1),
        "MatMulInteger": _matmul(1),
        "MaxPool": _pool(1),
        "Mean": _variadic(1),
        "QLinearConv": _conv(3, 8),
        "QLinearMatMul": _matmul(3),
        # The sums, and a tanh.
        "RNN": _recurrent(3),
        "Resize": _resize,
        "RoiAlign": _roi_align,
        "Transpose": _transpose,
        "Upsample": _resize,
        "com.microsoft.FusedConv": _fused_conv,
        "com.microsoft.FusedGemm": _gemm,
        "com.microsoft.FusedMatMul": _fused_matmul,
    }
)
"""Every other operator that is counted; names carry their domain unless it is the standard one."""
