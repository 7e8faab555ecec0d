"""Factors of a convolution's kernel, fitted to the response that the kernel gives on data.

A kernel ``W[o, c, i, j]`` (one group of a convolution; kernels of other ranks are folded into two
axes) is written as a product of thinner ones. What the product is asked to keep is not W but its
response: with second moments ``S = E[x x^T]`` of the input patches and cross moments
``T = E[y x^T]`` with the targets, both about their means, the error of a kernel is

    E |y - W x - b|^2  =  tr(W S W^T) - 2 tr(W T^T) + E |y - E y|^2,    b = E y - W E x

(reduced-rank regression: Izenman 1975; for convolutions Zhang et al. 2015, "Accelerating Very Deep
Convolutional Networks for Classification and Detection"). Patches may come from a network that is
approximated already and targets from the original, which is what Zhang et al. call asymmetric.
Without data S is the identity and T is W: the error is that of the weights.

All arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Fitter",
    "Method",
    "Moments",
    "Rows",
    "compose",
    "cost",
    "factor_shapes",
    "fit",
    "fit_rectified",
    "full_ranks",
    "stages",
]

Array: TypeAlias = npt.NDArray[np.float64]
Factors: TypeAlias = list[Array]
_Decomposition: TypeAlias = tuple[Array, Array, Array]
"""Left singular vectors, singular values, right singular vectors."""
Kernel: TypeAlias = tuple[int, int, int, int]
"""Output channels, input channels, and the two axes of the kernel."""

_RIDGE: Final = 1e-7
"""What is added to the second moments, relative to their mean: flat directions keep the weights."""
_NOTHING: Final = 1e-100
_ROUNDING: Final = 1e-13
"""Second moments that are none, by themselves and relative to the means they are about."""
_JITTER: Final = 1e-10
_SMALL_STEP: Final = 1e-4
"""Sweeps end when one gains less than this part of the error."""
_PENALTIES: Final = (0.01, 0.1, 1.0)
"""Weights of the coupling between response and auxiliary targets, round by round."""


class Method(StrEnum):
    """How a kernel is written as a product."""

    CHANNEL_OUT = "channel-out"
    """KxK to r channels, then 1x1: low rank of W unfolded on its output channels."""
    CHANNEL_IN = "channel-in"
    """1x1 to r channels, then KxK: low rank of W unfolded on its input channels."""
    BOTTLENECK = "bottleneck"
    """1x1 to r channels, KxK to s, 1x1 (Tucker-2; Kim et al. 2016)."""
    SPATIAL = "spatial"
    """Kx1 to r channels, then 1xK (Jaderberg et al. 2014)."""
    SPATIAL_REVERSED = "spatial-reversed"
    """1xK to r channels, then Kx1."""
    SEPARABLE = "separable"
    """A sum of t pairs of a depthwise and a pointwise one (Guo et al. 2018)."""
    POINTWISE = "pointwise"
    """A 1x1 as two thinner ones."""


_EQUATIONS: Final[Mapping[Method, str]] = MappingProxyType(
    {
        Method.CHANNEL_OUT: "rcij,or->ocij",
        Method.CHANNEL_IN: "rc,orij->ocij",
        Method.BOTTLENECK: "rc,srij,os->ocij",
        Method.SPATIAL: "rci,orj->ocij",
        Method.SPATIAL_REVERSED: "rcj,ori->ocij",
        Method.SEPARABLE: "ctij,oct->ocij",
        Method.POINTWISE: "rcij,or->ocij",
    }
)


_CLOSED: Final = (Method.CHANNEL_OUT, Method.POINTWISE)
"""Products of two matrices, which have a closed form."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments, about the means, of the patches and targets of one group of a convolution.

    Attributes:
        kernel: output channels, input channels, and the two axes of the kernel; D is the product of
            the last three.
        inputs: ``[D, D]``, of the patches.
        cross: ``[O, D]``, of targets with patches.
        input_mean: ``[D]``.
        target_mean: ``[O]``.
        power: of the targets, summed over output channels.
        weight: ``[O, D]``, kept where the patches say nothing.
    """

    kernel: Kernel
    inputs: Array
    cross: Array
    input_mean: Array
    target_mean: Array
    power: float
    weight: Array

    @classmethod
    def of_weight(cls, weight: Array) -> Moments:
        """The moments that stand for no data: white patches, whose response is that of *weight*."""
        flat = weight.reshape(len(weight), -1)
        size = flat.shape[1]
        return cls(
            _kernel_of(weight),
            np.eye(size),
            flat,
            np.zeros(size),
            np.zeros(len(flat)),
            float(np.sum(flat * flat)),
            flat,
        )

    @classmethod
    def of_response(cls, weight: Array, bias: Array, inputs: Array, input_mean: Array) -> Moments:
        """Targets are what *weight* itself makes of patches with these moments."""
        flat = weight.reshape(len(weight), -1)
        cross = flat @ inputs
        return cls(
            _kernel_of(weight),
            inputs,
            cross,
            input_mean,
            flat @ input_mean + bias,
            float(np.sum(cross * flat)),
            flat,
        )

    def error(self, weight: Array) -> float:
        """Mean squared error of the response of *weight*, with the best bias, relative to power."""
        flat = weight.reshape(self.cross.shape)
        moved = flat @ self.inputs - 2 * self.cross
        return float((np.sum(moved * flat) + self.power) / max(self.power, np.finfo(float).tiny))

    def bias(self, weight: Array) -> Array:
        """The bias with which the response of *weight* has the mean of the targets."""
        return self.target_mean - weight.reshape(self.cross.shape) @ self.input_mean

    def regression(self) -> Array:
        """``[O, D]``: the kernel without any restriction that has the least error."""
        inputs, cross = self._regularised()
        return np.asarray(np.linalg.solve(inputs, cross.T).T)

    def _regularised(self) -> tuple[Array, Array]:
        size = len(self.inputs)
        mean = float(np.trace(self.inputs)) / size
        # Of patches that never change all is flat.
        rounding = _ROUNDING * float(np.mean(self.input_mean**2))
        ridge = _RIDGE * mean if mean > max(rounding, _NOTHING) else 1.0
        return self.inputs + ridge * np.eye(size), self.cross + ridge * self.weight


@dataclass(frozen=True, eq=False)
class Rows:
    """Patches of some positions with what is wanted there, for what second moments cannot tell.

    Attributes:
        patches: ``[M, D]``.
        targets: ``[M, O]``.
    """

    patches: npt.NDArray[np.floating[Any]]
    targets: npt.NDArray[np.floating[Any]]


def factor_shapes(method: Method, kernel: Kernel, ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the factors; their axes are those of the method's equation.

    Args:
        method: how the kernel is written.
        kernel: output and input channels and the two axes of the kernel.
        ranks: r, or r and s for a bottleneck, or the number of pairs of a separable one.
    """
    sizes = dict(zip("ocij", kernel, strict=True))
    sizes.update(zip(_rank_labels(method), ranks, strict=True))
    return [tuple(sizes[label] for label in labels) for labels in _operands(method)]


def full_ranks(method: Method, kernel: Kernel) -> tuple[int, ...]:
    """The least ranks with which the method represents any kernel of that shape."""
    o, c, i, j = kernel
    return {
        Method.CHANNEL_OUT: (min(o, c * i * j),),
        Method.CHANNEL_IN: (min(c, o * i * j),),
        Method.BOTTLENECK: (min(c, o * i * j), min(o, c * i * j)),
        Method.SPATIAL: (min(c * i, o * j),),
        Method.SPATIAL_REVERSED: (min(c * j, o * i),),
        Method.SEPARABLE: (min(i * j, o),),
        Method.POINTWISE: (min(o, c * i * j),),
    }[method]


def cost(
    method: Method, kernel: Kernel, ranks: Sequence[int], strides: tuple[int, int] = (1, 1)
) -> float:
    """Multiplications per output pixel, for a group; the kernel itself has ``o c i j``.

    Factors before the one that has the stride work on more pixels.
    """
    sizes = [math.prod(shape) for shape in factor_shapes(method, kernel, ranks)]
    down, across = strides
    pixels = {
        Method.CHANNEL_IN: [down * across, 1],
        Method.BOTTLENECK: [down * across, 1, 1],
        Method.SPATIAL: [across, 1],
        Method.SPATIAL_REVERSED: [down, 1],
    }.get(method, [1] * len(sizes))
    return float(sum(n * p for n, p in zip(sizes, pixels, strict=True)))


def compose(method: Method, factors: Sequence[Array]) -> Array:
    """``[O, C, I, J]``: the kernel that the factors make."""
    return _einsum(_EQUATIONS[method], *factors)


def stages(method: Method, groups: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """The factors of all groups as weights ``[out, in / group, I, J]`` of convolutions.

    Returns:
        Chains of convolutions on the same input whose results are added: one chain, but for
        separable kernels, which have one for each pair.
    """
    stacked = [np.concatenate(parts) for parts in zip(*groups, strict=True)]
    if method is Method.SEPARABLE:
        depthwise, pointwise = stacked
        return [
            [depthwise[:, term, None], pointwise[:, :, term, None, None]]
            for term in range(depthwise.shape[1])
        ]
    return [
        [
            _with_kernel_axes(weight, labels)
            for weight, labels in zip(stacked, _operands(method), strict=True)
        ]
    ]


def fit(
    method: Method,
    ranks: Sequence[int],
    moments: Moments,
    *,
    start: Sequence[Array] | None = None,
    sweeps: int = 8,
    steps: int = 16,
) -> Factors:
    """:meth:`Fitter.fit` for a single form."""
    return Fitter(moments).fit(method, ranks, start=start, sweeps=sweeps, steps=steps)


class Fitter:
    """Fits factors of one kernel; what does not depend on the ranks is computed once."""

    def __init__(self, moments: Moments, free: Array | None = None) -> None:
        """For the response that *moments* tell of.

        Args:
            moments: what the response is to be close to.
            free: ``[O, D]``, the unrestricted kernel, where it is known already.
        """
        self.kernel = moments.kernel
        self._inputs, self._cross = moments._regularised()
        self._known = free
        self._problems: dict[Method, _Problem] = {}
        self._decompositions: dict[Method, list[_Decomposition]] = {}

    def fit(
        self,
        method: Method,
        ranks: Sequence[int],
        *,
        start: Sequence[Array] | None = None,
        sweeps: int = 8,
        steps: int = 16,
    ) -> Factors:
        """Factors with the least response error that alternating least squares finds.

        Reduced-rank regression in closed form where the method is a product of two matrices; else
        the factors are solved for in turn, the last one in closed form and the others by conjugate
        gradients, from the truncated (higher-order) singular value decomposition of the
        unrestricted kernel.

        Args:
            method: how the kernel is written.
            ranks: as :func:`factor_shapes` takes them.
            start: factors to start from.
            sweeps: how often all factors are solved for, at most.
            steps: of conjugate gradients, at most, for each.
        """
        if method in _CLOSED:
            return self._reduced_rank(ranks[0])
        factors = self._truncated(method, ranks) if start is None else list(start)
        problem = self._problem(method)
        floor = float(np.sum(self._free * self._cross))
        before = math.inf
        for sweep in range(sweeps):
            for position in reversed(range(len(factors))):
                factors[position] = problem.solved(factors, position, steps)
            if sweep == sweeps - 1:
                break
            excess = problem.value(factors) + floor
            if before - excess <= _SMALL_STEP * abs(excess):
                break
            before = excess
        return factors

    @cached_property
    def _free(self) -> Array:
        if self._known is not None:
            return self._known
        return np.asarray(np.linalg.solve(self._inputs, self._cross.T).T)

    def _problem(self, method: Method) -> _Problem:
        if method not in self._problems:
            self._problems[method] = _Problem(method, self.kernel, self._inputs, self._cross)
        return self._problems[method]

    @cached_property
    def _response(self) -> tuple[Array, Array]:
        """Left singular vectors of the whitened regression, and the regression."""
        lower = np.linalg.cholesky(self._inputs)
        whitened = np.linalg.solve(lower, self._cross.T).T
        free = np.linalg.solve(lower.T, whitened.T).T
        return _left_vectors(whitened), free

    def _reduced_rank(self, rank: int) -> Factors:
        """``U U^T W``: U the leading left singular vectors of the whitened regression."""
        vectors, free = self._response
        left = vectors[:, :rank]
        return [(left.T @ free).reshape(rank, *self.kernel[1:]), left]

    def _truncated(self, method: Method, ranks: Sequence[int]) -> Factors:
        """Factors of the unrestricted kernel by truncated singular value decompositions."""
        o, c, i, j = self.kernel
        rank = ranks[0]
        if method is Method.BOTTLENECK:
            narrow, wide = self._bases[0][:, :rank], self._bases[1][:, : ranks[1]]
            weight = self._free.reshape(self.kernel)
            return [narrow.T, _einsum("ocij,cr,os->srij", weight, narrow, wide), wide]
        halves = [_halves(parts, rank) for parts in self._decomposed(method)]
        left, right = halves[0]
        if method is Method.CHANNEL_IN:
            return [right, left.reshape(o, i, j, rank).transpose(0, 3, 1, 2)]
        if method is Method.SPATIAL:
            return [left.T.reshape(rank, c, i), right.reshape(rank, o, j).transpose(1, 0, 2)]
        if method is Method.SPATIAL_REVERSED:
            return [left.T.reshape(rank, c, j), right.reshape(rank, o, i).transpose(1, 0, 2)]
        depthwise = np.stack([right.reshape(rank, i, j) for _, right in halves])
        return [depthwise, np.stack([left for left, _ in halves], axis=1)]

    @cached_property
    def _bases(self) -> tuple[Array, Array]:
        """Left singular vectors of the unrestricted kernel, unfolded on either of its channels."""
        o, c, _, _ = self.kernel
        weight = self._free.reshape(self.kernel)
        unfolded = weight.transpose(1, 0, 2, 3).reshape(c, -1)
        return _left_vectors(unfolded), _left_vectors(weight.reshape(o, -1))

    def _decomposed(self, method: Method) -> list[_Decomposition]:
        """Singular value decompositions of the unrestricted kernel, unfolded for the method."""
        if method not in self._decompositions:
            o, c, i, j = self.kernel
            weight = self._free.reshape(self.kernel)
            matrices = {
                Method.CHANNEL_IN: lambda: [weight.transpose(0, 2, 3, 1).reshape(-1, c)],
                Method.SPATIAL: lambda: [weight.transpose(1, 2, 0, 3).reshape(c * i, o * j)],
                Method.SPATIAL_REVERSED: lambda: [weight.transpose(1, 3, 0, 2).reshape(c * j, -1)],
                Method.SEPARABLE: lambda: [weight[:, k].reshape(o, i * j) for k in range(c)],
            }[method]()
            self._decompositions[method] = [
                np.linalg.svd(matrix, full_matrices=False) for matrix in matrices
            ]
        return self._decompositions[method]


def fit_rectified(
    method: Method,
    ranks: Sequence[int],
    moments: Moments,
    rows: Rows,
    slope: float | Array,
    *,
    start: Sequence[Array],
    rounds: int = 3,
) -> tuple[Factors, Array]:
    """Factors and bias with which ``f(response)`` is close to ``f(target)``.

    f is the identity for positive values and multiplies others by *slope* (0: Relu). Zhang et al.
    2015, section 3.2: auxiliary targets z take the place of the response within f and are coupled
    to it by a penalty; z has a closed form for each element, the factors are fitted to z.

    Args:
        method: how the kernel is written.
        ranks: as :func:`factor_shapes` takes them.
        moments: of the patches; their targets do not count.
        rows: positions to look at.
        slope: of f left of zero, for all or ``[O]``.
        start: factors to start from.
        rounds: of solving for z and for the factors.
    """
    patches = rows.patches.astype(np.float64)
    mean = patches.mean(axis=0)
    centred = patches - mean
    second = centred.T @ centred / len(patches)
    wanted = _rectified(rows.targets.astype(np.float64), slope)
    factors = list(start)
    flat = compose(method, factors).reshape(moments.cross.shape)
    bias = rows.targets.mean(axis=0) - flat @ mean
    best = (math.inf, factors, bias)
    for turn in range(rounds + 1):
        response = patches @ flat.T + bias
        error = float(np.mean((_rectified(response, slope) - wanted) ** 2))
        if error < best[0]:
            best = (error, factors, bias)
        if turn == rounds:
            break
        penalty = _PENALTIES[min(turn, len(_PENALTIES) - 1)]
        targets = _auxiliary(wanted, response, slope, penalty)
        target_mean = targets.mean(axis=0)
        ours = Moments(
            moments.kernel,
            second,
            (targets - target_mean).T @ centred / len(patches),
            mean,
            target_mean,
            float(np.sum(np.var(targets, axis=0))),
            moments.weight,
        )
        factors = fit(method, ranks, ours, start=factors, sweeps=2)
        flat = compose(method, factors).reshape(moments.cross.shape)
        bias = ours.bias(flat)
    return best[1], best[2]


def _rectified(values: Array, slope: float | Array) -> Array:
    return np.where(values > 0, values, values * slope)


def _auxiliary(wanted: Array, response: Array, slope: float | Array, penalty: float) -> Array:
    """What minimises ``(wanted - f(z))^2 + penalty (z - response)^2``, element by element."""
    above = np.maximum((wanted + penalty * response) / (1 + penalty), 0)
    below = np.minimum((slope * wanted + penalty * response) / (slope * slope + penalty), 0)
    costs = [
        (wanted - f) ** 2 + penalty * (z - response) ** 2
        for f, z in ((above, above), (slope * below, below))
    ]
    return np.where(costs[0] < costs[1], above, below)


# -- the problem of one factor ---------------------------------------------------------------------


class _Problem:
    """The response error as a function of each factor, which it is quadratic in."""

    def __init__(self, method: Method, kernel: Kernel, inputs: Array, cross: Array) -> None:
        self.method = method
        self.kernel = kernel
        self.inputs = inputs
        self.cross = cross
        self.moment6 = inputs.reshape(*kernel[1:], *kernel[1:])

    def value(self, factors: Factors) -> float:
        """The part of the error that depends on the factors."""
        flat = compose(self.method, factors).reshape(self.cross.shape)
        return float(np.sum((flat @ self.inputs - 2 * self.cross) * flat))

    def solved(self, factors: Factors, position: int, steps: int) -> Array:
        """The factor at *position* that is best beside the others."""
        others = [f for k, f in enumerate(factors) if k != position]
        labels = _operands(self.method)
        rest = [names for k, names in enumerate(labels) if k != position]
        forward = ",".join([labels[position], *rest]) + "->ocij"
        backward = ",".join(["ocij", *rest]) + "->" + labels[position]

        def normal(x: Array) -> Array:
            flat = _einsum(forward, x, *others).reshape(self.cross.shape)
            return _einsum(backward, (flat @ self.inputs).reshape(self.kernel), *others)

        target = _einsum(backward, self.cross.reshape(self.kernel), *others)
        if position == len(factors) - 1:
            return self._of_last(factors)(target)
        precondition = self._preconditioner(factors, position)
        return _conjugate_gradients(normal, target, factors[position], precondition, steps)

    def _preconditioner(self, factors: Factors, position: int) -> Callable[[Array], Array]:
        """An approximate inverse of the normal equations."""
        if self.method is Method.SEPARABLE:
            return self._of_depthwise(factors[1])
        if self.method in (Method.SPATIAL, Method.SPATIAL_REVERSED):
            return self._of_spatial(factors[1])
        if position == 1:
            return self._of_core(factors)
        return self._of_narrowing(factors)

    @cached_property
    def _own(self) -> Array:
        """Moments of what the first factor sees, as if the taps of the others were independent."""
        _, c, i, j = self.kernel
        if self.method is Method.SEPARABLE:
            own = np.einsum("cijcIJ->cijIJ", self.moment6)
        elif self.method is Method.SPATIAL:
            own = np.einsum("cijCIj->ciCI", self.moment6).reshape(c * i, c * i) / j
        elif self.method is Method.SPATIAL_REVERSED:
            own = np.einsum("cijCiJ->cjCJ", self.moment6).reshape(c * j, c * j) / i
        else:
            own = np.einsum("cijCij->cC", self.moment6) / (i * j)
        return np.asarray(own)

    @cached_property
    def _of_own(self) -> Callable[[Array], Array]:
        return _solver(self._own)

    def _of_last(self, factors: Factors) -> Callable[[Array], Array]:
        """Exact: regression on what the factors before make of the patches."""
        *inner, last = _operands(self.method)
        axes = last[1:]
        prime = str.maketrans("cijrst", "CIJRST")
        doubled = ",".join(["cijCIJ", *inner, *(names.translate(prime) for names in inner)])
        features = _einsum(
            f"{doubled}->{axes}{axes.translate(prime)}",
            self.moment6,
            *factors[:-1],
            *factors[:-1],
        )
        size = math.prod(factors[-1].shape[1:])
        solve = _solver(features.reshape(size, size))
        return lambda x: solve(x.reshape(len(x), size).T).T.reshape(x.shape)

    def _of_depthwise(self, pointwise: Array) -> Callable[[Array], Array]:
        """Exact within a channel; blind to what channels have in common."""
        channels, terms = pointwise.shape[1:]
        taps = math.prod(self.kernel[2:])
        own = self._own.reshape(channels, taps, taps)
        gram = np.einsum("oct,ocT->ctT", pointwise, pointwise)
        blocks = np.einsum("ctT,cab->ctaTb", gram, own).reshape(channels, terms * taps, -1)
        inverse = _inverses(blocks)
        return lambda x: np.einsum("cab,cb->ca", inverse, x.reshape(channels, -1)).reshape(x.shape)

    def _of_spatial(self, second: Array) -> Callable[[Array], Array]:
        """As if the taps of the second factor saw patches of the same moments, and independent."""
        right = self._of_own
        left = _solver(np.einsum("orj,oRj->rR", second, second))
        return lambda x: left(right(x.reshape(len(x), -1).T).T).reshape(x.shape)

    def _of_core(self, factors: Factors) -> Callable[[Array], Array]:
        """Exact: patches behind the narrowing on one side, the widening on the other."""
        narrowing, core, widening = factors
        features = _einsum("cijCIJ,rc,RC->rijRIJ", self.moment6, narrowing, narrowing)
        size = math.prod(core.shape[1:])
        right = _solver(features.reshape(size, size))
        left = _solver(widening.T @ widening)
        return lambda x: left(right(x.reshape(len(x), size).T).T).reshape(x.shape)

    def _of_narrowing(self, factors: Factors) -> Callable[[Array], Array]:
        """As if the taps of the kernel saw pixels of the same mean moments, and independent."""
        right = self._of_own
        rest = factors[1] if len(factors) == 2 else _einsum("srij,os->orij", *factors[1:])
        left = _solver(np.einsum("orij,oRij->rR", rest, rest))
        return lambda x: left(right(x.T).T)


def _conjugate_gradients(
    normal: Callable[[Array], Array],
    target: Array,
    x: Array,
    precondition: Callable[[Array], Array],
    steps: int,
) -> Array:
    residual = target - normal(x)
    direction = precondition(residual)
    power = float(np.vdot(residual, direction))
    enough = 1e-8 * float(np.vdot(target, precondition(target)))
    for _ in range(steps):
        if power <= enough:
            break
        image = normal(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:  # rounding: the direction is flat
            break
        length = power / curvature
        x = x + length * direction
        residual = residual - length * image
        conditioned = precondition(residual)
        before, power = power, float(np.vdot(residual, conditioned))
        direction = conditioned + (power / before) * direction
    return x


# -- decompositions -------------------------------------------------------------------------------


def _halves(parts: _Decomposition, rank: int) -> tuple[Array, Array]:
    """Left and right factor of the best approximation of that rank, of equal scale."""
    left, values, right = parts
    root = np.sqrt(values[:rank])
    missing = rank - len(root)
    return (
        np.pad(left[:, :rank] * root, ((0, 0), (0, missing))),
        np.pad(root[:, None] * right[:rank], ((0, missing), (0, 0))),
    )


def _left_vectors(matrix: Array) -> Array:
    """Its left singular vectors, the leading ones first."""
    return np.linalg.svd(matrix, full_matrices=matrix.shape[0] > matrix.shape[1])[0]


# -- small helpers ---------------------------------------------------------------------------------


def _kernel_of(weight: Array) -> Kernel:
    o, c, i, j = weight.shape
    return o, c, i, j


def _operands(method: Method) -> list[str]:
    return _EQUATIONS[method].split("->", maxsplit=1)[0].split(",")


def _rank_labels(method: Method) -> str:
    return {Method.BOTTLENECK: "rs", Method.SEPARABLE: "t"}.get(method, "r")


def _with_kernel_axes(weight: Array, labels: str) -> Array:
    """A factor whose first axes are out and in, with both axes of a kernel."""
    index = tuple(slice(None) if label in labels else None for label in "ij")
    return weight[(slice(None), slice(None), *index)]


def _einsum(equation: str, *operands: Array) -> Array:
    return np.asarray(np.einsum(equation, *operands, optimize="greedy"))


def _loaded(matrix: Array) -> Array:
    size = matrix.shape[-1]
    mean = np.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / size
    return np.asarray(matrix + (_JITTER * mean + np.finfo(float).tiny) * np.eye(size))


def _solver(matrix: Array) -> Callable[[Array], Array]:
    inverse = np.linalg.inv(_loaded(matrix))
    return lambda b: inverse @ b


def _inverses(matrices: Array) -> Array:
    return np.asarray(np.linalg.inv(_loaded(matrices)))
