"""The hand-weighted networks give exactly the right answer, for all inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pwopt import models

Array = npt.NDArray[np.float32]
SIDE = 16


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def answer(name: str, first: Array, second: Array) -> Array:
    """What the model says about pairs, given as two flat arrays."""
    pixels = SIDE * SIDE
    missing = -len(first) % pixels
    planes = [np.pad(values, (0, missing)).reshape(-1, SIDE, SIDE) for values in (first, second)]
    images = np.stack(planes, axis=1).astype(np.float32)
    (result,) = session(models.build(name, batch="N")).run(None, {"input": images})
    flat: Array = np.asarray(result).reshape(-1)
    return flat[: len(first)]


def test_xor_of_every_pair_of_bits() -> None:
    bits = np.arange(SIDE * SIDE)
    first, second = (bits & 1).astype(np.float32), (bits >> 1 & 1).astype(np.float32)
    np.testing.assert_array_equal(answer("xor", first, second), np.not_equal(first, second))


def test_xor_has_the_published_form() -> None:
    (image,) = np.array([[[[0.5]], [[0.75]]]], np.float32)
    pixels = np.broadcast_to(image, (1, 2, SIDE, SIDE))
    (result,) = session(models.build("xor")).run(None, {"input": pixels.astype(np.float32)})
    np.testing.assert_array_equal(result, np.full((1, 1, SIDE, SIDE), 1.25 - 2 * 0.25, np.float32))


def test_distance_of_every_pair_of_grey_levels() -> None:
    first, second = (grid.ravel() for grid in np.mgrid[0:256, 0:256].astype(np.float32))
    np.testing.assert_array_equal(answer("abs_difference", first, second), np.abs(first - second))


@given(
    arrays.arrays(
        np.float32,
        (2, SIDE * SIDE),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_distance_of_any_numbers_is_the_rounded_difference(pair: Array) -> None:
    first, second = pair
    expected: Array = np.abs(first - second)
    # The runtime may flush results below the normal range to zero.
    atol = float(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(
        answer("abs_difference", first, second), expected, rtol=0.0, atol=atol
    )


@pytest.mark.parametrize("name", ["xor", "abs_difference"])
def test_seed_does_not_matter(name: str) -> None:
    one, two = (models.build(name, seed=seed).SerializeToString() for seed in (0, 1))
    assert one == two
