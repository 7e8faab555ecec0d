"""How good outputs are, sample by sample."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pwopt.calibration.samples import Batch, Samples
from pwopt.calibration.source import dims
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec

__all__ = [
    "METRICS",
    "Agreement",
    "Cosine",
    "Metric",
    "Psnr",
    "RelativeError",
    "Top1",
    "Top5",
    "UserMetric",
    "choose_metric",
    "classes_of",
    "parse_metric",
]

Array: TypeAlias = npt.NDArray[Any]
Scores: TypeAlias = npt.NDArray[np.float64]
Arrays: TypeAlias = Mapping[str, Array]
"""Outputs by name, one sample after another along the first axis."""

_PERCENT: Final = 100.0
_CLIPPED_DB: Final = 100.0
"""What equal images count as; their ratio is infinite."""
_MOST_OF_PEAK_1: Final = 2.0


class Metric(Protocol):
    """Scores each sample by itself, so that the interval of a difference can be had.

    The figure of a model is the mean over its samples.
    """

    @property
    def name(self) -> str:
        """As ``--metric`` takes it, without options."""

    @property
    def unit(self) -> str:
        """``%`` or ``dB``, or empty."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is a better one."""

    @property
    def step(self) -> float:
        """The least by which the score of one sample can change; 0 where it is continuous."""

    def check(self, samples: Samples, outputs: Sequence[TensorSpec]) -> None:
        """Raise if the samples or the model are not what this needs.

        Raises:
            UsageError: says what is missing, and the remedy.
        """

    def scores(self, outputs: Arrays, batch: Batch, original: Arrays) -> Scores:
        """A score per sample, ``[batch.size]``.

        Args:
            outputs: of the model to judge.
            batch: inputs, and labels or targets.
            original: what the original model gives for the same inputs.
        """

    def has_baseline(self, samples: Samples) -> bool:
        """Whether the original's own score means something (it does not against itself)."""


@dataclass(frozen=True)
class _ClassScores:
    """What the metrics on class scores share.

    Attributes:
        output: name of the output that holds them, ``[n, classes]`` (further axes of length 1);
            by default the first of that shape.
    """

    output: str | None = None
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    step: ClassVar[float] = _PERCENT

    def has_baseline(self, _: Samples) -> bool:
        """See :class:`Metric`."""
        return True

    def _ranked(self, outputs: Arrays) -> Array:
        """Scores ``[n, classes]``."""
        for name, array in outputs.items():
            chosen = self.output is None or name == self.output
            if chosen and array.ndim >= 2 and array.size == len(array) * array.shape[1]:
                return array.reshape(len(array), -1)
        raise UsageError(f"No output holds class scores ({_described(outputs)}); choose --metric.")


@dataclass(frozen=True)
class _TopK(_ClassScores):
    k: ClassVar[int]

    @property
    def name(self) -> str:
        return f"top{self.k}"

    def check(self, samples: Samples, outputs: Sequence[TensorSpec]) -> None:
        if samples.labels is None:
            raise UsageError(
                f"{self.name} needs labels: class sub-folders, a labels.csv, or an array 'labels'."
            )
        spec = classes_of(outputs, self.output)
        if spec is None:
            raise UsageError(
                f"{self.name} needs an output of shape NxCLASSES; there is"
                f" {', '.join(f'{o.name}: {dims(o.shape)}' for o in outputs)}. Choose --metric."
            )
        if isinstance(spec.shape[1], int):
            _check_labels(samples, spec.name, spec.shape[1])

    def scores(self, outputs: Arrays, batch: Batch, _: Arrays) -> Scores:
        assert batch.labels is not None
        return self.hits(outputs, batch.labels)

    def hits(self, outputs: Arrays, labels: npt.NDArray[np.int64]) -> Scores:
        """100 where the label is among the k largest scores; equal ones count for the lower class.

        A label out of range is never hit.
        """
        ranked = self._ranked(outputs)
        inside = (labels >= 0) & (labels < ranked.shape[1])
        own = ranked[np.arange(len(labels)), np.where(inside, labels, 0)][:, None]
        ties = (ranked == own) & (np.arange(ranked.shape[1]) < labels[:, None])
        better = (ranked > own).sum(axis=1) + ties.sum(axis=1)
        return np.where(inside & (better < self.k) & ~np.isnan(own[:, 0]), _PERCENT, 0.0)


@dataclass(frozen=True)
class Top1(_TopK):
    """Percent of the samples whose label has the highest score."""

    k: ClassVar[int] = 1


@dataclass(frozen=True)
class Top5(_TopK):
    """Percent of the samples whose label is among the five highest scores."""

    k: ClassVar[int] = 5


@dataclass(frozen=True)
class Agreement(_ClassScores):
    """Percent of the samples for which the class with the highest score is the original's."""

    name: ClassVar[str] = "agreement"

    def check(self, _: Samples, outputs: Sequence[TensorSpec]) -> None:
        """See :class:`Metric`."""
        if classes_of(outputs, self.output) is None:
            raise UsageError("agreement needs an output of shape NxCLASSES. Choose --metric.")

    def scores(self, outputs: Arrays, _: Batch, original: Arrays) -> Scores:
        """See :class:`Metric`."""
        same = self._ranked(outputs).argmax(axis=1) == self._ranked(original).argmax(axis=1)
        return np.where(same, _PERCENT, 0.0)


@dataclass(frozen=True)
class Psnr:
    """Peak signal-to-noise ratio in dB, against the targets, or else the original's own output.

    The mean over images of the ratio of each, as is usual; values are clipped to 0 to *peak* as in
    a saved image, and equal images count as 100 dB.

    Attributes:
        border: pixels at each edge that are left out (commonly the scale of a super-resolution).
        peak: largest value; 1 by default, refused where the images go far beyond.
        output: name of the output that holds images; by default the only one with four axes.
    """

    border: int = 0
    peak: float | None = None
    output: str | None = None
    name: ClassVar[str] = "psnr"
    unit: ClassVar[str] = "dB"
    higher_is_better: ClassVar[bool] = True
    step: ClassVar[float] = 0.0

    def has_baseline(self, samples: Samples) -> bool:
        """See :class:`Metric`."""
        return samples.has_targets

    def check(self, _: Samples, outputs: Sequence[TensorSpec]) -> None:
        """See :class:`Metric`."""
        found = [o for o in outputs if len(o.shape) == 4 and self.output in (None, o.name)]
        if len(found) != 1:
            raise UsageError(
                "psnr needs one output with four axes; name it with --metric psnr:output=NAME."
            )

    def scores(self, outputs: Arrays, batch: Batch, original: Arrays) -> Scores:
        """See :class:`Metric`."""
        name, found = next(
            (n, a) for n, a in outputs.items() if a.ndim == 4 and self.output in (None, n)
        )
        wanted = original[name] if batch.targets is None else batch.targets
        if wanted.shape != found.shape:
            raise UsageError(
                f"The targets have shape {dims(wanted.shape)}, but output '{name}' has"
                f" {dims(found.shape)}."
            )
        if self.peak is None and float(np.abs(wanted).max(initial=0)) > _MOST_OF_PEAK_1:
            raise UsageError(
                f"The images reach {float(wanted.max()):.3g}, so their peak is not 1; say"
                " --metric psnr:peak=255, or what it is."
            )
        peak = self.peak or 1.0
        edge = slice(self.border, -self.border or None)
        first, second = (
            np.clip(a.astype(np.float64), 0, peak)[..., edge, edge] for a in (wanted, found)
        )
        if first.size == 0:
            raise UsageError(f"A border of {self.border} leaves nothing of {dims(found.shape)}.")
        mean_square = ((first - second) ** 2).reshape(len(first), -1).mean(axis=1)
        least = peak**2 * 10 ** (-_CLIPPED_DB / 10)
        ratios: Scores = 10 * np.log10(peak**2 / np.maximum(mean_square, least))
        return ratios


@dataclass(frozen=True)
class _Distance:
    """What the metrics that compare all float outputs with the original's share."""

    step: ClassVar[float] = 0.0

    def has_baseline(self, _: Samples) -> bool:
        """See :class:`Metric`."""
        return True

    def check(self, _: Samples, outputs: Sequence[TensorSpec]) -> None:
        """See :class:`Metric`."""
        if not any(o.dtype is not None and o.dtype.kind == "f" for o in outputs):
            raise UsageError("The model has no float output to compare. Choose --metric.")

    def _pairs(self, outputs: Arrays, original: Arrays) -> Iterator[tuple[Array, Array]]:
        """Vectors ``[n, values]``, the original's first; infinities and NaN of both are 0."""
        for name, array in original.items():
            if array.dtype.kind == "f" and array.ndim:
                shape = (len(array), -1)
                want = array.reshape(shape).astype(np.float64)
                have = outputs[name].reshape(shape).astype(np.float64)
                same = (want == have) | (np.isnan(want) & np.isnan(have))
                shared = same & ~np.isfinite(want)
                yield np.where(shared, 0, want), np.where(shared, 0, have)


@dataclass(frozen=True)
class RelativeError(_Distance):
    """Norm of the deviation from the original's output, in percent of that output's norm.

    Of several outputs the one that deviates most counts.
    """

    name: ClassVar[str] = "relative-error"
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = False

    def scores(self, outputs: Arrays, _: Batch, original: Arrays) -> Scores:
        """See :class:`Metric`."""
        errors = []
        for want, have in self._pairs(outputs, original):
            scale = np.maximum(np.linalg.norm(want, axis=1), np.finfo(np.float32).tiny)
            errors.append(_PERCENT * np.linalg.norm(have - want, axis=1) / scale)
        worst: Scores = np.max(errors, axis=0)
        return worst


@dataclass(frozen=True)
class Cosine(_Distance):
    """Cosine between the original's output and this one; of several outputs the smallest."""

    name: ClassVar[str] = "cosine"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True

    def scores(self, outputs: Arrays, _: Batch, original: Arrays) -> Scores:
        """See :class:`Metric`."""
        cosines = []
        for want, have in self._pairs(outputs, original):
            lengths = np.linalg.norm(want, axis=1) * np.linalg.norm(have, axis=1)
            both_zero = ~want.any(axis=1) & ~have.any(axis=1)
            product = (want * have).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
            cosines.append(np.where(both_zero, 1.0, product))
        least: Scores = np.min(cosines, axis=0)
        return least


@dataclass(frozen=True)
class UserMetric:
    """A function of the user: ``score(outputs, batch) -> scores``.

    It is given the outputs (arrays by name) and the :class:`Batch` that they belong to (``feeds``,
    ``labels``, ``targets``, ``size``), and returns one finite number per sample. A larger one is
    better, unless the function has an attribute ``higher_is_better = False``; an attribute ``unit``
    is printed behind the figures.
    """

    name: str
    function: Callable[[Arrays, Batch], Any]
    step: ClassVar[float] = 0.0

    @property
    def unit(self) -> str:
        """See :class:`Metric`."""
        return str(getattr(self.function, "unit", ""))

    @property
    def higher_is_better(self) -> bool:
        """See :class:`Metric`."""
        return bool(getattr(self.function, "higher_is_better", True))

    def has_baseline(self, _: Samples) -> bool:
        """See :class:`Metric`."""
        return True

    def check(self, samples: Samples, outputs: Sequence[TensorSpec]) -> None:
        """The function knows best."""

    def scores(self, outputs: Arrays, batch: Batch, _: Arrays) -> Scores:
        """See :class:`Metric`."""
        try:
            found = np.asarray(self.function(outputs, batch), dtype=np.float64)
        except Exception as error:  # whatever the user's code throws
            kind = type(error).__name__
            raise UsageError(f"--metric {self.name} failed: {kind}: {error}") from error
        if found.shape != (batch.size,) or not np.isfinite(found).all():
            raise UsageError(
                f"--metric {self.name} must return {batch.size} finite scores, one per sample; it"
                f" returned shape {dims(found.shape) or 'of a scalar'}."
            )
        return found


METRICS: Final[Mapping[str, type[Metric]]] = MappingProxyType(
    {
        "top1": Top1,
        "top5": Top5,
        "psnr": Psnr,
        "agreement": Agreement,
        "relative-error": RelativeError,
        "cosine": Cosine,
    }
)


def parse_metric(spec: str) -> Metric:
    """The metric that ``NAME``, ``NAME:key=value,...`` or ``module:function`` describes.

    Modules are found as Python finds them, and in the current folder; a name that ends in ``.py``
    is a file.

    Raises:
        UsageError: unknown name, option, module or function; says what is allowed.
    """
    name, _, options = spec.partition(":")
    if name in METRICS:
        return _with_options(METRICS[name], options, spec)
    if ":" not in spec:
        raise UsageError(
            f"--metric {spec}: choose from {', '.join(METRICS)}, or name a module:function."
        )
    home, _, function_name = spec.rpartition(":")
    try:
        module = _from_file(Path(home)) if home.endswith(".py") else _from_module(home)
        function = getattr(module, function_name)
    except Exception as error:  # whatever the user's module throws
        raise UsageError(f"--metric {spec}: cannot be imported: {error}") from error
    if not callable(function):
        raise UsageError(f"--metric {spec}: is no function.")
    return UserMetric(spec, function)


def choose_metric(samples: Samples, outputs: Sequence[TensorSpec]) -> Metric:
    """What suits data and model when nobody says.

    top1 with labels, psnr with targets; without either, agreement where an output holds class
    scores, else relative-error.
    """
    has_classes = classes_of(outputs) is not None
    if samples.labels is not None and has_classes:
        return Top1()
    if samples.has_targets:
        return Psnr()
    return Agreement() if has_classes else RelativeError()


def classes_of(outputs: Sequence[TensorSpec], name: str | None = None) -> TensorSpec | None:
    """The first output (of that name) that holds class scores: ``NxC``, further axes of length 1.

    ``None`` if there is none.
    """
    for spec in outputs:
        known = len(spec.shape) >= 2 and all(size == 1 for size in spec.shape[2:])
        if name in (None, spec.name) and known and spec.shape[1] != 1:
            return spec
    return None


def _check_labels(samples: Samples, output: str, count: int) -> None:
    assert samples.labels is not None
    low, high = int(samples.labels.min()), int(samples.labels.max())
    offset = 0 if samples.preprocess is None else samples.preprocess.label_offset
    if low < 0 or high >= count:
        says = f"The labels go from {low} to {high}, but output '{output}' has {count} classes"
        moved = -1 if high == count and low > 0 else 1 if low == -1 and high < count - 1 else None
        remedy = "check which data belong to the model"
        if moved is not None:
            remedy = f"if they are counted from {low}, set label_offset={offset + moved}"
            remedy += " in --preprocess"
        raise UsageError(f"{says} (0 to {count - 1}); {remedy}.")
    if samples.classes is None or len(samples.classes) + offset == count:
        return
    says = f"There are {len(samples.classes)} class folders, but '{output}' has {count} classes"
    if len(samples.classes) + offset == count - 1:
        raise UsageError(
            f"{says}; if class 0 is the background, set label_offset={offset + 1} in --preprocess."
        )
    raise UsageError(
        f"{says}; name the folders by the numbers of their classes, or list file and class in a"
        " labels.csv."
    )


def _with_options(metric: type[Metric], text: str, spec: str) -> Metric:
    kinds = {"border": int, "peak": float, "output": str}
    allowed = [field.name for field in fields(metric)]  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise UsageError(f"--metric {spec}: there is no option '{key}' (known: {known}).")
        try:
            options[key] = kinds[key](value)
        except ValueError as error:
            raise UsageError(f"--metric {spec}: {key} cannot be '{value}'.") from error
        if key != "output" and options[key] < 0:
            raise UsageError(f"--metric {spec}: {key} cannot be below 0.")
    return metric(**options)


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_module(name: str) -> ModuleType:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def _described(outputs: Arrays) -> str:
    return ", ".join(f"{name}: {dims(array.shape)}" for name, array in outputs.items())
