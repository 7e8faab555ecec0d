"""What an optimization came to: plain data that reports render and replays read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwopt.errors import UsageError
from pwopt.remark import Remark, Tally
from pwopt.target import Target

__all__ = [
    "AccuracyFigures",
    "CoarseFigures",
    "CostChange",
    "ErrorFigures",
    "HalfFigures",
    "FactorizationFigures",
    "FactorizedPoint",
    "LatencyFigures",
    "ModelFile",
    "OptionFigures",
    "OptionsFigures",
    "PlacementFigures",
    "Recipe",
    "Report",
    "Script",
    "Totals",
]


@dataclass(frozen=True)
class ModelFile:
    """A model on disk (or, with an empty *path*, one that was not written)."""

    path: Path | None
    sha256: str
    opset: int
    size_bytes: int


@dataclass(frozen=True)
class LatencyFigures:
    """A paired comparison in one process: medians in ms, the median ratio and its 95% interval.

    On a device without the copies of inputs and outputs, which take ``copies_ms`` (to it, back).
    """

    baseline_ms: float
    optimized_ms: float
    speedup: float
    ci95: tuple[float, float]
    pairs: int
    copies_ms: tuple[float, float] | None = None


@dataclass(frozen=True)
class CoarseFigures:
    """Largest deviations where the device computes less precisely than it could, as when timed.

    Attributes:
        name: of what it computes with instead, such as ``"TF32"``.
        original: of the original model.
        optimized: of what was written.
    """

    name: str
    original: float
    optimized: float


@dataclass(frozen=True)
class ErrorFigures:
    """Largest deviation of any output, relative to that output's largest magnitude.

    ``max_relative`` is ``None`` when nothing could be compared; ``untested`` then says why, and
    otherwise names outputs whose comparison proves nothing. It is that of a run as precise as the
    device can; ``coarse`` has that of a run as timed, where it is another one.
    """

    max_relative: float | None
    tolerance: float
    inputs: int
    untested: tuple[str, ...] = ()
    coarse: CoarseFigures | None = None


@dataclass(frozen=True)
class OptionFigures:
    """One trial of provider options: what they gain, or why they were refused."""

    settings: Mapping[str, str]
    kept: bool
    speedup: float | None
    ci95: tuple[float, float] | None
    reason: str


@dataclass(frozen=True)
class OptionsFigures:
    """What provider options gain, apart from all rewriting.

    They are no part of the file that was written: set them where it is deployed.

    Attributes:
        settings: options that gain together, on top of those that were asked for.
        original: the original as asked for, against itself with *settings*.
        optimized: the same of the file that was written.
        trials: everything that was tried.
    """

    settings: Mapping[str, str]
    original: LatencyFigures | None
    optimized: LatencyFigures | None
    trials: tuple[OptionFigures, ...]


@dataclass(frozen=True)
class HalfFigures:
    """What the conversion to fp16 came to, apart from rewriting.

    Attributes:
        kept: names of nodes that go on computing in fp32.
        nodes: number of nodes of the original.
        conversion: the original against its plain conversion; ``None`` if nothing was timed.
        rewriting: that conversion against what was written; ``None`` if that is the original.
    """

    kept: tuple[str, ...]
    nodes: int
    conversion: LatencyFigures | None = None
    rewriting: LatencyFigures | None = None


@dataclass(frozen=True)
class PlacementFigures:
    """Where the nodes of what was written run, on a device.

    Attributes:
        nodes: number of nodes by execution provider.
        fallback: nodes that compute elsewhere than on the device.
        copies: nodes that the runtime added to copy values between memories.
    """

    nodes: Mapping[str, int]
    fallback: tuple[str, ...]
    copies: int


@dataclass(frozen=True)
class AccuracyFigures:
    """How well the original and the optimized model do on held-out samples.

    Attributes:
        metric: its name, as ``--metric`` takes it.
        unit: of all figures: ``%`` (differences are points), ``dB`` or what the user's metric says.
        baseline: the original's figure; ``None`` where it has none, being compared with itself.
        optimized: the optimized model's figure.
        samples: how many were judged on.
        drop: what was lost: positive when the optimized model is worse, whichever way the metric
            counts; ``None`` without a baseline.
        ci95: 95% bootstrap interval, over samples, of the drop (paired); without a baseline, of
            the optimized model's figure. An interval of 0 to 0 says that no sample changed.
        also: further figures of the same samples by name: (baseline, optimized).
    """

    metric: str
    unit: str
    baseline: float | None
    optimized: float
    samples: int
    drop: float | None
    ci95: tuple[float, float]
    also: Mapping[str, tuple[float, float]]

    def exceeds(self, max_drop: float) -> bool:
        """Whether more was lost than *max_drop*, in the metric's unit.

        Raises:
            UsageError: there is no baseline to lose against.
        """
        if self.drop is None:
            raise UsageError(
                f"{self.metric} against the original's own output has no baseline to drop from;"
                " give targets, or use --metric relative-error."
            )
        return not self.drop <= max_drop


@dataclass(frozen=True)
class Totals:
    """Size of a model: parameters, multiply-accumulates (``None``: unknown), bytes of the file."""

    params: int
    macs: int | None
    size_bytes: int


@dataclass(frozen=True)
class CostChange:
    """Totals before and after."""

    before: Totals
    after: Totals


@dataclass(frozen=True)
class Recipe:
    """How the model was prepared and which passes ran over it.

    Attributes:
        passes: with their options, as ``--passes`` takes them, in order.
        opset: what the opset was raised to; ``None``: it was kept.
        keep_overridable_initializers: whether listed initializers stayed inputs.
        fp16: names of the nodes that stayed in fp32 when the rest was converted to fp16;
            ``None``: nothing was.
    """

    passes: tuple[str, ...] = ()
    opset: int | None = None
    keep_overridable_initializers: bool = False
    fp16: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FactorizedPoint:
    """A factorised model that was fitted and judged, before the exact passes.

    Attributes:
        plan: the form of each convolution that has one, by site: method and ranks.
        predicted_loss: squared error of the outputs relative to their power, as allocated.
        accuracy: on data held out, those that points are chosen on.
        speedup: the original's time over its time, with a 95% interval; ``None`` without a clock.
        macs: multiply-accumulates; ``None``: unknown.
        sha256: of its file.
        final: accuracy on samples that had no part in the choice; ``None``: not looked at.
    """

    plan: Mapping[str, str]
    predicted_loss: float
    accuracy: AccuracyFigures
    speedup: float | None
    ci95: tuple[float, float] | None
    macs: int | None
    size_bytes: int
    sha256: str
    final: AccuracyFigures | None = None


@dataclass(frozen=True)
class FactorizationFigures:
    """How convolutions were factorised within an accuracy budget.

    Attributes:
        calibration_sha256: of the samples that factors were fitted to, and their preprocessing.
        samples: how many there were.
        seed: of the positions that were looked at.
        chosen: number of the point that was gone on with, from 1; ``None``: none was.
        points: accuracy against latency, from the slowest to the fastest.
        failure: why none was chosen, in words.
        selected_on: how many samples points were chosen on, which are not among those that the
            result is judged on; 0: accuracy had no part in the choice.
    """

    calibration_sha256: str
    samples: int
    seed: int
    chosen: int | None
    points: tuple[FactorizedPoint, ...]
    failure: str | None = None
    selected_on: int = 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FactorizationFigures:
        """What :func:`dataclasses.asdict` made, read back from JSON."""
        points = []
        for point in value["points"]:
            final = point.get("final")
            found = {
                **point,
                "accuracy": _accuracy_from_json(point["accuracy"]),
                "ci95": None if point["ci95"] is None else tuple(point["ci95"]),
                "final": None if final is None else _accuracy_from_json(final),
            }
            points.append(FactorizedPoint(**found))
        return cls(**{**value, "points": tuple(points)})


def _accuracy_from_json(value: Mapping[str, Any]) -> AccuracyFigures:
    also = {name: tuple(pair) for name, pair in value["also"].items()}
    return AccuracyFigures(**{**value, "ci95": tuple(value["ci95"]), "also": also})


@dataclass(frozen=True)
class Script:
    """What of a report repeats an optimization: every decision, and no measurement.

    Attributes:
        model_sha256: digest of the model file it was made from.
        output_sha256: digest of what was written; that of the model if the original was kept.
        candidates: the remarks that bear ordinals, in their order.
        factorization: what came before them, if anything was approximated.
    """

    model_sha256: str
    output_sha256: str
    recipe: Recipe
    input_shapes: Mapping[str, tuple[int, ...]]
    candidates: tuple[Remark, ...]
    factorization: FactorizationFigures | None = None

    @property
    def keeps_original(self) -> bool:
        """Whether nothing was written but the original."""
        return self.output_sha256 == self.model_sha256


@dataclass(frozen=True)
class Report:
    """What changed, what did not, and why.

    Attributes:
        latency: ``None`` when nothing was timed (``--effort none``).
        accuracy: ``None`` when it was not asked for.
        seconds: wall-clock seconds per stage, with their sum as ``total``.
        stop_reason: why the search ended, in words.
        notes: things the user should know, each a sentence.
        placement: which provider runs which nodes; ``None`` on the CPU.
        options: provider options that were tried; ``None`` if none were.
        fp16: the conversion to fp16; ``None`` if it was not asked for.
        factorization: what was approximated; ``None`` if that was not asked for.
    """

    pwopt: str
    model: ModelFile
    output: ModelFile
    target: Target
    latency: LatencyFigures | None
    error: ErrorFigures
    cost: CostChange
    recipe: Recipe
    passes: Mapping[str, Tally]
    remarks: tuple[Remark, ...]
    seconds: Mapping[str, float]
    stop_reason: str
    notes: tuple[str, ...] = ()
    accuracy: AccuracyFigures | None = None
    placement: PlacementFigures | None = None
    options: OptionsFigures | None = None
    fp16: HalfFigures | None = None
    factorization: FactorizationFigures | None = None
