"""Samples from arrays in files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np

from pwopt.calibration.image_input import IMAGE_AXES, IMAGE_CHANNELS, ImageInput
from pwopt.calibration.images import pixels_of_array
from pwopt.calibration.preprocess import Preprocess
from pwopt.calibration.source import Array, Truth, digest_of, quoted
from pwopt.calibration.table import Table
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec

__all__ = ["Arrays", "open_arrays"]

_LOCAL_HEADER: Final = 30
"""Bytes of a member's fixed header in a zip archive."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """Rows of arrays, which stay in the file where they can be mapped."""

    table: Table
    images: Mapping[str, ImageInput]
    preprocess: Preprocess
    where: str

    @property
    def truth(self) -> Truth:
        """Labels of all samples."""
        return Truth(self.table.labels, has_targets=self.table.targets is not None)

    @property
    def constants(self) -> Mapping[str, Array]:
        """Inputs that serve all samples."""
        return self.table.constants

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> dict[str, Array]:
        """One row of each array, preprocessed where it goes to an image input."""
        return {name: self._row(name, index) for name in self.table.inputs}

    def target(self, index: int) -> Array:
        """One row of the targets."""
        assert self.table.targets is not None
        return np.asarray(self.table.targets[index])

    def digest(self, index: int) -> bytes:
        """Digest of everything in the file that belongs to the sample."""
        return digest_of(self.table.row(index))

    def _row(self, name: str, index: int) -> Array:
        row = np.asarray(self.table.inputs[name][index])
        image = self.images.get(name)
        if image is None:
            return row
        where = f"{self.where}, '{name}' {index}"
        pixels = pixels_of_array(_channels_last(row), image.channels, self.preprocess, where)
        return image.arranged(pixels, self.preprocess, where)


def open_arrays(path: Path, specs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Arrays:
    """Open ``.npz`` (arrays named like the inputs) or ``.npy`` (a single input).

    The arrays are as :class:`Table` takes them. With a *preprocess* those of inputs with four axes
    are images instead: ``[n, h, w]``, ``[n, h, w, c]`` or ``[n, c, h, w]``.

    ``.npy``, and ``.npz`` that is not compressed, are mapped into memory, not read.

    Raises:
        UsageError: the file cannot be read, names differ from the inputs', or shapes do not fit.
    """
    images = {
        spec.name: ImageInput.for_spec(spec, preprocess, path)
        for spec in specs
        if preprocess is not None and len(spec.shape) == IMAGE_AXES
    }
    table = Table.of(_mapped(path, specs), specs, path.name, images=frozenset(images))
    return Arrays(table, images, preprocess or Preprocess(), path.name)


def _mapped(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    try:
        if zipfile.is_zipfile(path):
            return _mapped_archive(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read as .npz or .npy: {text}") from error
    if len(specs) != 1:
        names = quoted(spec.name for spec in specs)
        raise UsageError(f"{path.name} holds one array, but the inputs are {names}; save an .npz.")
    return {specs[0].name: array}


def _mapped_archive(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz``; those that are not compressed are mapped."""
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            array = _mapped_member(path, file, member)
            if array is None:
                with archive.open(member) as packed:
                    array = np.lib.format.read_array(packed, allow_pickle=False)
            arrays[member.filename.removesuffix(".npy")] = array
    return arrays


def _mapped_member(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> Array | None:
    """Map an array that lies in an archive as it is; ``None`` if it does not."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    # The member's data follow its name and extra field, whose lengths end the fixed header.
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        return None
    is_old = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject or not shape or 0 in shape:
        return None
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _channels_last(row: Array) -> Array:
    if row.ndim == 2:
        return row[..., None]
    is_first = row.shape[0] in IMAGE_CHANNELS and row.shape[2] not in IMAGE_CHANNELS
    return row.transpose(1, 2, 0) if is_first else row
