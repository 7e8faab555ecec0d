"""Optimize every model of the collection and write the table in docs/results.md.

Each model is optimized by ``pwopt.optimize`` at the given effort; the row comes from its report.
Run it on a quiet machine:

    python -m benchmarks.collection --threads 1
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import pwopt
from benchmarks.conditions import conditions
from benchmarks.zoo import Entry, collection
from pwopt.report.json import to_json
from pwopt.tuning.search import Effort

HERE = Path(__file__).parent
RECORD = HERE / "records" / "collection-{effort}-{threads}.json"


def optimize(
    entry: Entry, folder: Path, threads: int, effort: str, keep: Path | None
) -> dict[str, Any]:
    source = folder / f"{entry.name}.onnx"
    output = folder / f"{entry.name}.opt.onnx"
    entry.write(source)
    target = pwopt.Target("cpu", threads=threads, input_shapes=entry.input_shapes)
    try:
        report = pwopt.optimize(source, output, target, pwopt.Options(effort=Effort(effort)))
    finally:
        source.unlink(missing_ok=True)
        if keep is not None and output.exists():
            output.replace(keep / f"{entry.name}.onnx")
    row = to_json(report)
    del row["remarks"]  # a report has them all; here they would be most of the record
    row["name"], row["kind"] = entry.name, entry.kind
    row["conditions"] = conditions()
    row["model"]["path"] = row["output"]["path"] = entry.name
    return row


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--effort", default="quick", show_default=True)
@click.option("--only", default="", help="Only models whose name contains this.")
@click.option("--kind", default="", help="trained, reference or light.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the optimized models."
)
def main(threads: int, effort: str, only: str, kind: str, keep: Path | None) -> None:
    """Measure and record; earlier rows of other models are kept."""
    path = Path(str(RECORD).format(effort=effort, threads=threads))
    path.parent.mkdir(exist_ok=True)
    rows = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    for entry in collection(only):
        if kind and entry.kind != kind:
            continue
        with tempfile.TemporaryDirectory(dir=keep) as folder:
            row = optimize(entry, Path(folder), threads, effort, keep)
        rows[entry.name] = row
        path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        latency = row["latency"] or {"speedup": 1.0, "ci95": [1.0, 1.0]}
        print(
            f"{entry.name:32} {latency['speedup']:.3f} {latency['ci95']}"
            f" {row['seconds']['total']:.0f} s; {row['stop_reason']}"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
