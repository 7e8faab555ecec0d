from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pwopt.errors import UsageError
from pwopt.runtime import OutputDeviation, compare_outputs
from pwopt.runtime import deviation as deviation_module
from pwopt.runtime.deviation import compare_values, is_finite


def f32(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def test_deviation_is_relative_to_the_largest_reference_value() -> None:
    found = compare_values(f32(0.001, -200, 3), f32(0.002, -200, 3.5))
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_relative == pytest.approx(0.0025)
    assert (found.equal, found.problem) == (False, None)


def test_equal_values_do_not_deviate() -> None:
    values = f32(1, np.nan, np.inf, -np.inf)
    found = compare_values(values, values.copy())
    assert (found.max_abs, found.max_relative, found.equal, found.problem) == (0, 0, True, None)


def test_a_deviation_from_all_zeros_has_no_scale() -> None:
    assert compare_values(f32(0, 0), f32(0, 1e-30)).max_relative == math.inf


def test_half_precision_does_not_overflow() -> None:
    found = compare_values(np.array([60000], np.float16), np.array([-60000], np.float16))
    assert found.max_abs == pytest.approx(120000, rel=1e-3)
    assert found.max_relative == pytest.approx(2)


@pytest.mark.parametrize(
    ("reference", "candidate", "words"),
    [
        ((1, 2), (1, np.nan), "1 of 2 values are NaN or infinite"),
        ((1, 2), (-np.inf, np.inf), "2 of 2 values are NaN or infinite"),
        ((1, np.inf), (1, -np.inf), "1 of 2 values are NaN or infinite"),
        ((np.nan, 1), (np.inf, 1), "1 of 2 values are NaN or infinite"),
        ((np.nan, 1), (0, 1), "1 of 2 values lost the reference's NaN"),
    ],
)
def test_nan_and_infinity_must_be_where_the_reference_has_them(
    reference: tuple[float, ...], candidate: tuple[float, ...], words: str
) -> None:
    found = compare_values(f32(*reference), f32(*candidate))
    assert found.problem is not None
    assert words in found.problem
    assert found.max_relative == math.inf


def test_finite_values_beside_nan_are_still_compared() -> None:
    found = compare_values(f32(np.nan, 10, np.inf), f32(np.nan, 11, np.inf))
    assert found.max_abs == 1.0
    assert found.max_relative == pytest.approx(0.1)


def test_integers_booleans_and_strings_must_be_equal() -> None:
    found = compare_values(np.array([1, 2, 10]), np.array([1, 3, 10]))
    assert (found.problem, found.max_abs) == ("1 of 3 values are unequal", 1.0)
    assert compare_values(np.array([True]), np.array([False])).problem is not None
    words = np.array(["a", "b"], dtype=object)
    assert compare_values(words, words.copy()).equal
    assert compare_values(words, np.array(["a", "c"], dtype=object)).max_abs == math.inf


def test_large_integers_that_doubles_confuse_are_unequal() -> None:
    assert compare_values(np.array([2**60]), np.array([2**60 + 1])).problem is not None


def test_types_and_shapes_must_be_the_same() -> None:
    assert "float64 instead of float32" in str(compare_values(f32(1), np.array([1.0])).problem)
    assert "[2] instead of [1]" in str(compare_values(f32(1), f32(1, 1)).problem)
    assert "[1, 1] instead of [1]" in str(compare_values(f32(1), f32(1)[None]).problem)
    assert "sequence instead of float32" in str(compare_values(f32(1), [f32(1)]).problem)


def test_sequences_are_compared_element_by_element_at_their_own_scale() -> None:
    found = compare_values([f32(1000), f32(1)], [f32(1000), f32(1.5)])
    assert found.max_relative == pytest.approx(0.5)
    assert "1 elements instead of 2" in str(compare_values([f32(1), f32(1)], [f32(1)]).problem)
    assert compare_values([], []).equal
    assert compare_values([f32(1), f32(2)], [f32(1), f32(2)]).equal


def test_maps_share_one_scale_and_need_the_same_keys() -> None:
    found = compare_values([{1: 0.5, 2: 1e-9}], [{2: 2e-9, 1: 0.5}])
    assert found.max_relative == pytest.approx(2e-9)
    assert "other keys" in str(compare_values({1: 0.5}, {2: 0.5}).problem)


def test_empty_optionals_match_only_each_other() -> None:
    assert compare_values(None, None).equal
    assert "float32 instead of none" in str(compare_values(None, f32(1)).problem)


def test_outputs_larger_than_a_chunk_are_compared_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deviation_module, "_CHUNK", 4)
    reference = np.ones(11, np.float32)
    for index in range(11):
        candidate = reference.copy()
        candidate[index] = 1.25
        assert compare_values(reference, candidate).max_abs == 0.25
        candidate[index] = np.nan
        assert "1 of 11" in str(compare_values(reference, candidate).problem)
        assert not is_finite(candidate)
        whole = np.arange(11)
        whole[index] = -1
        assert "1 of 11" in str(compare_values(np.arange(11), whole).problem)


def test_empty_and_scalar_tensors_compare() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert compare_values(empty, empty).equal
    scalar = np.array(2, np.float32)
    assert compare_values(scalar, np.array(3, np.float32)).max_relative == 0.5


def test_strided_outputs_compare_by_position() -> None:
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert compare_values(base.T, np.ascontiguousarray(base.T)).equal


def test_outputs_are_judged_by_name() -> None:
    reference = {"a": f32(1, 2), "b": f32(4), "c": np.array([1])}
    candidate = {"a": f32(1, 2.002), "b": f32(4.1), "c": np.array([1])}
    a, b, c = compare_outputs(reference, candidate, {"a": 0.01, "b": 0.01})
    assert [(o.name, o.ok, o.equal) for o in (a, b, c)] == [
        ("a", True, False),
        ("b", False, False),
        ("c", True, True),
    ]
    assert all(o.ok for o in compare_outputs(reference, candidate, 0.1))
    assert isinstance(a, OutputDeviation)
    assert a.tested


def test_outputs_need_the_same_names() -> None:
    with pytest.raises(UsageError, match="are not the reference's"):
        compare_outputs({"a": f32(1)}, {"b": f32(1)})
