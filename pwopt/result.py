"""What an optimization came to: plain data that reports render and replays read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pwopt.remark import Remark, Tally
from pwopt.target import Target

__all__ = [
    "CostChange",
    "ErrorFigures",
    "LatencyFigures",
    "ModelFile",
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
    """A paired comparison in one process: medians in ms, the median ratio and its 95% interval."""

    baseline_ms: float
    optimized_ms: float
    speedup: float
    ci95: tuple[float, float]
    pairs: int


@dataclass(frozen=True)
class ErrorFigures:
    """Largest deviation of any output, relative to that output's largest magnitude.

    ``max_relative`` is ``None`` when nothing could be compared; ``untested`` then says why, and
    otherwise names outputs whose comparison proves nothing.
    """

    max_relative: float | None
    tolerance: float
    inputs: int
    untested: tuple[str, ...] = ()


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
    """

    passes: tuple[str, ...] = ()
    opset: int | None = None
    keep_overridable_initializers: bool = False


@dataclass(frozen=True)
class Script:
    """What of a report repeats an optimization: every decision, and no measurement.

    Attributes:
        model_sha256: digest of the model file it was made from.
        output_sha256: digest of what was written; that of the model if the original was kept.
        candidates: the remarks that bear ordinals, in their order.
    """

    model_sha256: str
    output_sha256: str
    recipe: Recipe
    input_shapes: Mapping[str, tuple[int, ...]]
    candidates: tuple[Remark, ...]

    @property
    def keeps_original(self) -> bool:
        """Whether nothing was written but the original."""
        return self.output_sha256 == self.model_sha256


@dataclass(frozen=True)
class Report:
    """What changed, what did not, and why.

    Attributes:
        latency: ``None`` when nothing was timed (``--effort none``).
        seconds: wall-clock seconds per stage, with their sum as ``total``.
        stop_reason: why the search ended, in words.
        notes: things the user should know, each a sentence.
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
