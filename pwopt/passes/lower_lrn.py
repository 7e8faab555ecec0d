"""Lower LRN to convolutions or pools over channels and square roots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerLrn", "LowerLrnMatch"]

_CONV = Variant("conv")
_POOL = Variant("pool")

_WIDE = 128
"""Channels from which on a pool is tried first: the band's convolution costs their square."""


@dataclass(frozen=True, eq=False)
class LowerLrnMatch(Match):
    """An LRN over a known number of channels.

    Attributes:
        channels: size of axis 1.
        dtype: of the data.
        size, alpha, beta, bias: the attributes.
        axes_are_input: whether Unsqueeze takes its axes as an input (opset 13).
        ways: the variants that exist for this rank.
    """

    channels: int
    dtype: np.dtype[Any]
    size: int
    alpha: float
    beta: float
    bias: float
    axes_are_input: bool
    ways: tuple[Variant, ...]


@dataclass(frozen=True)
class LowerLrn(Pass[LowerLrnMatch]):
    """Lower LRN across channels to a window sum, square roots and a division.

    Rewrites:
        ``LRN(x)`` into ``q = Mul(x, x)``, the window sum ``s`` of q over channels, and
        ``Div(x, Mul(Sqrt(s), Sqrt(Sqrt(s))))`` for beta 0.75, ``Div(x, Sqrt(s))`` for 0.5,
        ``Div(x, s)`` for 1, else ``Mul(x, Pow(s, -beta))``. In the variant ``conv``, s is a Conv
        with a kernel of 1, banded weights ``alpha / size`` and the bias k; in the variant
        ``pool``, ``Add(Mul(a, alpha), k)`` with a the AveragePool (padding counted) of q over the
        channels as an axis of space, between Unsqueeze and Squeeze. ``pool`` is offered for 3 and
        4 dimensions, and first for many channels.

    Algebra:
        ``y[c] = x[c] / (k + alpha / size * sum over c' of x[c']^2)^beta`` with c' from
        ``c - floor((size - 1) / 2)`` to ``c + ceil((size - 1) / 2)``, where there are channels
        (Krizhevsky et al. 2012, section 3.3; the ONNX operator specification). The sum is a banded
        matrix over channels, which a pointwise convolution is; ``s^0.75 = s^0.5 (s^0.5)^0.5``.

    Declines when:
        the number of dimensions or of channels is not known, or there are no axes of space; the
        element type is neither float32 nor float64 (float16 holds neither squares above 256 nor
        weights of alpha / size); k is not positive or alpha negative, so that s may be zero (0/0
        for beta > 0) or lose its digits; size, alpha or beta are out of range; opset before 7.

    Exactness:
        ROUNDING, for finite squares. Where x is NaN, Inf or has a square that overflows, ``conv``
        spreads NaN over all channels of the pixel (zero times it), LRN over the window only.

    When it pays:
        ONNX Runtime's CPU kernel evaluates a power per element on one thread: on Conv, Relu, LRN,
        MaxPool at 56x56 and 64 to 192 channels the lowered form takes a fifth to a twelfth of the
        time on one thread. GoogLeNet as a whole ran 1.5 times as fast.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        RANK_UNKNOWN = "rank-unknown"
        NO_SPACE = "no-axes-of-space"
        CHANNELS_UNKNOWN = "channels-unknown"
        ELEMENT_TYPE = "element-type"
        BIAS_NOT_POSITIVE = "bias-not-positive"
        ALPHA_NEGATIVE = "alpha-negative"
        ATTRIBUTES_OUT_OF_RANGE = "attributes-out-of-range"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "lower-lrn"
    roots: ClassVar[tuple[str, ...]] = ("LRN",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> LowerLrnMatch | Decline:
        """See the class."""
        if facts.opset < 7:
            return Decline(self.Why.OP_NOT_IN_OPSET, {"since": 7, "opset": facts.opset})
        x = node.inputs[0]
        dtype = facts.dtype(x)
        if dtype is None or not facts.is_float(x) or dtype == np.float16:
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(dtype)})
        rank = facts.rank(x)
        if rank is None:
            return Decline(self.Why.RANK_UNKNOWN)
        if rank < 3:
            return Decline(self.Why.NO_SPACE, {"rank": rank})
        channels = facts.channels(x)
        if not channels:
            return Decline(self.Why.CHANNELS_UNKNOWN)
        size = facts.attr_int(node, "size", 0)
        alpha = facts.attr_float(node, "alpha", 1e-4)
        beta = facts.attr_float(node, "beta", 0.75)
        bias = facts.attr_float(node, "bias", 1.0)
        if size < 1 or not all(map(math.isfinite, (alpha, beta, bias))):
            return Decline(self.Why.ATTRIBUTES_OUT_OF_RANGE)
        if alpha < 0:
            return Decline(self.Why.ALPHA_NEGATIVE, {"alpha": alpha})
        if bias <= 0:
            return Decline(self.Why.BIAS_NOT_POSITIVE, {"bias": bias})
        return LowerLrnMatch(
            node,
            (node,),
            channels,
            dtype,
            size,
            alpha,
            beta,
            bias,
            facts.has_op("Unsqueeze", since=13),
            _ways(rank, channels),
            facts={"channels": channels, "size": size, "beta": beta},
        )

    def variants(self, match: LowerLrnMatch) -> tuple[Variant, ...]:
        """The one that is cheaper for this number of channels first."""
        return match.ways

    def rewrite(self, match: LowerLrnMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        node = match.root
        x, y = node.inputs[0], node.outputs[0]
        rewriter.remove(node)
        squares = rewriter.variable(f"{y.name}/squares", like=x)
        rewriter.add("Mul", [x, x], [squares], near=node)
        energy = _banded if variant == _CONV else _pooled
        _normalise(match, x, energy(match, squares, rewriter), y, rewriter)


def _ways(rank: int, channels: int) -> tuple[Variant, ...]:
    # Runtimes pool along three axes at most, and channels are one of them here.
    if rank > 4:
        return (_CONV,)
    return (_POOL, _CONV) if channels > _WIDE else (_CONV, _POOL)


def _banded(match: LowerLrnMatch, squares: Tensor, rewriter: Rewriter) -> Tensor:
    name, space = match.root.outputs[0].name, len(squares.shape or ()) - 2
    ahead = np.subtract.outer(np.arange(match.channels), np.arange(match.channels))
    before, behind = (match.size - 1) // 2, match.size // 2
    band = ((ahead <= before) & (ahead >= -behind)) * (match.alpha / match.size)
    weight = band.astype(match.dtype).reshape(*band.shape, *(1,) * space)
    energy = rewriter.variable(f"{name}/energy", like=squares)
    operands = [
        squares,
        rewriter.constant(f"{name}/band", weight),
        rewriter.constant(f"{name}/bias", np.full(match.channels, match.bias, match.dtype)),
    ]
    attributes: dict[str, int | list[int]] = {
        "dilations": [1] * space,
        "group": 1,
        "kernel_shape": [1] * space,
        "pads": [0] * (2 * space),
        "strides": [1] * space,
    }
    rewriter.add("Conv", operands, [energy], attributes, near=match.root)
    return energy


def _pooled(match: LowerLrnMatch, squares: Tensor, rewriter: Rewriter) -> Tensor:
    node, name = match.root, match.root.outputs[0].name
    shape = tuple(squares.shape or ())
    space = len(shape) - 2
    lifted_shape = (shape[0], 1, *shape[1:])
    lifted = rewriter.variable(f"{name}/lifted", like=squares, shape=lifted_shape)
    averaged = rewriter.variable(f"{name}/averaged", like=squares, shape=lifted_shape)
    mean, scaled, energy = (
        rewriter.variable(f"{name}/{hint}", like=squares) for hint in ("mean", "scaled", "energy")
    )
    pool: dict[str, int | list[int]] = {
        "kernel_shape": [match.size, *(1,) * space],
        "strides": [1] * (space + 1),
        "pads": [(match.size - 1) // 2, *(0,) * space, match.size // 2, *(0,) * space],
        "count_include_pad": 1,
    }
    axes = rewriter.constant(f"{name}/axes", np.array([1], np.int64))
    axes_input = [axes] if match.axes_are_input else []
    axes_attribute = {} if match.axes_are_input else {"axes": [1]}
    rewriter.add("Unsqueeze", [squares, *axes_input], [lifted], axes_attribute, near=node)
    rewriter.add("AveragePool", [lifted], [averaged], pool, near=node)
    rewriter.add("Squeeze", [averaged, *axes_input], [mean], axes_attribute, near=node)
    for op, number, source, target in (
        ("Mul", match.alpha, mean, scaled),
        ("Add", match.bias, scaled, energy),
    ):
        constant = rewriter.constant(f"{target.name}/{op}", np.array(number, match.dtype))
        rewriter.add(op, [source, constant], [target], near=node)
    return energy


def _normalise(
    match: LowerLrnMatch, x: Tensor, energy: Tensor, y: Tensor, rewriter: Rewriter
) -> None:
    node = match.root

    def step(op: str, inputs: list[Tensor], hint: str) -> Tensor:
        result = rewriter.variable(f"{y.name}/{hint}", like=x)
        rewriter.add(op, inputs, [result], near=node)
        return result

    if match.beta not in _ROOTS:
        exponent = rewriter.constant(f"{y.name}/exponent", np.array(-match.beta, match.dtype))
        rewriter.add("Mul", [x, step("Pow", [energy, exponent], "factor")], [y], near=node)
        return
    divisor = energy
    if match.beta < 1:
        divisor = step("Sqrt", [energy], "root")
    if match.beta == 0.75:
        # Not sqrt(s sqrt(s)), which leaves the range of numbers earlier.
        divisor = step("Mul", [divisor, step("Sqrt", [divisor], "fourth-root")], "divisor")
    rewriter.add("Div", [x, divisor], [y], near=node)


_ROOTS = (0.5, 0.75, 1.0)
"""The powers that square roots make."""
