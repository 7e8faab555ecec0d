"""Accuracy of the trained models before and after the exact passes, on their own real data.

Every model is optimized with ``--effort none``, so that all exact rewrites that the cost model
likes are in. Nothing is timed:

    python -m benchmarks.accuracy
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

import pwopt
from benchmarks.conditions import conditions
from benchmarks.tasks import Task, find_tasks
from benchmarks.zoo import SHAPES
from pwopt.report.json import to_json
from pwopt.report.terminal import accuracy_text
from pwopt.tuning.effort import Effort

RECORD = Path(__file__).parent / "records" / "accuracy-exact.json"


def judged(task: Task, threads: int, folder: Path) -> dict[str, Any]:
    options = pwopt.Options(
        effort=Effort.NONE,
        validation=task.given(),
        preprocess=task.steps,
        metric=task.metric,
    )
    output = folder / "optimized.onnx"
    target = pwopt.Target("cpu", threads, input_shapes=SHAPES.get(task.model, {}))
    report = pwopt.optimize(task.model_path, output, target, options)
    assert report.accuracy is not None
    print(f"{task.model}: {accuracy_text(report.accuracy)}", flush=True)
    found = to_json(report)
    return {
        "name": task.model,
        "data": task.what,
        "preprocess": task.preprocess,
        "accuracy": found["accuracy"],
        "error": found["error"]["max_relative"],
        "applied": [p["name"] for p in found["passes"] if p["applied"]],
        "conditions": conditions(),
    }


@click.command()
@click.option("--threads", default=0, show_default="all cores")
@click.option("--only", default="", help="Only models whose name contains this.")
def main(threads: int, only: str) -> None:
    """Judge and record; earlier rows of other models are kept."""
    RECORD.parent.mkdir(exist_ok=True)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = {(row["name"], row["data"]): row for row in known}
    for task in find_tasks(only):
        with tempfile.TemporaryDirectory() as folder:
            rows[task.model, task.what] = judged(task, threads, Path(folder))
        RECORD.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
