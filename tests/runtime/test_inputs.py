from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pwopt.errors import UsageError
from pwopt.runtime import (
    Feeds,
    Interface,
    TensorSpec,
    UnsupportedInputError,
    UntestableError,
    concrete_shapes,
    load_inputs,
    make_inputs,
    open_session,
)
from pwopt.target import Target
from tests.runtime.textual import write


def spec(name: str, *shape: int | str | None, element: str = "float") -> TensorSpec:
    return TensorSpec(name, f"tensor({element})", shape)


def array(feeds: Feeds, name: str) -> npt.NDArray[Any]:
    value = feeds[name]
    assert isinstance(value, np.ndarray)
    return value


def made(
    *specs: TensorSpec, sets: int = 3, seed: int = 0, **shapes: tuple[int, ...]
) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return make_inputs(specs, Target(input_shapes=shapes), rng, sets=sets)


def test_static_shapes_are_taken_from_the_model() -> None:
    assert concrete_shapes([spec("x", 2, 3), spec("s")], Target()) == {"x": (2, 3), "s": ()}


@pytest.mark.parametrize("batch", ["N", None])
def test_an_unknown_first_axis_is_a_batch_of_one(batch: str | None) -> None:
    assert concrete_shapes([spec("x", batch, 3, 8, 8)], Target()) == {"x": (1, 3, 8, 8)}


def test_given_shapes_fix_dynamic_axes_and_their_symbols_everywhere() -> None:
    inputs = [spec("mask", "N", "H"), spec("x", "N", 3, "H", "W")]
    shapes = concrete_shapes(inputs, Target(input_shapes={"x": (4, 3, 10, 12)}))
    assert shapes == {"mask": (4, 10), "x": (4, 3, 10, 12)}


def test_a_batch_symbol_is_one_wherever_it_stands() -> None:
    inputs = [spec("late", 3, "N"), spec("x", "N", 3)]
    assert concrete_shapes(inputs, Target()) == {"late": (3, 1), "x": (1, 3)}


def test_unknown_dimensions_raise_with_the_option_to_give() -> None:
    with pytest.raises(UsageError) as caught:
        concrete_shapes([spec("data", "N", 3, "H", None)], Target())
    assert "Input 'data' has unknown dimensions ['H', '?']" in str(caught.value)
    assert "--input-shape data:1x3x224x224" in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": (1,)}, "names 'y', but the inputs are 'x', 'z'"),
        ({"x": (1, 4, 8)}, "contradicts the model, whose input 'x' is Nx3xH"),
        ({"x": (1, 3)}, "has 2 axes, but input 'x' has 3"),
        ({"x": (1, 3, -1)}, "negative"),
        ({"x": (1, 3, 8), "z": (9,)}, "dimension 'H' the size 9, but it is 8"),
    ],
)
def test_contradicting_shapes_are_usage_errors(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        concrete_shapes([spec("x", "N", 3, "H"), spec("z", "H")], Target(input_shapes=shapes))


def test_a_shape_may_be_given_where_the_rank_is_unknown() -> None:
    assert concrete_shapes([spec("x")], Target(input_shapes={"x": (2, 3)})) == {"x": (2, 3)}


def test_float_sets_cover_the_scales_networks_expect() -> None:
    normal, unit, pixels = (array(f, "x") for f in made(spec("x", 1, 3, 40, 40)))
    assert {a.dtype for a in (normal, unit, pixels)} == {np.dtype(np.float32)}
    assert abs(normal.mean()) < 0.1
    assert normal.std() == pytest.approx(1, abs=0.1)
    assert (unit.min() >= 0, unit.max() < 1, unit.mean()) == (
        True,
        True,
        pytest.approx(0.5, abs=0.05),
    )
    assert pixels.max() > 200
    assert pixels.min() >= 0
    assert pixels.mean() == pytest.approx(127.5, rel=0.1)


def test_vectors_are_taken_for_parameters_not_images() -> None:
    values = array(made(spec("scale", 500))[2], "scale")
    assert 1 <= values.min() < values.max() < 2


def test_sets_beyond_three_are_new_draws_of_the_same_kinds() -> None:
    feeds = made(spec("x", 4, 5), sets=5)
    assert not np.array_equal(array(feeds[0], "x"), array(feeds[3], "x"))
    assert array(feeds[4], "x").min() >= 0


def test_inputs_follow_the_seed() -> None:
    first, again, other = (array(made(spec("x", 9), seed=s)[0], "x") for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("element", ["float16", "double", "float"])
def test_floats_have_the_inputs_own_type(element: str) -> None:
    only = spec("x", 3, 3, element=element)
    assert {array(f, "x").dtype for f in made(only)} == {only.dtype}


@pytest.mark.parametrize("element", ["int8", "uint8", "int32", "int64", "uint64"])
def test_integers_are_small_and_not_negative(element: str) -> None:
    values = [array(f, "x") for f in made(spec("x", 2000, element=element))]
    assert {v.dtype for v in values} == {spec("x", element=element).dtype}
    assert min(v.min() for v in values) == 0
    largest = [int(v.max()) for v in values]
    assert largest[:2] == [9, 1]
    assert largest[2] == {"int8": 127, "uint8": 255}.get(element, 3)


def test_booleans_strings_and_scalars() -> None:
    feeds = made(spec("b", 500, element="bool"), spec("w", 2, element="string"), spec("s"))[0]
    assert array(feeds, "b").dtype == np.bool_
    assert 0.3 < array(feeds, "b").mean() < 0.7
    assert all(isinstance(word, str) for word in array(feeds, "w"))
    assert array(feeds, "s").shape == ()


@pytest.mark.parametrize(
    "element", ["float", "double", "int64", "uint8", "bool", "string", "float16"]
)
def test_made_inputs_are_accepted_by_a_session(tmp_path: Path, element: str) -> None:
    path = write(
        tmp_path,
        f"g ({element}[N,2] x, {element} s) => ({element}[N,2] y, {element} t) "
        "{ y = Identity(x) t = Identity(s) }",
    )
    with open_session(path, Target(threads=1)) as session:
        for feeds in make_inputs(session.interface.inputs, Target(), np.random.default_rng(0)):
            outputs = session.run(feeds)
            np.testing.assert_array_equal(np.asarray(outputs["y"]), array(feeds, "x"))
            np.testing.assert_array_equal(np.asarray(outputs["t"]), array(feeds, "s"))


@pytest.mark.parametrize("type_", ["seq(tensor(float))", "optional(tensor(float))", "tensor(int4)"])
def test_other_types_cannot_be_made_up(type_: str) -> None:
    with pytest.raises(UnsupportedInputError, match="'x' has type"):
        made(TensorSpec("x", type_, ()))
    assert issubclass(UnsupportedInputError, UntestableError)


def loaded(path: Path, *specs: TensorSpec, chunk: int = 32, **arrays: Any) -> list[Feeds]:
    np.savez(path / "in.npz", **arrays)
    return load_inputs(path / "in.npz", Interface(specs, ()), chunk=chunk)


def test_a_fixed_batch_splits_the_leading_axis(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    feeds = loaded(tmp_path, spec("x", 2, 3), x=x)
    assert len(feeds) == 4
    np.testing.assert_array_equal(array(feeds[1], "x"), x[2:4])


def test_a_dynamic_batch_is_cut_into_chunks(tmp_path: Path) -> None:
    x, z = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7)
    feeds = loaded(tmp_path, spec("x", "N", 2), spec("z", "N", element="int64"), chunk=3, x=x, z=z)
    assert [array(f, "x").shape[0] for f in feeds] == [3, 3, 1]
    assert [array(f, "z").tolist() for f in feeds] == [[0, 1, 2], [3, 4, 5], [6]]


def test_different_dynamic_lengths_are_left_whole(tmp_path: Path) -> None:
    x, z = np.zeros((5, 2), np.float32), np.zeros((40, 4), np.float32)
    (feeds,) = loaded(tmp_path, spec("x", "N", 2), spec("z", "M", 4), chunk=3, x=x, z=z)
    assert (array(feeds, "x").shape, array(feeds, "z").shape) == ((5, 2), (40, 4))


def test_one_more_axis_counts_sets_and_single_sets_serve_all(tmp_path: Path) -> None:
    x, scale = np.arange(12, dtype=np.float32).reshape(3, 1, 4), np.ones(2, np.float32)
    feeds = loaded(tmp_path, spec("x", "N", 4), spec("scale", 2), x=x, scale=scale)
    assert len(feeds) == 3
    np.testing.assert_array_equal(array(feeds[2], "x"), x[2])
    assert all(array(f, "scale").tolist() == [1, 1] for f in feeds)


def test_npy_serves_a_single_input_and_is_cast(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.uint8).reshape(2, 3))
    feeds = load_inputs(tmp_path / "x.npy", Interface((spec("x", 1, 3),), ()))
    assert [array(f, "x").tolist() for f in feeds] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert array(feeds[0], "x").dtype == np.float32


def test_strings_are_loaded_as_objects(tmp_path: Path) -> None:
    (feeds,) = loaded(tmp_path, spec("w", 2, element="string"), w=np.array(["a", "bc"]))
    assert array(feeds, "w").dtype == np.object_
    assert array(feeds, "w").tolist() == ["a", "bc"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((1, 3))}, "holds 'y', but the inputs are 'x'"),
        ({"x": np.zeros((1, 4))}, "'x' has shape 1x4, which does not fit the input's 2x3"),
        ({"x": np.zeros((3, 3))}, "shape 3x3"),
        ({"x": np.zeros((0, 3))}, "shape 0x3"),
        ({"x": np.zeros((2, 3), np.complex64)}, "holds complex64, the input takes float32"),
    ],
)
def test_unfit_arrays_are_usage_errors(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loaded(tmp_path, spec("x", 2, 3), **arrays)


def test_floats_are_not_cast_to_integers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds float64, the input takes int64"):
        loaded(tmp_path, spec("x", 2, element="int64"), x=np.array([0.5, 1.5]))


def test_unequal_numbers_of_sets_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="different numbers of sets"):
        loaded(tmp_path, spec("x", 1), spec("z", 1), x=np.zeros(3), z=np.zeros(2))


def test_unreadable_files_are_usage_errors(tmp_path: Path) -> None:
    interface = Interface((spec("x", 1),), ())
    for content in (b"", b"PK\x03\x04 cut off", b"no array"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            load_inputs(tmp_path / "bad.npz", interface)
    with pytest.raises(UsageError, match="cannot be read"):
        load_inputs(tmp_path / "none.npz", interface)
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        load_inputs(tmp_path / "pickled.npy", interface)


def test_a_single_array_needs_a_single_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(1))
    with pytest.raises(UsageError, match=r"one array, but the inputs are 'x', 'z'. Use .npz"):
        load_inputs(tmp_path / "x.npy", Interface((spec("x", 1), spec("z", 1)), ()))
