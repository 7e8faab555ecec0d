"""What tuning on a noisy machine keeps, and what a quiet machine says to it.

A model is optimized for one thread while other processes load all other cores, each multiplying
matrices that do not fit its caches. Then it is quiet: every group of equal rewrites that was kept
is taken out by itself, and the model without it is timed against the one with it.

    python -m benchmarks.noisy --effort quick --only cifar10
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

import pwopt
from benchmarks.conditions import conditions
from benchmarks.zoo import Entry, collection
from pwopt.remark import Kind
from pwopt.report.files import write_report
from pwopt.report.json import read_script
from pwopt.runtime import Comparison, compare, make_inputs, open_session
from pwopt.tuning.effort import Effort

RECORD = Path(__file__).parent / "records" / "noisy.json"
MODELS = (
    "cifar10_resnet20",
    "fastestdet_352",
    "mobilenet_v3_large_decomposed",
    "nin_cifar10",
    "shufflenet_v1",
    "yolox_nano_416",
)
SLOWER = 0.99
LOAD = """
import numpy as np
a = np.ones((1500, 1500), np.float32)
while True:
    a @ a
"""


@contextmanager
def loaded(count: int) -> Iterator[None]:
    """*count* processes that keep a core busy each."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    busy = [subprocess.Popen([sys.executable, "-c", LOAD], env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def timed(target: pwopt.Target, baseline: Path, candidate: Path) -> Comparison:
    """In pairs, with sessions opened twice, in either order."""
    rng = np.random.default_rng(0)
    with open_session(baseline, target) as session:
        feeds = make_inputs(session.interface.inputs, target, rng)[0]

    def once(*, candidate_first: bool) -> Comparison:
        paths = (candidate, baseline) if candidate_first else (baseline, candidate)
        with open_session(paths[0], target) as one, open_session(paths[1], target) as two:
            first, second = (two, one) if candidate_first else (one, two)
            return compare(
                first,
                second,
                feeds,
                min_pairs=15,
                max_pairs=301,
                time_limit_s=4.0,
                precision=0.004,
                rng=rng,
            )

    return once(candidate_first=False).joined(once(candidate_first=True))


def judge(
    entry: Entry, folder: Path, effort: str, time_limit: float | None, busy: int
) -> dict[str, Any]:
    source, output = folder / "model.onnx", folder / "optimized.onnx"
    entry.write(source)
    target = pwopt.Target("cpu", threads=1, input_shapes=entry.input_shapes)
    options = pwopt.Options(effort=Effort(effort), time_limit_s=time_limit)
    with loaded(busy):
        report = pwopt.optimize(source, output, target, options)
    write_report(report, folder / "report.json")
    script = read_script(folder / "report.json")
    groups: dict[tuple[str, str], list[int]] = {}
    for remark in report.remarks:
        if remark.kind is Kind.APPLIED and remark.ordinal and remark.pass_name != "canonicalise":
            key = (remark.pass_name, str(remark.facts["signature"]))
            groups.setdefault(key, []).append(remark.ordinal)
    kept = []
    for (name, _), ordinals in groups.items():
        without = folder / "without.onnx"
        left_out = pwopt.Options(replay=script, skip_rewrites=frozenset(ordinals))
        pwopt.optimize(source, without, target, left_out)
        quiet = timed(target, without, output)
        kept.append(
            {
                "pass": name,
                "sites": len(ordinals),
                "speedup": quiet.speedup,
                "ci95": list(quiet.ci95),
                "slower": quiet.ci95[1] < SLOWER,
            }
        )
    whole = timed(target, source, output)
    return {
        "model": entry.name,
        "effort": effort,
        "time_limit_s": time_limit,
        "busy": busy,
        "under_load": None if report.latency is None else report.latency.speedup,
        "quiet": {"speedup": whole.speedup, "ci95": list(whole.ci95)},
        "kept": kept,
        "seconds": report.seconds["total"],
        "stop_reason": report.stop_reason,
        "notes": list(report.notes),
        "conditions": conditions(),
    }


@click.command()
@click.option("--effort", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--time-limit", type=float, help="Seconds for trials; the effort's by default.")
@click.option("--only", default="", help="Only models whose name contains this.")
def main(effort: str, time_limit: float | None, only: str) -> None:
    """Measure, print and record; earlier rows of other models and efforts are kept."""
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    busy = max((os.cpu_count() or 1) - 1, 1)
    for name in (m for m in MODELS if only in m):
        entry = next(e for e in collection(name) if e.name == name)
        with tempfile.TemporaryDirectory() as folder:
            row = judge(entry, Path(folder), effort, time_limit, busy)
        rows = [r for r in rows if (r["model"], r["effort"]) != (name, effort)] + [row]
        RECORD.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
