"""Lower spatial convolutions to minimal filtering: fewer multiplications, in stock operators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Final, Self, TypeVar

import numpy as np

from pwopt.errors import UsageError
from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor
from pwopt.numerics.winograd import minimal_filtering
from pwopt.passes._emitter import Emitter, times
from pwopt.passes.contract import DEFAULT_VARIANT, Match, Pass, Variant
from pwopt.passes.fold_batch_normalization import (
    FoldBatchNormalization,
    FoldBatchNormalizationMatch,
)
from pwopt.remark import Decline, Exactness

__all__ = ["Form", "LowerConvWinograd", "LowerConvWinogradMatch", "Plan", "Weights"]

Array = np.ndarray[Any, Any]


class Form(StrEnum):
    """How many axes are transformed, and whether tap by tap along the first one (*bands*)."""

    TWO = "2d"
    BANDS = "2d-bands"
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

_TILES: Final = {Form.TWO: (4, 2, 6), Form.BANDS: (4, 6), Form.ONE: (4, 6, 2)}
"""Outputs per tile and axis."""

_FILTERINGS: Final = {Form.TWO: range(4, 9), Form.BANDS: range(6, 9), Form.ONE: range(6, 9)}
"""Inputs of a tile along the longer axis of the kernel: fewer save too little, F(2,3) along one
axis never wins; for more there are no points that fp32 can bear."""

_LAYER_ERROR: Final = 1e-6
"""What a direct convolution in fp32 deviates by at most, relative to its output's scale."""

_FEW_TILES: Final = 8
"""Fewer tiles than this do not amortise reading the weights of 36 taps."""

_FEW_CHANNELS: Final = 96
"""Up to so many, large images are better transformed along one axis."""

_CACHED_BYTES: Final = 2 << 20
"""A transformed input beyond this is better made and used band by band."""

_USUAL_SIZE: Final = 128
"""What a height or width that is not known is taken for: networks for any size get large images."""


@dataclass(frozen=True)
class Plan:
    """Which axes are transformed, how, and by which tile; its name is that of the variant."""

    form: Form
    axes: tuple[int, ...]
    tile: int

    @property
    def name(self) -> str:
        """``2d-f4``, ``2d-bands-f4``, ``1d-f6``, ..."""
        return f"{self.form.value}-f{self.tile}"


@dataclass(frozen=True, eq=False)
class LowerConvWinogradMatch(Match):
    """A convolution, what becomes part of it, and the plans that apply.

    Attributes:
        normalisation: the folding of the BatchNormalization that is its only reader, if any.
        activation: the only reader of that, if it moves along.
        size: of the output.
    """

    conv: ConvFacts
    normalisation: FoldBatchNormalizationMatch | None
    activation: Node | None
    size: tuple[Dim, Dim]
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class LowerConvWinograd(Pass[LowerConvWinogradMatch]):
    """Lower a Conv with a 3x3, 5x5, 1xK or Kx1 kernel to Winograd's minimal filtering.

    Rewrites:
        ``Conv`` of stride 1 with two spatial axes. Per transformed axis, one depthwise ``Conv``
        for each row of B^T, with a stride of one tile, and a ``Concat`` on channels; the Conv's
        pads go into these. Then one grouped ``Conv`` with a group per tap, whose kernel is 1 along
        transformed axes; ``Reshape``; ``Gemm`` with A^T (``MatMul`` unless the batch is 1); and
        tiles into place by ``DepthToSpace``, or by ``Transpose`` of whole rows where the height
        alone is transformed; ``Slice`` if the last tiles are partial. Height and width need not be
        known: then end pads are such that there are as many tiles as any size takes, and the
        ``Slice`` cuts to a computed size, as does one ``Reshape`` where both are open. The bias is
        spread over the taps such that A^T gives it back to every output. All up to the Reshape are
        convolutions of aligned channels, so they stay in ONNX Runtime's blocked layout. A
        BatchNormalization that is the only reader is folded, for what is left is no Conv that the
        runtime could fold it into; an activation that is the only reader of the result moves behind
        the Gemm, with which it fuses. *2d* transforms both axes, *1d* the first one whose kernel is
        larger than 1. *2d-bands* does all of that for one tap of the height at a time, which keeps
        it in the cache: a depthwise Conv for the tap, one for each tap of the width, ``Concat``, a
        grouped Conv with a group per tap of the width, and a transposed ``Gemm`` that leaves the
        width's outputs side by side; a Gemm over the bands and a Transpose of whole rows come last.
        f4 is a tile of 4 outputs per axis. Options: ``form``, ``tile`` (0 for any),
        ``amplification`` (how many times larger a layer's rounding error may become;
        ``--max-error`` raises it), and ``weights``: ``session`` leaves them as they are and
        expresses the transformation by operators that the runtime folds when a session is created;
        ``file`` stores them transformed.

    Algebra:
        ``Y = A^T [sum_c (G g G^T) * (B^T d B)] A`` with the matrices of F(m, r): m outputs of r
        taps by m + r - 1 multiplications (Winograd 1980, "Arithmetic Complexity of
        Computations"; for CNNs Lavin and Gray 2016). Under the transforms every tap is a
        pointwise convolution over channels. The matrices come from interpolation points by the
        method of Cook and Toom; powers of two are chosen for the least error (Barabasz et al.
        2020). F(4,3) needs a fourth of the multiplications along two axes, half along one.

    Declines when:
        the Conv has not two spatial axes, is pointwise, has strides, groups or dilations; weight
        or bias are computed or may be overridden; the type is not float32; pads follow from a
        height or width that is not known; there are too few channels for the transforms to
        pay; the kernel is too large for any tile whose errors fp32 can bear; the opset is older
        than 8, or than 10 where height or width are not known; the options exclude all that
        applies.

    Exactness:
        ROUNDING. The function is the same in real arithmetic; fp32 rounding errors grow by about
        the amplification that :mod:`pwopt.numerics.winograd` computes: less than ten times the
        direct convolution's, unless more is allowed.

    When it pays:
        On CPUs, where ONNX Runtime convolves directly, from 64 channels on: the more channels,
        the more. 2d-bands is for what does not fit a cache at once; it has many small operators,
        which cost on several threads where images are small. Along two axes the transformed
        weights take 4 times the memory of the original ones, which counts where images are small:
        below some 14x14 pixels f2 is better, or one axis, as it is for few channels and large
        images, where the transforms outweigh the multiplications.
    """

    form: Form | str = Form.ANY
    tile: int = 0
    weights: Weights | str = Weights.SESSION
    amplification: float = 10.0

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
        if not self.amplification > 0:
            raise UsageError(
                f"lower-conv-winograd:amplification must be above 0, not {self.amplification}"
            )

    def allowing(self, max_error: float) -> Self:
        """With larger tiles, as far as a layer's own rounding error may grow to *max_error*."""
        allowed = round(max_error / _LAYER_ERROR, 3)
        return replace(self, amplification=max(self.amplification, allowed))

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
        if any(isinstance(n, int) and n < 1 for n in size):
            return Decline(self.Why.EMPTY_DIMENSION)
        if not _is_known(size) and not facts.has_op("Slice", since=10):
            return Decline(self.Why.OPSET_TOO_OLD, {"opset": facts.opset, "needed": 10})
        plans = self._plans(conv)
        if not plans:
            return Decline(self.Why.NO_SUCH_FORM, {"kernel": conv.kernel})
        plans = _by_promise(plans, conv.cin, size)
        normalisation = _normalisation(conv, facts)
        last = conv.output if normalisation is None else normalisation.root.outputs[0]
        activation = facts.sole_consumer(last)
        if not facts.is_op(activation, *_FUSABLE_ACTIVATIONS):
            activation = None
        behind = (None if normalisation is None else normalisation.root, activation)
        return LowerConvWinogradMatch(
            node,
            (node, *(n for n in behind if n is not None)),
            conv,
            normalisation,
            activation,
            size,
            plans,
            facts={"cin": conv.cin, "cout": conv.cout, "kernel": conv.kernel, "size": size},
        )

    def variants(self, match: LowerConvWinogradMatch) -> tuple[Variant, ...]:
        """The plans, the most promising first."""
        return tuple(Variant(plan.name) for plan in match.plans)

    def rewrite(self, match: LowerConvWinogradMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        plan = next(plan for plan in match.plans if plan.name == variant.name)
        if match.normalisation is not None:
            FoldBatchNormalization().rewrite(match.normalisation, DEFAULT_VARIANT, rewriter)
            conv = Facts(rewriter.model).conv(match.root)
            assert conv is not None
            match = replace(match, conv=conv)
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
            Plan(form, axes[:1] if form is Form.ONE else axes, tile)
            for form, tiles in _TILES.items()
            if form is Form.ONE or len(axes) == 2
            for tile in tiles
        ]
        return tuple(
            plan
            for plan in candidates
            if self.form in (plan.form, Form.ANY)
            and self.tile in (plan.tile, 0)
            and _amplification(plan, conv.kernel) <= self.amplification
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
        self.form = plan.form
        self.axes = plan.axes
        self.tile = plan.tile
        self.in_file = in_file
        self.kernels: dict[tuple[int, int, int], Tensor] = {}
        self.flat_weight: Tensor | None = None
        self.filters = {a: minimal_filtering(plan.tile, match.conv.kernel[a]) for a in plan.axes}
        self.taps = math.prod(f.size for f in self.filters.values())
        self.grid = tuple(
            n if a not in plan.axes else -(-n // plan.tile) if isinstance(n, int) else None
            for a, n in enumerate(match.size)
        )
        # Where neither height nor width are known, one of them is left to a Reshape.
        self.is_open = not any(isinstance(n, int) for n in self.grid)
        one = (0, 1) if plan.axes == (1,) else (1, 2)
        self.open_axes = (0, 2) if plan.form is Form.TWO else one
        self.open_sizes: Tensor | None = None
        self.batch = (self.facts.shape(match.conv.input) or (None,))[0]
        self.lead = 1 if self.batch == 1 else 0

    def write(self) -> None:
        conv = self.conv
        result = conv.output if self.activation is None else self.activation.outputs[0]
        self.rewriter.remove(conv.node)
        # At first, for else the input would have to stay for the sake of its size.
        ends = self.ends()
        y = self.by_bands() if self.form is Form.BANDS else self.at_once()
        self.cropped(y, ends)
        self.finish(result)

    def at_once(self) -> Tensor:
        """All taps by one convolution."""
        conv = self.conv
        x, channels = conv.input, conv.cin
        extent = self.input_size()
        for axis in self.axes:
            x, channels = self.transformed(x, channels, extent, axis)
            extent[axis] = self.grid[axis]
        kernel = [1 if a in self.axes else k for a, k in enumerate(conv.kernel)]
        pads = [0 if a % 2 in self.axes else p for a, p in enumerate(self.pads())]
        bias = self.bias(self.constant())
        y = self.products(x, self.weight(kernel, self.weight_transform()), bias, kernel, pads)
        if self.axes == (1,):
            y = self.activated(self.side_by_side(y, self.output_transform()))
            full = (conv.cout, self.grid[0], times(self.grid[1], self.tile))
            return self.laid_out(y, full)
        y = self.reshape_image(y, (self.taps, _product(conv.cout, *self.grid)))
        return self.interleaved(self.activated(self.combined(y, self.output_transform())))

    def by_bands(self) -> Tensor:
        """Tap by tap along the height, all of the width's taps by one convolution.

        What one tap of the height needs stays in the cache from transform to A^T, and A^T leaves
        the width's outputs where they belong.
        """
        conv, extent = self.conv, self.input_size()
        rows, columns = (self.filters[axis] for axis in self.axes)
        band = [self.grid[0], extent[1]]
        transform = self.weight_transform().reshape(-1, columns.size, rows.size)
        flat = _product(conv.cout, *self.grid, self.tile)
        parts = []
        for p in range(rows.size):
            x = self.filtered(conv.input, conv.cin, extent, 0, p)
            x, _ = self.transformed(x, conv.cin, band, 1)
            bias = self.bias(rows.constant[p] * columns.constant)
            weight = self.weight([1, 1], transform[:, :, p])
            y = self.products(x, weight, bias, [1, 1], [0, 0, 0, 0])
            y = self.side_by_side(y, columns.output_array)
            parts.append(self.reshape_image(y, (1, flat)))
        shape: list[Dim] = [rows.size, flat] if self.batch == 1 else [self.batch, rows.size, flat]
        y = self.emit("Concat", parts, shape, {"axis": len(shape) - 2})
        y = self.activated(self.combined(y, rows.output_array))
        return self.rows_in_place(y, self.tile)

    # -- the steps -----------------------------------------------------------------------------

    def transformed(
        self, x: Tensor, channels: int, extent: Sequence[Dim], axis: int
    ) -> tuple[Tensor, int]:
        """B^T along *axis*: ``[N, taps * C, ...]`` with the taps outermost."""
        size = self.filters[axis].size
        parts = [self.filtered(x, channels, extent, axis, tap) for tap in range(size)]
        shape: list[Dim] = [self.batch, channels * size, *extent]
        shape[axis + 2] = self.grid[axis]
        return self.emit("Concat", parts, shape, {"axis": 1}), channels * size

    def filtered(
        self, x: Tensor, channels: int, extent: Sequence[Dim], axis: int, tap: int
    ) -> Tensor:
        """One row of B^T along *axis*: a depthwise convolution with a stride of one tile."""
        row, grid, size = self.filters[axis].input_array[tap], self.grid[axis], extent[axis]
        begin, end = self.pads()[axis], self.pads()[axis + 2]
        if isinstance(size, int) and isinstance(grid, int):
            kernel, pads = _window(row, begin, size, grid, self.tile)
        else:
            kernel, pads = _open_window(row, begin, end + self.tile - 1)
        kernel = kernel.reshape((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
        attributes: dict[str, int | Sequence[int]] = {
            "group": channels,
            "kernel_shape": kernel.shape[2:],
            "strides": [self.tile if a == axis else 1 for a in (0, 1)],
            "pads": [pads[0], 0, pads[1], 0] if axis == 0 else [0, pads[0], 0, pads[1]],
        }
        key = (axis, tap, channels)
        if key not in self.kernels:
            self.kernels[key] = self.repeated(kernel, channels)
        shape: list[Dim] = [self.batch, channels, *extent]
        shape[axis + 2] = grid
        return self.emit("Conv", [x, self.kernels[key]], shape, attributes)

    def products(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel: Sequence[int],
        pads: Sequence[int],
    ) -> Tensor:
        """The convolutions over channels, one group per tap."""
        channels = self.facts.shape(weight)
        assert channels is not None
        assert isinstance(channels[0], int)
        attributes: dict[str, int | Sequence[int]] = {
            "group": channels[0] // self.conv.cout,
            "kernel_shape": kernel,
            "pads": pads,
        }
        operands = [x, weight] if bias is None else [x, weight, bias]
        y = self.emit("Conv", operands, (self.batch, channels[0], *self.grid), attributes)
        if self.is_open and self.open_sizes is None:
            self.open_sizes = self.sizes(y, *self.open_axes)
        return y

    def combined(self, y: Tensor, matrix: Array) -> Tensor:
        """A^T on the taps, the outer axis of *y* (behind the batch, if that is not 1)."""
        weight = self.rewriter.constant(f"{self.name}/output", matrix.astype(np.float32))
        *_, columns = y.shape
        if self.batch != 1:
            return self.emit("MatMul", [weight, y], (self.batch, len(matrix), columns))
        return self.gemm(weight, y, (len(matrix), columns), {})

    def side_by_side(self, y: Tensor, matrix: Array) -> Tensor:
        """A^T on the taps, the outer axis of *y*, with the outputs as the innermost one."""
        taps, columns = matrix.shape[1], _product(self.conv.cout, *self.grid)
        weight = self.rewriter.constant(f"{self.name}/output", matrix.T.astype(np.float32))
        y = self.reshape_image(y, (taps, columns))
        if self.batch == 1:
            return self.gemm(y, weight, (columns, len(matrix)), {"transA": 1})
        turned = self.transpose(y, 0, 2, 1)
        return self.emit("MatMul", [turned, weight], (self.batch, columns, len(matrix)))

    def gemm(
        self, a: Tensor, b: Tensor, shape: Sequence[Dim], attributes: Mapping[str, int]
    ) -> Tensor:
        operands = [a, b]
        if not self.facts.has_op("Gemm", since=11):
            # The third operand is optional from opset 11 on.
            operands.append(self.rewriter.constant(f"{self.name}/zero", np.zeros(1, np.float32)))
        return self.emit("Gemm", operands, shape, attributes)

    def interleaved(self, y: Tensor) -> Tensor:
        """Tiles, the outer axis, into place along the height and what else is transformed."""
        cout, grid, m = self.conv.cout, self.grid, self.tile
        if self.axes == (0,):
            return self.rows_in_place(y, 1)
        y = self.laid_out(y, (m * m * cout, grid[0], grid[1]))
        shape = (self.batch, cout, times(grid[0], m), times(grid[1], m))
        return self.emit("DepthToSpace", [y], shape, {"blocksize": m})

    def rows_in_place(self, y: Tensor, step: int) -> Tensor:
        """From ``[tile, rows, width]`` to ``[N, Cout, rows / Cout * tile, width]``.

        Args:
            y: in this order, whatever its shape.
            step: pixels that a position along the width stands for.
        """
        cout, grid, m = self.conv.cout, self.grid, self.tile
        width = times(grid[1], step)
        y = self.laid_out(y, (m, times(grid[0], cout), width), step)
        y = self.transpose(y, 0, 2, 1, 3)
        full = (cout, times(grid[0], m), width)
        dims = (self.lead, cout, _or(-1, full[1]), _or(0, width))
        return self.reshape(y, dims, (self.batch, *full))

    def laid_out(self, y: Tensor, shape: tuple[int, Dim, Dim], step: int = 1) -> Tensor:
        """The images of *y* as *shape*, which has to be computed if two of it are not known.

        Args:
            y: its batch is in front unless it is 1.
            shape: of an image.
            step: pixels that a position along the width stands for.
        """
        known = (self.batch, *shape)
        if not self.is_open:
            return self.reshape(y, (self.lead, *(_or(-1, n) for n in shape)), known)
        sizes = self.open_sizes
        assert sizes is not None
        if step > 1:
            factor = self.integers("step", [step])
            sizes = self.emit("Mul", [sizes, factor], sizes.shape, like=sizes)
        first, end = self.open_axes
        parts = [self.integers("shape", [self.lead, shape[0], -1][: first + 2]), sizes]
        if end == 1:
            parts.append(self.integers("rest", [-1]))
        dims = self.emit("Concat", parts, (4,), {"axis": 0}, like=sizes)
        return self.emit("Reshape", [y, dims], known)

    def reshape_image(self, y: Tensor, shape: tuple[Dim, ...]) -> Tensor:
        """What belongs to one image as *shape*; the batch stays in front unless it is 1."""
        dims = [_or(-1, n) for n in shape]
        if self.batch == 1:
            return self.reshape(y, dims, shape)
        return self.reshape(y, (0, *dims), (self.batch, *shape))

    def ends(self) -> Tensor | None:
        """Where the output ends along the axes that are cut, computed; ``None`` if constant."""
        if all(isinstance(self.size[a], int) for a in self.axes):
            return None
        first, last = self.axes[0], self.axes[-1]
        conv, pads = self.conv, self.pads()
        ends = self.sizes(conv.input, first, last + 1)
        more = [pads[a] + pads[a + 2] + 1 - conv.kernel[a] for a in self.axes]
        if not any(more):
            return ends
        return self.emit("Add", [ends, self.integers("more", more)], ends.shape, like=ends)

    def cropped(self, y: Tensor, ends: Tensor | None) -> Tensor:
        """Without what the last tiles have too many."""
        shape = (self.batch, self.conv.cout, *self.size)
        if ends is None:
            surplus = {a + 2: -_or(0, self.size[a]) % self.tile for a in self.axes}
            return self.drop_ends(y, surplus, shape)
        starts = self.integers("starts", [0] * len(self.axes))
        axes = self.integers("axes", [a + 2 for a in self.axes])
        return self.emit("Slice", [y, starts, ends, axes], shape)

    def sizes(self, x: Tensor, first: int, end: int) -> Tensor:
        """The sizes of the image *x* along the axes of space from *first* to before *end*."""
        start, end, count = first + 2, end + 2, (end - first,)
        axes = self.integers("axes", [0])
        if self.facts.has_op("Shape", since=15):
            return self.emit("Shape", [x], count, {"start": start, "end": end}, like=axes)
        shape = self.emit("Shape", [x], (4,), like=axes)
        bounds = [self.integers("starts", [start]), self.integers("ends", [end]), axes]
        return self.emit("Slice", [shape, *bounds], count, like=axes)

    def activated(self, y: Tensor) -> Tensor:
        activation = self.activation
        if activation is None:
            return y
        out = self.rewriter.variable(f"{self.name}/{activation.op}_output", like=y)
        self.rewriter.set_input(activation, 0, y)
        self.rewriter.set_output(activation, 0, out)
        return out

    # -- weights -------------------------------------------------------------------------------

    def weight(self, kernel: Sequence[int], transform: Array) -> Tensor:
        """The transformed weight, ``[taps * Cout, Cin, *kernel]``.

        Args:
            kernel: what is left of the kernel's height and width.
            transform: ``[kh * kw, taps * rest]`` with the rest of the kernel innermost.
        """
        conv = self.conv
        rest = math.prod(kernel)
        taps = transform.shape[1] // rest
        shape = (taps * conv.cout, conv.cin, *kernel)
        values = self.facts.constant(conv.weight)
        assert values is not None
        if self.in_file:
            flat = values.reshape(conv.cout, conv.cin, -1).astype(np.float64) @ transform
            spread = flat.reshape(conv.cout, conv.cin, taps, -1).transpose(2, 0, 1, 3)
            transformed = spread.astype(np.float32).reshape(shape)
            return self.rewriter.constant(f"{conv.weight.name}/transformed", transformed)
        # All of this is constant: the runtime computes it once, when it creates a session.
        plane = math.prod(conv.kernel)
        matrix = self.rewriter.constant(f"{self.name}/weight", transform.astype(np.float32))
        flat_shape = (conv.cout * conv.cin, plane)
        if self.flat_weight is None:
            self.flat_weight = self.reshape(conv.weight, flat_shape, flat_shape)
        tensor = self.emit("MatMul", [self.flat_weight, matrix], (flat_shape[0], taps * rest))
        split = (flat_shape[0], taps, rest)
        tensor = self.reshape(tensor, split, split)
        turned = (taps, flat_shape[0], rest)
        tensor = self.emit("Transpose", [tensor], turned, {"perm": [1, 0, 2]})
        return self.reshape(tensor, shape, shape)

    def bias(self, spread: Array) -> Tensor | None:
        """The bias times what A^T makes ones of; ``None`` if nothing of it is at these taps."""
        bias = self.facts.constant(self.conv.bias)
        if bias is None or not spread.any():
            return None
        values = np.outer(spread, bias.astype(np.float64)).astype(np.float32)
        return self.rewriter.constant(f"{self.name}/bias", values.reshape(-1))

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

    def constant(self) -> Array:
        """What the taps must be for every output to be 1; the first axis is innermost."""
        values: Array = np.ones(1)
        for axis in self.axes:
            values = np.outer(self.filters[axis].constant, values).reshape(-1)
        return values

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

    def input_size(self) -> list[Dim]:
        pads, kernel = self.pads(), self.conv.kernel
        return [
            n + kernel[a] - 1 - pads[a] - pads[a + 2] if isinstance(n, int) else None
            for a, n in enumerate(self.size)
        ]


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
    if max(plan.tile + kernel[a] - 1 for a in plan.axes) not in _FILTERINGS[plan.form]:
        return math.inf
    return math.prod(minimal_filtering(plan.tile, kernel[a]).amplification for a in plan.axes)


def _by_promise(plans: tuple[Plan, ...], cin: int, size: tuple[Dim, Dim]) -> tuple[Plan, ...]:
    """In the order that shapes like this mostly have: the tuner stops behind a leader.

    Where there are few tiles, the weights of many taps are read for little; where there are many,
    what is transformed does not stay in a cache, and for few channels it costs more than two axes
    save.
    """
    tiles = math.prod(-(-_or(_USUAL_SIZE, n) // 4) for n in size)
    if tiles < _FEW_TILES:
        order = ["2d-f2", "1d-f4", "2d-f4"]
    elif 36 * 4 * cin * tiles > _CACHED_BYTES:
        order = ["2d-bands-f4", "1d-f6", "2d-f4", "1d-f4"]
        if cin <= _FEW_CHANNELS:
            order[:2] = ["1d-f6", "2d-bands-f4"]
    else:
        order = ["2d-f4", "1d-f4", "2d-bands-f4", "2d-f2", "1d-f6"]
    ranks = {name: rank for rank, name in enumerate(order)}
    return tuple(sorted(plans, key=lambda plan: ranks.get(plan.name, len(ranks))))


def _normalisation(conv: ConvFacts, facts: Facts) -> FoldBatchNormalizationMatch | None:
    """How to fold the BatchNormalization behind *conv*, which the runtime then cannot fold."""
    reader = facts.sole_consumer(conv.output)
    if reader is None or not facts.is_op(reader, "BatchNormalization"):
        return None
    found = FoldBatchNormalization().match(reader, facts)
    if isinstance(found, Decline) or found.nodes != (reader, conv.node):
        return None
    return found


def _output_size(conv: ConvFacts, facts: Facts) -> tuple[Dim, Dim] | None:
    """Output height and width, from the input's; at stride 1. ``None`` if pads are not known."""
    if conv.pads is None:
        return None
    before = (facts.shape(conv.input) or (None,) * 4)[2:]
    pads, kernel = conv.pads, conv.kernel
    height, width = (_plus(n, pads[a] + pads[a + 2] - kernel[a] + 1) for a, n in enumerate(before))
    return height, width


def _plus(dim: Dim, more: int) -> Dim:
    if more == 0:
        return dim
    return dim + more if isinstance(dim, int) else None


def _product(*dims: Dim) -> Dim:
    known = [n for n in dims if isinstance(n, int)]
    return math.prod(known) if len(known) == len(dims) else None


def _or(default: int, dim: Dim) -> int:
    """*dim* where it is known."""
    return dim if isinstance(dim, int) else default


def _is_known(size: tuple[Dim, Dim]) -> bool:
    return all(isinstance(n, int) for n in size)


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


def _open_window(row: Array, begin: int, end: int) -> tuple[Array, tuple[int, int]]:
    """The same where the input's size is not known.

    With pads of *begin* and *end* a window of the whole row stands on as many tiles as any size
    takes; what its ends have zeros is taken from both.
    """
    used = np.flatnonzero(row)
    first = min(int(used[0]), begin)
    last = min(len(row) - 1 - int(used[-1]), end)
    return row[first : len(row) - last], (begin - first, end - last)
