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
from pwopt.runtime import Feeds, Session, open_session
from pwopt.runtime.half import LARGEST_HALF, converted_to_half
from pwopt.target import Target

__all__ = ["Half", "convert_to_half", "half_with"]

_HEADROOM = 4.0
"""How far below the end of fp16's range values must stay on the calibration inputs."""
_TENSORS_AT_ONCE = 16
_ATTEMPTS = 8

Array = np.ndarray[Any, Any]


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
        probe = _Probe(Path(folder), feeds, Target(threads=target.threads))
        largest = probe.largest(proto, [name for step in steps for name in step.writes])
        kept = _out_of_range(steps, {**_largest_fed(feeds), **largest})
        best: tuple[float, set[str]] | None = None
        more = 1
        for _ in range(_ATTEMPTS):
            half = _converted(proto, kept)
            worst = max(probe.deviations(proto, half, outputs).values(), default=0.0)
            if best is None or worst < best[0]:
                best = (worst, set(kept))
            if worst <= tolerance or len(kept) == len(steps):
                break
            deviations = probe.deviations(proto, half, list(largest))
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
    """Runs models on the calibration inputs and looks at values within them, a few at a time."""

    def __init__(self, folder: Path, feeds: Sequence[Feeds], target: Target) -> None:
        self.folder = folder
        self.feeds = feeds
        self.target = target

    def largest(self, proto: ModelProto, names: Sequence[str]) -> dict[str, float]:
        """Largest finite magnitude of those of the tensors *names* that are floats."""
        found: dict[str, float] = {}
        for group in _groups(names):
            with self._open(proto, group) as session:
                for feed in self.feeds:
                    for name, values in _floats(session.run(feed)).items():
                        found[name] = max(found.get(name, 0.0), _magnitude(values))
        return found

    def deviations(
        self, exact: ModelProto, half: ModelProto, names: Sequence[str]
    ) -> dict[str, float]:
        """How far the tensors *names* of *half* lie from those of *exact*."""
        found: dict[str, float] = {}
        for group in _groups(names):
            with self._open(exact, group) as first, self._open(half, group) as second:
                for feed in self.feeds:
                    reference, others = _floats(first.run(feed)), _floats(second.run(feed))
                    for name in reference.keys() & others.keys():
                        deviation = _deviation(reference[name], others[name])
                        found[name] = max(found.get(name, 0.0), deviation)
        return found

    def _open(self, proto: ModelProto, names: Sequence[str]) -> Session:
        path = save(parse(exposed(proto, names)), self.folder / "probe.onnx").path
        return open_session(path, self.target, optimized=False)


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Not all values of a model are to lie in memory at once."""
    for start in range(0, len(names), _TENSORS_AT_ONCE):
        yield names[start : start + _TENSORS_AT_ONCE]


def _floats(values: Mapping[str, Any]) -> dict[str, Array]:
    """Those of *values* that are tensors of fp16 or fp32, in fp32."""
    return {
        name: value.astype(np.float32, copy=False)
        for name, value in values.items()
        if isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float16)
    }


def _largest_fed(feeds: Sequence[Feeds]) -> dict[str, float]:
    """The same as :meth:`_Probe.largest` of the inputs."""
    found: dict[str, float] = {}
    for feed in feeds:
        for name, values in _floats(feed).items():
            found[name] = max(found.get(name, 0.0), _magnitude(values))
    return found


def _out_of_range(steps: Sequence[Step], largest: Mapping[str, float]) -> set[str]:
    """Nodes that write or read what fp16 cannot hold."""
    limit = LARGEST_HALF / _HEADROOM
    beyond = {name for name, magnitude in largest.items() if magnitude > limit}
    return {step.name for step in steps if beyond.intersection((*step.reads, *step.writes))}


def _magnitude(values: Array) -> float:
    """The largest finite magnitude."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def _deviation(exact: Array, found: Array) -> float:
    """Largest difference, relative to the largest magnitude; infinite where one is not finite."""
    finite = np.isfinite(exact)
    if exact.shape != found.shape or bool((finite & ~np.isfinite(found)).any()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(exact[finite]).max())
    difference = float(np.abs(exact[finite] - found[finite]).max())
    return difference / scale if scale else difference


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
