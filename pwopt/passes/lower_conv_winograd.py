"""Lower spatial convolutions to minimal filtering: fewer multiplications, in stock operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, Final, TypeVar

import numpy as np

from pwopt.errors import UsageError
from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor
from pwopt.numerics.winograd import minimal_filtering
from pwopt.passes._emitter import Emitter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["Form", "LowerConvWinograd", "LowerConvWinogradMatch", "Plan", "Weights"]

Array = np.ndarray[Any, Any]


class Form(StrEnum):
    """How many axes are transformed."""

    TWO = "2d"
    ONE = "1d"
    ANY = "any"


class Weights(StrEnum):
    """Where the weights are transformed."""

    SESSION = "session"
    FILE = "file"


E = TypeVar("E", bound=StrEnum)

_FUSABLE_ACTIVATIONS: Final = (
    "Relu",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Sigmoid",
    "HardSigmoid",
    "Tanh",
    "Softplus",
    "Softsign",
    "ThresholdedRelu",
)
"""Elementwise operators of one tensor that ONNX Runtime fuses into a Gemm right before them."""

_TILES: Final = {Form.TWO: (4, 2), Form.ONE: (4, 6, 2)}
"""Outputs per tile and axis, the generally faster ones first."""

_FILTERINGS: Final = range(6, 9)
"""Inputs of a tile along the longer axis of the kernel: fewer save too little, F(2,3) never wins;
for more there are no points that fp32 can bear."""

_MOST_AMPLIFICATION: Final = 10.0
"""The error may grow so much, as a typical value over all axes."""


@dataclass(frozen=True)
class Plan:
    """Which axes are transformed, and by which tile; its name is that of the variant."""

    axes: tuple[int, ...]
    tile: int

    @property
    def form(self) -> Form:
        """The number of axes, as the option has it."""
        return Form.TWO if len(self.axes) == 2 else Form.ONE

    @property
    def name(self) -> str:
        """``2d-f4``, ``1d-f6``, ..."""
        return f"{self.form.value}-f{self.tile}"


@dataclass(frozen=True, eq=False)
class LowerConvWinogradMatch(Match):
    """A convolution, the activation that is its only reader, and the plans that apply."""

    conv: ConvFacts
    activation: Node | None
    size: tuple[int, int]
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class LowerConvWinograd(Pass[LowerConvWinogradMatch]):
    """Lower a Conv with a 3x3, 5x5, 1xK or Kx1 kernel to Winograd's minimal filtering.

    Rewrites:
        ``Conv`` of stride 1 with two spatial axes. Per transformed axis, one depthwise ``Conv``
        for each row of B^T, with a stride of one tile, and a ``Concat`` on channels; the Conv's
        pads go into these. Then one grouped ``Conv`` with a group per tap, whose kernel is 1 along
        transformed axes; ``Reshape``; ``Gemm`` with A^T (``MatMul`` unless the batch is 1); and
        tiles into place by ``DepthToSpace``, or by ``Transpose`` where one axis is transformed;
        ``Slice`` if the last tiles are partial. The bias belongs to the tap of point 1, from
        which A^T spreads it over the tile as it is. All up to the Reshape are convolutions of
        aligned channels, so they stay in ONNX Runtime's blocked layout. An activation that is the
        only reader moves behind the Gemm, with which it fuses. *2d* transforms both axes, *1d*
        the first one whose kernel is larger than 1; f4 is a tile of 4 outputs per axis. Options:
        ``form``, ``tile`` (0 for any), and ``weights``: ``session`` leaves them as they are and
        expresses the transformation by operators that the runtime folds when a session is
        created; ``file`` stores them transformed.

    Algebra:
        ``Y = A^T [sum_c (G g G^T) * (B^T d B)] A`` with the matrices of F(m, r): m outputs of r
        taps by m + r - 1 multiplications (Winograd 1980, "Arithmetic Complexity of
        Computations"; for CNNs Lavin and Gray 2016). Under the transforms every tap is a
        pointwise convolution over channels. The matrices come from interpolation points by the
        method of Cook and Toom; powers of two are chosen for the least error (Barabasz et al.
        2020). F(4,3) needs a fourth of the multiplications along two axes, half along one.

    Declines when:
        the Conv has not two spatial axes, is pointwise, has strides, groups or dilations; weight
        or bias are computed or may be overridden; the type is not float32; height or width are
        not known, or pads follow from them; there are too few channels for the transforms to
        pay; the kernel is too large for any tile whose errors fp32 can bear; the opset is older
        than 8; the options exclude all that applies.

    Exactness:
        ROUNDING. The function is the same in real arithmetic; fp32 rounding errors grow by about
        the amplification that :mod:`pwopt.numerics.winograd` computes: less than ten times the
        direct convolution's.

    When it pays:
        On CPUs, where ONNX Runtime convolves directly, from 64 channels on: the more channels,
        the more. Along two axes the transformed weights take 4 times the memory of the original
        ones, which counts where images are small: below some 14x14 pixels one axis is better, as it
        is for few channels and large images, where the transforms outweigh the multiplications.
    """

    form: Form | str = Form.ANY
    tile: int = 0
    weights: Weights | str = Weights.SESSION

    class Why(StrEnum):
        """Reasons to decline."""

        NOT_TWO_DIMENSIONAL = "not-two-dimensional"
        POINTWISE = "pointwise"
        STRIDED = "strided"
        DILATED = "dilated"
        GROUPED = "grouped"
        TOO_FEW_CHANNELS = "too-few-channels"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        BIAS_NOT_CONSTANT = "bias-not-constant"
        UNSUPPORTED_DTYPE = "unsupported-dtype"
        UNKNOWN_SPATIAL_SIZE = "unknown-spatial-size"
        EMPTY_DIMENSION = "empty-dimension"
        OPSET_TOO_OLD = "opset-too-old"
        NO_SUCH_FORM = "no-such-form"

    name: ClassVar[str] = "lower-conv-winograd"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    _FEWEST_CHANNELS: ClassVar[int] = 16

    def __post_init__(self) -> None:
        """Accept the options' values as plain strings.

        Raises:
            UsageError: an option has no such value.
        """
        object.__setattr__(self, "form", _member(Form, "form", self.form))
        object.__setattr__(self, "weights", _member(Weights, "weights", self.weights))
        tiles = sorted({0, *(t for tiles in _TILES.values() for t in tiles)})
        if self.tile not in tiles:
            allowed = ", ".join(map(str, tiles))
            raise UsageError(f"lower-conv-winograd:tile takes one of {allowed}, not '{self.tile}'")

    def match(self, node: Node, facts: Facts) -> LowerConvWinogradMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        refusal = self._geometry(conv) or self._operands(conv, facts)
        if refusal is not None:
            return refusal
        size = _output_size(conv, facts)
        if size is None:
            return Decline(self.Why.UNKNOWN_SPATIAL_SIZE)
        if min(size) < 1:
            return Decline(self.Why.EMPTY_DIMENSION)
        plans = self._plans(conv)
        if not plans:
            return Decline(self.Why.NO_SUCH_FORM, {"kernel": conv.kernel})
        activation = facts.sole_consumer(conv.output)
        if not facts.is_op(activation, *_FUSABLE_ACTIVATIONS):
            activation = None
        return LowerConvWinogradMatch(
            node,
            (node,) if activation is None else (node, activation),
            conv,
            activation,
            size,
            plans,
            facts={"cin": conv.cin, "cout": conv.cout, "kernel": conv.kernel, "size": size},
        )

    def variants(self, match: LowerConvWinogradMatch) -> tuple[Variant, ...]:
        """The plans; two axes first where both have a kernel."""
        return tuple(Variant(plan.name) for plan in match.plans)

    def rewrite(self, match: LowerConvWinogradMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        plan = next(plan for plan in match.plans if plan.name == variant.name)
        _Lowering(match, plan, rewriter, in_file=self.weights is Weights.FILE).write()

    def _geometry(self, conv: ConvFacts) -> Decline | None:
        why = self.Why
        if conv.spatial_rank != 2:
            return Decline(why.NOT_TWO_DIMENSIONAL, {"axes": conv.spatial_rank})
        if conv.is_pointwise:
            return Decline(why.POINTWISE)
        if not conv.is_unit_stride:
            return Decline(why.STRIDED, {"strides": conv.strides})
        if any(d > 1 for d in conv.dilations):
            return Decline(why.DILATED, {"dilations": conv.dilations})
        if conv.group > 1:
            return Decline(why.GROUPED, {"group": conv.group})
        if min(conv.cin, conv.cout) < self._FEWEST_CHANNELS:
            facts = {"cin": conv.cin, "cout": conv.cout, "needed": self._FEWEST_CHANNELS}
            return Decline(why.TOO_FEW_CHANNELS, facts)
        return None

    def _operands(self, conv: ConvFacts, facts: Facts) -> Decline | None:
        why = self.Why
        if not facts.is_constant(conv.weight):
            return Decline(why.WEIGHT_NOT_CONSTANT)
        if conv.bias is not None and not facts.is_constant(conv.bias):
            return Decline(why.BIAS_NOT_CONSTANT)
        if facts.dtype(conv.weight) is None or facts.dtype(conv.weight) != np.dtype(np.float32):
            return Decline(why.UNSUPPORTED_DTYPE, {"dtype": str(facts.dtype(conv.weight))})
        if not facts.has_op("Expand"):
            return Decline(why.OPSET_TOO_OLD, {"opset": facts.opset, "needed": 8})
        return None

    def _plans(self, conv: ConvFacts) -> tuple[Plan, ...]:
        """What the kernel admits and the options leave."""
        axes = tuple(axis for axis in (0, 1) if conv.kernel[axis] > 1)
        candidates = [
            Plan(chosen, tile)
            for form, chosen in ((Form.TWO, axes), (Form.ONE, axes[:1]))
            if form is Form.ONE or len(axes) == 2
            for tile in _TILES[form]
        ]
        return tuple(
            plan
            for plan in candidates
            if self.form in (plan.form, Form.ANY)
            and self.tile in (plan.tile, 0)
            and _amplification(plan, conv.kernel) <= _MOST_AMPLIFICATION
        )


class _Lowering(Emitter):
    """Writes one lowered convolution."""

    def __init__(
        self, match: LowerConvWinogradMatch, plan: Plan, rewriter: Rewriter, *, in_file: bool
    ) -> None:
        node = match.conv.node
        super().__init__(rewriter, node, match.conv.weight, node.name or match.conv.output.name)
        self.conv = match.conv
        self.activation = match.activation
        self.size = match.size
        self.axes = plan.axes
        self.tile = plan.tile
        self.in_file = in_file
        self.filters = {a: minimal_filtering(plan.tile, match.conv.kernel[a]) for a in plan.axes}
        self.taps = math.prod(f.size for f in self.filters.values())
        self.grid = tuple(
            -(-n // plan.tile) if a in plan.axes else n for a, n in enumerate(match.size)
        )
        self.batch = (self.facts.shape(match.conv.input) or (None,))[0]

    def write(self) -> None:
        conv = self.conv
        result = conv.output if self.activation is None else self.activation.outputs[0]
        self.rewriter.remove(conv.node)
        x, channels = conv.input, conv.cin
        extent = self.input_size()
        for axis in self.axes:
            x, channels = self.transformed_input(x, channels, extent, axis)
            extent[axis] = self.grid[axis]
        y = self.products(x)
        y = self.activated(self.combined(y))
        self.cropped(self.interleaved(y))
        self.finish(result)

    # -- the steps -----------------------------------------------------------------------------

    def transformed_input(
        self, x: Tensor, channels: int, extent: Sequence[int], axis: int
    ) -> tuple[Tensor, int]:
        """B^T along *axis*: ``[N, taps * C, ...]`` with the taps outermost."""
        f, grid = self.filters[axis], self.grid[axis]
        shape: list[Dim] = [self.batch, channels, *extent]
        shape[axis + 2] = grid
        strides = [self.tile if a == axis else 1 for a in (0, 1)]
        rows = []
        for row in f.input_array:
            kernel, pads = _window(row, self.begin_pad(axis), extent[axis], grid, self.tile)
            kernel = kernel.reshape((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
            attributes: dict[str, int | Sequence[int]] = {
                "group": channels,
                "kernel_shape": kernel.shape[2:],
                "strides": strides,
                "pads": [pads[0], 0, pads[1], 0] if axis == 0 else [0, pads[0], 0, pads[1]],
            }
            weight = self.repeated(kernel, channels)
            rows.append(self.emit("Conv", [x, weight], shape, attributes))
        shape[1] = channels * f.size
        return self.emit("Concat", rows, shape, {"axis": 1}), channels * f.size

    def products(self, x: Tensor) -> Tensor:
        """The convolutions over channels, one group per tap."""
        conv = self.conv
        kernel = [1 if a in self.axes else k for a, k in enumerate(conv.kernel)]
        pads = [0 if a % 2 in self.axes else p for a, p in enumerate(self.pads())]
        attributes: dict[str, int | Sequence[int]] = {
            "group": self.taps,
            "kernel_shape": kernel,
            "pads": pads,
        }
        operands = [x, self.weight(kernel)]
        bias = self.facts.constant(conv.bias)
        if bias is not None:
            spread = np.zeros((self.taps, conv.cout), np.float32)
            spread[self.tap_of_one()] = bias
            operands.append(self.rewriter.constant(f"{self.name}/bias", spread.reshape(-1)))
        return self.emit(
            "Conv", operands, (self.batch, self.taps * conv.cout, *self.grid), attributes
        )

    def combined(self, y: Tensor) -> Tensor:
        """A^T on the taps: ``[taps, Cout * tiles]`` to ``[tile, Cout * tiles]``."""
        matrix = self.output_transform()
        rows = self.tile ** len(self.axes)
        columns = self.conv.cout * math.prod(self.grid)
        weight = self.rewriter.constant(f"{self.name}/output", matrix.astype(np.float32))
        if self.batch != 1:
            flat = self.reshape(y, (0, self.taps, columns), (self.batch, self.taps, columns))
            return self.emit("MatMul", [weight, flat], (self.batch, rows, columns))
        flat = self.reshape(y, (self.taps, columns), (self.taps, columns))
        operands = [weight, flat]
        if not self.facts.has_op("Gemm", since=11):
            # The third operand is optional from opset 11 on.
            operands.append(self.rewriter.constant(f"{self.name}/zero", np.zeros(1, np.float32)))
        return self.emit("Gemm", operands, (rows, columns))

    def interleaved(self, y: Tensor) -> Tensor:
        """Tiles side by side: ``[N, Cout, *(tiles * tile)]``."""
        cout, grid, m = self.conv.cout, self.grid, self.tile
        lead = 1 if self.batch == 1 else 0
        full = tuple(g * m if a in self.axes else g for a, g in enumerate(grid))
        if len(self.axes) == 2:
            stacked = (m * m * cout, *grid)
            y = self.reshape(y, (lead, *stacked), (self.batch, *stacked))
            return self.emit("DepthToSpace", [y], (self.batch, cout, *full), {"blocksize": m})
        split = (m, cout, *grid)
        y = self.reshape(y, (lead, *split), (self.batch, *split))
        perm = [0, 2, 3, 1, 4] if self.axes == (0,) else [0, 2, 3, 4, 1]
        inner = (grid[0], m, grid[1]) if self.axes == (0,) else (*grid, m)
        y = self.emit("Transpose", [y], (self.batch, cout, *inner), {"perm": perm})
        return self.reshape(y, (lead, cout, *full), (self.batch, cout, *full))

    def cropped(self, y: Tensor) -> Tensor:
        """Without what the last tiles have too many."""
        surplus = {a + 2: self.grid[a] * self.tile - self.size[a] for a in self.axes}
        return self.drop_ends(y, surplus, (self.batch, self.conv.cout, *self.size))

    def activated(self, y: Tensor) -> Tensor:
        activation = self.activation
        if activation is None:
            return y
        out = self.rewriter.variable(f"{self.name}/{activation.op}_output", like=y)
        self.rewriter.set_input(activation, 0, y)
        self.rewriter.set_output(activation, 0, out)
        return out

    # -- weights -------------------------------------------------------------------------------

    def weight(self, kernel: Sequence[int]) -> Tensor:
        """The transformed weight, ``[taps * Cout, Cin, *kernel]``."""
        conv = self.conv
        transform = self.weight_transform()
        shape = (self.taps * conv.cout, conv.cin, *kernel)
        values = self.facts.constant(conv.weight)
        assert values is not None
        if self.in_file:
            flat = values.reshape(conv.cout, conv.cin, -1).astype(np.float64) @ transform
            spread = flat.reshape(conv.cout, conv.cin, self.taps, -1).transpose(2, 0, 1, 3)
            transformed = spread.astype(np.float32).reshape(shape)
            return self.rewriter.constant(f"{conv.weight.name}/transformed", transformed)
        # All of this is constant: the runtime computes it once, when it creates a session.
        rest = math.prod(kernel)
        plane = math.prod(conv.kernel)
        matrix = self.rewriter.constant(f"{self.name}/weight", transform.astype(np.float32))
        flat_shape = (conv.cout * conv.cin, plane)
        tensor = self.reshape(conv.weight, flat_shape, flat_shape)
        tensor = self.emit("MatMul", [tensor, matrix], (flat_shape[0], self.taps * rest))
        split = (flat_shape[0], self.taps, rest)
        tensor = self.reshape(tensor, split, split)
        turned = (self.taps, flat_shape[0], rest)
        tensor = self.emit("Transpose", [tensor], turned, {"perm": [1, 0, 2]})
        return self.reshape(tensor, shape, shape)

    def weight_transform(self) -> Array:
        """``[kh * kw, taps * rest]``: G on transformed axes; the other one stays as the rest."""
        rows, columns = self.conv.kernel
        parts = {axis: f.weight_array for axis, f in self.filters.items()}
        if len(parts) == 2:
            matrix = np.einsum("pk,ql->klqp", parts[0], parts[1])
        elif 0 in parts:
            matrix = np.einsum("pk,lr->klpr", parts[0], np.eye(columns))
        else:
            matrix = np.einsum("ql,kr->klqr", parts[1], np.eye(rows))
        transform: Array = matrix.reshape(rows * columns, -1)
        return transform

    def output_transform(self) -> Array:
        """A^T, ``[tile, taps]``; along two axes rows of a tile are outermost, of taps innermost."""
        parts = [f.output_array for f in self.filters.values()]
        if len(parts) == 1:
            return parts[0]
        both: Array = np.einsum("ip,jq->ijqp", *parts)
        return both.reshape(self.tile**2, self.taps)

    def tap_of_one(self) -> int:
        """Where point 1 stands among the taps, along every axis."""
        index = 0
        for axis in reversed(self.axes):
            f = self.filters[axis]
            index = index * f.size + f.points.index(Fraction(1))
        return index

    def repeated(self, kernel: Array, channels: int) -> Tensor:
        """One kernel for all channels: ``[channels, 1, *kernel]``."""
        values = kernel.astype(np.float32)
        shape = (channels, *kernel.shape[1:])
        if self.in_file:
            return self.rewriter.constant(
                f"{self.name}/input", np.tile(values, (channels, 1, 1, 1))
            )
        row = self.rewriter.constant(f"{self.name}/input", values)
        return self.emit("Expand", [row, self.integers("shape", shape)], shape)

    # -- what they are made of -----------------------------------------------------------------

    def pads(self) -> tuple[int, ...]:
        assert self.conv.pads is not None
        return self.conv.pads

    def begin_pad(self, axis: int) -> int:
        return self.pads()[axis]

    def input_size(self) -> list[int]:
        pads, kernel = self.pads(), self.conv.kernel
        return [self.size[a] + kernel[a] - 1 - pads[a] - pads[a + 2] for a in (0, 1)]


def _member(kind: type[E], key: str, value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise UsageError(
            f"lower-conv-winograd:{key} takes one of {allowed}, not '{value}'"
        ) from None


@cache
def _amplification(plan: Plan, kernel: tuple[int, ...]) -> float:
    """How much the error grows; infinite where the tile is not used."""
    if max(plan.tile + kernel[a] - 1 for a in plan.axes) not in _FILTERINGS:
        return math.inf
    return math.prod(minimal_filtering(plan.tile, kernel[a]).amplification for a in plan.axes)


def _output_size(conv: ConvFacts, facts: Facts) -> tuple[int, int] | None:
    """Output height and width, from the input's; at stride 1."""
    shape = facts.shape(conv.input)
    if shape is None or conv.pads is None:
        return None
    height, width = shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    pads, kernel = conv.pads, conv.kernel
    return height + pads[0] + pads[2] - kernel[0] + 1, width + pads[1] + pads[3] - kernel[1] + 1


def _window(
    row: Array, pad: int, extent: int, grid: int, tile: int
) -> tuple[Array, tuple[int, int]]:
    """A row of B^T without the zeros at its ends, and the pads that then take it to its place.

    Args:
        row: coefficients; the first belongs to the position *pad* before the tile.
        pad: the convolution's begin pad.
        extent: input size along the axis.
        grid: number of tiles.
        tile: distance between them.
    """
    used = np.flatnonzero(row)
    # Pads cannot be negative: zeros that stand on the input are kept.
    first, end = min(int(used[0]), pad), int(used[-1]) + 1
    reach = (grid - 1) * tile + end - pad
    return row[first:end], (pad - first, max(reach - extent, 0))
