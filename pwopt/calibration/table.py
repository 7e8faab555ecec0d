"""Arrays by input name whose first axis counts samples, checked against a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pwopt.calibration.image_input import IMAGE_AXES
from pwopt.calibration.source import Array, dims, quoted
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec

__all__ = ["Table"]

_LABELS: Final = "labels"
_TARGETS: Final = "targets"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of inputs, and what is known of them.

    Per input of shape ``[d0, d1, ...]`` an array is ``[n, d1, ...]`` or ``[k, d0, d1, ...]``, the
    latter with ``n = k * d0`` samples. An input that comes once only serves all samples.

    Attributes:
        inputs: arrays by input name; as they are given: whoever feeds them casts them.
        constants: inputs that serve all samples: scalars, and those that come once only.
        labels: from the array ``labels``: class of each sample.
        targets: from the array ``targets``: output of each sample.
    """

    inputs: Mapping[str, Array]
    constants: Mapping[str, Array]
    labels: npt.NDArray[np.int64] | None
    targets: Array | None

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, Array],
        specs: Sequence[TensorSpec],
        where: str,
        *,
        images: frozenset[str] = frozenset(),
    ) -> Table:
        """Sort *arrays* by what they are; those for the inputs *images* hold images.

        Raises:
            UsageError: names, shapes, types or counts do not fit.
        """
        names = {spec.name for spec in specs}
        extra = {n: a for n, a in arrays.items() if n in (_LABELS, _TARGETS) and n not in names}
        found = {name: array for name, array in arrays.items() if name not in extra}
        if set(found) != names:
            raise UsageError(
                f"{where} holds {quoted(found)}, but the inputs are {quoted(names)};"
                " save it with numpy.savez(path, **arrays), named like the inputs."
            )
        inputs = {
            spec.name: _images(found[spec.name], spec, where)
            if spec.name in images
            else _rows(found[spec.name], spec, where)
            for spec in specs
            if spec.shape
        }
        length = max(map(len, inputs.values()), default=0)
        constants = {s.name: _fitting(found[s.name], s, where) for s in specs if not s.shape}
        for spec in specs:
            if spec.name in inputs and len(inputs[spec.name]) != length:
                _assert_single(inputs, spec, where, is_image=spec.name in images)
                constants[spec.name] = inputs.pop(spec.name)
        for name, array in extra.items():
            count = len(array) if array.ndim else 1
            if count != length:
                raise UsageError(f"{where}: '{name}' holds {count} for {length} samples.")
        labels = _labels(extra[_LABELS], where) if _LABELS in extra else None
        return cls(inputs, constants, labels, extra.get(_TARGETS))

    def __len__(self) -> int:
        return max(map(len, self.inputs.values()), default=0)

    def row(self, index: int) -> Iterator[Array]:
        """Everything but the label that belongs to a sample, in the order of names."""
        yield from (self.inputs[name][index] for name in sorted(self.inputs))
        yield from (self.constants[name] for name in sorted(self.constants))
        if self.targets is not None:
            yield self.targets[index]


def _rows(array: Array, spec: TensorSpec, where: str) -> Array:
    """*array* with the samples along its first axis."""
    rank = len(spec.shape)
    if array.ndim == rank + 1 and _fits(array.shape[1:], spec.shape):
        array = array.reshape(-1, *array.shape[2:])
    elif array.ndim != rank or not _fits(array.shape[1:], spec.shape[1:]):
        raise UsageError(
            f"{where}: array '{spec.name}' has shape {dims(array.shape)}, which does not fit"
            f" the input's {dims(spec.shape)}; raw images need --preprocess."
        )
    return _fitting(array, spec, where)


def _images(array: Array, spec: TensorSpec, where: str) -> Array:
    if array.ndim == IMAGE_AXES + 1:
        array = array.reshape(-1, *array.shape[2:])
    if array.ndim not in (3, 4) or array.dtype.kind not in "fiu":
        raise UsageError(
            f"{where}: array '{spec.name}' of {array.dtype} with shape {dims(array.shape)} is"
            " no list of images (NxHxW, NxHxWxC or NxCxHxW)."
        )
    return array


def _fitting(array: Array, spec: TensorSpec, where: str) -> Array:
    """*array*, if its values can be cast when they are fed."""
    if spec.dtype is None:
        raise UsageError(f"Input '{spec.name}' has type {spec.type}; no array can hold it.")
    is_text = spec.dtype.kind == "O" and array.dtype.kind in "US"
    if not is_text and not np.can_cast(array.dtype, spec.dtype, casting="same_kind"):
        raise UsageError(
            f"{where}: array '{spec.name}' holds {array.dtype}, the input takes {spec.dtype}."
        )
    return array


def _assert_single(
    inputs: Mapping[str, Array], spec: TensorSpec, where: str, *, is_image: bool
) -> None:
    once = spec.shape[0] if isinstance(spec.shape[0], int) else 1
    if len(inputs[spec.name]) != once or is_image:
        counts = ", ".join(f"'{name}': {len(array)}" for name, array in inputs.items())
        raise UsageError(f"{where}: the inputs hold different numbers of samples ({counts}).")


def _labels(labels: Array, where: str) -> npt.NDArray[np.int64]:
    flat: npt.NDArray[Any] = labels.reshape(len(labels), -1)
    if labels.dtype.kind not in "iu" or flat.shape[1] != 1:
        raise UsageError(
            f"{where}: 'labels' of {labels.dtype} with shape {dims(labels.shape)} must be one"
            " whole number per sample."
        )
    return flat[:, 0].astype(np.int64)


def _fits(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    pairs = zip(shape, declared, strict=True)
    return all(not isinstance(want, int) or have == want for have, want in pairs)
