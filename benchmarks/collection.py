"""Optimize every model of the collection and write the table in docs/results.md.

Each model is optimized by ``pwopt.optimize`` at the given effort with an empty cache; the row comes
from its report. Then once more, with the cache that the first run filled, for what a second run
takes. Run it on a quiet machine, in pieces if need be; ``--resume`` leaves out what was measured at
this commit already:

    python -m benchmarks.collection --threads 1 --resume
    python -m benchmarks.collection --threads 2 --resume
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import pwopt
from benchmarks.conditions import conditions
from benchmarks.zoo import Entry, collection
from pwopt.report.json import to_json
from pwopt.tuning.effort import Effort

HERE = Path(__file__).parent
RECORD = HERE / "records" / "collection-{effort}-{threads}.json"


def optimize(
    entry: Entry,
    folder: Path,
    threads: int,
    effort: str,
    keep: Path | None,
    time_limit_s: float | None = None,
) -> dict[str, Any]:
    source = folder / f"{entry.name}.onnx"
    output = folder / f"{entry.name}.opt.onnx"
    entry.write(source)
    target = pwopt.Target("cpu", threads=threads, input_shapes=entry.input_shapes)
    options = pwopt.Options(
        effort=Effort(effort), time_limit_s=time_limit_s, cache=folder / "cache"
    )
    try:
        report = pwopt.optimize(source, output, target, options)
        again = pwopt.optimize(source, folder / "again.onnx", target, options)
    finally:
        source.unlink(missing_ok=True)
        if keep is not None and output.exists():
            output.replace(keep / f"{entry.name}.onnx")
    row = to_json(report)
    del row["remarks"]  # a report has them all; here they would be most of the record
    row["name"], row["kind"] = entry.name, entry.kind
    row["conditions"] = conditions()
    row["second_run"] = {
        "seconds": again.seconds["total"],
        "speedup": 1.0 if again.latency is None else again.latency.speedup,
        "same": again.output.sha256 == report.output.sha256,
        "stop_reason": again.stop_reason,
    }
    if time_limit_s is not None:
        row["time_limit_s"] = time_limit_s
    row["model"]["path"] = row["output"]["path"] = entry.name
    return row


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--effort", default="quick", show_default=True)
@click.option("--only", default="", help="Only models whose name contains this.")
@click.option("--kind", default="", help="trained, reference or light.")
@click.option("--time-limit", type=float, help="Seconds for trials instead of the effort's.")
@click.option("--resume", is_flag=True, help="Leave out what was recorded at this commit.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the optimized models."
)
def main(
    threads: int,
    effort: str,
    only: str,
    kind: str,
    time_limit: float | None,
    resume: bool,
    keep: Path | None,
) -> None:
    """Measure and record; earlier rows of other models are kept."""
    path = Path(str(RECORD).format(effort=effort, threads=threads))
    path.parent.mkdir(exist_ok=True)
    rows = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    commit = conditions()["commit"]
    wanted = [e for e in collection(only) if not kind or e.kind == kind]
    for number, entry in enumerate(wanted, start=1):
        if resume and _commit_of(rows.get(entry.name)) == commit:
            continue
        with tempfile.TemporaryDirectory(dir=keep) as folder:
            row = optimize(entry, Path(folder), threads, effort, keep, time_limit)
        rows[entry.name] = row
        path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        latency = row["latency"] or {"speedup": 1.0, "ci95": [1.0, 1.0]}
        print(
            f"{number:2}/{len(wanted)} {entry.name:32} {latency['speedup']:.3f} {latency['ci95']}"
            f" {row['seconds']['total']:.1f} s, again {row['second_run']['seconds']:.1f} s;"
            f" {row['stop_reason']}",
            flush=True,
        )
    speedups = [(r["latency"] or {"speedup": 1.0})["speedup"] for r in rows.values()]
    mean = float(np.exp(np.mean(np.log(speedups))))
    print(f"{len(speedups)} models: geometric mean {mean:.3f}, least {min(speedups):.3f}")


def _commit_of(row: dict[str, Any] | None) -> str | None:
    return None if row is None else row["conditions"]["commit"]


if __name__ == "__main__":
    main()
