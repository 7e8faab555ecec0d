"""What samples are read from, whatever it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Source", "Truth", "digest_of", "dims", "quoted"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of all samples of a source besides the inputs.

    Attributes:
        labels: class of each sample; ``None``: there are none.
        classes: names of the classes when the labels are their positions.
        has_targets: whether there is an output to compare with.
    """

    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    has_targets: bool = False


class Source(Protocol):
    """Samples by index, each without a batch axis, read when they are asked for."""

    @property
    def truth(self) -> Truth:
        """What is known of all samples."""

    @property
    def constants(self) -> Mapping[str, Array]:
        """Inputs that are the same for all batches."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, Array]:
        """Inputs of a sample by name, without the batch axis."""

    def target(self, index: int) -> Array:
        """The output to compare with, without the batch axis."""

    def digest(self, index: int) -> bytes:
        """SHA-256 of what the sample is made from."""


def digest_of(arrays: Iterable[Array]) -> bytes:
    """SHA-256 of types, shapes and values."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.digest()


def dims(shape: Sequence[int | str | None]) -> str:
    """``1x3x?x?``, for messages."""
    return "x".join("?" if size is None else str(size) for size in shape)


def quoted(names: Iterable[str]) -> str:
    """``'a', 'b'``, for messages."""
    return ", ".join(f"'{name}'" for name in sorted(names)) or "nothing"
