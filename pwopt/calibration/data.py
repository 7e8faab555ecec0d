"""The real data that a user gives with a model: what to verify with, to fit to, to judge on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from pwopt.calibration.judge import HeldOut, hold_out
from pwopt.calibration.preprocess import Preprocess
from pwopt.calibration.samples import Samples, load_samples
from pwopt.calibration.source import digest_of
from pwopt.errors import UsageError
from pwopt.runtime import Feeds, TensorSpec, input_sets, open_session, reference_target
from pwopt.target import Target

__all__ = ["Data", "Given", "feeds_digest"]

Given: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""A folder of images, an ``.npz`` or ``.npy`` file, or feeds; see :func:`load_samples`."""

_SETS: Final = 4
_MOST_SETS: Final = 32
_MOST_SAMPLES: Final = 128


class Data:
    """Samples for a model, loaded when they are asked for."""

    def __init__(
        self,
        model: Path,
        target: Target,
        *,
        calibration: Given | None = None,
        validation: Given | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        """Look at the model's inputs, and read feeds (these can be read but once).

        Args:
            model: the model file; it is loaded, without optimizations, for its interface.
            target: its input shapes hold for the inputs to verify and time with; samples to fit to
                and to judge on take their batch from it alone, for images may differ in size.
            calibration: to verify, time and fit with.
            validation: to judge accuracy on.
            preprocess: what is done to images.

        Raises:
            PwoptError: as :func:`open_session` and, for feeds, :func:`load_samples`.
        """
        with open_session(model, reference_target(target), optimized=False) as session:
            self.specs = tuple(_batched(s, target) for s in session.interface.inputs)
        self._model = model
        self._target = target
        self._preprocess = preprocess
        self._given = {"calibration": calibration, "validation": validation}
        self._loaded = {
            name: load_samples(given, self.specs)
            for name, given in self._given.items()
            if given is not None and not isinstance(given, str | Path)
        }

    @property
    def calibration(self) -> Samples | None:
        """Samples to fit to.

        Raises:
            UsageError: as :func:`load_samples`.
        """
        return self._samples("calibration")

    @property
    def validation(self) -> Samples | None:
        """Samples to judge on.

        Raises:
            UsageError: as :func:`load_samples`.
        """
        return self._samples("validation")

    def held_out(self, seed: int, *, chooses: bool = False) -> HeldOut:
        """What to fit to, choose and judge on, with no sample in two; see :func:`hold_out`.

        Raises:
            UsageError: as :func:`load_samples` and :func:`hold_out`.
        """
        rng = np.random.default_rng(seed)
        return hold_out(self.calibration, self.validation, rng, chooses=chooses)

    def input_sets(self, rng: np.random.Generator) -> list[Feeds]:
        """Inputs to verify and time with: a few of the calibration samples, one at a time.

        Of a file of arrays that is fed as it is, all; if they are more than 128 samples, then so
        many of them, in up to 32 sets. Generated ones where no calibration data are given; where
        these are of other shapes than the target's, a generated one comes first, which is timed.

        Raises:
            PwoptError: as :func:`load_samples` and :func:`pwopt.runtime.input_sets`.
        """
        if self._given["calibration"] is None:
            return input_sets(self._model, None, self._target, rng)
        found = self._given_sets(rng)
        if self._is_of_target(found[0]):
            return found
        return [*input_sets(self._model, None, self._target, rng)[:1], *found]

    def _is_of_target(self, feeds: Feeds) -> bool:
        """Whether inputs have the shapes that the target was given, if any."""
        shapes = self._target.input_shapes
        return all(np.asarray(feeds[n]).shape == tuple(s) for n, s in shapes.items() if n in feeds)

    def _given_sets(self, rng: np.random.Generator) -> list[Feeds]:
        given = self._given["calibration"]
        if not isinstance(given, str | Path):
            assert self.calibration is not None
            return _some(self.calibration)
        path = Path(given)
        if path.is_dir() or self._preprocess is not None:
            shapes = self._target.input_shapes
            specs = [replace(s, shape=shapes.get(s.name, s.shape)) for s in self.specs]
            return _some(load_samples(path, specs, self._preprocess))
        return self._sets_of_large(path) or input_sets(self._model, path, self._target, rng)

    def _sets_of_large(self, path: Path) -> list[Feeds]:
        """Some of very many samples; nothing where they are few, or laid out in another way."""
        try:
            samples = load_samples(path, self.specs)
        except UsageError:
            return []
        if len(samples) <= _MOST_SAMPLES:
            return []
        size = samples.fixed_batch or _MOST_SAMPLES // _SETS
        return list(samples.spread(min(_MOST_SAMPLES, _MOST_SETS * size)).batches(size))

    def _samples(self, name: str) -> Samples | None:
        given = self._given[name]
        if given is not None and name not in self._loaded:
            self._loaded[name] = load_samples(given, self.specs, self._preprocess)
        return self._loaded.get(name)


def feeds_digest(feeds: Iterable[Feeds]) -> str:
    """SHA-256 of input sets, in order."""
    found = hashlib.sha256()
    for feed in feeds:
        for name, value in sorted(feed.items()):
            array = np.asarray(value)
            plain = array.astype(str) if array.dtype.hasobject else array
            found.update(name.encode() + digest_of([plain]))
    return found.hexdigest()


def _batched(spec: TensorSpec, target: Target) -> TensorSpec:
    given = target.input_shapes.get(spec.name)
    return replace(spec, shape=(given[0], *spec.shape[1:])) if given and spec.shape else spec


def _some(samples: Samples) -> list[Feeds]:
    """A few batches, as small as the model allows."""
    return list(samples.spread(_SETS * (samples.fixed_batch or 1)).batches(1))
