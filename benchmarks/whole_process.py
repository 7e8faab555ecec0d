"""What a user waits for and what it takes: whole processes of the command line.

Seconds of ``pwopt --help`` and of ``pwopt optimize --effort none`` on ResNet-50, as medians of runs
in turn; and peak memory of ``optimize --effort none`` beside that of ONNX Runtime alone, which
loads and runs the same original, unoptimized and optimized, as verification has to.

    python -m benchmarks.whole_process
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.conditions import conditions

RECORD = Path(__file__).parent / "records" / "whole-process.json"
RUNTIME_ALONE = """
import sys
import numpy as np
import onnxruntime as ort
Level = ort.GraphOptimizationLevel
for level in (Level.ORT_DISABLE_ALL, Level.ORT_ENABLE_ALL):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    feeds = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
    session.run(None, feeds)
    del session
"""

SAVE_CHAIN = """
import sys
import onnx
from benchmarks.scaling import chain
onnx.save(chain(10_000), sys.argv[1])
"""


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a process of its own, which may keep bytecode as users' do.

    This process must stay small: a child's peak counts what it shared before it started.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def optimize(source: Path) -> list[str]:
    output = str(source.with_suffix(".opt.onnx"))
    return [*PWOPT, "optimize", str(source), "-o", output, "--effort", "none"]


PWOPT = (sys.executable, "-m", "pwopt")


def times(folder: Path, repeat: int) -> list[dict[str, Any]]:
    source = exported("resnet50", folder)
    commands = {
        "pwopt --help": ([*PWOPT, "--help"], 0.3),
        "pwopt optimize --effort none, ResNet-50": (optimize(source), 4.0),
    }
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeat + 1):
        for name, (command, _) in commands.items():
            seconds, _ = run(command)
            if turn:  # the first run writes bytecode and fills the page cache
                samples[name].append(seconds)
    return [
        {
            "what": name,
            "seconds": statistics.median(seconds),
            "range": [min(seconds), max(seconds)],
            "runs": len(seconds),
            "asked": commands[name][1],
        }
        for name, seconds in samples.items()
    ]


IMPORTS_ALONE = "import pwopt; pwopt.optimize, pwopt.verify, pwopt.passes"


def memory(name: str, source: Path) -> dict[str, Any]:
    file_mib = source.stat().st_size / 2**20
    _, alone = run([sys.executable, "-c", RUNTIME_ALONE, str(source)])
    _, imports = run([sys.executable, "-c", IMPORTS_ALONE])
    _, ours = run(optimize(source))
    return {
        "what": name,
        "file_mib": file_mib,
        "runtime_mib": alone,
        "imports_mib": imports,
        "peak_mib": ours,
    }


def exported(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    if not path.exists():
        run([*PWOPT, "models", "export", name, "-o", str(path)])
    return path


@click.command()
@click.option("--repeat", default=7, show_default=True)
def main(repeat: int) -> None:
    """Measure, print and record."""
    with tempfile.TemporaryDirectory() as folder:
        timed = times(Path(folder), repeat)
        sized = [memory(n, exported(n, Path(folder))) for n in ("resnet50", "vgg16")]
        long = Path(folder) / "chain.onnx"
        run([sys.executable, "-c", SAVE_CHAIN, str(long)])
        sized.append(memory("chain of 10,000 nodes", long))
    record = {"conditions": conditions(), "times": timed, "memory": sized}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
