"""Thin factors of kernels: exact where there are some, best on data where not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pwopt.numerics import lowrank
from pwopt.numerics.lowrank import Kernel, Method, Moments, Rows

Array = np.ndarray[Any, Any]

KERNEL: Kernel = (6, 5, 3, 2)
RANKS = {Method.BOTTLENECK: (3, 4), Method.SEPARABLE: (2,)}


def kernel_of(method: Method) -> Kernel:
    return (6, 5, 1, 1) if method is Method.POINTWISE else KERNEL


def planted(method: Method, rng: np.random.Generator) -> tuple[Array, tuple[int, ...]]:
    ranks = RANKS.get(method, (3,))
    shapes = lowrank.factor_shapes(method, kernel_of(method), ranks)
    return lowrank.compose(method, [rng.standard_normal(s) for s in shapes]), ranks


def second_moments(size: int, rng: np.random.Generator) -> Array:
    """Of patches with very unequal directions, as images have."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    moments: Array = (basis * np.logspace(0, -3, size)) @ basis.T
    return moments


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("on_data", [False, True])
def test_a_planted_kernel_is_recovered(method: Method, on_data: bool) -> None:
    rng = np.random.default_rng(0)
    weight, ranks = planted(method, rng)
    moments = Moments.of_weight(weight)
    if on_data:
        size = weight[0].size
        inputs = second_moments(size, rng)
        moments = Moments.of_response(weight, np.ones(6), inputs, rng.standard_normal(size))
    factors = lowrank.fit(method, ranks, moments, sweeps=60, steps=60)
    assert [f.shape for f in factors] == lowrank.factor_shapes(method, weight.shape, ranks)
    np.testing.assert_allclose(lowrank.compose(method, factors), weight, atol=1e-3)
    assert moments.error(lowrank.compose(method, factors)) < 1e-8


@pytest.mark.parametrize("method", Method)
def test_full_rank_represents_any_kernel(method: Method) -> None:
    """The rank conditions: 1x1-KxK needs min(Cin, Cout K K) channels, KxK-1x1 min(Cout, Cin K K),
    Kx1-1xK min(Cin K, Cout K), depthwise-pointwise min(K K, Cout) pairs."""
    rng = np.random.default_rng(1)
    for kernel in (
        kernel_of(method),
        (2, 5, *kernel_of(method)[2:]),
        (9, 1, *kernel_of(method)[2:]),
    ):
        weight = rng.standard_normal(kernel)
        ranks = lowrank.full_ranks(method, kernel)
        factors = lowrank.fit(method, ranks, Moments.of_weight(weight))
        np.testing.assert_allclose(lowrank.compose(method, factors), weight, atol=1e-8)


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.SEPARABLE])
def test_less_than_full_rank_does_not(method: Method) -> None:
    weight = np.random.default_rng(2).standard_normal(kernel_of(method))
    full = lowrank.full_ranks(method, weight.shape)
    moments = Moments.of_weight(weight)
    for position in range(len(full)):
        ranks = [r - (k == position) for k, r in enumerate(full)]
        factors = lowrank.fit(method, ranks, moments, sweeps=30)
        assert moments.error(lowrank.compose(method, factors)) > 1e-3


def test_costs_are_those_of_the_papers() -> None:
    o, c, k = 48, 32, 3
    kernel = (o, c, k, k)
    whole = math.prod(kernel)
    for t in (1, 2, 3):  # network decoupling: t (1 / Cout + 1 / k^2) of the convolution
        ratio = lowrank.cost(Method.SEPARABLE, kernel, (t,)) / whole
        assert ratio == pytest.approx(t * (1 / o + 1 / k**2))
    assert lowrank.cost(Method.SPATIAL, kernel, (20,)) == 20 * k * (c + o)
    assert lowrank.cost(Method.CHANNEL_OUT, kernel, (20,)) == 20 * (c * k * k + o)
    assert lowrank.cost(Method.CHANNEL_IN, kernel, (20,)) == 20 * (c + o * k * k)
    assert lowrank.cost(Method.BOTTLENECK, kernel, (8, 12)) == 8 * c + 8 * 12 * k * k + 12 * o
    assert lowrank.cost(Method.POINTWISE, (o, c, 1, 1), (8,)) == 8 * (c + o)
    # What stands before a stride works on all pixels.
    assert lowrank.cost(Method.CHANNEL_IN, kernel, (20,), (2, 2)) == 20 * (4 * c + o * k * k)
    assert lowrank.cost(Method.SPATIAL, kernel, (20,), (2, 2)) == 20 * k * (2 * c + o)
    assert lowrank.cost(Method.CHANNEL_OUT, kernel, (20,), (2, 2)) == 20 * (c * k * k + o)


@pytest.mark.parametrize("method", Method)
def test_data_helps(method: Method) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(kernel_of(method))
    size = weight[0].size
    moments = Moments.of_response(weight, np.zeros(6), second_moments(size, rng), np.zeros(size))
    ranks = RANKS.get(method, (2,)) if method is not Method.SEPARABLE else (1,)
    blind = lowrank.fit(method, ranks, Moments.of_weight(weight))
    seeing = lowrank.fit(method, ranks, moments, sweeps=20)
    errors = [moments.error(lowrank.compose(method, f)) for f in (blind, seeing)]
    assert errors[1] < 0.7 * errors[0]


def test_reduced_rank_regression_is_the_optimum() -> None:
    """No other factors of that rank do better: alternating from many starts ends no lower."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((6, 5, 1, 2))
    moments = Moments.of_response(weight, np.zeros(6), second_moments(10, rng), np.zeros(10))
    best = moments.error(
        lowrank.compose(Method.CHANNEL_OUT, lowrank.fit(Method.CHANNEL_OUT, (3,), moments))
    )
    lower = np.linalg.cholesky(moments.inputs)
    values = np.linalg.svd(weight.reshape(6, -1) @ lower, compute_uv=False) ** 2
    assert best == pytest.approx(values[3:].sum() / values.sum(), rel=1e-4)


def samples(rng: np.random.Generator, count: int = 4000) -> tuple[Array, Array, Array, Array]:
    """Patches, those of a disturbed network, a kernel and its targets."""
    weight = rng.standard_normal((6, 5, 3, 2))
    patches = rng.standard_normal((count, 30)) @ np.diag(np.logspace(0.5, -1, 30)) + 0.3
    disturbed = patches @ (np.eye(30) + 0.1 * rng.standard_normal((30, 30))) + 0.2
    return patches, disturbed, weight, patches @ weight.reshape(6, -1).T + 0.5


def moments_of(patches: Array, targets: Array, weight: Array) -> Moments:
    mean, wanted = patches.mean(0), targets.mean(0)
    centred = patches - mean
    return Moments(
        weight.shape,
        centred.T @ centred / len(patches),
        (targets - wanted).T @ centred / len(patches),
        mean,
        wanted,
        float(np.var(targets, axis=0).sum()),
        weight.reshape(len(weight), -1),
    )


def test_moments_say_what_rows_say() -> None:
    rng = np.random.default_rng(5)
    _, disturbed, weight, targets = samples(rng)
    moments = moments_of(disturbed, targets, weight)
    other = np.asarray(rng.standard_normal(weight.shape))
    response = disturbed @ other.reshape(6, -1).T + moments.bias(other)
    expected = np.mean(np.sum((targets - response) ** 2, axis=1))
    assert moments.error(other) == pytest.approx(expected / moments.power)
    np.testing.assert_allclose(response.mean(0), targets.mean(0))


def test_asymmetric_fits_make_up_for_what_happened_before() -> None:
    rng = np.random.default_rng(6)
    patches, disturbed, weight, targets = samples(rng)
    asymmetric = moments_of(disturbed, targets, weight)
    symmetric = moments_of(patches, targets, weight)
    errors = [
        asymmetric.error(
            lowrank.compose(Method.SPATIAL, lowrank.fit(Method.SPATIAL, (8,), moments))
        )
        for moments in (symmetric, asymmetric)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_fits_that_see_the_activation_are_closer_behind_it(slope: float) -> None:
    rng = np.random.default_rng(7)
    patches, _, weight, targets = samples(rng)
    targets = targets - 2.0
    moments = moments_of(patches, targets, weight)
    start = lowrank.fit(Method.SPATIAL, (4,), moments)
    rows = Rows(patches, targets)
    factors, bias = lowrank.fit_rectified(
        Method.SPATIAL, (4,), moments, rows, slope, start=start, rounds=4
    )

    def error(kernel: Array, bias: Array) -> float:
        wanted, found = (
            np.where(v > 0, v, slope * v)
            for v in (targets, patches @ kernel.reshape(6, -1).T + bias)
        )
        return float(np.mean((wanted - found) ** 2))

    plain = lowrank.compose(Method.SPATIAL, start)
    assert error(lowrank.compose(Method.SPATIAL, factors), bias) < 0.98 * error(
        plain, moments.bias(plain)
    )
    unseen = lowrank.fit_rectified(Method.SPATIAL, (4,), moments, rows, 1.0, start=start, rounds=2)
    np.testing.assert_allclose(unseen[1], moments.bias(plain), atol=0.1)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_patches_that_never_change_leave_the_weights_to_be_kept(
    method: Method, value: float
) -> None:
    """Channels behind a Relu may be dead; moments of what is constant hold rounding at most."""
    rng = np.random.default_rng(10)
    weight = rng.standard_normal(kernel_of(method))
    size = weight[0].size
    dust = 1e-16 * value * rng.standard_normal((size, size))
    dust = dust + dust.T
    moments = Moments.of_response(weight, np.ones(len(weight)), dust, np.full(size, value))
    ranks = {Method.BOTTLENECK: (2, 2), Method.SEPARABLE: (1,)}.get(method, (2,))
    for sweeps, steps in ((1, 1), (8, 16)):
        found = lowrank.fit(method, ranks, moments, sweeps=sweeps, steps=steps)
        blind = lowrank.fit(method, ranks, Moments.of_weight(weight), sweeps=sweeps, steps=steps)
        np.testing.assert_allclose(
            lowrank.compose(method, found), lowrank.compose(method, blind), atol=1e-6
        )


def test_stages_of_groups_are_weights_of_convolutions() -> None:
    rng = np.random.default_rng(8)
    for method in Method:
        ranks = RANKS.get(method, (3,))
        shapes = lowrank.factor_shapes(method, kernel_of(method), ranks)
        groups = [[rng.standard_normal(s) for s in shapes] for _ in range(2)]
        chains = lowrank.stages(method, groups)
        assert len(chains) == (2 if method is Method.SEPARABLE else 1)
        for chain in chains:
            first, last = chain[0], chain[-1]
            assert last.shape[0] == 12
            assert first.shape[1] == (1 if method is Method.SEPARABLE else 5)
            heights, widths = zip(*(w.shape[2:] for w in chain), strict=True)
            assert (max(heights), max(widths)) == kernel_of(method)[2:]
