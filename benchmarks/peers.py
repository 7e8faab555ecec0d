"""pwopt beside three popular simplifiers: paired latency against the original, and outputs.

All candidates of a model are timed in one process, in turn, in an order that changes from round to
round, so that drift of the machine falls on all alike. Needs the ``bench`` dependency group:

    python -m benchmarks.peers --threads 1
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

import pwopt
from benchmarks.conditions import conditions
from benchmarks.zoo import Entry, collection
from pwopt.errors import PwoptError
from pwopt.runtime import (
    Feeds,
    Session,
    make_inputs,
    median_interval,
    open_session,
    resolve,
)
from pwopt.target import Target
from pwopt.tuning.effort import Effort

RECORD = Path(__file__).parent / "records" / "peers-{threads}.json"
_SAMPLE_S = 0.005
_OPENINGS = 5
"""How often all sessions are opened anew, in rotating order: where one lies in memory shifts all of
its times by a few percent."""
Tool = Callable[[Path, Path, Entry, int], None]


def by_onnxsim(source: Path, output: Path, entry: Entry, threads: int) -> None:
    import onnxsim

    simplified, ok = onnxsim.simplify(onnx.load(str(source)))
    if not ok:
        raise RuntimeError("onnxsim's own check failed")
    onnx.save(simplified, str(output))


def by_onnxslim(source: Path, output: Path, entry: Entry, threads: int) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(str(source))), str(output))


def by_onnxoptimizer(source: Path, output: Path, entry: Entry, threads: int) -> None:
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(str(source))), str(output))


def by_pwopt(source: Path, output: Path, entry: Entry, threads: int) -> None:
    target = pwopt.Target("cpu", threads=threads, input_shapes=entry.input_shapes)
    pwopt.optimize(source, output, target, pwopt.Options(effort=Effort.QUICK))


TOOLS: dict[str, Tool] = {
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
    "onnxoptimizer": by_onnxoptimizer,
    "pwopt": by_pwopt,
}


def deviation(expected: dict[str, Any], actual: dict[str, Any]) -> float:
    """Largest difference relative to the scale of each output."""
    worst = 0.0
    for name, reference in expected.items():
        if not isinstance(reference, np.ndarray) or reference.dtype.kind != "f":
            continue
        scale = float(np.abs(reference).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(actual[name] - reference).max(initial=0.0)) / scale)
    return worst


def rounds(sessions: dict[str, Session], feeds: Feeds, count: int, seconds: float) -> Any:
    """Times in ms, [rounds, sessions]; every round runs all sessions, in rotating order."""
    names = list(sessions)
    runners = {name: session.runner(feeds) for name, session in sessions.items()}
    for name in names:
        before = time.perf_counter()
        for _ in range(4):
            runners[name]()
    # A sample of a short model is several runs, so that the clock and the call do not show.
    repeats = max(1, round(_SAMPLE_S / ((time.perf_counter() - before) / 4)))
    start = time.perf_counter()
    times = []
    for turn in range(count):
        row = dict.fromkeys(names, 0.0)
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            runners[name]()
            before = time.perf_counter()
            for _ in range(repeats):
                runners[name]()
            row[name] = (time.perf_counter() - before) * 1e3 / repeats
        times.append([row[name] for name in names])
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return np.array(times)


def opened_anew(paths: dict[str, Path], target: Target, feeds: Feeds) -> Any:
    """Times in ms, [rounds, models], of sessions that are opened five times in rotating order."""
    parts = []
    for turn in range(_OPENINGS):
        order = list(paths)[turn % len(paths) :] + list(paths)[: turn % len(paths)]
        with ExitStack() as stack:
            opened = {n: stack.enter_context(open_session(paths[n], target)) for n in order}
            sessions = {name: opened[name] for name in paths}
            parts.append(rounds(sessions, feeds, count=21, seconds=10.0))
    return np.concatenate(parts)


def measure(entry: Entry, folder: Path, threads: int, kept: Path | None) -> dict[str, Any]:
    source = folder / "original.onnx"
    entry.write(source)
    target = resolve(pwopt.Target("cpu", threads=threads, input_shapes=entry.input_shapes))
    paths = {"original": source}
    row: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "tools": {}}
    row["conditions"] = conditions()
    for name, tool in TOOLS.items():
        output = folder / f"{name}.onnx"
        try:
            if name == "pwopt" and kept is not None and (kept / f"{entry.name}.onnx").exists():
                output = kept / f"{entry.name}.onnx"
            else:
                tool(source, output, entry, threads)
            open_session(output, target).close()
            paths[name] = output
        except Exception as error:
            row["tools"][name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    with open_session(source, target) as original:
        feeds = make_inputs(original.interface.inputs, target, np.random.default_rng(0))[0]
        expected = original.run(feeds)
    for name in [n for n in paths if n != "original"]:
        try:
            with open_session(paths[name], target) as session:
                row["tools"][name] = {"error": deviation(expected, session.run(feeds))}
        except (PwoptError, KeyError) as error:
            row["tools"][name] = {"failed": f"does not run like the original: {error}"[:200]}
            del paths[name]
    times = opened_anew(paths, target, feeds)
    columns = dict(zip(paths, times.T, strict=True))
    row["over"] = {}
    rng = np.random.default_rng(0)
    for name, taken in columns.items():
        if name != "original":
            row["tools"][name]["speedup"] = float(np.median(columns["original"] / taken))
        if name != "pwopt":
            row["over"][name] = median_interval(taken / columns["pwopt"], rng)
    row["original_ms"] = float(np.median(times[:, 0]))
    row["rounds"] = len(times)
    return row


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--only", default="", help="Only models whose name contains this.")
@click.option("--kind", default="", help="trained, reference or light.")
@click.option(
    "--kept",
    type=click.Path(exists=True, path_type=Path),
    help="Folder where benchmarks.collection --keep left its models.",
)
def main(threads: int, only: str, kind: str, kept: Path | None) -> None:
    """Measure and record; earlier rows of other models are kept."""
    path = Path(str(RECORD).format(threads=threads))
    path.parent.mkdir(exist_ok=True)
    rows = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    for entry in collection(only):
        if kind and entry.kind != kind:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows[entry.name] = measure(entry, Path(folder), threads, kept)
        path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        tools = rows[entry.name]["tools"]
        text = "  ".join(
            f"{n} {t['speedup']:.3f}" if "speedup" in t else f"{n} failed" for n, t in tools.items()
        )
        print(f"{entry.name:32} {text}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
