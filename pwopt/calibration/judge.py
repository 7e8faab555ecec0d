"""How much accuracy a candidate loses against the original, on data that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from pwopt.calibration.metrics import (
    Agreement,
    Arrays,
    Cosine,
    Metric,
    RelativeError,
    Top1,
    Top5,
    choose_metric,
    classes_of,
)
from pwopt.calibration.samples import Batch, Samples
from pwopt.calibration.source import dims
from pwopt.calibration.store import Place, Store
from pwopt.errors import UsageError, VerificationError
from pwopt.result import AccuracyFigures
from pwopt.runtime import Outputs, TensorSpec, mean_interval, open_session
from pwopt.target import Target

__all__ = ["HeldOut", "Judge", "hold_out"]

Counting = Callable[[int, int], None]
"""Told how many of how many samples are done."""

_BATCH: Final = 16
_FEWEST: Final = 2
_FEW_CLASSES: Final = 10
_SHIFTS: Final = (1, -1)
_CLEARLY_MORE: Final = 10.0
"""Points by which moved labels must be better to be taken for the right ones."""


def _uncounted(_: int, __: int) -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True, eq=False)
class Judge:
    """What the original does on held-out samples, and the measure of what candidates do.

    The original runs once, when this is made by :meth:`of`; its outputs lie in a temporary file.

    Attributes:
        samples: what is judged on.
        metrics: what counts, and what is told besides.
        target: where models run.
        seed: for the bootstrap.
        baseline: the original's scores, ``[samples]`` per metric.
        original: the original's outputs, per batch.
        store: holds these.
    """

    samples: Samples
    metrics: tuple[Metric, ...]
    target: Target
    seed: int
    baseline: tuple[npt.NDArray[np.float64], ...]
    original: tuple[dict[str, Place], ...]
    store: Store

    @classmethod
    def of(
        cls,
        original: Path,
        samples: Samples,
        target: Target,
        *,
        metric: Metric | None = None,
        seed: int = 0,
        progress: Counting = _uncounted,
    ) -> Judge:
        """Run *original* on the samples.

        Args:
            original: the model file.
            samples: held-out ones; see :func:`hold_out`.
            target: where it, and candidates, run at full optimization.
            metric: what counts; by default :func:`choose_metric`.
            seed: for the bootstrap.
            progress: told how many samples are done.

        Raises:
            UsageError: the samples do not suit the model or the metric: their labels are out of
                range or seem to be counted from another class, or there are too few.
            PwoptError: the model cannot be loaded or run.
        """
        if len(samples) < _FEWEST:
            raise UsageError("One sample says nothing about accuracy; give more (--validation).")
        store, places = Store(), list[dict[str, Place]]()
        shifted: dict[int, list[npt.NDArray[np.float64]]] = {shift: [] for shift in _SHIFTS}
        with open_session(original, target) as session:
            outputs = session.interface.outputs
            metrics = _metrics(metric, samples, outputs)
            scores: list[list[npt.NDArray[np.float64]]] = [[] for _ in metrics]
            for batch in _counted(samples, progress):
                rows = _rows(session.run(batch.feeds), batch)
                places.append({n: store.put(array, f"output '{n}'") for n, array in rows.items()})
                for kept, one in zip(scores, metrics, strict=True):
                    kept.append(_finite(one.scores(rows, batch, rows), one, "the original"))
                if isinstance(metrics[0], Top1 | Top5) and batch.labels is not None:
                    for shift, hits in shifted.items():
                        hits.append(metrics[0].hits(rows, batch.labels + shift))
        baseline = tuple(np.concatenate(kept) for kept in scores)
        for shift, hits in shifted.items():
            if hits:
                _assert_not_shifted(samples, baseline[0], np.concatenate(hits), shift)
        return cls(samples, metrics, target, seed, baseline, tuple(places), store)

    @property
    def metric(self) -> Metric:
        """What counts."""
        return self.metrics[0]

    def figures(self, candidate: Path, progress: Counting = _uncounted) -> AccuracyFigures:
        """Run *candidate* on the samples and compare it with the original.

        Raises:
            PwoptError: the model cannot be loaded or run.
            VerificationError: it gives NaN or infinity, or other outputs than the original.
        """
        scores: list[list[npt.NDArray[np.float64]]] = [[] for _ in self.metrics]
        with open_session(candidate, self.target) as session:
            batches = zip(_counted(self.samples, progress), self.original, strict=True)
            for batch, places in batches:
                rows = _rows(session.run(batch.feeds), batch)
                original = {name: self.store.get(place) for name, place in places.items()}
                _assert_same_shapes(rows, original)
                for kept, metric in zip(scores, self.metrics, strict=True):
                    found = metric.scores(rows, batch, original)
                    kept.append(_finite(found, metric, candidate.name))
        return self._compared([np.concatenate(kept) for kept in scores])

    def unchanged(self) -> AccuracyFigures:
        """The figures of the original itself."""
        return self._compared(self.baseline)

    def assert_resolves(self, max_drop: float, parts: int = 1) -> None:
        """Check that a drop of *max_drop* can be told from none.

        Args:
            max_drop: in the metric's unit.
            parts: equal ones that the samples given were split into; these are one of them.

        Raises:
            UsageError: the metric has no baseline to drop from, or a single sample weighs more
                than that; says how many it takes.
        """
        self.unchanged().exceeds(max_drop)
        weight = self.metric.step / len(self.samples)
        if weight <= max_drop or max_drop <= 0:
            return
        needed = parts * int(np.ceil(self.metric.step / max_drop))
        split = " (as many choose among models)" if parts > 1 else ""
        raise UsageError(
            f"With {len(self.samples)} samples to judge on{split}, one of them is {weight:.2g}"
            f" points of {self.metric.name}, more than the {max_drop:g} allowed; give at least"
            f" {needed}."
        )

    def _compared(self, scores: Sequence[npt.NDArray[np.float64]]) -> AccuracyFigures:
        metric, before, after = self.metric, self.baseline[0], scores[0]
        rng = np.random.default_rng(self.seed)
        pairs = zip(self.metrics[1:], self.baseline[1:], scores[1:], strict=True)
        also = {one.name: (float(b.mean()), float(a.mean())) for one, b, a in pairs}
        if not metric.has_baseline(self.samples):
            figure, interval = mean_interval(after, rng)
            return AccuracyFigures(
                metric.name, metric.unit, None, figure, len(after), None, interval, also
            )
        lost = before - after if metric.higher_is_better else after - before
        drop, interval = mean_interval(lost, rng)
        return AccuracyFigures(
            metric.name,
            metric.unit,
            float(before.mean()),
            float(after.mean()),
            len(after),
            drop,
            interval,
            also,
        )


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples in parts that have none in common.

    Attributes:
        calibration: to fit to; ``None`` if there are none.
        validation: to judge on.
        drawn: whether the latter were split off from the former.
        selection: to choose among candidates on; ``None`` if nobody does.
    """

    calibration: Samples | None
    validation: Samples
    drawn: bool
    selection: Samples | None = None


def hold_out(
    calibration: Samples | None,
    validation: Samples | None,
    rng: np.random.Generator,
    *,
    chooses: bool = False,
) -> HeldOut:
    """Say what to judge on: *validation*, else a half of *calibration*.

    Args:
        calibration: to fit to, if there are any.
        validation: to judge on, if there are others.
        rng: draws.
        chooses: whether one of several candidates is taken for its accuracy. The figure that won is
            too good on the samples that it won on, so that a half of those to judge on is for
            choosing, and the result is judged on the other one.

    Raises:
        UsageError: there is neither, too few to split, or some samples are in both.
    """
    if validation is None:
        if calibration is None:
            raise UsageError("There is nothing to judge accuracy on; give --validation.")
        if len(calibration) < 2 * _FEWEST:
            raise UsageError(
                f"{len(calibration)} samples are too few to hold some out; give more with"
                " --calibration, or others with --validation."
            )
        held, rest = calibration.split(len(calibration) // 2, rng)
        return _with_selection(HeldOut(rest, held, drawn=True), rng, chooses=chooses)
    if calibration is not None:
        common = len(_digests(calibration) & _digests(validation))
        if common:
            raise UsageError(
                f"{common} of the {len(validation)} samples to judge on are calibrated with too;"
                " give others, or leave --validation out: then a half is held out."
            )
    return _with_selection(HeldOut(calibration, validation, drawn=False), rng, chooses=chooses)


def _with_selection(parts: HeldOut, rng: np.random.Generator, *, chooses: bool) -> HeldOut:
    if not chooses:
        return parts
    count = len(parts.validation)
    if count < 2 * _FEWEST:
        raise UsageError(
            f"{count} samples to judge on are too few to choose on some and judge on others; give"
            f" more with {'--calibration' if parts.drawn else '--validation'}."
        )
    selection, rest = parts.validation.split(count // 2, rng)
    return replace(parts, validation=rest, selection=selection)


def _digests(samples: Samples) -> set[bytes]:
    return {samples.source.digest(int(index)) for index in samples.indices}


def _metrics(
    metric: Metric | None, samples: Samples, outputs: Sequence[TensorSpec]
) -> tuple[Metric, ...]:
    """What counts, then whatever else can be told of these samples."""
    first = metric or choose_metric(samples, outputs)
    first.check(samples, outputs)
    others: list[Metric] = [Top1(), Agreement(), RelativeError(), Cosine()]
    spec = classes_of(outputs)
    if spec is not None and isinstance(spec.shape[1], int) and spec.shape[1] > _FEW_CLASSES:
        others.insert(1, Top5())
    return (first, *(o for o in others if o.name != first.name and _suits(o, samples, outputs)))


def _suits(metric: Metric, samples: Samples, outputs: Sequence[TensorSpec]) -> bool:
    try:
        metric.check(samples, outputs)
    except UsageError:
        return False
    return True


def _counted(samples: Samples, progress: Counting) -> Iterator[Batch]:
    done = 0
    for batch in samples.stream(_BATCH):
        yield batch
        done += batch.size
        progress(done, len(samples))


def _rows(outputs: Outputs, batch: Batch) -> Arrays:
    """The outputs that are tensors, a row per sample."""
    rows = {}
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray):
            continue
        if value.ndim and len(value) == batch.rows:
            rows[name] = value[: batch.size]
        elif batch.rows == 1:
            rows[name] = value[None]
        else:
            raise UsageError(
                f"Output '{name}' of shape {dims(value.shape)} has no row for each of {batch.rows}"
                " samples; fix the batch to 1 with --input-shape."
            )
    return rows


def _assert_same_shapes(rows: Arrays, original: Arrays) -> None:
    for name, array in original.items():
        if name not in rows or rows[name].shape != array.shape:
            found = dims(rows[name].shape) if name in rows else "missing"
            raise VerificationError(
                f"output '{name}' is {found}, but {dims(array.shape)} in the original"
            )


def _finite(scores: npt.NDArray[np.float64], metric: Metric, model: str) -> npt.NDArray[np.float64]:
    if not np.isfinite(scores).all():
        raise VerificationError(f"{model} gives NaN or infinity, so {metric.name} has no value")
    return scores


def _assert_not_shifted(
    samples: Samples,
    hits: npt.NDArray[np.float64],
    shifted: npt.NDArray[np.float64],
    shift: int,
) -> None:
    """Refuse labels that are plainly counted from another class than the model's."""
    right, moved = float(hits.mean()), float(shifted.mean())
    if moved < right + _CLEARLY_MORE or moved < 2 * right:
        return
    offset = shift + (0 if samples.preprocess is None else samples.preprocess.label_offset)
    remedy = f"set label_offset={offset} in --preprocess"
    if samples.preprocess is None:
        remedy = f"add {shift} to the labels"
    raise UsageError(
        f"The original finds {right:.3g}% of the labels, and {moved:.3g}% of them moved by"
        f" {shift:+d}; {remedy}."
    )
