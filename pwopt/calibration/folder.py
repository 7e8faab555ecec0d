"""Samples from a folder of images."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from pwopt.calibration.image_input import ImageInput
from pwopt.calibration.images import (
    IMAGE_SUFFIXES,
    RAW_SUFFIXES,
    pixels_of_array,
    pixels_of_file,
)
from pwopt.calibration.preprocess import Preprocess
from pwopt.calibration.source import Array, Truth, dims
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec

__all__ = ["Folder", "open_folder"]

_TABLES: Final = ("labels.csv", "y_labels.csv")
_FILE_TITLES: Final = frozenset({"file", "filename", "file_name", "image", "name", "path"})
_LABEL_TITLES: Final = frozenset({"label", "class", "class_id", "target", "y"})


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files, and raw files of 8-bit values, decoded when they are read."""

    files: tuple[Path, ...]
    truth: Truth
    image: ImageInput
    preprocess: Preprocess
    constants: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> dict[str, Array]:
        """One decoded image."""
        path = self.files[index]
        if path.suffix.lower() in RAW_SUFFIXES:
            pixels = self._raw(path)
        else:
            pixels = pixels_of_file(path, self.image.channels, self.preprocess)
        return {self.image.spec.name: self.image.arranged(pixels, self.preprocess, path)}

    def target(self, index: int) -> Array:
        """Folders hold none."""
        raise UsageError(f"{self.files[index].parent}: holds no targets; save them in an .npz.")

    def digest(self, index: int) -> bytes:
        """Digest of the file."""
        try:
            with self.files[index].open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise _unreadable(self.files[index], error) from error

    def _raw(self, path: Path) -> Array:
        try:
            values = np.frombuffer(path.read_bytes(), dtype=self.preprocess.dtype)
        except OSError as error:
            raise _unreadable(path, error) from error
        shape = self.preprocess.shape or (*self.image.size, self.image.channels)
        whole = tuple(size for size in shape if isinstance(size, int))
        if len(whole) == 2:
            whole = (*whole, 1)
        if len(whole) != 3 or values.size != int(np.prod(whole)):
            raise UsageError(
                f"{path}: holds {values.size} bytes, not {dims(shape)}; give"
                " shape=HEIGHTxWIDTHxCHANNELS (and dtype) in --preprocess."
            )
        return pixels_of_array(values.reshape(whole), self.image.channels, self.preprocess, path)


def open_folder(folder: Path, specs: Sequence[TensorSpec], preprocess: Preprocess) -> Folder:
    """Find the images of a folder and their labels.

    Labels come from ``labels.csv`` (or ``y_labels.csv``, or the only ``.csv`` in the folder), else
    from sub-folders, one per class: their names are the classes if all of them are numbers, else
    the classes are counted in alphabetical order. Without either there are no labels.

    Raises:
        UsageError: there are no images, a listed one is missing, the table cannot be read, or the
            model takes no images.
    """
    image = ImageInput.of(specs, preprocess, folder)
    table = _table_of(folder)
    if table is not None:
        files, truth = _listed_files(table)
    else:
        files, truth = _found_files(folder)
    if not files:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES | RAW_SUFFIXES))
        raise UsageError(f"{folder}: holds no images ({kinds}).")
    return Folder(files, truth, image, preprocess)


def _table_of(folder: Path) -> Path | None:
    for name in _TABLES:
        if (folder / name).is_file():
            return folder / name
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UsageError(f"{folder}: holds {names}; rename the table of labels to labels.csv.")
    return tables[0] if tables else None


def _listed_files(table: Path) -> tuple[tuple[Path, ...], Truth]:
    """Files and classes of a table: file, class; file, number of classes, class; or with titles."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as text:
            rows = [row for row in csv.reader(text) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{table}: cannot be read: {error}") from error
    file_column, label_column = 0, -1
    if rows and not _is_whole(rows[0][-1]):
        titles = [title.strip().lower() for title in rows.pop(0)]
        file_column = _column(titles, _FILE_TITLES, table)
        label_column = _column(titles, _LABEL_TITLES, table)
    files, labels = [], []
    for row in rows:
        try:
            path, label = table.parent / row[file_column].strip(), int(row[label_column])
        except (IndexError, ValueError) as error:
            raise UsageError(
                f"{table}: '{','.join(row)}' is not of the form file,class with a whole number."
            ) from error
        if not path.is_file():
            raise UsageError(f"{table}: names {path.name}, which does not exist there.")
        files.append(path)
        labels.append(label)
    return tuple(files), Truth(np.array(labels, dtype=np.int64))


def _column(titles: Sequence[str], wanted: frozenset[str], table: Path) -> int:
    found = [index for index, title in enumerate(titles) if title in wanted]
    if len(found) != 1:
        raise UsageError(f"{table}: its columns are {', '.join(titles)}; name them file and class.")
    return found[0]


def _found_files(folder: Path) -> tuple[tuple[Path, ...], Truth]:
    """Images in class folders, or images alone."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error
    alone = _samples_among(entries)
    groups = {
        entry.name: files
        for entry in entries
        if entry.is_dir() and (files := _samples_among(sorted(entry.iterdir())))
    }
    if not groups:
        return tuple(alone), Truth()
    if alone:
        raise UsageError(
            f"{folder}: holds images both in class folders and beside them, such as"
            f" {alone[0].name}; move these."
        )
    if all(_is_whole(name) for name in groups):
        numbers, names = [int(name) for name in groups], None
    else:
        numbers, names = list(range(len(groups))), tuple(groups)
    counts = [len(files) for files in groups.values()]
    labels = np.repeat(np.array(numbers, dtype=np.int64), counts)
    return tuple(path for files in groups.values() for path in files), Truth(labels, names)


def _samples_among(entries: Iterable[Path]) -> list[Path]:
    suffixes = IMAGE_SUFFIXES | RAW_SUFFIXES
    return [entry for entry in entries if entry.suffix.lower() in suffixes and entry.is_file()]


def _is_whole(text: str) -> bool:
    return text.strip().isdecimal()


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be read: {error.strerror or error}")
