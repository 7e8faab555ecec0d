"""Lower interpolation by a constant factor to convolutions on a padded image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from itertools import product
from typing import ClassVar

import numpy as np

from pwopt.graph import Dim, Facts, Node, Rewriter, Tensor
from pwopt.numerics.resampling import Float64, Resampling, resampling
from pwopt.passes._emitter import Attributes, Emitter
from pwopt.passes._interleave import Arrangement, arrangements, interleave
from pwopt.passes._scale_factors import scale_factors
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerResize", "LowerResizeMatch"]

_SEPARABLE = Variant("separable")
_DEPTHWISE = Variant("depthwise")
_DENSE = Variant("dense")

_LARGEST_TERM = 8
"""Of a factor as a fraction: more would need too many phases or strides."""

_MOST_PHASES = 16
_MOST_DENSE = 8
"""Channels up to which one Conv over all of them is offered, though most weights are zero."""

_COORDINATES = {
    "half_pixel": True,
    "pytorch_half_pixel": True,
    "half_pixel_symmetric": True,
    "asymmetric": False,
}
"""Whether pixels are squares, by the modes in which an output's place depends on its phase only."""


@dataclass(frozen=True, eq=False)
class LowerResizeMatch(Match):
    """A Resize of height and width by constant rational factors.

    Attributes:
        channels: of the image.
        size: of the result, where known.
        axes: how it is interpolated along height and width.
        ways: the variants that apply.
    """

    channels: int
    size: tuple[Dim, Dim]
    axes: tuple[Resampling, Resampling]
    ways: tuple[Variant, ...]


@dataclass(frozen=True)
class LowerResize(Pass[LowerResizeMatch]):
    """Lower a cubic Resize, or a linear one that shrinks, to convolutions on a padded image.

    Rewrites:
        ``Resize`` of height and width by constant factors ``u / v`` (terms up to 8) into ``Pad``
        with the edge, and ``Conv`` with stride v whose weights are those of the interpolation.
        Shrinking: depthwise (*depthwise*), or depthwise along one axis after the other
        (*separable*), or, for up to 8 channels, over all channels at once with zeros between them
        (*dense*). Enlarging: as many output channels as phases, by one such dense ``Conv`` or by a
        depthwise one per phase and ``Concat``, then ``DepthToSpace``, or Reshapes and
        ``Transpose``, which the variants are named after; ``Slice`` if the size is not a multiple.

    Algebra:
        By a factor u / v output ``u q + r`` lies at ``v q + (r + 1/2) v / u - 1/2`` of the input
        (ONNX's half_pixel; ``r v / u`` in asymmetric coordinates), so its neighbours and weights
        depend on the phase r alone: a convolution with stride v. Cubic weights are those of Keys
        1981. Neighbours outside are clamped to the edge, which is what the padding repeats.

    Declines when:
        the mode is nearest, or linear and enlarging (which ONNX Runtime does well); the places of
        outputs or the weights depend on more than the phase (align_corners, tf_crop_and_resize,
        half_pixel_symmetric with a rest, antialias, exclude_outside); the factors are not
        constant or no such fractions; batch or channels are scaled; the number of channels is not
        known, or a size is not where it matters; the type is no float.

    Exactness:
        ROUNDING. ONNX Runtime computes coordinates in single precision, which are exact where
        both terms of the factor are powers of two; else its weights are off by the size of the
        image times 1e-7.

    When it pays:
        Always for cubic: ONNX Runtime's CPU kernel evaluates each neighbour of each pixel by
        itself and is 10 to 30 times slower. A super-resolution net with a cubic Resize at its end
        gained a sixth.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NEAREST = "nearest"
        LINEAR_ENLARGING = "linear-enlarging"
        COORDINATES = "coordinates"
        BORDER_WEIGHTS = "border-weights"
        FACTORS_UNKNOWN = "factors-unknown"
        FACTORS = "factors"
        NOT_TWO_DIMENSIONAL = "not-two-dimensional"
        CHANNELS_UNKNOWN = "channels-unknown"
        SIZE_UNKNOWN = "size-unknown"
        ELEMENT_TYPE = "element-type"

    name: ClassVar[str] = "lower-resize"
    roots: ClassVar[tuple[str, ...]] = ("Resize",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> LowerResizeMatch | Decline:
        """See the class."""
        x = node.inputs[0]
        mode = facts.attr_str(node, "mode", "nearest")
        if mode == "nearest":
            return Decline(self.Why.NEAREST)
        if facts.rank(x) != 4:
            return Decline(self.Why.NOT_TWO_DIMENSIONAL)
        if not facts.is_float(x):
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(facts.dtype(x))})
        channels = facts.channels(x)
        if channels is None:
            return Decline(self.Why.CHANNELS_UNKNOWN)
        given = scale_factors(node, 4, facts)
        if given is None:
            return Decline(self.Why.FACTORS_UNKNOWN)
        factors = [_fraction(factor) for factor in given]
        refusal = self._factors(given, factors, mode)
        if refusal is not None:
            return refusal
        space = [f for f in factors[2:] if f is not None]
        size = self._size(node, given[2:], space, facts)
        if isinstance(size, Decline):
            return size
        centred = self._coordinates(node, space, size, facts)
        if isinstance(centred, Decline):
            return centred
        a = Fraction(facts.attr_float(node, "cubic_coeff_a", -0.75)) if mode == "cubic" else None
        axes = [resampling(f.numerator, f.denominator, centred=centred, a=a) for f in space]
        ways = _ways((axes[0], axes[1]), channels, size)
        if not ways:
            return Decline(self.Why.SIZE_UNKNOWN)
        return LowerResizeMatch(
            node,
            (node,),
            channels,
            size,
            (axes[0], axes[1]),
            ways,
            facts={"mode": mode, "factors": [str(f) for f in space]},
        )

    def _factors(
        self, given: list[float], factors: list[Fraction | None], mode: str
    ) -> Decline | None:
        space = [f for f in factors[2:] if f is not None]
        if (
            factors[:2] != [1, 1]
            or len(space) != 2
            or space == [1, 1]
            or math.prod(f.numerator for f in space) > _MOST_PHASES
        ):
            return Decline(self.Why.FACTORS, {"factors": list(given)})
        if mode != "cubic" and any(f > 1 for f in space):
            return Decline(self.Why.LINEAR_ENLARGING, {"factors": list(given)})
        return None

    def _size(
        self, node: Node, given: list[float], factors: list[Fraction], facts: Facts
    ) -> tuple[Dim, Dim] | Decline:
        """The size of the result, as far as it is known and needs to be."""
        before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
        assert before is not None
        found: list[Dim] = []
        for axis, (scale, factor) in enumerate(zip(given, factors, strict=True), 2):
            size = before[axis]
            if not isinstance(size, int):
                # As many as a convolution has positions, unless floor(size * scale) rounds.
                exact = _is_power_of_two(factor.numerator * factor.denominator)
                if 1 not in (factor.numerator, factor.denominator) or not exact:
                    return Decline(self.Why.SIZE_UNKNOWN)
                found.append(size if factor == 1 else None)
                continue
            result = math.floor(size * factor)
            known = after[axis] if after is not None and len(after) == 4 else result
            rounded = math.floor(np.float32(size) * np.float32(scale))
            if result < 1 or rounded != result or (isinstance(known, int) and known != result):
                return Decline(self.Why.SIZE_UNKNOWN)
            found.append(result)
        return found[0], found[1]

    def _coordinates(
        self, node: Node, factors: list[Fraction], size: tuple[Dim, Dim], facts: Facts
    ) -> bool | Decline:
        """Whether pixels are squares."""
        default = "half_pixel" if facts.has_op("Resize", since=11) else "asymmetric"
        mode = facts.attr_str(node, "coordinate_transformation_mode", default)
        shape = facts.shape(node.inputs[0]) or (None,) * 4
        axes = list(zip(factors, shape[2:], size, strict=True))
        rest = any(
            f.denominator > 1 and (not isinstance(n, int) or n % f.denominator) for f, n, _ in axes
        )
        single = any(f != 1 and (not isinstance(n, int) or n < 2) for f, _, n in axes)
        if (
            mode not in _COORDINATES
            or (mode == "half_pixel_symmetric" and rest)
            or (mode == "pytorch_half_pixel" and single)
        ):
            return Decline(self.Why.COORDINATES, {"mode": mode})
        for key in ("antialias", "exclude_outside"):
            if facts.attr_int(node, key, 0):
                return Decline(self.Why.BORDER_WEIGHTS, {"because": key})
        return _COORDINATES[mode]

    def variants(self, match: LowerResizeMatch) -> tuple[Variant, ...]:
        """The cheapest first."""
        return match.ways

    def rewrite(self, match: LowerResizeMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        node = match.root
        result = node.outputs[0]
        rewriter.remove(node)
        _Lowering(match, Emitter(rewriter, node, node.inputs[0], result.name)).write(variant)


class _Lowering:
    """Writes one lowered Resize."""

    def __init__(self, match: LowerResizeMatch, emitter: Emitter) -> None:
        self.emitter = emitter
        self.channels = match.channels
        self.axes = match.axes
        self.size = match.size
        self.result = match.root.outputs[0]
        x = match.root.inputs[0]
        self.source = x
        self.batch, _, *self.before = emitter.facts.shape(x) or (None,) * 4
        self.windows = [axis.window for axis in match.axes]
        self.kernels = [a.kernels(w) for a, w in zip(match.axes, self.windows, strict=True)]
        self.steps = [axis.up for axis in match.axes]
        self.strides = [axis.down for axis in match.axes]

    def write(self, variant: Variant) -> None:
        x = self.padded()
        if variant == _SEPARABLE:
            self.separable(x)
        elif variant == _DEPTHWISE:
            self.depthwise(x)
        elif variant == _DENSE:
            self.dense(x)
        else:
            build = self.dense if self.channels <= _MOST_DENSE else self.per_phase
            y = build(x)
            axes = zip(self.size, self.steps, strict=True)
            surplus = [-n % s if isinstance(n, int) else 0 for n, s in axes]
            interleave(self.emitter, y, self.steps, Arrangement(variant.name), surplus)
        self.emitter.finish(self.result)

    def padded(self) -> Tensor:
        """The image with as much of its edge around it as the weights reach."""
        pads = self.pads()
        if not any(pads):
            return self.source
        amounts = [0, 0, *pads[:2], 0, 0, *pads[2:]]
        shape = [
            self.batch,
            self.channels,
            *(
                n + pads[a] + pads[a + 2] if isinstance(n, int) else None
                for a, n in enumerate(self.before)
            ),
        ]
        emitter = self.emitter
        if not emitter.facts.has_op("Pad", since=11):
            return emitter.emit("Pad", [self.source], shape, {"mode": "edge", "pads": amounts})
        operands = [self.source, emitter.integers("pads", amounts)]
        return emitter.emit("Pad", operands, shape, {"mode": "edge"})

    def pads(self) -> list[int]:
        """Begins, then ends, such that the Conv has as many positions as there are blocks."""
        begins, ends = [], []
        for axis, (first, last) in enumerate(self.windows):
            size, down = self.before[axis], self.strides[axis]
            whole = isinstance(size, int) and self.blocks(axis) == size // down
            begins.append(-first)
            known = size if isinstance(size, int) else 0
            ends.append(last + 1 - (down if whole or not known else known % down))
        return begins + ends

    def blocks(self, axis: int) -> Dim:
        """How many positions the Conv has along *axis*."""
        size = self.size[axis]
        return -(-size // self.steps[axis]) if isinstance(size, int) else size

    # -- convolutions --------------------------------------------------------------------------

    def separable(self, x: Tensor) -> Tensor:
        """Along height, then along width."""
        one = np.ones(1)
        rows, columns = (kernel[0] for kernel in self.kernels)
        size = [self.blocks(0), (self.emitter.facts.shape(x) or (None,) * 4)[3]]
        y = self.conv(x, _repeated(rows, one, self.channels), [self.strides[0], 1], size)
        return self.conv(y, _repeated(one, columns, self.channels), [1, self.strides[1]])

    def depthwise(self, x: Tensor) -> Tensor:
        """Every channel by itself."""
        rows, columns = (kernel[0] for kernel in self.kernels)
        return self.conv(x, _repeated(rows, columns, self.channels), self.strides)

    def dense(self, x: Tensor) -> Tensor:
        """All phases and channels by one Conv, with zeros between different channels."""
        rows, columns = self.kernels
        diagonal = np.eye(self.channels)
        weight = np.einsum("ak,bl,cd->abcdkl", rows, columns, diagonal)
        kernel = weight.shape[-2:]
        return self.conv(x, weight.reshape(-1, self.channels, *kernel), self.strides, group=1)

    def per_phase(self, x: Tensor) -> Tensor:
        """For each phase every channel by itself, concatenated."""
        phases = [
            self.conv(x, _repeated(rows, columns, self.channels), self.strides)
            for rows, columns in product(*self.kernels)
        ]
        shape = (self.batch, self.channels * len(phases), self.blocks(0), self.blocks(1))
        return self.emitter.emit("Concat", phases, shape, {"axis": 1})

    def conv(
        self,
        x: Tensor,
        weight: Float64,
        strides: list[int],
        size: list[Dim] | None = None,
        group: int | None = None,
    ) -> Tensor:
        dtype = self.emitter.facts.dtype(self.source)
        values = self.emitter.rewriter.constant(
            f"{self.result.name}/weight", weight.astype(dtype, order="C")
        )
        attributes: Attributes = {
            "group": self.channels if group is None else group,
            "kernel_shape": list(weight.shape[2:]),
            "strides": strides,
        }
        size = [self.blocks(0), self.blocks(1)] if size is None else size
        return self.emitter.emit("Conv", [x, values], (self.batch, len(weight), *size), attributes)


def _repeated(rows: Float64, columns: Float64, channels: int) -> Float64:
    """One kernel for every channel, ``[channels, 1, rows, columns]``."""
    return np.tile(np.outer(rows, columns), (channels, 1, 1, 1))


def _ways(
    axes: tuple[Resampling, Resampling], channels: int, size: tuple[Dim, Dim]
) -> tuple[Variant, ...]:
    steps = [axis.up for axis in axes]
    if steps == [1, 1]:
        two = all(axis.window != (0, 0) for axis in axes)
        few = 1 < channels <= _MOST_DENSE
        return ((_SEPARABLE,) if two else ()) + (_DEPTHWISE,) + ((_DENSE,) if few else ())
    forms = arrangements(steps, size[1])
    if channels <= _MOST_DENSE:
        # Few channels make short runs of memory.
        forms = tuple(f for f in forms if f is not Arrangement.CHANNELS_LAST)
    return tuple(Variant(form.value) for form in forms)


def _fraction(factor: float) -> Fraction | None:
    """The simple fraction that *factor* is in single precision."""
    found = Fraction(factor).limit_denominator(_LARGEST_TERM)
    if not 0 < found.numerator <= _LARGEST_TERM or np.float32(found) != np.float32(factor):
        return None
    return found


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
