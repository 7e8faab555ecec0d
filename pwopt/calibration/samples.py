"""Samples of real data for a model: streamed in batches, picked, split; never all in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt.calibration.arrays import open_arrays
from pwopt.calibration.folder import open_folder
from pwopt.calibration.preprocess import Preprocess
from pwopt.calibration.source import Source
from pwopt.calibration.spool import spool
from pwopt.errors import UsageError
from pwopt.runtime import Feeds, TensorSpec

__all__ = ["Batch", "Samples", "load_samples"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples at once.

    Attributes:
        feeds: the inputs by name, one sample after another along the first axis.
        size: how many samples there are.
        rows: how many the inputs have; those behind the samples only fill a fixed batch up.
        labels: class per sample, ``[size]``; ``None``: unknown.
        targets: output to compare with, ``[size, ...]``; ``None``: unknown.
    """

    feeds: Feeds
    size: int
    rows: int
    labels: npt.NDArray[np.int64] | None = None
    targets: npt.NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples for the inputs of a model; made by :func:`load_samples`.

    Images are decoded when a batch needs them, so memory does not grow with the number of samples.

    Attributes:
        source: where they are read.
        specs: the model's inputs.
        indices: which of the source's samples these are, in order.
        preprocess: what is done to images; ``None`` for arrays that are fed as they are.
    """

    source: Source
    specs: tuple[TensorSpec, ...]
    indices: npt.NDArray[np.int64]
    preprocess: Preprocess | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class of each sample, with the preprocessing's ``label_offset``; ``None``: unknown."""
        known = self.source.truth.labels
        if known is None:
            return None
        offset = 0 if self.preprocess is None else self.preprocess.label_offset
        found: npt.NDArray[np.int64] = known[self.indices] + offset
        return found

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, where labels are positions in their alphabetical order."""
        return self.source.truth.classes

    @property
    def has_targets(self) -> bool:
        """Whether there are outputs to compare with."""
        return self.source.truth.has_targets

    @cached_property
    def digest(self) -> str:
        """SHA-256 over contents and labels of these samples, in order, and preprocessing."""
        steps = None if self.preprocess is None else self.preprocess.as_dict()
        found = hashlib.sha256(json.dumps(steps, sort_keys=True).encode())
        for index in self.indices:
            found.update(self.source.digest(int(index)))
        if self.labels is not None:
            found.update(self.labels.tobytes())
        return found.hexdigest()

    def batches(self, size: int) -> Iterator[Feeds]:
        """The inputs alone; see :meth:`stream`."""
        return (batch.feeds for batch in self.stream(size))

    def stream(self, size: int) -> Iterator[Batch]:
        """All samples, in order, in batches of at most *size*.

        A model whose batch is fixed gets that many rows; the last of them repeat a sample where
        there are no more. Samples of different shapes never meet in one batch.

        Raises:
            UsageError: a sample cannot be read or does not fit the model.
        """
        fixed = self.fixed_batch
        size = fixed or size
        if size < 1:
            raise UsageError(f"A batch of {size} samples is impossible; give 1 or more.")
        pending: list[tuple[int, Mapping[str, npt.NDArray[Any]]]] = []
        for position, index in enumerate(self.indices):
            sample = self.source.read(int(index))
            if pending and (len(pending) == size or not _alike(sample, pending[0][1])):
                yield self._batch(pending, fixed)
                pending = []
            pending.append((position, sample))
        if pending:
            yield self._batch(pending, fixed)

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Samples:
        """The samples at these positions, in that order."""
        return replace(self, indices=self.indices[np.asarray(indices, dtype=np.int64)])

    def spread(self, count: int) -> Samples:
        """At most *count* samples, evenly spaced."""
        positions = np.linspace(0, len(self) - 1, min(count, len(self)))
        return self.take(np.round(positions).astype(np.int64))

    def split(self, count: int, rng: np.random.Generator) -> tuple[Samples, Samples]:
        """Draw *count* samples; they, and the rest.

        Where there are labels, every class gives the same share, up to one sample. Both parts are
        in an order of which every beginning is as balanced.

        Raises:
            UsageError: one of the parts would be empty.
        """
        if not 0 < count < len(self):
            raise UsageError(
                f"{count} of {len(self)} samples cannot be split off; give more samples."
            )
        classes = np.zeros(len(self), np.int64) if self.labels is None else self.labels
        order = np.argsort(_shares(classes, rng), kind="stable")
        return self.take(order[:count]), self.take(order[count:])

    @property
    def fixed_batch(self) -> int | None:
        """The batch that the model asks for; ``None`` if it takes any."""
        sizes = (spec.shape[0] for spec in self.specs if spec.shape)
        return next((size for size in sizes if isinstance(size, int)), None)

    def _batch(
        self, pending: Sequence[tuple[int, Mapping[str, npt.NDArray[Any]]]], fixed: int | None
    ) -> Batch:
        filled = [*pending, *[pending[-1]] * ((fixed or 0) - len(pending))]
        feeds: Feeds = {}
        for spec in self.specs:
            constant = self.source.constants.get(spec.name)
            if constant is None:
                value = np.stack([sample[spec.name] for _, sample in filled])
            elif spec.shape:
                value = np.resize(constant, (len(filled), *constant.shape[1:]))
            else:
                value = np.asarray(constant)
            feeds[spec.name] = _as_fed(value, spec)
        positions = [position for position, _ in pending]
        labels = None if self.labels is None else self.labels[positions]
        targets = None
        if self.has_targets:
            rows = [self.source.target(int(index)) for index in self.indices[positions]]
            targets = np.stack(rows)
        return Batch(feeds, len(pending), len(filled), labels, targets)


def load_samples(
    source: str | Path | Iterable[Mapping[str, Any]],
    specs: Sequence[TensorSpec],
    preprocess: Preprocess | None = None,
) -> Samples:
    """Samples for the inputs *specs* of a model.

    Args:
        source: a folder of images (class sub-folders, or a ``labels.csv`` with file and class),
            an ``.npz`` or ``.npy`` file, or an iterable of feeds. Each feed holds any number of
            samples along the first axis of its arrays, by input name, and may hold ``labels`` and
            ``targets``. It is read once, into a temporary file.
        specs: the model's inputs, as a session reports them.
        preprocess: what is done to images. Arrays in files are fed as they are without it, and
            taken for images with it; feeds are always fed as they are.

    Raises:
        UsageError: the source cannot be read, is empty or does not fit the model.
    """
    specs = tuple(specs)
    found: Source
    if not isinstance(source, str | Path):
        found, preprocess = spool(source, specs), None
    elif Path(source).is_dir():
        preprocess = preprocess or Preprocess()
        found = open_folder(Path(source), specs, preprocess)
    else:
        found = open_arrays(Path(source), specs, preprocess)
    if len(found) == 0:
        raise UsageError(f"{source if isinstance(source, str | Path) else 'the feeds'}: no samples")
    return Samples(found, specs, np.arange(len(found)), preprocess)


def _shares(classes: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Where in its class each sample stands, from 0 to 1, in a random order."""
    shares = np.empty(len(classes))
    for name in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == name))
        shares[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return shares


def _alike(a: Mapping[str, npt.NDArray[Any]], b: Mapping[str, npt.NDArray[Any]]) -> bool:
    return all(array.shape == b[name].shape for name, array in a.items())


def _as_fed(value: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[Any]:
    assert spec.dtype is not None  # refused when the source was opened
    if spec.dtype.kind == "O":
        return value.astype(str).astype(object)
    return np.asarray(value, dtype=spec.dtype, order="C")
