"""What a user waits for and what it takes: whole processes of the command line.

Seconds of ``pwopt --help`` and of ``pwopt optimize --effort none`` on ResNet-50, as medians of runs
in turn; and peak memory of ``optimize --effort none`` beside that of ONNX Runtime alone, which
loads and runs the same original, unoptimized and optimized, as verification has to. With effort
quick the runtime alone has two sessions of the original open at once, as comparing has to.

    python -m benchmarks.whole_process
    python -m benchmarks.whole_process --tuning
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

RUNTIME_IN_PAIRS = (
    RUNTIME_ALONE
    + """
pair = [
    ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"]) for _ in "ab"
]
for session in pair:
    session.run(None, feeds)
"""
)

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


def optimize(source: Path, *options: str) -> list[str]:
    output = str(source.with_suffix(".opt.onnx"))
    return [*PWOPT, "optimize", str(source), "-o", output, *options]


PWOPT = (sys.executable, "-m", "pwopt")


def times(folder: Path, repeat: int) -> list[dict[str, Any]]:
    source = exported("resnet50", folder)
    commands = {
        "pwopt --help": ([*PWOPT, "--help"], 0.3),
        "pwopt optimize --effort none, ResNet-50": (optimize(source, "--effort", "none"), 4.0),
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


def memory(name: str, source: Path, trials_s: int = 0) -> dict[str, Any]:
    """Peaks in MiB with effort none, or while tuning for so many seconds of trials."""
    file_mib = source.stat().st_size / 2**20
    tuning = ("--effort", "quick", "--no-cache", "--time-limit", str(trials_s))
    _, alone = run(
        [sys.executable, "-c", RUNTIME_IN_PAIRS if trials_s else RUNTIME_ALONE, str(source)]
    )
    _, imports = run([sys.executable, "-c", IMPORTS_ALONE])
    _, ours = run(optimize(source, *(tuning if trials_s else ("--effort", "none"))))
    return {
        "what": name,
        "file_mib": file_mib,
        "runtime_mib": alone,
        "imports_mib": imports,
        "peak_mib": ours,
        "trials_s": trials_s,
    }


def exported(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    if not path.exists():
        run([*PWOPT, "models", "export", name, "-o", str(path)])
    return path


@click.command()
@click.option("--repeat", default=7, show_default=True)
@click.option("--tuning", is_flag=True, help="Only memory while tuning.")
@click.option("--seconds", default=40, show_default=True, help="Of trials while tuning.")
@click.option("--only", default="", help="While tuning, only models whose name contains this.")
def main(repeat: int, tuning: bool, seconds: int, only: str) -> None:
    """Measure, print and record; what was not measured now stays as it was."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if tuning:
            rows = {r["what"]: r for r in record.get("tuning", ())}
            for name in (n for n in ("resnet50", "vgg16") if only in n):
                found = memory(name, exported(name, Path(folder)), seconds)
                rows[name] = found | {"conditions": conditions()}
            record["tuning"] = list(rows.values())
        else:
            record |= {"conditions": conditions()} | everything(Path(folder), repeat)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def everything(folder: Path, repeat: int) -> dict[str, Any]:
    """Seconds, and memory without tuning."""
    timed = times(folder, repeat)
    sized = [memory(n, exported(n, folder)) for n in ("resnet50", "vgg16")]
    long = folder / "chain.onnx"
    run([sys.executable, "-c", SAVE_CHAIN, str(long)])
    return {"times": timed, "memory": [*sized, memory("chain of 10,000 nodes", long)]}


if __name__ == "__main__":
    main()
