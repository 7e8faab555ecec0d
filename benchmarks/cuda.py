"""The collection on a GPU: what rewriting gains, what fp16 gains, what provider options gain.

One command, for a machine with an NVIDIA GPU, that ends within eight minutes and writes the table
in docs/results-cuda.md. What matters most comes first; what the time does not reach is listed.

    pip install -e '.[gpu]' --group bench && python -m benchmarks.cuda

Each row is an optimization in a process of its own, for the time that is left. ``--provider cpu``
runs the same on the CPU, to try the script out; nothing is recorded then.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import helper, numpy_helper

import pwopt
from benchmarks.conditions import conditions
from benchmarks.render import RESULTS_CUDA, cuda_table, fill
from pwopt import models
from pwopt.errors import PwoptError
from pwopt.report.json import to_json
from pwopt.runtime import resolve
from pwopt.tuning.effort import Effort

HERE = Path(__file__).parent
RECORD = HERE / "records" / "cuda.json"
CHAIN = "bottleneck_chain"
FIRST = ("resnet50", CHAIN)
OTHERS = ("vgg16", "mobilenet_v2", "googlenet", "convnext_tiny", "squeezenet1_1", "efficientnet_b0")
SECONDS = 470.0
"""For all rows: eight minutes less what starting and writing take."""
ROW_SECONDS = 30.0
"""A row is not begun with less time left, and searches for the third part of that."""
SEARCH_SECONDS = 12.0
PRECISIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "cuda": {
        "fp32": {"use_tf32": "0"},
        "fp32, TF32": {"use_tf32": "1"},
        "fp16": {"use_tf32": "1"},
    },
    "cpu": {"fp32": {}, "fp16": {}},
}
"""By provider, what is measured and under which options."""


@dataclass(frozen=True)
class Row:
    """One optimization."""

    model: str
    batch: int
    precision: str


def rows(provider: str) -> Iterator[Row]:
    """Everything there is to measure, in the order of importance."""
    for names in (FIRST, OTHERS):
        for batch in (1, 32):
            for precision in PRECISIONS[provider]:
                for name in names:
                    yield Row(name, batch, precision)


def bottlenecks(batch: int, blocks: int = 4, width: int = 64, size: int = 56) -> onnx.ModelProto:
    """Residual blocks 1x1, 3x3, 1x1 of ResNet-50's first stage, without what is around them."""
    rng = np.random.default_rng(0)
    wide, nodes, weights, last = 4 * width, [], {}, "x"
    for block in range(blocks):
        source = last
        for layer, (cin, cout, kernel) in enumerate(
            ((wide, width, 1), (width, width, 3), (width, wide, 1))
        ):
            stem = f"b{block}_{layer}"
            fan = cin * kernel**2
            # The last layer of a block adds little, so that values keep their scale.
            scale = np.sqrt(2 / fan) * (0.3 if layer == 2 else 1.0)
            weights[f"{stem}_w"] = rng.normal(0, scale, (cout, cin, kernel, kernel))
            weights[f"{stem}_b"] = rng.normal(0, 0.1, cout)
            operands = [last, f"{stem}_w", f"{stem}_b"]
            pads = [kernel // 2] * 4
            nodes.append(
                helper.make_node("Conv", operands, [f"{stem}_c"], f"{stem}_conv", pads=pads)
            )
            last = f"{stem}_c"
            if layer == 2:
                nodes.append(helper.make_node("Add", [last, source], [f"{stem}_s"], f"{stem}_add"))
                last = f"{stem}_s"
            nodes.append(helper.make_node("Relu", [last], [f"{stem}_r"], f"{stem}_relu"))
            last = f"{stem}_r"
    shape = [batch, wide, size, size]
    x, y = (helper.make_tensor_value_info(name, 1, shape) for name in ("x", last))
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, CHAIN, [x], [y], constants)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def build(row: Row) -> onnx.ModelProto:
    return (
        bottlenecks(row.batch) if row.model == CHAIN else models.build(row.model, batch=row.batch)
    )


def measure(row: Row, provider: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Optimize one model; the row comes from the report."""
    path = folder / "model.onnx"
    onnx.save(build(row), str(path))
    settings = PRECISIONS[provider][row.precision]
    options = pwopt.Options(
        effort=Effort.QUICK,
        fp16=row.precision == "fp16",
        time_limit_s=min(SEARCH_SECONDS, seconds / 3),
    )
    target = pwopt.Target(provider, provider_options=dict(settings))
    report = to_json(pwopt.optimize(path, folder / "out.onnx", target, options))
    for unwanted in ("remarks", "model", "output", "seconds"):
        del report[unwanted]
    return {**vars(row), "report": report}


def measure_apart(row: Row, provider: str, seconds: float) -> dict[str, Any]:
    """The same in a process of its own, which is ended when its time is over."""
    with tempfile.TemporaryDirectory(prefix="pwopt-cuda-") as folder:
        answer = Path(folder) / "row.json"
        asked = json.dumps({**vars(row), "provider": provider, "seconds": seconds})
        command = [sys.executable, "-m", "benchmarks.cuda", "--row", asked, str(answer)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {**vars(row), "failed": "the time was over"}
        if answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
    last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    return {**vars(row), "failed": last}


Measure = Callable[[Row, str, float], dict[str, Any]]


def collect(
    wanted: Iterator[Row],
    provider: str,
    measure_row: Measure,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Measure until the time is over; rows that it does not reach say so."""
    deadline = clock() + seconds
    found = []
    for row in wanted:
        left = deadline - clock()
        if left < ROW_SECONDS:
            found.append({**vars(row), "failed": "not reached in the time"})
            continue
        result = measure_row(row, provider, left)
        found.append(result)
        print(f"{row.model:20} {row.batch:3} {row.precision:12} {_outcome(result)}", flush=True)
    return found


def _outcome(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    latency = row["report"]["latency"]
    return "the original was kept" if latency is None else f"{latency['speedup']:.3f}"


def versions() -> dict[str, str]:
    """Libraries that matter on a GPU and are installed as packages."""
    found = {}
    for package in ("onnxruntime-gpu", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@click.command()
@click.option(
    "--provider", type=click.Choice(sorted(PRECISIONS)), default="cuda", show_default=True
)
@click.option("--seconds", default=SECONDS, show_default=True, help="For all rows together.")
@click.option("--only", default="", help="Only models whose name contains this.")
@click.option("--row", nargs=2, hidden=True, help="One row, as JSON, and where to write it.")
def main(provider: str, seconds: float, only: str, row: tuple[str, str] | None) -> None:
    """Measure, record, and write the table."""
    if row is not None:
        asked = json.loads(row[0])
        wanted = Row(asked["model"], asked["batch"], asked["precision"])
        answer = Path(row[1])
        found = measure(wanted, asked["provider"], answer.parent, asked["seconds"])
        answer.write_text(json.dumps(found))
        return
    try:
        device = resolve(pwopt.Target(provider)).device
    except PwoptError as error:
        print(f"no GPU: {error}\nNothing was measured; {RESULTS_CUDA.name} stays as it is.")
        sys.exit(1)
    chosen = (r for r in rows(provider) if only in r.model)
    results = collect(chosen, provider, measure_apart, seconds=seconds)
    record = {"conditions": {**conditions(), "device": device, **versions()}, "rows": results}
    if provider != "cuda":
        print(cuda_table(record))
        return
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    fill(RESULTS_CUDA, "cuda", cuda_table(record))


if __name__ == "__main__":
    main()
