"""The variants of lower-conv-winograd against the runtime's own convolution, shape by shape.

Every figure comes from a window of two convolutions, each with its Relu, so that layout changes
at the edges count about as they do inside a network. Speedups are median ratios of paired runs.
The split into input transform, multiplication and output transform comes from a profile; beside it
stands the roofline: the time that the multiplications alone would take at the rate of a large
matrix product, and that reading and writing each intermediate value once would take at the rate of
adding two large tensors, both measured first, on the same threads.

    python -m benchmarks.winograd --threads 1
    python -m benchmarks.winograd --only 64x56 --batch 4
    python -m benchmarks.winograd --loading
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.conditions import conditions
from pwopt.graph import load, save
from pwopt.passes.lower_conv_winograd import LowerConvWinograd
from pwopt.runtime import Profile, compare, open_session, profile
from pwopt.target import Target
from pwopt.tuning.driver import Driver

SHAPES = "64x56,128x28,256x14,512x7,64x112,128x56,256x28,512x14,128x112,256x56,512x28,64x224"
VARIANTS = "2d-f4,2d-bands-f4,2d-f2,1d-f4,1d-f6"
LAYERS = 2
RECORD = Path(__file__).parent / "records" / "winograd-{threads}.json"


def window(
    channels: int, size: int, batch: int, kernel: int = 3, layers: int = LAYERS
) -> onnx.ModelProto:
    """Convolutions of stride 1 that keep the size, each followed by Relu."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {}
    for i in range(layers):
        fan = channels * kernel**2
        weights[f"w{i}"] = rng.normal(0, math.sqrt(2 / fan), (channels, channels, kernel, kernel))
        weights[f"b{i}"] = rng.normal(0, 0.1, channels)
        pads = [kernel // 2] * 4
        nodes.append(
            helper.make_node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"c{i}"], f"conv{i}", pads=pads)
        )
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"], f"relu{i}"))
    shape = [batch, channels, size, size]
    graph = helper.make_graph(
        nodes,
        "window",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{layers}", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def lowered(path: Path, variant: str, weights: str = "session") -> Path:
    """The model with every convolution in one variant."""
    form, tile = variant.split("-f")
    driver = Driver(load(path))
    driver.rewriter.infer_shapes()
    applied, _ = driver.run(LowerConvWinograd(form, int(tile), weights))
    if not applied:
        raise click.ClickException(f"{variant} does not apply")
    out = path.with_name(f"{path.stem}.{variant}.{weights}.onnx")
    save(driver.model, out)
    return out


def taps(variant: str) -> tuple[int, int, int]:
    """Outputs of a tile per axis; taps in all; taps of one convolution."""
    form, tile = variant.split("-f")
    size = int(tile) + 2
    return int(tile), size if form == "1d" else size**2, size**2 if form == "2d" else size


def split(measured: Profile, variant: str, channels: int) -> dict[str, float]:
    """Milliseconds per layer before, in and behind the multiplications."""
    _, _, together = taps(variant)
    times = {"input": 0.0, "multiply": 0.0, "output": 0.0}
    is_behind = False
    for node in measured.nodes:
        shape = node.output_shapes[0] if node.output_shapes else ()
        is_conv = node.op == "Conv"
        if is_conv and shape[1] == together * channels:
            step, is_behind = "multiply", True
        elif is_conv or node.op == "ReorderInput":
            step, is_behind = "input", False
        else:
            step = "output" if is_behind else "input"
        times[step] += node.median_us / 1000 / LAYERS
    return times


def timed(folder: Path, target: Target, op: str, *shapes: tuple[int, ...]) -> float:
    """Microseconds of one operator on tensors of these shapes."""
    names = [f"x{i}" for i in range(len(shapes))]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"])],
        op,
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in zip(names, shapes, strict=True)
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    path = folder / f"{op}.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, str(path))
    rng = np.random.default_rng(1)
    feeds = {n: rng.normal(size=s).astype(np.float32) for n, s in zip(names, shapes, strict=True)}
    return min(node.median_us for node in profile(path, target, feeds, runs=20).nodes)


def gmacs_per_s(folder: Path, target: Target) -> float:
    """The rate of a matrix product of 1024 x 1024 x 1024."""
    return 1024**3 / timed(folder, target, "MatMul", (1024, 1024), (1024, 1024)) / 1000


def gbytes_per_s(folder: Path, target: Target) -> float:
    """The rate of adding two tensors of 64 MiB: two are read, one is written."""
    shape = (16, 1024, 1024)
    return 3 * 4 * math.prod(shape) / timed(folder, target, "Add", shape, shape) / 1000


def macs(channels: int, size: int, batch: int, variant: str) -> float:
    """Multiply-accumulates of one layer's multiplications, those of partial tiles included."""
    m, count, _ = taps(variant)
    tiles = -(-size // m)
    positions = tiles * size * 3 if variant.startswith("1d") else tiles**2
    return float(batch * channels**2 * count * positions)


def least_bytes(channels: int, size: int, batch: int, variant: str) -> float:
    """Bytes of one layer if each step read and wrote its tensors once.

    The image is read and written; what is transformed is written, read, and so are the products;
    transformed weights are read.
    """
    m, count, _ = taps(variant)
    tiles = -(-size // m)
    positions = tiles * size if variant.startswith("1d") else tiles**2
    weights = channels**2 * count * (3 if variant.startswith("1d") else 1)
    return 4.0 * (batch * channels * (2 * size**2 + 4 * count * positions) + weights)


def rows(
    shapes: list[tuple[int, int]], variants: list[str], batch: int, target: Target
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ceiling, bandwidth = gmacs_per_s(folder, target), gbytes_per_s(folder, target)
        click.echo(f"ceilings: {ceiling:.1f} GMAC/s, {bandwidth:.1f} GB/s", err=True)
        for channels, size in shapes:
            path = folder / f"{channels}x{size}.onnx"
            onnx.save(window(channels, size, batch), str(path))
            feeds = {"x0": rng.normal(size=(batch, channels, size, size)).astype(np.float32)}
            direct = batch * 9 * (channels * size) ** 2 / ceiling / 1e6
            with open_session(path, target) as baseline:
                for variant in variants:
                    candidate = lowered(path, variant)
                    with open_session(candidate, target) as session:
                        result = compare(
                            baseline, session, feeds, max_pairs=40, time_limit_s=2.0, rng=rng
                        )
                    measured = profile(candidate, target, feeds, runs=12)
                    parts = split(measured, variant, channels)
                    traffic = least_bytes(channels, size, batch, variant)
                    yield {
                        "threads": target.threads,
                        "gmacs_per_s": round(ceiling, 1),
                        "gbytes_per_s": round(bandwidth, 1),
                        "channels": channels,
                        "size": size,
                        "batch": batch,
                        "variant": variant,
                        "speedup": round(result.speedup, 3),
                        "ci95": [round(v, 3) for v in result.ci95],
                        "direct_ms": round(result.baseline.median_ms / LAYERS, 3),
                        "lowered_ms": round(result.candidate.median_ms / LAYERS, 3),
                        **{f"{k}_ms": round(v, 3) for k, v in parts.items()},
                        "direct_roofline_ms": round(direct, 3),
                        "multiply_roofline_ms": round(
                            macs(channels, size, batch, variant) / ceiling / 1e6, 3
                        ),
                        "bytes_roofline_ms": round(traffic / bandwidth / 1e6, 3),
                        "conditions": conditions(),
                    }


def load_once(path: Path) -> dict[str, float]:
    """Processor seconds and memory of opening one session in this process."""
    before = memory_mib()
    cpu = time.process_time()
    with open_session(path, Target("cpu", threads=1)):
        seconds = time.process_time() - cpu
        after = memory_mib()
    return {
        "cpu_seconds": round(seconds, 2),
        "peak_mib": round(after["VmHWM"] - before["VmRSS"]),
        "resident_mib": round(after["VmRSS"] - before["VmRSS"]),
    }


def memory_mib() -> dict[str, float]:
    """This process's resident memory now and at most (Linux; getrusage counts the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM")}


def loading(channels: int, size: int, layers: int) -> None:
    """Print file size, load time and memory for untransformed and transformed weights."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"
        onnx.save(window(channels, size, 1, layers=layers), str(path))
        paths = {"original": path}
        for weights in ("session", "file"):
            for variant in ("2d-f4", "1d-f4"):
                paths[f"{variant}, {weights}"] = lowered(path, variant, weights)
        for label, candidate in paths.items():
            code = (
                "import json, sys; from pathlib import Path; import onnxruntime;"
                "from benchmarks.winograd import load_once;"
                "print(json.dumps(load_once(Path(sys.argv[1]))))"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, str(candidate)],
                capture_output=True,
                text=True,
                check=True,
            )
            size_mib = candidate.stat().st_size / 2**20
            print(f"{label}: file {size_mib:.1f} MiB, {json.loads(done.stdout)}")


@click.command()
@click.option("--shapes", default=SHAPES, show_default=True, help="CxH, comma-separated.")
@click.option("--variants", default=VARIANTS, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--only", default="", help="Only the shape that is exactly this.")
@click.option("--loading", "only_loading", is_flag=True, help="Load time and memory instead.")
def main(
    shapes: str, variants: str, batch: int, threads: int, only: str, only_loading: bool
) -> None:
    """Measure and record; earlier rows of other shapes, variants and batch sizes are kept."""
    if only_loading:
        loading(512, 14, 8)
        return
    path = Path(str(RECORD).format(threads=threads))
    earlier = json.loads(path.read_text()) if path.exists() else []
    found = {_key(row): row for row in earlier}
    chosen = [s for s in shapes.split(",") if only in ("", s)]
    grid = [(int(c), int(h)) for c, h in (s.split("x") for s in chosen)]
    for row in rows(grid, variants.split(","), batch, Target("cpu", threads=threads)):
        click.echo(f"{row['channels']}x{row['size']} {row['variant']}: {row['speedup']}", err=True)
        found[_key(row)] = row
        path.write_text(json.dumps([found[k] for k in sorted(found)], indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[int, int, int, str]:
    return row["batch"], row["channels"], row["size"], row["variant"]


if __name__ == "__main__":
    main()
