"""Time per node, from ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pwopt.errors import UsageError
from pwopt.runtime.session import ExecutionError, Session, Value, open_session, without_capture
from pwopt.target import Target

__all__ = [
    "NodeTime",
    "Profile",
    "kernel_events",
    "node_of",
    "profile",
    "profile_events",
    "summarize_events",
]

_KERNEL: Final = "_kernel_time"
_WARM_UP_RUNS: Final = 2


@dataclass(frozen=True)
class NodeTime:
    """Time of one node of the graph that ONNX Runtime really ran.

    Attributes:
        name: the node's name. With optimizations on it may be one that the runtime made up, such
            as ``"conv1_nchwc"`` or ``"ReorderInput_token_3"``.
        op: operator type; fused and layout operators are the runtime's own.
        provider: execution provider that ran it, such as ``"CPUExecutionProvider"``.
        median_us: median over the runs, in microseconds, without the nodes of its subgraphs; if
            it runs several times within a run (in a loop), their sum.
        share: part of the total, 0 to 1.
        output_shapes: shapes of its outputs in the last run.
    """

    name: str
    op: str
    provider: str
    median_us: float
    share: float
    output_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Profile:
    """Time per node, in the order of execution.

    Attributes:
        nodes: the nodes.
        total_us: sum of the nodes' medians, in microseconds.
        run_us: median time of a whole run, the runtime's own work between nodes included.
        runs: number of runs behind the medians.
    """

    nodes: tuple[NodeTime, ...]
    total_us: float
    run_us: float
    runs: int

    @property
    def providers(self) -> dict[str, int]:
        """Number of nodes by execution provider."""
        counts: dict[str, int] = defaultdict(int)
        for node in self.nodes:
            counts[node.provider] += 1
        return dict(counts)


def profile(
    path: Path,
    target: Target,
    feeds: Mapping[str, Value],
    *,
    runs: int = 10,
    optimized: bool = True,
) -> Profile:
    """Run the model at *path* on *feeds* and time every node.

    Profiling itself costs time, so these figures divide up a run, but do not measure it; use
    :func:`pwopt.runtime.compare` for that. On CUDA they are the times of launching kernels.

    Args:
        path: the model file.
        target: provider, options and threads.
        feeds: values by input name.
        runs: number of runs, after two that do not count.
        optimized: profile the graph as ONNX Runtime optimizes it, or the model's own nodes.

    Raises:
        UsageError: *runs* is below 1, or the feeds are not the model's.
        ExecutionError: the model fails on *feeds*, or the runtime writes no usable profile.
        InvalidModelError, RuntimeUnavailableError: as :func:`pwopt.runtime.open_session`.
    """
    if runs < 1:
        raise UsageError(f"{runs} runs are impossible; give 1 or more.")
    with tempfile.TemporaryDirectory(prefix="pwopt-profile-") as folder:
        prefix = Path(folder) / "profile"
        plain = without_capture(target)
        with open_session(path, plain, optimized=optimized, profile_to=prefix) as session:
            try:
                run = session.runner(feeds)
                for _ in range(_WARM_UP_RUNS + runs):
                    run()
            finally:  # else the runtime writes when the session is freed, the folder being gone
                events = profile_events(session)
    summary = summarize_events(events, skip=_WARM_UP_RUNS)
    if summary.runs == 0:
        raise ExecutionError(f"{path.name}: the profile holds no complete run.")
    return summary


def profile_events(session: Session) -> list[Mapping[str, Any]]:
    """End the profile of a *session* that was opened with ``profile_to``, and read it.

    Raises:
        ExecutionError: the runtime wrote none that can be read.
    """
    try:
        text = session.end_profiling().read_text(encoding="utf-8", errors="replace")
        events: list[Mapping[str, Any]] = json.loads(text)
    except (OSError, ValueError) as error:
        name = session.path.name
        raise ExecutionError(f"{name}: the profile cannot be read: {error}") from error
    return events


def kernel_events(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of *events* that are a node's run."""
    return [event for event in events if event.get("ph") == "X" and _is_kernel(event)]


def node_of(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name, operator and execution provider of the node whose run *event* is."""
    name = str(event["name"]).removesuffix(_KERNEL)
    return name, _arg(event, "op_name"), _arg(event, "provider")


def summarize_events(events: Iterable[Mapping[str, Any]], *, skip: int = 0) -> Profile:
    """Sum up the events of a profile in Chrome's trace format, as ONNX Runtime writes them.

    Args:
        events: complete (``"ph": "X"``) events with ``ts`` and ``dur`` in microseconds; kernel
            events have category ``Node`` and a name ending in ``_kernel_time``, whole runs are
            named ``model_run``. Other events are passed over.
        skip: leave out that many runs at the beginning.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    spans = sorted(_span(event) for event in complete if event.get("name") == "model_run")[skip:]
    kernels = kernel_events(complete)
    # A node with a subgraph comes before the nodes inside it.
    kernels.sort(key=lambda event: (event["ts"], -event["dur"]))
    timings: dict[tuple[str, str], _Timing] = {}
    for run, (start, end) in enumerate(spans):
        inside = [event for event in kernels if start <= event["ts"] <= end]
        for event, own_us in zip(inside, _own_times(inside), strict=True):
            name, op, _ = node_of(event)
            timings.setdefault((name, op), _Timing()).add(event, run, own_us)
    medians = {key: timing.median_us(len(spans)) for key, timing in timings.items()}
    total = sum(medians.values())
    nodes = tuple(
        NodeTime(
            name=name,
            op=op,
            provider=timings[name, op].provider,
            median_us=median,
            share=median / total if total else 0.0,
            output_shapes=timings[name, op].output_shapes,
        )
        for (name, op), median in medians.items()
    )
    run_us = statistics.median(end - start for start, end in spans) if spans else 0.0
    return Profile(nodes, total_us=total, run_us=run_us, runs=len(spans))


@dataclass
class _Timing:
    """What is known of one node while events are read."""

    provider: str = ""
    output_shapes: tuple[tuple[int, ...], ...] = ()
    by_run: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, event: Mapping[str, Any], run: int, own_us: float) -> None:
        self.provider = _arg(event, "provider")
        self.output_shapes = _output_shapes(event)
        self.by_run[run] += own_us

    def median_us(self, runs: int) -> float:
        """Median over all runs; a run in which the node was not reached counts as 0."""
        return statistics.median(self.by_run.get(run, 0.0) for run in range(runs))


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and str(event.get("name", "")).endswith(_KERNEL)


def _span(event: Mapping[str, Any]) -> tuple[int, int]:
    return event["ts"], event["ts"] + event["dur"]


def _own_times(events: list[Mapping[str, Any]]) -> list[float]:
    """Duration of each event less that of the events right inside it; sorted by start."""
    own = [float(event["dur"]) for event in events]
    enclosing: list[int] = []
    for index, event in enumerate(events):
        start, end = _span(event)
        while enclosing and _span(events[enclosing[-1]])[1] < end:
            enclosing.pop()
        # Clocks tick in whole microseconds: touching is not containing, an empty event neither.
        if enclosing and start < _span(events[enclosing[-1]])[1]:
            own[enclosing[-1]] = max(own[enclosing[-1]] - event["dur"], 0.0)
        enclosing.append(index)
    return own


def _arg(event: Mapping[str, Any], name: str) -> str:
    return str(event.get("args", {}).get(name, ""))


def _output_shapes(event: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """From ``[{"float": [1, 3]}, ...]``."""
    listed = event.get("args", {}).get("output_type_shape", [])
    if not isinstance(listed, list):
        return ()
    return tuple(
        tuple(shape) for entry in listed if isinstance(entry, dict) for shape in entry.values()
    )
