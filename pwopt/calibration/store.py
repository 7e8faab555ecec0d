"""Arrays on disk for as long as somebody needs them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from pwopt.calibration.source import Array
from pwopt.errors import UsageError

__all__ = ["Place", "Store"]


@dataclass(frozen=True)
class Place:
    """Where an array lies in the file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Store:
    """Arrays in a temporary file, which goes with the last reference to it."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="pwopt-")  # noqa: SIM115

    def put(self, array: Array, where: str) -> Place:
        """Append *array*.

        Raises:
            UsageError: it holds Python objects; *where* says which it is.
        """
        if array.dtype.hasobject:
            raise UsageError(f"{where}: holds Python objects; give numbers or fixed-width text.")
        # A mapping may start anywhere, but numpy is faster on aligned values.
        self._file.write(bytes(-self._file.tell() % array.dtype.alignment))
        place = Place(self._file.tell(), array.dtype, array.shape)
        self._file.write(np.ascontiguousarray(array).tobytes())
        return place

    def get(self, place: Place) -> Array:
        """The array that lies at *place*, mapped."""
        if 0 in place.shape:
            return np.empty(place.shape, place.dtype)
        self._file.flush()
        return np.memmap(self._file, place.dtype, "r", place.offset, place.shape)
