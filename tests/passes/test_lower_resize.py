"""Interpolation by constant factors as convolutions on a padded image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes.lower_resize import LowerResize
from tests import zoo
from tests.passes import harness

Why = LowerResize.Why
Dims = tuple[int | str | None, ...]

SHRINKING = ["separable", "depthwise", "dense"]


def resize(
    *factors: float,
    mode: str = "cubic",
    batch: int | str = 2,
    channels: int | str = 3,
    size: Dims = (8, 12),
    sizes: Sequence[int] | None = None,
    opset: int = 17,
    ir: int = 8,
    dtype: Any = np.float32,
    lead: Sequence[float] = (1, 1),
    **attributes: Any,
) -> onnx.ModelProto:
    weights: dict[str, Any] = {}
    if sizes is not None:
        weights["sizes"] = np.array(sizes, np.int64)
        inputs = ["x", "", "", "sizes"]
    else:
        weights["scales"] = np.array([*lead, *factors], np.float32)
        inputs = ["x", "scales"] if opset < 11 else ["x", "", "scales"]
        if 11 <= opset < 13:
            weights["roi"] = np.zeros(0, np.float32)
            inputs[1] = "roi"
    return harness.model(
        [harness.node("Resize", inputs, ["y"], mode=mode, **attributes)],
        {"x": (batch, channels, *size)},
        {"y": None},
        weights,
        opset=opset,
        ir=ir,
        dtype=dtype,
    )


def lower(proto: onnx.ModelProto, variant: str | None = None, **options: Any) -> harness.Outcome:
    return harness.run_pass(LowerResize(), proto, variant, **options)


def variants(proto: onnx.ModelProto) -> list[str]:
    return harness.offered(LowerResize(), proto)


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    harness.assert_same_outputs(before, after, np.random.default_rng(0), factor=2.0, **dims)


def check_all(before: onnx.ModelProto, **dims: int) -> list[str]:
    return harness.assert_every_variant_agrees(LowerResize(), before, factor=2.0, **dims)


# -- golden ----------------------------------------------------------------------------------------


def test_halving() -> None:
    before = resize(0.5, 0.5)
    assert check_all(before) == SHRINKING
    assert lower(before, "depthwise").ops == ["Pad", "Conv"]
    assert lower(before, "separable").ops == ["Pad", "Conv", "Conv"]
    assert lower(before, "dense").ops == ["Pad", "Conv"]
    assert lower(before).model.graph.node[-1].output == ["y"]


def test_doubling() -> None:
    before = resize(2, 2)
    assert check_all(before) == ["transpose", "depth-to-space"]
    assert lower(before, "depth-to-space").ops == ["Pad", "Conv", "DepthToSpace"]


def test_many_channels_are_convolved_each_by_itself() -> None:
    assert check_all(resize(0.5, 0.5, channels=9)) == ["separable", "depthwise"]
    before = resize(2, 2, channels=9)
    assert check_all(before) == ["transpose", "channels-last", "depth-to-space"]
    ops = ["Pad", *["Conv"] * 4, "Concat", "DepthToSpace"]
    assert lower(before, "depth-to-space").ops == ops


def test_one_axis() -> None:
    assert check_all(resize(1, 0.5)) == ["depthwise", "dense"]
    assert check_all(resize(4, 1)) == ["transpose"]
    assert check_all(resize(0.5, 2)) == ["transpose"]


def test_one_channel() -> None:
    assert check_all(resize(0.5, 0.5, channels=1)) == ["separable", "depthwise"]


@pytest.mark.parametrize("size", [(9, 13), (2, 3), (11, 10)])
def test_sizes_that_leave_a_rest(size: tuple[int, int]) -> None:
    check_all(resize(0.5, 0.5, size=size))
    check_all(resize(1.5, 0.75, size=size))


def test_fractions() -> None:
    check_all(resize(1 / 3, 2 / 3, size=(9, 15)))
    check_all(resize(0.4, 1.25, size=(10, 16)))
    check_all(resize(1, 8 / 3, size=(4, 6)))


def test_linear_shrinking_needs_no_padding() -> None:
    before = resize(0.5, 0.25, mode="linear")
    check_all(before)
    assert lower(before, "depthwise").ops == ["Conv"]


@pytest.mark.parametrize("mode", ["asymmetric", "half_pixel", "pytorch_half_pixel"])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_coordinates(mode: str, factor: float) -> None:
    check_all(resize(factor, factor, coordinate_transformation_mode=mode))


def test_symmetric_coordinates_without_a_rest() -> None:
    mode = {"coordinate_transformation_mode": "half_pixel_symmetric"}
    check_all(resize(0.5, 2, opset=19, **mode))  # type: ignore[arg-type]


def test_coefficient() -> None:
    check_all(resize(0.5, 2, cubic_coeff_a=-0.5))


def test_given_sizes() -> None:
    check_all(resize(sizes=[2, 3, 16, 6]))
    check_all(resize(sizes=[2, 3, 12, 16]))


def test_old_opsets() -> None:
    check_all(resize(0.5, 0.5, mode="linear", opset=10))
    check_all(resize(0.5, 0.5, opset=11))


def test_images_of_any_size() -> None:
    shrunk = resize(0.5, 0.25, batch="N", size=("H", "W"))
    assert check_all(shrunk, N=2, H=9, W=14) == SHRINKING
    grown = resize(2, 2, size=("H", "W"))
    assert check_all(grown, H=5, W=4) == ["depth-to-space"]
    assert check_all(resize(2, 4, size=("H", 4)), H=5) == ["transpose"]
    check_all(resize(1, 0.5, size=("H", 4)), H=5)


# -- reasons to decline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """A model at which the pass must decline for one reason."""

    proto: Callable[[], onnx.ModelProto]
    facts: dict[str, Any] = field(default_factory=dict)


def fed() -> onnx.ModelProto:
    nodes = [harness.node("Resize", ["x", "", "scales"], ["y"], mode="cubic")]
    inputs = {"x": (1, 3, 8, 8), "scales": (4,)}
    return harness.model(nodes, inputs, {"y": (1, 3, "H", "W")})


def volume() -> onnx.ModelProto:
    nodes = [harness.node("Resize", ["x", "", "scales"], ["y"], mode="linear")]
    scales = {"scales": np.array([1, 1, 0.5, 0.5, 0.5], np.float32)}
    return harness.model(nodes, {"x": (1, 3, 4, 4, 4)}, {"y": None}, scales)


DECLINED = {
    Why.NEAREST: Declined(lambda: resize(2, 2, mode="nearest")),
    Why.LINEAR_ENLARGING: Declined(lambda: resize(2, 2, mode="linear")),
    Why.COORDINATES: Declined(
        lambda: resize(2, 2, coordinate_transformation_mode="align_corners"),
        {"mode": "align_corners"},
    ),
    Why.BORDER_WEIGHTS: Declined(
        lambda: resize(0.5, 0.5, exclude_outside=1), {"because": "exclude_outside"}
    ),
    Why.FACTORS_UNKNOWN: Declined(fed),
    Why.FACTORS: Declined(lambda: resize(0.3, 0.5, size=(10, 10))),
    Why.NOT_TWO_DIMENSIONAL: Declined(volume),
    Why.CHANNELS_UNKNOWN: Declined(lambda: resize(0.5, 0.5, channels="C")),
    Why.SIZE_UNKNOWN: Declined(lambda: resize(1.5, 1.5, size=("H", "W"))),
    Why.ELEMENT_TYPE: Declined(lambda: resize(0.5, 0.5, mode="linear", dtype=np.uint8)),
}


def test_every_reason_has_a_test() -> None:
    assert set(DECLINED) == set(Why)


@pytest.mark.parametrize("why", Why, ids=lambda w: w.value)
def test_declines(why: Why) -> None:
    case = DECLINED[why]
    after = lower(case.proto())
    (remark,) = after.remarks
    assert remark.reason == why.value
    assert {k: remark.facts[k] for k in case.facts} == case.facts


@pytest.mark.parametrize(
    ("why", "build"),
    [
        (Why.FACTORS, lambda: resize(1, 1)),
        (Why.FACTORS, lambda: resize(8, 8)),
        (Why.FACTORS, lambda: resize(1, 2, lead=(1, 2))),
        (Why.BORDER_WEIGHTS, lambda: resize(0.5, 0.5, antialias=1, opset=18)),
        (Why.SIZE_UNKNOWN, lambda: resize(1 / 3, 1, size=("H", 8))),
        (Why.SIZE_UNKNOWN, lambda: resize(2, 1, size=(8, "W"))),
        (Why.SIZE_UNKNOWN, lambda: resize(0.5, 1, size=(1, 8))),
        (
            Why.COORDINATES,
            lambda: resize(
                0.5, 1, size=(9, 8), coordinate_transformation_mode="half_pixel_symmetric", opset=19
            ),
        ),
        (
            Why.COORDINATES,
            lambda: resize(
                0.5, 1, size=(3, 8), coordinate_transformation_mode="pytorch_half_pixel"
            ),
        ),
    ],
)
def test_further_ways_to_decline(why: Why, build: Callable[[], onnx.ModelProto]) -> None:
    assert lower(build()).reasons == {why.value}


# -- properties ------------------------------------------------------------------------------------

Drawn = tuple[onnx.ModelProto, dict[str, int], int]
"""A model, its unknown dimensions, and which variant to take."""

FACTORS = sorted(
    {Fraction(u, v) for u in range(1, 5) for v in range(1, 5)} | {Fraction(8), Fraction(1, 8)}
)


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    is_cubic = draw(st.sampled_from([True, True, False]))
    suited = [f for f in FACTORS if is_cubic or f <= 1]
    dims: dict[str, int] = {}
    factors: list[Fraction] = []
    shape: list[int | str] = [draw(st.integers(1, 2))]
    for name in "HW":
        factor = draw(st.sampled_from([f for f in suited if f * max([Fraction(1), *factors]) <= 8]))
        size = draw(st.integers(-(-factor.denominator // factor.numerator), 14))
        factors.append(factor)
        is_dyadic = factor in (1, 2, 4, 8, Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
        if is_dyadic and draw(st.sampled_from([False, False, True])):
            dims[name] = size
        shape.append(name if name in dims else size)
    mode = draw(st.sampled_from(["half_pixel", "asymmetric", "pytorch_half_pixel"]))
    proto = resize(
        *(float(f) for f in factors),
        mode="cubic" if is_cubic else "linear",
        batch=shape[0],
        channels=draw(st.sampled_from([1, 2, 3, 9])),
        size=tuple(shape[1:]),
        opset=draw(st.sampled_from([11, 13, 18, 22, harness.NEWEST_OPSET])),
        dtype=draw(st.sampled_from([np.float32, np.float32, np.float16])),
        coordinate_transformation_mode=mode,
        cubic_coeff_a=draw(st.sampled_from([-0.75, -0.5])),
    )
    return proto, dims, draw(st.integers(0, 5))


def check_model(drawn: Drawn) -> None:
    before, dims, choice = drawn
    after = lower(before)
    if not after.applied:
        assert after.reasons <= {r.value for r in (Why.FACTORS, Why.COORDINATES, Why.SIZE_UNKNOWN)}
        return
    names = variants(before)
    check(before, lower(before, names[choice % len(names)]).model, **dims)


@settings(max_examples=50, deadline=None)
@given(models())
def test_any_factors(drawn: Drawn) -> None:
    check_model(drawn)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(models())
def test_any_factors_at_length(drawn: Drawn) -> None:
    check_model(drawn)


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.zoo
def test_a_trained_network() -> None:
    before = zoo.trained("realesr_animevideov3_x2.onnx")
    after = lower(before)
    assert after.applied == 1
    assert after.reasons == {Why.NEAREST.value}
    dims = {"H": 24, "W": 30}
    harness.assert_same_outputs(before, after.model, np.random.default_rng(0), factor=8.0, **dims)
