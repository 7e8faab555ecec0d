"""Factorise a convolution into thinner ones, within an error that somebody else has to judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter, Tensor, ValuesView
from pwopt.numerics import lowrank
from pwopt.numerics.lowrank import Kernel, Method
from pwopt.passes._emitter import Emitter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = [
    "FactorizeConv",
    "FactorizeConvMatch",
    "Form",
    "SiteFactors",
    "form_cost",
    "forms",
    "group_kernel",
]

_WIDTHS = (16, 8, 4, 2, 1)
"""Ranks are multiples of the first of these that leaves a choice: of what vectors hold."""
_FINE_WIDTHS = (4, 2, 1)
"""The same where nothing but multiplications counts."""
_FEWEST_RANKS = 3
_MOST_RANKS = 8
_MOST_FINE_RANKS = 9
_MOST_PAIRS = 6


@dataclass(frozen=True)
class Form:
    """A method with its ranks, those of each group."""

    method: Method
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        """As a variant is called: ``spatial-32``."""
        return f"{self.method.value}-{'x'.join(map(str, self.ranks))}"

    @classmethod
    def parse(cls, name: str) -> Form:
        """The form that is called *name*."""
        method, _, ranks = name.rpartition("-")
        return cls(Method(method), tuple(int(r) for r in ranks.split("x")))


@dataclass(frozen=True, eq=False)
class SiteFactors:
    """What to write at a site.

    Attributes:
        form: method and ranks.
        groups: the factors of each group of the convolution, as :mod:`pwopt.numerics.lowrank` has
            them.
        bias: ``[Cout]``.
    """

    form: Form
    groups: tuple[tuple[npt.NDArray[np.float64], ...], ...]
    bias: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FactorizeConvMatch(Match):
    """A Conv with constant weight.

    Attributes:
        kernels: ``[O, C, I, J]`` for each group.
        forms: what it may become, by variant.
    """

    conv: ConvFacts
    kernels: tuple[npt.NDArray[np.float64], ...]
    dtype: np.dtype[Any]
    forms: Mapping[Variant, Form]


@dataclass(frozen=True)
class FactorizeConv(Pass[FactorizeConvMatch]):
    """Factorise a Conv into a chain (or a sum of chains) of thinner ones.

    Rewrites:
        ``Conv`` into two or three, with nothing between them and the bias on the last. *channel*:
        KxK to r channels, then 1x1 (``channel-out``), or 1x1 to r channels, then KxK
        (``channel-in``). *bottleneck*: 1x1, KxK, 1x1. *spatial*: Kx1, then 1xK, or the other way
        round (``spatial-reversed``). *separable*: a sum of t depthwise Convs, each followed by a
        pointwise one. *pointwise*: a 1x1 as two. The strides, dilations and pads of an axis go to
        the factor that has that axis. Each group is factorised by itself. Variants are methods
        and ranks; without data the first one keeps at most ``keep`` of the multiplications.

    Algebra:
        ``W[o,c,i,j]`` is a sum of r products of thinner tensors: ``U[o,r] V[r,c,i,j]``,
        ``V[o,r,i,j] U[r,c]``, ``U[o,s] G[s,r,i,j] V[r,c]`` (Tucker 1966; Kim et al. 2016,
        "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
        Applications"), ``H[o,r,j] V[r,c,i]`` (Jaderberg et al. 2014, "Speeding up Convolutional
        Neural Networks with Low Rank Expansions"), ``P[o,c,t] D[c,t,i,j]`` (Guo et al. 2018,
        "Network Decoupling: From Regular to Depthwise Separable Convolutions"). With full rank
        each represents any kernel; with less the best approximation is that of
        :mod:`pwopt.numerics.lowrank`: of the weights without data, of the response with a plan
        that was fitted to calibration data. No factor but the last has a bias, so that a zero
        pad is zero behind each of them.

    Declines when:
        the weight is not constant or no float; the pads are not known; the Conv is itself such a
        factor (it or its one neighbour has no bias, and nothing stands between them); no method
        has fewer multiplications; the plan, where there is one, does not name it, or names a form
        or a number of channels that the Conv has not.

    Exactness:
        APPROXIMATE: another function. Never unless asked for: with an accuracy budget
        (``--max-accuracy-drop``, ``--target-speedup``) ranks are chosen on calibration data and
        judged on data held out; by name the kernels are factorised by their weights alone, which
        is much weaker.

    When it pays:
        Where ranks fill the vectors of the runtime, time falls like the multiplications: a 3x3
        ``spatial`` with half the channels takes 0.35 of the time. Winograd competes for the same
        layers.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        ELEMENT_TYPE = "element-type"
        PADS_UNKNOWN = "pads-unknown"
        FACTOR = "factor"
        NOTHING_CHEAPER = "nothing-cheaper"
        NOT_PLANNED = "not-planned"
        PLAN_DOES_NOT_FIT = "plan-does-not-fit"

    name: ClassVar[str] = "factorize-conv"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    by_default: ClassVar[bool] = False

    method: Method | None = None
    """Only this one; ``None``: all, spatial ones and pointwise ones of 1x1 first."""
    keep: float = 0.5
    """Multiplications that the first variant keeps at most, relative to the Conv's."""
    plan: Mapping[str, SiteFactors] | None = None
    """Factors by site; with a plan nothing else is done."""

    def match(self, node: Node, facts: Facts) -> FactorizeConvMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        weight = None if conv is None else facts.constant(conv.weight)
        if conv is None or weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if not facts.is_float(conv.weight):
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(facts.dtype(conv.weight))})
        if conv.pads is None:
            return Decline(self.Why.PADS_UNKNOWN)
        if _is_factor(conv, facts):
            return Decline(self.Why.FACTOR)
        kernels = _kernels(weight, conv.group)
        forms = self._planned(node, conv, facts) if self.plan is not None else self._forms(conv)
        if isinstance(forms, Decline):
            return forms
        if not forms:
            return Decline(self.Why.NOTHING_CHEAPER, {"kernel": list(conv.kernel)})
        return FactorizeConvMatch(
            node,
            (node,),
            conv,
            kernels,
            weight.dtype,
            {Variant(form.name): form for form in forms},
            facts={"cin": conv.cin, "cout": conv.cout, "kernel": list(conv.kernel)},
        )

    def _planned(self, node: Node, conv: ConvFacts, facts: Facts) -> list[Form] | Decline:
        assert self.plan is not None
        planned = self.plan.get(facts.site(node))
        if planned is None:
            return Decline(self.Why.NOT_PLANNED)
        kernel = group_kernel(conv)
        wanted = lowrank.factor_shapes(planned.form.method, kernel, planned.form.ranks)
        fits = len(planned.groups) == conv.group and planned.bias.shape == (conv.cout,)
        if not fits or any([f.shape for f in group] != wanted for group in planned.groups):
            return Decline(self.Why.PLAN_DOES_NOT_FIT, {"form": planned.form.name})
        return [planned.form]

    def _forms(self, conv: ConvFacts) -> list[Form]:
        """What is cheaper, the one to take without data first."""
        found = forms(conv, self.method)
        limit = self.keep * math.prod(group_kernel(conv))
        cheap = [form for form in found if form_cost(conv, form) <= limit]
        first = cheap[-1:] if not cheap else _leading_method(cheap)
        return [*first, *(form for form in found if form not in first)]

    def variants(self, match: FactorizeConvMatch) -> tuple[Variant, ...]:
        """Methods and ranks."""
        return tuple(match.forms)

    def rewrite(self, match: FactorizeConvMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        conv, form = match.conv, match.forms[variant]
        facts = Facts(rewriter.model)
        planned = None if self.plan is None else self.plan[facts.site(conv.node)]
        if planned is None:
            bias = conv.bias
            groups: Sequence[Sequence[npt.NDArray[np.float64]]] = [
                lowrank.fit(form.method, form.ranks, lowrank.Moments.of_weight(kernel))
                for kernel in match.kernels
            ]
        else:
            name = f"{conv.output.name}/bias"
            bias = rewriter.constant(name, planned.bias.astype(match.dtype))
            groups = planned.groups
        rewriter.remove(conv.node)
        emitter = Emitter(rewriter, conv.node, conv.output, conv.output.name)
        chains = lowrank.stages(form.method, groups)
        total: Tensor | None = None
        for chain in chains:
            weights = [weight.astype(match.dtype) for weight in chain]
            y = _chain(emitter, conv, form, weights, bias if total is None else None)
            total = y if total is None else emitter.emit("Add", [y, total], y.shape)
        emitter.finish(conv.output)


def group_kernel(conv: ConvFacts) -> Kernel:
    """The shape of the kernel of a group, with two axes of space."""
    first, *rest = conv.kernel
    return conv.cout // conv.group, conv.cin // conv.group, first, math.prod(rest)


def form_cost(conv: ConvFacts, form: Form) -> float:
    """Multiplications per output pixel and group, next to the product of :func:`group_kernel`."""
    first, *rest = conv.strides
    return lowrank.cost(form.method, group_kernel(conv), form.ranks, (first, math.prod(rest)))


def forms(conv: ConvFacts, method: Method | None = None, *, fine: bool = False) -> list[Form]:
    """Forms of *conv* that have fewer multiplications, by method and from low ranks up.

    Args:
        conv: the convolution.
        method: only this one.
        fine: with ranks that do not fill vectors, too.
    """
    whole = math.prod(group_kernel(conv))
    found: list[Form] = []
    for one in _methods(conv):
        if method not in (None, one):
            continue
        ranks = _ranks(one, group_kernel(conv), conv.group, _FINE_WIDTHS if fine else _WIDTHS)
        cheaper = [f for f in (Form(one, r) for r in ranks) if form_cost(conv, f) < whole]
        found += _thinned(cheaper, _MOST_FINE_RANKS if fine else _MOST_RANKS)
    return found


def _methods(conv: ConvFacts) -> list[Method]:
    o, c, i, j = group_kernel(conv)
    if conv.is_pointwise:
        return [Method.POINTWISE]
    spatial = [Method.SPATIAL, Method.SPATIAL_REVERSED]
    found = spatial if conv.spatial_rank == 2 and min(i, j) > 1 else []
    if c > 1:
        found = [*found, Method.SEPARABLE, Method.CHANNEL_IN, Method.BOTTLENECK]
    return [*found, Method.CHANNEL_OUT] if o > 1 else found


def _ranks(
    method: Method, kernel: Kernel, group: int, widths: Sequence[int]
) -> list[tuple[int, ...]]:
    """Ranks that kernels like, below those that represent everything."""
    full = lowrank.full_ranks(method, kernel)
    if method is Method.SEPARABLE:
        return [(t,) for t in range(1, min(full[0], _MOST_PAIRS + 1))]
    if method is Method.BOTTLENECK:
        narrow, wide = (_multiples(r + 1, group, widths) for r in full)
        count = max(len(narrow), len(wide))
        pairs = [
            (narrow[k * len(narrow) // count], wide[k * len(wide) // count]) for k in range(count)
        ]
        return list(dict.fromkeys(pairs))
    return [(r,) for r in _multiples(full[0], group, widths)]


def _multiples(end: int, group: int, widths: Sequence[int]) -> list[int]:
    """Ranks per group below *end*."""
    for width in widths:
        step = max(1, width // group)
        found = list(range(step, end, step))
        if len(found) >= _FEWEST_RANKS:
            break
    return found or [1]


def _thinned(found: Sequence[Form], most: int) -> list[Form]:
    """Evenly spread where there are many."""
    if len(found) <= most:
        return list(found)
    chosen = np.linspace(0, len(found) - 1, most).round().astype(int)
    return [found[k] for k in chosen]


def _leading_method(cheap: Sequence[Form]) -> list[Form]:
    """The highest rank of the method that stands first."""
    return [[form for form in cheap if form.method is cheap[0].method][-1]]


def _is_factor(conv: ConvFacts, facts: Facts) -> bool:
    """Whether it is part of a product of Convs already."""

    def is_bare(node: Node | None) -> bool:
        return facts.is_op(node, "Conv") and node is not None and facts.input(node, 2) is None

    before = facts.producer(conv.input)
    behind = facts.sole_consumer(conv.output)
    is_second = is_bare(before) and facts.is_private(conv.input)
    return is_second or (is_bare(conv.node) and facts.is_op(behind, "Conv"))


def _kernels(weight: ValuesView, group: int) -> tuple[npt.NDArray[np.float64], ...]:
    """``[O, C, I, J]`` for each group."""
    flat = weight.reshape(*weight.shape[:3], -1).astype(np.float64)
    return tuple(np.split(flat, group))


def _chain(
    emitter: Emitter,
    conv: ConvFacts,
    form: Form,
    weights: Sequence[npt.NDArray[np.floating[Any]]],
    bias: Tensor | None,
) -> Tensor:
    """Convs one after another; the first with a kernel along an axis moves along it."""
    assert conv.pads is not None
    rank = conv.spatial_rank
    kernels = [_kernel(weight, conv.kernel) for weight in weights]
    movers = [next((n for n, k in enumerate(kernels) if k[a] > 1), 0) for a in range(rank)]
    y = conv.input
    for position, (weight, kernel) in enumerate(zip(weights, kernels, strict=True)):
        mine = [mover == position for mover in movers]
        depthwise = form.method is Method.SEPARABLE and not position
        attributes: dict[str, int | list[int]] = {
            "kernel_shape": kernel,
            "strides": [s if m else 1 for s, m in zip(conv.strides, mine, strict=True)],
            "dilations": [d if m else 1 for d, m in zip(conv.dilations, mine, strict=True)],
            "pads": [p if m else 0 for p, m in zip(conv.pads, 2 * mine, strict=True)],
            "group": conv.cin if depthwise else conv.group,
        }
        values = weight.reshape(*weight.shape[:2], *kernel)
        operands = [y, emitter.rewriter.constant(f"{emitter.name}/weight", values)]
        if bias is not None and position == len(weights) - 1:
            operands.append(bias)
        shape = emitter.facts.shape(y) or (None,) * (rank + 2)
        size = [_size(d, attributes, axis) for axis, d in enumerate(shape[2:])]
        y = emitter.emit("Conv", operands, (shape[0], len(weight), *size), attributes)
    return y


def _kernel(weight: npt.NDArray[Any], whole: Sequence[int]) -> list[int]:
    """The kernel of a factor, which has some of the axes of the *whole* one."""
    first, rest = weight.shape[2:]
    return [first, *(whole[1:] if rest > 1 else [1] * (len(whole) - 1))]


def _size(dim: Dim, attributes: Mapping[str, Any], axis: int) -> Dim:
    """What a Conv leaves of a dimension."""
    if not isinstance(dim, int):
        return None
    pads = attributes["pads"]
    reach = attributes["dilations"][axis] * (attributes["kernel_shape"][axis] - 1) + 1
    padded = dim + pads[axis] + pads[axis + len(pads) // 2]
    return int((padded - reach) // attributes["strides"][axis] + 1)
