"""Fold the gate of a squeeze-excite block into the weights of the convolution behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor, ValuesView
from pwopt.passes._emitter import Emitter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["FoldGate", "FoldGateMatch"]

_CONV = Variant("conv")
_MATMUL = Variant("matmul")


@dataclass(frozen=True, eq=False)
class FoldGateMatch(Match):
    """A gated feature map that one Conv reads.

    Attributes:
        features: what the gate multiplies, ``[N, C, *spatial]``.
        gate: ``[N, C, 1...]`` or ``[1, C, 1...]``.
        forms: the variants that apply here.
    """

    conv: ConvFacts
    weight: ValuesView
    features: Tensor
    gate: Tensor
    forms: tuple[Variant, ...]


@dataclass(frozen=True)
class FoldGate(Pass[FoldGateMatch]):
    """Fold a gate per channel into the weights of the Conv that reads the gated features.

    Rewrites:
        ``Conv(Mul(x, g), W, b)`` with x ``[N, C, *spatial]`` and a computed g ``[N, C, 1...]``,
        as squeeze-and-excitation blocks have it, into a Conv of x with the computed weights
        ``W g`` (*conv*, one gate for the whole batch), or for 1x1 kernels into a batched
        ``MatMul`` of them with x (*matmul*, any batch).

    Algebra:
        A product per input channel is a product per column of the weights:
        ``sum_c W[o,c,k] (g[n,c] x[n,c,p+k]) = sum_c (W[o,c,k] g[n,c]) x[n,c,p+k]``; padding is
        zero before and after (squeeze-and-excitation: Hu et al. 2018). The weights are
        multiplied once per image instead of every pixel.

    Declines when:
        the input of the Conv is no product with a gate; the gate is constant (fold-affine takes
        it); the product is read elsewhere too; the weight is not constant; the Conv is grouped;
        the gates differ within the batch, or may, and the Conv is more than a plain 1x1 one of
        known size, whose MatMul could take them.

    Exactness:
        ROUNDING: the same factors, multiplied in another order.

    When it pays:
        Not on CPUs: ONNX Runtime brings a convolution into its blocked layout only where the
        weights are constant. 0.96 (*conv*) and 0.96 times (*matmul*) on EfficientNet-B0, 0.98 and
        0.97 on MobileNetV3-Large, where lower-gate gains 2%. It saves writing and reading the
        gated features, which may pay on providers that are bound by memory, so it is there, but
        off by default.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NO_GATE = "no-gate"
        CONSTANT_GATE = "constant-gate"
        PRODUCT_SHARED = "product-shared"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        GROUPED = "grouped"
        GATE_PER_IMAGE = "gate-per-image"

    name: ClassVar[str] = "fold-gate"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    by_default: ClassVar[bool] = False

    def match(self, node: Node, facts: Facts) -> FoldGateMatch | Decline:
        """See the class."""
        product = facts.producer(node.inputs[0])
        if product is None or not facts.is_op(product, "Mul") or not facts.has_op("Mul", since=7):
            return Decline(self.Why.NO_GATE)
        index = _gate_index(product, facts)
        if index is None:
            return Decline(self.Why.NO_GATE)
        gate, features = product.inputs[index], product.inputs[1 - index]
        if facts.is_constant(gate):
            return Decline(self.Why.CONSTANT_GATE)
        if not facts.is_private(product.outputs[0]):
            return Decline(self.Why.PRODUCT_SHARED)
        conv = facts.conv(node)
        weight = None if conv is None else facts.constant(conv.weight)
        if conv is None or weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.group != 1:
            return Decline(self.Why.GROUPED, {"group": conv.group})
        forms = _forms(conv, gate, facts)
        if not forms:
            batch = (facts.shape(gate) or (None,))[0]
            return Decline(self.Why.GATE_PER_IMAGE, {"batch": batch, "kernel": conv.kernel})
        return FoldGateMatch(
            node,
            (product, node),
            conv,
            weight,
            features,
            gate,
            forms,
            facts={"cin": conv.cin, "cout": conv.cout, "kernel": conv.kernel},
        )

    def variants(self, match: FoldGateMatch) -> tuple[Variant, ...]:
        """The Conv, which keeps any kernel and may be fused with what follows, comes first."""
        return match.forms

    def rewrite(self, match: FoldGateMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        conv, (product, node) = match.conv, match.nodes
        name = conv.output.name
        rewriter.remove(product)
        if variant == _CONV:
            emitter = Emitter(rewriter, node, conv.weight, name)
            gated = emitter.emit("Mul", [conv.weight, match.gate], match.weight.shape)
            rewriter.set_inputs(node, [match.features, gated, *node.inputs[2:]])
            return
        rewriter.remove(node)
        emitter = Emitter(rewriter, node, conv.output, name)
        shape = emitter.facts.shape(match.features) or ()
        gates = (emitter.facts.shape(match.gate) or (None,))[0]
        batch, spatial = shape[0], shape[2:]
        weight = match.weight.reshape(conv.cout, conv.cin)
        matrix = rewriter.constant(f"{name}/matrix", weight.copy())
        row = emitter.reshape(match.gate, (0, 1, conv.cin), (gates, 1, conv.cin))
        gated = emitter.emit("Mul", [matrix, row], (gates, conv.cout, conv.cin))
        pixels = _count(spatial)
        x = emitter.reshape(match.features, (0, conv.cin, -1), (batch, conv.cin, pixels))
        y = emitter.emit("MatMul", [gated, x], (batch, conv.cout, pixels))
        if conv.bias is not None:
            bias = _as_column(conv.bias, emitter)
            y = emitter.emit("Add", [y, bias], (batch, conv.cout, pixels))
        dims = [d if isinstance(d, int) else -1 for d in spatial]
        emitter.reshape(y, (0, conv.cout, *dims), (batch, conv.cout, *spatial))
        emitter.finish(conv.output)


def _gate_index(product: Node, facts: Facts) -> int | None:
    """Which operand of *product* is a gate of the other."""
    shapes = [facts.shape(t) for t in product.inputs]
    first, second = shapes
    if first is None or second is None or len(first) != len(second) or len(first) < 3:
        return None
    if first[1] is None or first[1] != second[1]:
        return None
    gates = [i for i, s in enumerate((first, second)) if all(d == 1 for d in s[2:])]
    if len(gates) != 1:
        return None
    (index,) = gates
    gate, features = (first, second)[index], (first, second)[1 - index]
    is_batched = gate[0] == 1 or (gate[0] is not None and gate[0] == features[0])
    return index if is_batched else None


def _forms(conv: ConvFacts, gate: Tensor, facts: Facts) -> tuple[Variant, ...]:
    forms = []
    if (facts.shape(gate) or (None,))[0] == 1:
        forms.append(_CONV)
    is_plain = conv.is_pointwise and conv.is_unit_stride and conv.is_unpadded
    spatial = (facts.shape(conv.input) or ())[2:]
    sizes = [d for d in spatial if isinstance(d, int)]
    is_sized = len(sizes) >= len(spatial) - 1 and 0 not in sizes
    if is_plain and is_sized and facts.is_float(conv.weight):
        forms.append(_MATMUL)
    return tuple(forms)


def _count(spatial: tuple[Dim, ...]) -> Dim:
    sizes = [d for d in spatial if isinstance(d, int)]
    return math.prod(sizes) if len(sizes) == len(spatial) else None


def _as_column(bias: Tensor, emitter: Emitter) -> Tensor:
    values = emitter.facts.constant(bias)
    if values is None:
        count = (emitter.facts.shape(bias) or (None,))[0]
        return emitter.reshape(bias, (-1, 1), (count, 1))
    return emitter.rewriter.constant(f"{bias.name}/column", values.reshape(-1, 1).copy())
