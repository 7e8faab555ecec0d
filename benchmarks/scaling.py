"""Time and memory against model size: both must grow linearly.

Rewrites chains of pointwise convolutions and activations in processes of their own and prints
seconds, ratios between sizes, and peak memory of loading, rewriting and saving (the runtime, which
verification adds, is left out).

    python -m benchmarks.scaling
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.conditions import conditions

RECORD = Path(__file__).parent / "records" / "scaling.json"
SIZES = (2500, 5000, 10000)


def chain(length: int, channels: int = 4) -> onnx.ModelProto:
    """*length* nodes: pointwise Conv, BatchNormalization, Relu, Mul by a shared scalar, in turn."""
    rng = np.random.default_rng(0)
    weights = {"half": np.array(0.5, np.float32)}
    nodes = []
    for index in range(length):
        inputs = [f"t{index}"]
        op = ("Conv", "BatchNormalization", "Relu", "Mul")[index % 4]
        if op == "Conv":
            inputs.append(f"w{index}")
            weights[f"w{index}"] = rng.normal(0, 0.5, (channels, channels, 1, 1)).astype(np.float32)
        if op == "BatchNormalization":
            for part in ("scale", "shift", "mean", "var"):
                inputs.append(f"{part}{index}")
                weights[f"{part}{index}"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        if op == "Mul":
            inputs.append("half")
        nodes.append(helper.make_node(op, inputs, [f"t{index + 1}"], name=f"n{index}"))
    shape = [1, channels, 8, 8]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("t0", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"t{length}", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rewrite(path: Path) -> dict[str, float]:
    """Load, rewrite to the fixed point and save, without the runtime."""
    from pwopt import passes
    from pwopt.graph import load, save
    from pwopt.tuning.driver import Driver
    from pwopt.tuning.pipeline import run_passes

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    driver = Driver(load(path))
    driver.rewriter.infer_shapes()
    run_passes(driver, passes.SIMPLIFY)
    nodes = len(driver.model.nodes)
    save(driver.model, path.with_suffix(".out.onnx"))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "memory_mib": (peak - before) / 1024, "nodes": nodes}


def in_process(path: Path) -> dict[str, float]:
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.scaling import rewrite;"
        "print(json.dumps(rewrite(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


@click.command()
@click.option("--repeat", default=3, show_default=True)
def main(repeat: int) -> None:
    """Measure, print and record; the median of *repeat* runs each."""
    rows = []
    previous = None
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chain.onnx"
            onnx.save(chain(size), str(path))
            runs = [in_process(path) for _ in range(repeat)]
            file_mib = path.stat().st_size / 2**20
        seconds = float(np.median([r["seconds"] for r in runs]))
        memory = float(np.median([r["memory_mib"] for r in runs]))
        ratio = "" if previous is None else f", {seconds / previous:.2f}x the time of half of it"
        print(
            f"{size} nodes -> {runs[0]['nodes']:.0f}: {seconds:.2f} s{ratio};"
            f" {memory:.0f} MiB on top of imports, file {file_mib:.1f} MiB"
        )
        rows.append(
            {
                "nodes": size,
                "after": runs[0]["nodes"],
                "seconds": seconds,
                "ratio": None if previous is None else seconds / previous,
                "memory_mib": memory,
                "file_mib": file_mib,
            }
        )
        previous = seconds
    RECORD.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
