"""Lower ConvTranspose to a convolution of its input and a rearrangement of pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import ClassVar

import numpy as np

from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor, ValuesView
from pwopt.numerics.sub_pixel import PhasePlan, phase_weight, stacked_weight, transposed_phases
from pwopt.passes._emitter import Attributes, Emitter
from pwopt.passes._interleave import Arrangement, activation_behind, arrangements, interleave
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerConvTranspose", "LowerConvTransposeMatch"]

_CONV = Variant("conv")
_PER_PHASE = "per-phase-"

_MOST_PHASES = 16
"""With more phases than this, one Conv per phase is no longer offered."""


@dataclass(frozen=True, eq=False)
class LowerConvTransposeMatch(Match):
    """A ConvTranspose, its phases per axis, and the activation that is its only reader."""

    conv: ConvFacts
    weight: ValuesView
    bias: ValuesView | None
    plans: tuple[PhasePlan, ...]
    activation: Node | None
    ways: tuple[Variant, ...]


@dataclass(frozen=True)
class LowerConvTranspose(Pass[LowerConvTransposeMatch]):
    """Lower a ConvTranspose to a Conv per phase of its output, and put the phases into place.

    Rewrites:
        ``ConvTranspose`` with strides (sh, sw) into a ``Conv`` with sh sw Cout output channels,
        whose pixels a rearrangement then moves side by side; pointwise where the kernel is no
        larger than the stride. In the variants ``per-phase-...`` there is one ``Conv`` for each
        phase, whose kernel has the taps of that phase only, and a ``Concat``. The rearrangement is
        ``DepthToSpace`` (*depth-to-space*), or Reshapes and two ``Transpose`` (*transpose*:
        columns, then rows), or Transposes to channels-last and back that move whole pixels
        (*channels-last*). ``Slice`` where the last block of pixels is cut. With strides of 1 just
        a ``Conv`` (*conv*). An activation that is the only reader moves to the Conv.

    Algebra:
        Tap k takes input i to output ``s i + d k - p``: the outputs ``s q + r`` get their taps
        from the ``k`` with ``d k = r + p (mod s)``, always from the same neighbours of input q,
        which is a convolution (Shi et al. 2016, "Is the deconvolution layer the same as a
        convolutional layer?"). Pads shift the phases, so they cost nothing.

    Declines when:
        there are not two spatial axes; weight or bias are not constant; the type is no float; the
        output's size is given by ``output_shape`` or ``auto_pad`` such that ONNX and ONNX Runtime
        differ about the pads, or by an unknown input's size; the output padding is not below the
        stride; the width is not known while the strides differ; there are groups (which need a
        Conv per phase) and more than 16 phases.

    Exactness:
        ROUNDING: the same products, summed in another order.

    When it pays:
        ONNX Runtime's CPU provider multiplies matrices in the plain layout, then scatters columns
        with additions and adds the bias in another sweep; a Conv stays in the blocked layout.
        *channels-last* goes from the layout and back to it at no further cost, if a Conv comes
        next: 1.2 to 1.4 times on a 2x2 ConvTranspose between convolutions. Behind a Concat,
        *transpose* gains up to 1.1. DepthToSpace moves element by element: it is for images of
        unknown width, and for GPUs.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NOT_TWO_DIMENSIONAL = "not-two-dimensional"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        BIAS_NOT_CONSTANT = "bias-not-constant"
        ELEMENT_TYPE = "element-type"
        PADS_AMBIGUOUS = "pads-ambiguous"
        SIZE_UNKNOWN = "size-unknown"
        OUTPUT_PADDING = "output-padding"
        TOO_MANY_PHASES = "too-many-phases"

    name: ClassVar[str] = "lower-conv-transpose"
    roots: ClassVar[tuple[str, ...]] = ("ConvTranspose",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> LowerConvTransposeMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.spatial_rank != 2:
            return Decline(self.Why.NOT_TWO_DIMENSIONAL, {"axes": conv.spatial_rank})
        weight, bias = facts.constant(conv.weight), facts.constant(conv.bias)
        if weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if conv.bias is not None and bias is None:
            return Decline(self.Why.BIAS_NOT_CONSTANT)
        if not facts.is_float(conv.weight):
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(facts.dtype(conv.weight))})
        geometry = self._geometry(conv, facts)
        if isinstance(geometry, Decline):
            return geometry
        plans = tuple(geometry)
        ways = self._ways(conv, plans, facts)
        if isinstance(ways, Decline):
            return ways
        activation = activation_behind(conv.output, facts)
        return LowerConvTransposeMatch(
            node,
            (node,) if activation is None else (node, activation),
            conv,
            weight,
            bias,
            plans,
            activation,
            ways,
            facts={"kernel": list(conv.kernel), "strides": list(conv.strides)},
        )

    def _geometry(self, conv: ConvFacts, facts: Facts) -> list[PhasePlan] | Decline:
        """The phases along every axis."""
        shape = facts.shape(conv.input)
        sizes = shape[2:] if shape is not None and len(shape) == 4 else (None, None)
        given = facts.attr_ints(conv.node, "output_shape", ())
        extra = facts.attr_ints(conv.node, "output_padding", (0, 0))
        plans = []
        for axis, (size, wanted) in enumerate(zip(sizes, given[-2:] or (None, None), strict=True)):
            stride = conv.strides[axis]
            reach = (conv.kernel[axis] - 1) * conv.dilations[axis] + 1
            cut = self._cut(conv, axis, reach + extra[axis] - stride, size, wanted, facts)
            if isinstance(cut, Decline):
                return cut
            begin, end, excess = cut
            # By how much the output goes on behind what the last input reaches.
            beyond = excess + begin + end - (reach - stride)
            if not 0 <= beyond < stride:
                return Decline(self.Why.OUTPUT_PADDING, {"output_padding": beyond})
            plans.append(
                transposed_phases(
                    conv.kernel[axis],
                    stride=stride,
                    dilation=conv.dilations[axis],
                    begin=begin,
                    excess=excess,
                )
            )
        return plans

    def _cut(
        self, conv: ConvFacts, axis: int, full: int, size: Dim, wanted: int | None, facts: Facts
    ) -> tuple[int, int, int] | Decline:
        """Pads along *axis*, and the output size less stride times input size.

        Args:
            conv: the ConvTranspose.
            axis: of space.
            full: the difference without pads.
            size: of the input.
            wanted: of the output, if it is given.
            facts: about the model.
        """
        auto_pad = facts.attr_str(conv.node, "auto_pad", "NOTSET")
        if wanted is not None:
            if not isinstance(size, int):
                return Decline(self.Why.SIZE_UNKNOWN)
            excess = wanted - conv.strides[axis] * size
        elif auto_pad in ("NOTSET", "VALID"):
            assert conv.pads is not None
            begin, end = conv.pads[axis], conv.pads[axis + 2]
            return begin, end, full - begin - end
        else:
            excess = 0
        # An output larger than the kernel reaches has no pads.
        total = max(full - excess, 0)
        # Which end gets the larger half is what ONNX and ONNX Runtime do not agree about.
        if total % 2:
            return Decline(self.Why.PADS_AMBIGUOUS, {"auto_pad": auto_pad, "total": total})
        return total // 2, total // 2, excess

    def _ways(
        self, conv: ConvFacts, plans: tuple[PhasePlan, ...], facts: Facts
    ) -> tuple[Variant, ...] | Decline:
        if conv.is_unit_stride:
            return (_CONV,)
        phases = math.prod(conv.strides)
        if conv.group > 1 and phases > _MOST_PHASES:
            return Decline(self.Why.TOO_MANY_PHASES, {"phases": phases})
        shape = facts.shape(conv.input)
        forms = arrangements(conv.strides, shape[3] if shape is not None else None)
        if not forms:
            return Decline(self.Why.SIZE_UNKNOWN)
        whole = [Variant(form.value) for form in forms] if conv.group == 1 else []
        same = all(phase.window == plan.window for plan in plans for phase in plan.phases)
        if (same and conv.group == 1) or phases > _MOST_PHASES:
            return tuple(whole)
        parts = [Variant(f"{_PER_PHASE}{form.value}") for form in forms]
        return (*whole, *parts)

    def variants(self, match: LowerConvTransposeMatch) -> tuple[Variant, ...]:
        """One Conv before one per phase; the cheaper rearrangements first."""
        return match.ways

    def rewrite(self, match: LowerConvTransposeMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        conv, activation = match.conv, match.activation
        result = conv.output if activation is None else activation.outputs[0]
        rewriter.remove(conv.node)
        if activation is not None:
            rewriter.remove(activation)
        emitter = Emitter(rewriter, conv.node, conv.weight, conv.output.name)
        per_phase = variant.name.startswith(_PER_PHASE) or (variant == _CONV and conv.group > 1)
        y = _per_phase(match, emitter) if per_phase else _stacked(match, emitter)
        if activation is not None:
            y = emitter.again(activation, y)
        if variant != _CONV:
            arrangement = Arrangement(variant.name.removeprefix(_PER_PHASE))
            surplus = [plan.surplus for plan in match.plans]
            interleave(emitter, y, conv.strides, arrangement, surplus)
        emitter.finish(result)


def _stacked(match: LowerConvTransposeMatch, emitter: Emitter) -> Tensor:
    """All phases by one Conv."""
    windows = [plan.pads(plan.window) for plan in match.plans]
    weight = stacked_weight(match.weight, match.plans, [w for _, _, w in windows])
    phases = math.prod(match.conv.strides)
    bias = None if match.bias is None else np.tile(match.bias, phases)
    return _conv(match, emitter, weight, bias, [w[:2] for w in windows])


def _per_phase(match: LowerConvTransposeMatch, emitter: Emitter) -> Tensor:
    """A Conv for each phase, concatenated."""
    outputs = []
    for phases in product(*(plan.phases for plan in match.plans)):
        windows = [plan.pads(phase.window) for plan, phase in zip(match.plans, phases, strict=True)]
        weight = phase_weight(match.weight, phases, [w for _, _, w in windows], match.conv.group)
        bias = None if match.bias is None else np.array(match.bias)
        outputs.append(_conv(match, emitter, weight, bias, [w[:2] for w in windows]))
    if len(outputs) == 1:
        return outputs[0]
    batch, channels, *space = outputs[0].shape
    shape = (batch, channels * len(outputs), *space)
    return emitter.emit("Concat", outputs, shape, {"axis": 1})


def _conv(
    match: LowerConvTransposeMatch,
    emitter: Emitter,
    weight: ValuesView,
    bias: ValuesView | None,
    pads: list[tuple[int, int]],
) -> Tensor:
    source = emitter.facts.shape(match.conv.input) or (None,) * 4
    size = [
        d + plan.blocks if isinstance(d, int) else d if plan.blocks == 0 else None
        for d, plan in zip(source[2:], match.plans, strict=True)
    ]
    name = match.conv.output.name
    operands = [match.conv.input, emitter.rewriter.constant(f"{name}/weight", weight)]
    if bias is not None:
        operands.append(emitter.rewriter.constant(f"{name}/bias", bias))
    attributes: Attributes = {
        "group": match.conv.group,
        "kernel_shape": list(weight.shape[2:]),
        "pads": [begin for begin, _ in pads] + [end for _, end in pads],
    }
    return emitter.emit("Conv", operands, (source[0], len(weight), *size), attributes)
