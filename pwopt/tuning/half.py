"""Conversion to fp16 by calibration: what half precision cannot hold stays in fp32.

Two things decide that. Values near the end of fp16's range, on the calibration inputs, keep the
nodes that write and read them in fp32. If the outputs deviate too far then, the nodes that add
most to the deviation follow, in growing numbers, until the tolerance is met. This runs on the CPU
and is only a choice: the result is verified on the target like every other model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pwopt.errors import UsageError
from pwopt.graph import Model, ModelProto, parse, save
from pwopt.graph.expose import Step, exposed, join_casts, named_steps
from pwopt.runtime import Feeds, open_session
from pwopt.runtime.half import LARGEST_HALF, converted_to_half
from pwopt.target import Target

__all__ = ["Half", "convert_to_half", "half_with"]

_HEADROOM = 4.0
"""How far below the end of fp16's range values must stay on the calibration inputs."""
_TENSORS_AT_ONCE = 48
_ATTEMPTS = 8

Values = Mapping[str, Sequence[np.ndarray[Any, Any]]]
"""By tensor, its values on each input set."""


@dataclass(frozen=True, eq=False)
class Half:
    """A model in half precision.

    Attributes:
        model: the model; its inputs and outputs are what they were.
        kept: names of nodes that go on computing in fp32.
        nodes: number of nodes that were looked at.
        deviation: largest deviation of an output on the CPU, relative to its scale.
    """

    model: Model
    kept: tuple[str, ...]
    nodes: int
    deviation: float


def half_with(model: Model, kept: Collection[str]) -> Model:
    """*model* in fp16 but for the nodes *kept*, as an earlier calibration chose them.

    Raises:
        UsageError: it has no weights in fp32.
        InvalidModelError: the conversion fails.
    """
    proto = _single_precision(model)
    named_steps(proto)
    return parse(_converted(proto, kept))


def convert_to_half(model: Model, feeds: Sequence[Feeds], target: Target, tolerance: float) -> Half:
    """Convert *model*, which stays as it is, to fp16.

    Args:
        model: in fp32.
        feeds: the calibration inputs.
        target: its number of threads is used.
        tolerance: of the deviation of the outputs, relative to their scale.

    Raises:
        UsageError: it has no weights in fp32.
        InvalidModelError: the conversion fails.
        PwoptError: the model does not run on *feeds*.
    """
    proto = _single_precision(model)
    steps = named_steps(proto)
    outputs = [output.name for output in proto.graph.output]
    with tempfile.TemporaryDirectory(prefix="pwopt-half-") as folder:
        run = _Probe(Path(folder), feeds, Target(threads=target.threads))
        exact = run.values(proto, [name for step in steps for name in step.writes])
        kept = _out_of_range(steps, exact, feeds)
        best: tuple[float, set[str]] | None = None
        more = 1
        for _ in range(_ATTEMPTS):
            half = _converted(proto, kept)
            found = run.values(half, [n for n in exact if n not in outputs] + outputs)
            deviations = {name: _deviation(exact[name], found[name]) for name in found}
            worst = max((deviations[name] for name in outputs if name in deviations), default=0.0)
            if best is None or worst < best[0]:
                best = (worst, set(kept))
            if worst <= tolerance or len(kept) == len(steps):
                break
            kept = kept | set(_culprits(steps, deviations, kept)[:more])
            more *= 2
        assert best is not None
    worst, kept = best
    ordered = tuple(step.name for step in steps if step.name in kept)
    return Half(parse(_converted(proto, ordered)), ordered, len(steps), worst)


def _single_precision(model: Model) -> ModelProto:
    proto = model.to_proto()
    if not any(tensor.data_type == tensor.FLOAT for tensor in proto.graph.initializer):
        raise UsageError("--fp16: the model has no weights in fp32 that could be converted")
    return proto


def _converted(proto: ModelProto, kept: Collection[str]) -> ModelProto:
    half: ModelProto = converted_to_half(proto, kept)
    join_casts(half, {node.name for node in proto.graph.node})
    return half


class _Probe:
    """Runs models on the calibration inputs and reads values within them."""

    def __init__(self, folder: Path, feeds: Sequence[Feeds], target: Target) -> None:
        self.folder = folder
        self.feeds = feeds
        self.target = target

    def values(self, proto: ModelProto, names: Sequence[str]) -> dict[str, list[Any]]:
        """The tensors *names* on every input set; those alone that hold numbers of fp16 or fp32."""
        found: dict[str, list[Any]] = {}
        for group in _groups(names):
            path = save(parse(exposed(proto, group)), self.folder / "probe.onnx").path
            with open_session(path, self.target, optimized=False) as session:
                for feed in self.feeds:
                    for name, value in session.run(feed).items():
                        if isinstance(value, np.ndarray) and value.dtype in (
                            np.float32,
                            np.float16,
                        ):
                            found.setdefault(name, []).append(value.astype(np.float32))
        return found


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Not all values of a model are to lie in memory at once."""
    for start in range(0, len(names), _TENSORS_AT_ONCE):
        yield names[start : start + _TENSORS_AT_ONCE]


def _out_of_range(steps: Sequence[Step], exact: Values, feeds: Sequence[Feeds]) -> set[str]:
    """Nodes that write or read what fp16 cannot hold."""
    limit = LARGEST_HALF / _HEADROOM
    fed: dict[str, list[Any]] = {}
    for feed in feeds:
        for name, value in feed.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                fed.setdefault(name, []).append(value)
    large = {name for name, sets in {**fed, **exact}.items() if _largest(sets) > limit}
    return {step.name for step in steps if large.intersection((*step.reads, *step.writes))}


def _largest(sets: Sequence[np.ndarray[Any, Any]]) -> float:
    """The largest finite magnitude."""
    finite = (np.abs(values[np.isfinite(values)]) for values in sets)
    return max((float(f.max()) for f in finite if f.size), default=0.0)


def _deviation(
    exact: Sequence[np.ndarray[Any, Any]], found: Sequence[np.ndarray[Any, Any]]
) -> float:
    """Largest difference, relative to the largest magnitude; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(exact, found, strict=True):
        if a.shape != b.shape or bool((np.isfinite(a) & ~np.isfinite(b)).any()):
            return float("inf")
        finite = np.isfinite(a)
        if not finite.any():
            continue
        scale = float(np.abs(a[finite]).max())
        difference = float(np.abs(a[finite] - b[finite]).max())
        worst = max(worst, difference / scale if scale else difference)
    return worst


def _culprits(
    steps: Sequence[Step], deviations: Mapping[str, float], kept: Collection[str]
) -> list[str]:
    """Nodes not yet kept, those first whose outputs deviate most beyond their inputs."""
    added = {}
    for step in steps:
        if step.name in kept:
            continue
        before = max((deviations.get(name, 0.0) for name in step.reads), default=0.0)
        after = max((deviations.get(name, 0.0) for name in step.writes), default=0.0)
        added[step.name] = after if np.isinf(after) and np.isfinite(before) else after - before
    # An infinity less another is no number; what only passes one on is no culprit.
    growth = {name: 0.0 if np.isnan(value) else value for name, value in added.items()}
    return sorted(growth, key=lambda name: -growth[name])
