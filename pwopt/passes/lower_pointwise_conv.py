"""Lower pointwise convolutions to matrix products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypeVar

import numpy as np

from pwopt.errors import UsageError
from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Shape, Tensor
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["Form", "Layout", "LowerPointwiseConv", "LowerPointwiseConvMatch", "MatrixOp"]


class Layout(StrEnum):
    """Where the channels stand during the product: last, or where Conv has them."""

    NHWC = "nhwc"
    NCHW = "nchw"
    ANY = "any"


class MatrixOp(StrEnum):
    """The operator that multiplies."""

    MATMUL = "matmul"
    GEMM = "gemm"
    ANY = "any"


class Form(StrEnum):
    """A layout and an operator; the names of the variants, preferred ones first."""

    NCHW_GEMM = "nchw-gemm"
    NCHW_MATMUL = "nchw-matmul"
    NHWC_GEMM = "nhwc-gemm"
    NHWC_MATMUL = "nhwc-matmul"

    @property
    def layout(self) -> str:
        """The part before the hyphen."""
        return self.value.split("-")[0]

    @property
    def op(self) -> str:
        """The part behind the hyphen."""
        return self.value.split("-")[1]


E = TypeVar("E", bound=StrEnum)

_FUSABLE_ACTIVATIONS = (
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


@dataclass(frozen=True, eq=False)
class LowerPointwiseConvMatch(Match):
    """A pointwise convolution, the activation that is its only reader, and the legal forms."""

    conv: ConvFacts
    activation: Node | None
    forms: tuple[Form, ...]


@dataclass(frozen=True)
class LowerPointwiseConv(Pass[LowerPointwiseConvMatch]):
    """Lower a Conv with a 1x1 kernel to MatMul or Gemm, with or without Transposes.

    Rewrites:
        ``Conv`` with kernel 1 along each of its 1, 2 or 3 spatial axes, into one of four forms,
        here for two spatial axes and one group. *nhwc-matmul*: ``Transpose(0,2,3,1) -> MatMul ->
        Add -> Transpose(0,3,1,2)``. *nhwc-gemm*: ``Transpose -> Reshape[-1,Cin] -> Gemm ->
        Reshape[N,H,W,Cout] -> Transpose``. *nchw-matmul*: ``Reshape[0,Cin,-1] -> MatMul with W on
        the left -> Add -> Reshape[0,Cout,H,W]``. *nchw-gemm*: the same with Gemm, ``[Cout,Cin] x
        [Cin,H*W]``, for batch 1. Pads become ``Pad``; strides become ``Slice`` (before opset 10,
        where Slice has no steps, an ``AveragePool`` over single elements); groups become a batch
        axis of MatMul. Dynamic dimensions are carried by 0 and -1 in Reshape, and by ``Shape``
        where several are dynamic at once. An activation that is the only reader moves between
        the product and the operators that restore the shape, so that the runtime fuses it into
        Gemm. The options ``layout`` and ``op`` restrict the forms.

    Algebra:
        A 1x1 convolution is one matrix over channels, applied alike at every pixel p (Lin, Chen
        and Yan 2013, "Network in Network"): ``Y[n,:,p] = W X[n,:,p] + b``, with a block-diagonal W
        for groups. Hence ``Y = W X`` with pixels as columns (NCHW), or ``Y^T = X^T W^T`` with
        pixels as rows (NHWC). A stride drops columns, padding adds zero columns, and an
        elementwise function commutes with any reordering of elements.

    Declines when:
        the kernel is larger than 1; ``auto_pad`` pads by what depends on an unknown size, or by
        what runtimes disagree on (a stride that passes over the end); weight or bias are computed
        or may be overridden; the type is not float16, float32 or float64; a channel or spatial
        dimension is zero; the opset is older than 7 (no broadcasting); the options leave Gemm only
        and the Conv has groups, or NCHW with Gemm only and the batch is not known to be 1.

    Exactness:
        ROUNDING. The products are the same; their sums may be taken in another order, and in
        float16 the bias is added after rounding.

    When it pays:
        Seldom on x86, where ONNX Runtime keeps convolutions in a channel-blocked layout: a
        network lowered throughout ran at 0.66 to 1.0 of the original speed. It can pay where
        that layout is not used, and for chains of pointwise operators between Transposes.
    """

    layout: Layout | str = Layout.ANY
    op: MatrixOp | str = MatrixOp.ANY

    class Why(StrEnum):
        """Reasons to decline."""

        NOT_POINTWISE = "not-pointwise"
        UNKNOWN_PADS = "unknown-pads"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        BIAS_NOT_CONSTANT = "bias-not-constant"
        UNSUPPORTED_DTYPE = "unsupported-dtype"
        EMPTY_DIMENSION = "empty-dimension"
        OPSET_TOO_OLD = "opset-too-old"
        GROUPS_NEED_MATMUL = "groups-need-matmul"
        NCHW_GEMM_NEEDS_BATCH_ONE = "nchw-gemm-needs-batch-one"

    name: ClassVar[str] = "lower-pointwise-conv"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def __post_init__(self) -> None:
        """Accept the options' values as plain strings.

        Raises:
            UsageError: an option has no such value.
        """
        object.__setattr__(self, "layout", _member(Layout, "layout", self.layout))
        object.__setattr__(self, "op", _member(MatrixOp, "op", self.op))

    def match(self, node: Node, facts: Facts) -> LowerPointwiseConvMatch | Decline:
        """See the class."""
        conv = self._read(node, facts)
        if isinstance(conv, Decline):
            return conv
        forms = self._forms(conv, _batch(conv, facts), _output_spatial(conv, facts))
        if isinstance(forms, Decline):
            return forms
        activation = facts.sole_consumer(conv.output)
        if not facts.is_op(activation, *_FUSABLE_ACTIVATIONS):
            activation = None
        return LowerPointwiseConvMatch(
            node,
            (node,) if activation is None else (node, activation),
            conv,
            activation,
            forms,
            facts={
                "cin": conv.cin,
                "cout": conv.cout,
                "group": conv.group,
                "strides": conv.strides,
            },
        )

    def variants(self, match: LowerPointwiseConvMatch) -> tuple[Variant, ...]:
        """The legal forms, those that need no arithmetic on shapes at run time first."""
        return tuple(Variant(form.value) for form in match.forms)

    def rewrite(self, match: LowerPointwiseConvMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        _Lowering(match, rewriter).write(Form(variant.name))

    def _read(self, node: Node, facts: Facts) -> ConvFacts | Decline:
        """The facts of a convolution that has a legal form."""
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if not conv.is_pointwise:
            return Decline(self.Why.NOT_POINTWISE, {"kernel": conv.kernel})
        if conv.pads is None:
            return Decline(self.Why.UNKNOWN_PADS, {"strides": conv.strides})
        if not facts.is_constant(conv.weight):
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.bias is not None and not facts.is_constant(conv.bias):
            return Decline(self.Why.BIAS_NOT_CONSTANT)
        if not facts.is_float(conv.weight):
            return Decline(self.Why.UNSUPPORTED_DTYPE, {"dtype": str(facts.dtype(conv.weight))})
        if 0 in (conv.cin, conv.cout, *_output_spatial(conv, facts)):
            return Decline(self.Why.EMPTY_DIMENSION)
        if not facts.has_op("Add", since=7):
            return Decline(self.Why.OPSET_TOO_OLD, {"opset": facts.opset, "needed": 7})
        return conv

    def _forms(
        self, conv: ConvFacts, batch: Dim, spatial: tuple[Dim, ...]
    ) -> tuple[Form, ...] | Decline:
        wanted = [
            form
            for form in Form
            if self.layout in (form.layout, Layout.ANY) and self.op in (form.op, MatrixOp.ANY)
        ]
        if conv.group > 1:
            wanted = [form for form in wanted if form.op == MatrixOp.MATMUL]
            if not wanted:
                legal_forms = (Form.NCHW_MATMUL.value, Form.NHWC_MATMUL.value)
                return Decline(
                    self.Why.GROUPS_NEED_MATMUL, {"group": conv.group, "forms": legal_forms}
                )
        legal = [form for form in wanted if form is not Form.NCHW_GEMM or batch == 1]
        if not legal:
            return Decline(self.Why.NCHW_GEMM_NEEDS_BATCH_ONE, {"batch": batch})

        def needs_shape(form: Form) -> bool:
            keeps_rank = form is Form.NHWC_MATMUL and conv.group == 1
            dims = (batch, *spatial) if form is Form.NHWC_GEMM else spatial
            return not keeps_rank and len(_dynamic(dims)) > 1

        return tuple(sorted(legal, key=needs_shape))


class _Lowering:
    """Writes one lowered convolution; ``last`` is the node that holds the result so far."""

    def __init__(self, match: LowerPointwiseConvMatch, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.facts = Facts(rewriter.model)
        self.conv = match.conv
        self.activation = match.activation
        self.last = match.conv.node
        self.name = match.conv.node.name or match.conv.output.name
        self.batch = _batch(match.conv, self.facts)
        self.spatial = _output_spatial(match.conv, self.facts)

    def write(self, form: Form) -> None:
        conv = self.conv
        result = conv.output if self.activation is None else self.activation.outputs[0]
        self.rewriter.remove(conv.node)
        x = self.subsampled(self.padded(conv.input))
        if conv.group > 1:
            self.grouped(x, channels_last=form is Form.NHWC_MATMUL)
        elif form is Form.NHWC_MATMUL:
            self.nhwc_matmul(x)
        elif form is Form.NHWC_GEMM:
            self.nhwc_gemm(x)
        elif form is Form.NCHW_MATMUL:
            self.nchw_matmul(x)
        else:
            self.nchw_gemm(x)
        self.rewriter.set_output(self.last, 0, result)

    # -- the four forms, and groups ------------------------------------------------------------

    def nhwc_matmul(self, x: Tensor) -> None:
        lead = (self.batch, *self.spatial)
        rows = self.channels_last(x, self.conv.cin)
        weight = self.constant(self.conv.weight, self.matrix().T)
        y = self.emit("MatMul", [rows, weight], (*lead, self.conv.cout))
        y = self.biased(y, (self.conv.cout,))
        y = self.activated(y)
        self.channels_first(y)

    def nhwc_gemm(self, x: Tensor) -> None:
        cin, cout = self.conv.cin, self.conv.cout
        lead = (self.batch, *self.spatial)
        pixels = self.channels_last(x, cin)
        rows = self.reshape(pixels, self.constant_shape(-1, cin), (_product(lead), cin))
        y = self.gemm(rows, self.constant(self.conv.weight, self.matrix().T), (-1,))
        y = self.activated(y)
        unknown = _dynamic(lead)
        if len(unknown) > 1:
            leading = self.slice_of_shape(pixels, 0, len(lead))
            shape = self.concat_shape([leading, self.constant_shape(cout)])
        else:
            # With everything known the batch is left open: one fixed size less in the model.
            free = unknown[0] if unknown else 0
            dims = [-1 if i == free else int(d or 0) for i, d in enumerate(lead)]
            shape = self.constant_shape(*dims, cout)
        self.channels_first(self.reshape(y, shape, (*lead, cout)))

    def nchw_matmul(self, x: Tensor) -> None:
        conv = self.conv
        columns = _product(self.spatial)
        flat = x
        if conv.spatial_rank > 1:
            shape = self.constant_shape(0, conv.cin, _known(columns))
            flat = self.reshape(x, shape, (self.batch, conv.cin, columns))
        weight = self.constant(conv.weight, self.matrix())
        y = self.emit("MatMul", [weight, flat], (self.batch, conv.cout, columns))
        y = self.biased(y, (conv.cout, 1))
        y = self.activated(y)
        if conv.spatial_rank > 1:
            self.restore(y, x, batch=0)

    def nchw_gemm(self, x: Tensor) -> None:
        conv = self.conv
        columns = _product(self.spatial)
        shape = self.constant_shape(conv.cin, _known(columns))
        flat = self.reshape(x, shape, (conv.cin, columns))
        y = self.gemm(flat, self.constant(conv.weight, self.matrix()), (-1, 1), weight_first=True)
        self.restore(self.activated(y), x, batch=1)

    def grouped(self, x: Tensor, *, channels_last: bool) -> None:
        """MatMul with the group as a batch axis, with pixels as columns or as rows."""
        conv = self.conv
        group, inner, outer = conv.group, conv.cin // conv.group, conv.cout // conv.group
        columns = _product(self.spatial)
        lead = (self.batch, group)
        shape = self.constant_shape(0, group, inner, _known(columns))
        y = self.reshape(x, shape, (*lead, inner, columns))
        matrix = self.matrix().reshape(group, outer, inner)
        if channels_last:
            y = self.emit("Transpose", [y], (*lead, columns, inner), {"perm": [0, 1, 3, 2]})
            weight = self.constant(conv.weight, matrix.transpose(0, 2, 1))
            y = self.emit("MatMul", [y, weight], (*lead, columns, outer))
            y = self.activated(self.biased(y, (group, 1, outer)))
            y = self.emit("Transpose", [y], (*lead, outer, columns), {"perm": [0, 1, 3, 2]})
        else:
            weight = self.constant(conv.weight, matrix)
            y = self.emit("MatMul", [weight, y], (*lead, outer, columns))
            y = self.activated(self.biased(y, (group, outer, 1)))
        self.restore(y, x, batch=0)

    # -- what they are made of -----------------------------------------------------------------

    def padded(self, x: Tensor) -> Tensor:
        pads = self.conv.pads or ()
        if not any(pads):
            return x
        rank = self.conv.spatial_rank
        shape = self.facts.shape(x) or (None,) * (rank + 2)
        sizes = [
            d + pads[i] + pads[i + rank] if isinstance(d, int) else None
            for i, d in enumerate(shape[2:])
        ]
        amounts = [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
        padded = (shape[0], self.conv.cin, *sizes)
        if self.facts.has_op("Pad", since=11):
            return self.emit("Pad", [x, self.constant_shape(*amounts, hint="pads")], padded)
        return self.emit("Pad", [x], padded, {"pads": amounts})

    def subsampled(self, x: Tensor) -> Tensor:
        strides = self.conv.strides
        axes = [i + 2 for i, s in enumerate(strides) if s > 1]
        if not axes:
            return x
        shape = (self.batch, self.conv.cin, *self.spatial)
        if not self.facts.has_op("Slice", since=10):
            attributes = {"kernel_shape": [1] * len(strides), "strides": list(strides)}
            return self.emit("AveragePool", [x], shape, attributes)
        bounds = (
            self.constant_shape(*(0 for _ in axes), hint="starts"),
            self.constant_shape(*(np.iinfo(np.int64).max for _ in axes), hint="ends"),
            self.constant_shape(*axes, hint="axes"),
            self.constant_shape(*(strides[axis - 2] for axis in axes), hint="steps"),
        )
        return self.emit("Slice", [x, *bounds], shape)

    def channels_last(self, x: Tensor, channels: int) -> Tensor:
        rank = self.conv.spatial_rank + 2
        perm = [0, *range(2, rank), 1]
        return self.emit("Transpose", [x], (self.batch, *self.spatial, channels), {"perm": perm})

    def channels_first(self, y: Tensor) -> None:
        rank = self.conv.spatial_rank + 2
        perm = [0, rank - 1, *range(1, rank - 1)]
        shape = (self.batch, self.conv.cout, *self.spatial)
        self.emit("Transpose", [y], shape, {"perm": perm})

    def restore(self, y: Tensor, x: Tensor, batch: int) -> None:
        """Reshape to ``[N, Cout, *spatial]``; *x* has the same batch and spatial sizes."""
        cout = self.conv.cout
        unknown = _dynamic(self.spatial)
        if len(unknown) > 1:
            sizes = self.slice_of_shape(x, 2, 2 + len(self.spatial))
            shape = self.concat_shape([self.constant_shape(batch, cout), sizes])
        else:
            dims = [_known(d if isinstance(d, int) else None) for d in self.spatial]
            shape = self.constant_shape(batch, cout, *dims)
        self.reshape(y, shape, (self.batch, cout, *self.spatial))

    def gemm(
        self, x: Tensor, weight: Tensor, bias_shape: Sequence[int], *, weight_first: bool = False
    ) -> Tensor:
        conv = self.conv
        operands = [weight, x] if weight_first else [x, weight]
        values = self.facts.constant(conv.bias)
        if values is not None:
            operands.append(self.constant(conv.bias, values.reshape(bias_shape)))
        elif not self.facts.has_op("Gemm", since=11):
            # The third operand is optional from opset 11 on.
            operands.append(self.constant(None, np.zeros(1, self.facts.dtype(conv.weight))))
        pixels = (self.facts.shape(x) or (None, None))[1 if weight_first else 0]
        shape = (conv.cout, pixels) if weight_first else (pixels, conv.cout)
        return self.emit("Gemm", operands, shape)

    def biased(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        values = self.facts.constant(self.conv.bias)
        if values is None:
            return y
        bias = self.constant(self.conv.bias, values.reshape(shape))
        return self.emit("Add", [y, bias], self.facts.shape(y))

    def activated(self, y: Tensor) -> Tensor:
        activation = self.activation
        if activation is None:
            return y
        out = self.rewriter.variable(f"{self.name}/{activation.op}_output", like=y)
        self.rewriter.set_input(activation, 0, y)
        self.rewriter.set_output(activation, 0, out)
        self.last = activation
        return out

    def matrix(self) -> np.ndarray[tuple[int, int], np.dtype[np.generic]]:
        """The weight as ``[Cout, Cin/group]``; not to be written to."""
        values = self.facts.constant(self.conv.weight)
        assert values is not None
        return values.reshape(self.conv.cout, -1)

    def reshape(self, x: Tensor, shape: Tensor, known: Shape) -> Tensor:
        return self.emit("Reshape", [x, shape], known)

    def slice_of_shape(self, x: Tensor, start: int, end: int) -> Tensor:
        rank = self.conv.spatial_rank + 2
        axes = self.constant_shape(0, hint="axes")
        sizes = self.emit("Shape", [x], (rank,), like=axes)
        if not self.facts.has_op("Slice", since=10):
            attributes = {"starts": [start], "ends": [end], "axes": [0]}
            return self.emit("Slice", [sizes], (end - start,), attributes, like=axes)
        bounds = [
            self.constant_shape(start, hint="starts"),
            self.constant_shape(end, hint="ends"),
            axes,
        ]
        return self.emit("Slice", [sizes, *bounds], (end - start,), like=axes)

    def concat_shape(self, parts: Sequence[Tensor]) -> Tensor:
        rank = self.conv.spatial_rank + 2
        return self.emit("Concat", parts, (rank,), {"axis": 0}, like=parts[0])

    def constant_shape(self, *dims: int, hint: str = "shape") -> Tensor:
        return self.rewriter.constant(f"{self.name}/{hint}", np.array(dims, np.int64))

    def constant(
        self, origin: Tensor | None, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    ) -> Tensor:
        hint = f"{self.name}/zero" if origin is None else f"{origin.name}/matrix"
        return self.rewriter.constant(hint, np.array(values, order="C"))

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor],
        shape: Shape | None,
        attributes: Mapping[str, int | Sequence[int]] | None = None,
        *,
        like: Tensor | None = None,
    ) -> Tensor:
        out = self.rewriter.variable(f"{self.name}/{op}_output", like or self.conv.weight, shape)
        self.last = self.rewriter.add(op, inputs, [out], attributes, near=self.conv.node)
        return out


def _member(kind: type[E], key: str, value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise UsageError(
            f"lower-pointwise-conv:{key} takes one of {allowed}, not '{value}'"
        ) from None


def _batch(conv: ConvFacts, facts: Facts) -> Dim:
    for tensor in (conv.input, conv.output):
        shape = facts.shape(tensor)
        if shape and shape[0] is not None:
            return shape[0]
    return None


def _output_spatial(conv: ConvFacts, facts: Facts) -> tuple[Dim, ...]:
    """The output's spatial sizes; a symbol is kept where the axis is neither cut nor padded."""
    rank = conv.spatial_rank
    unknown: Shape = (None,) * (rank + 2)
    before = (facts.shape(conv.input) or unknown)[2:]
    after = (facts.shape(conv.output) or unknown)[2:]
    pads = conv.pads or (0,) * (2 * rank)
    sizes: list[Dim] = []
    for i, (size, out) in enumerate(zip(before, after, strict=True)):
        padding, stride = pads[i] + pads[i + rank], conv.strides[i]
        if isinstance(size, int):
            sizes.append((size + padding - 1) // stride + 1)
        elif isinstance(out, int) or padding or stride > 1:
            sizes.append(out)
        else:
            sizes.append(size if size is not None else out)
    return tuple(sizes)


def _dynamic(dims: Sequence[Dim]) -> list[int]:
    """Indices of the dimensions without a known size."""
    return [i for i, d in enumerate(dims) if not isinstance(d, int)]


def _product(dims: Sequence[Dim]) -> Dim:
    """The number of elements; a lone dynamic dimension keeps its symbol."""
    if len(dims) == 1:
        return dims[0]
    sizes = [d for d in dims if isinstance(d, int)]
    return math.prod(sizes) if len(sizes) == len(dims) else None


def _known(dim: Dim) -> int:
    """For Reshape: the size, or -1 where it is to be inferred."""
    return dim if isinstance(dim, int) else -1
