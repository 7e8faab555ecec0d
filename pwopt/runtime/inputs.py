"""Input sets for running a model: generated at realistic scale, or loaded from a file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from pwopt.errors import UsageError
from pwopt.runtime.session import (
    Feeds,
    Interface,
    TensorSpec,
    UntestableError,
    open_session,
    reference_target,
)
from pwopt.target import Target

__all__ = [
    "UnsupportedInputError",
    "concrete_shapes",
    "input_sets",
    "load_inputs",
    "make_inputs",
]

_WORDS: Final = ("red", "green", "blue", "one", "two", "three", "north", "south")
_TRUTHS: Final = frozenset({"labels", "targets"})
_PIXEL_DTYPES: Final = frozenset({"uint8", "int8", "uint16", "int16"})


class UnsupportedInputError(UntestableError):
    """No values can be made up for an input of this type, so the model cannot be tested."""


def concrete_shapes(inputs: Sequence[TensorSpec], target: Target) -> dict[str, tuple[int, ...]]:
    """Sizes for all axes of all *inputs*.

    Taken from ``target.input_shapes``, else from the model. A dynamic *first* axis that nothing
    fixes is taken for the batch and becomes 1; any other one must be given. Axes that share a
    symbol get the same size, also across inputs.

    Raises:
        UsageError: a given shape names an unknown input or contradicts the model, or an axis that
            is needed is missing; the message shows the option to give.
    """
    unknown = [name for name in target.input_shapes if name not in {spec.name for spec in inputs}]
    if unknown:
        names = ", ".join(f"'{spec.name}'" for spec in inputs) or "none"
        raise UsageError(f"--input-shape names '{unknown[0]}', but the inputs are {names}.")
    symbols: dict[str, int] = {}
    for spec in inputs:
        if spec.name in target.input_shapes:
            _bind_given(spec, target.input_shapes[spec.name], symbols)
    for spec in inputs:
        batch = spec.shape[0] if spec.shape else None
        if spec.name not in target.input_shapes and isinstance(batch, str):
            symbols.setdefault(batch, 1)
    return {
        spec.name: target.input_shapes[spec.name]
        if spec.name in target.input_shapes
        else _bound(spec, symbols)
        for spec in inputs
    }


def make_inputs(
    interface_inputs: Sequence[TensorSpec],
    target: Target,
    rng: np.random.Generator,
    *,
    sets: int = 3,
) -> list[Feeds]:
    """Make up *sets* input sets of realistic scale; shapes as in :func:`concrete_shapes`.

    Networks differ in the scale they expect, so the sets take turns:

    ====  ===========================  =====================  ====================
    set   floats                       8- and 16-bit integers  32- and 64-bit ones
    ====  ===========================  =====================  ====================
    0     standard normal              0 to 9                 0 to 9
    1     uniform in [0, 1)            0 or 1                 0 or 1
    2     uniform in [0, 255)          0 to 255 (int8: 127)   0 to 3
    ====  ===========================  =====================  ====================

    Float scalars and vectors are more likely a scale or threshold than an image: in set 2 they
    are uniform in [1, 2). Wide integers are likely indices or sizes, so they stay small. Booleans
    are drawn evenly, strings from a few words.

    Raises:
        UsageError: as :func:`concrete_shapes`.
        UnsupportedInputError: an input is a sequence, map or optional, or has a type that numpy
            cannot hold.
    """
    for spec in interface_inputs:
        if spec.dtype is None:
            raise UnsupportedInputError(
                f"Input '{spec.name}' has type {spec.type}; no values can be made up for it."
            )
    shapes = concrete_shapes(interface_inputs, target)
    return [
        {spec.name: _values(spec, shapes[spec.name], kind % 3, rng) for spec in interface_inputs}
        for kind in range(sets)
    ]


def input_sets(
    model: Path, given: Path | None, target: Target, rng: np.random.Generator
) -> list[Feeds]:
    """The inputs to run *model* on: those of the file *given*, else generated ones.

    Args:
        model: the model file; it is loaded, without optimizations, for its interface.
        given: as :func:`load_inputs` takes it.
        target: its input shapes fix dynamic dimensions of generated inputs.
        rng: draws the generated inputs.

    Raises:
        PwoptError: as :func:`open_session`, :func:`load_inputs` and :func:`make_inputs`.
    """
    with open_session(model, reference_target(target), optimized=False) as session:
        interface = session.interface
    if given is not None:
        return load_inputs(given, interface)
    return make_inputs(interface.inputs, target, rng)


def load_inputs(path: Path, interface: Interface, *, chunk: int = 32) -> list[Feeds]:
    """Load input sets from ``.npz`` (arrays named like the inputs) or ``.npy`` (a single input).

    Per input of shape ``[d0, d1, ...]`` the array may be

    - ``[k * d0, d1, ...]``, where ``d0`` is fixed: cut into ``k`` sets;
    - ``[n, d1, ...]``, where ``d0`` is dynamic: a batch, cut into sets of at most *chunk*
      samples if all inputs with a dynamic first axis have the same ``n``, else left whole;
    - ``[k, d0, d1, ...]``: one more axis, that counts the sets.

    An input that comes in one set only serves all sets. Arrays ``labels`` and ``targets`` that no
    input is named after are for judging accuracy and left alone. Values are cast where the kind
    of number stays the same (float64 to float32, uint8 to float32).

    Raises:
        UsageError: the file cannot be read, names differ from the inputs', or shapes do not fit.
    """
    arrays = _read_arrays(path, interface)
    expected = [spec.name for spec in interface.inputs]
    for name in _TRUTHS - set(expected):
        arrays.pop(name, None)
    if set(arrays) != set(expected):
        raise UsageError(
            f"{path.name} holds {_listed(arrays)}, but the inputs are {_listed(expected)}. "
            f"Save it with numpy.savez(path, **arrays), named like the inputs."
        )
    cast = {spec.name: _cast(path, spec, arrays[spec.name]) for spec in interface.inputs}
    batches = {
        array.shape[0]
        for spec in interface.inputs
        if _has_dynamic_batch(spec, array := cast[spec.name])
    }
    batch_chunk = chunk if len(batches) == 1 else max(batches, default=chunk)
    pieces = {
        spec.name: _split(path, spec, cast[spec.name], max(batch_chunk, 1))
        for spec in interface.inputs
    }
    counts = {len(piece) for piece in pieces.values() if len(piece) != 1}
    if len(counts) > 1:
        described = ", ".join(f"'{name}': {len(piece)}" for name, piece in pieces.items())
        raise UsageError(f"{path.name}: the inputs hold different numbers of sets ({described}).")
    sets = counts.pop() if counts else 1
    return [
        {name: piece[index if len(piece) > 1 else 0] for name, piece in pieces.items()}
        for index in range(sets)
    ]


def _bind_given(spec: TensorSpec, given: tuple[int, ...], symbols: dict[str, int]) -> None:
    """Check a given shape against the model's, and note the sizes of its symbols."""
    text = "x".join(map(str, given))
    if any(size < 0 for size in given):
        raise UsageError(f"--input-shape {spec.name}:{text} has a negative size.")
    if not spec.shape:  # a scalar, or a rank that the runtime does not know
        return
    if len(given) != len(spec.shape):
        raise UsageError(
            f"--input-shape {spec.name}:{text} has {len(given)} axes, "
            f"but input '{spec.name}' has {len(spec.shape)}: {_shape_text(spec)}."
        )
    for size, declared in zip(given, spec.shape, strict=True):
        if isinstance(declared, int) and size != declared:
            raise UsageError(
                f"--input-shape {spec.name}:{text} contradicts the model, "
                f"whose input '{spec.name}' is {_shape_text(spec)}."
            )
        if isinstance(declared, str) and symbols.setdefault(declared, size) != size:
            raise UsageError(
                f"--input-shape {spec.name}:{text} gives dimension '{declared}' the size {size}, "
                f"but it is {symbols[declared]} elsewhere."
            )


def _bound(spec: TensorSpec, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes of an input without a given shape."""
    sizes = [symbols.get(size) if isinstance(size, str) else size for size in spec.shape]
    if sizes and sizes[0] is None:
        sizes[0] = 1
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return tuple(known)
    open_axes = [
        str(declared or "?")
        for declared, size in zip(spec.shape, sizes, strict=True)
        if size is None
    ]
    example = "x".join("224" if size is None else str(size) for size in sizes)
    raise UsageError(
        f"Input '{spec.name}' has unknown dimensions {open_axes}; "
        f"give them with --input-shape {spec.name}:{example} (your sizes)."
    )


def _values(
    spec: TensorSpec, shape: tuple[int, ...], kind: int, rng: np.random.Generator
) -> npt.NDArray[Any]:
    dtype = spec.dtype
    assert dtype is not None  # make_inputs() has refused the others
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, size=shape)).astype(dtype)
    if dtype.kind == "O":
        return np.asarray(rng.choice(_WORDS, size=shape)).astype(object)
    if dtype.kind in "iu":
        wide = 256 if dtype.name in _PIXEL_DTYPES else 4
        high = min((10, 2, wide)[kind], int(np.iinfo(dtype).max) + 1)
        return np.asarray(rng.integers(0, high, size=shape)).astype(dtype)
    if kind == 0:
        return np.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(dtype, copy=False)
    uniform = np.asarray(rng.random(shape, dtype=np.float32))
    if kind == 1:
        return uniform.astype(dtype, copy=False)
    scaled = uniform * np.float32(255) if len(shape) >= 2 else uniform + np.float32(1)
    return np.asarray(scaled).astype(dtype, copy=False)


def _read_arrays(path: Path, interface: Interface) -> dict[str, npt.NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as .npz or .npy: {_one_line(error)}") from error
    if isinstance(loaded, np.ndarray):
        if len(interface.inputs) != 1:
            names = _listed(spec.name for spec in interface.inputs)
            raise UsageError(
                f"{path.name} holds one array, but the inputs are {names}. Use .npz instead."
            )
        return {interface.inputs[0].name: loaded}
    with loaded:
        try:
            return {name: loaded[name] for name in loaded.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} cannot be read: {_one_line(error)}") from error


def _cast(path: Path, spec: TensorSpec, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if spec.dtype is None:
        raise UnsupportedInputError(
            f"Input '{spec.name}' has type {spec.type}; it cannot be loaded from a file."
        )
    if array.dtype == spec.dtype:
        return array
    text = spec.dtype.kind == "O" and array.dtype.kind in "US"
    if not text and not np.can_cast(array.dtype, spec.dtype, casting="same_kind"):
        raise UsageError(
            f"{path.name}: array '{spec.name}' holds {array.dtype}, the input takes {spec.dtype}."
        )
    return array.astype(str).astype(object) if text else array.astype(spec.dtype)


def _has_dynamic_batch(spec: TensorSpec, array: npt.NDArray[Any]) -> bool:
    return len(spec.shape) == array.ndim and bool(spec.shape) and not isinstance(spec.shape[0], int)


def _split(
    path: Path, spec: TensorSpec, array: npt.NDArray[Any], chunk: int
) -> list[npt.NDArray[Any]]:
    """Cut *array* into one piece per set."""
    if not spec.shape:  # a scalar, or a rank that the runtime does not know
        return [array]
    if array.ndim == len(spec.shape) + 1 and len(array) and _fits(array.shape[1:], spec.shape):
        return list(array)
    if array.ndim != len(spec.shape) or not _fits(array.shape[1:], spec.shape[1:]):
        _refuse(path, spec, array)
    samples, declared = array.shape[0], spec.shape[0]
    step = declared if isinstance(declared, int) else chunk
    if samples == declared:
        return [array]
    if samples == 0 or step == 0 or (isinstance(declared, int) and samples % step):
        _refuse(path, spec, array)
    return [array[i * step : (i + 1) * step] for i in range(math.ceil(samples / step))]


def _fits(shape: tuple[int, ...], declared: tuple[int | str | None, ...]) -> bool:
    return all(
        not isinstance(want, int) or have == want
        for have, want in zip(shape, declared, strict=True)
    )


def _refuse(path: Path, spec: TensorSpec, array: npt.NDArray[Any]) -> NoReturn:
    raise UsageError(
        f"{path.name}: array '{spec.name}' has shape {'x'.join(map(str, array.shape))}, "
        f"which does not fit the input's {_shape_text(spec)}."
    )


def _shape_text(spec: TensorSpec) -> str:
    return "x".join("?" if size is None else str(size) for size in spec.shape)


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
