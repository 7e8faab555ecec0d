"""Optimized models on ONNX Runtime against OpenVINO on the originals, in fp32.

Both run in one process, in turns, on the same inputs and the same number of threads; ONNX Runtime
on the original takes turns too. OpenVINO is told to aim at latency and to compute in fp32 (on
processors with bfloat16 instructions it would take bfloat16 by itself).

    python -m benchmarks.openvino --threads 1 --only vgg19
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import pwopt
from benchmarks.conditions import conditions
from benchmarks.peers import deviation, rounds
from benchmarks.zoo import Entry, collection
from pwopt.runtime import Feeds, make_inputs, median_interval, open_session, resolve
from pwopt.tuning.effort import Effort

HERE = Path(__file__).parent
RECORD = HERE / "records" / "openvino-{threads}.json"
MODELS = ("vgg19", "resnet18", "googlenet")
_OPENINGS = 3
"""How often the sessions of ONNX Runtime are opened anew."""


class OpenVino:
    """A compiled model with the two calls that taking turns needs."""

    def __init__(self, path: Path, feeds: Feeds, threads: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        # Dynamic dimensions cost OpenVINO time that ONNX Runtime does not spend: fix them.
        model.reshape({name: list(np.asarray(value).shape) for name, value in feeds.items()})
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(self, feeds: Feeds) -> dict[str, Any]:
        """Outputs by name."""
        results = self._request.infer(dict(feeds))
        return {port.get_any_name(): np.array(value) for port, value in results.items()}

    def runner(self, feeds: Feeds) -> Any:
        """A call without arguments; inputs are shared, and outputs are left where they are."""
        inputs = dict(feeds)
        return lambda: self._request.infer(inputs, share_inputs=True, share_outputs=True)


def optimized(entry: Entry, source: Path, folder: Path, threads: int, kept: Path | None) -> Path:
    """What pwopt makes of the model, or made of it before."""
    if kept is not None and (kept / f"{entry.name}.onnx").exists():
        return kept / f"{entry.name}.onnx"
    output = folder / "optimized.onnx"
    target = pwopt.Target("cpu", threads=threads, input_shapes=entry.input_shapes)
    pwopt.optimize(source, output, target, pwopt.Options(effort=Effort.QUICK))
    return output


def measure(entry: Entry, folder: Path, threads: int, kept: Path | None) -> dict[str, Any]:
    source = folder / "original.onnx"
    entry.write(source)
    target = resolve(pwopt.Target("cpu", threads=threads, input_shapes=entry.input_shapes))
    paths = {"original": source, "pwopt": optimized(entry, source, folder, threads, kept)}
    with open_session(source, target) as original:
        feeds = make_inputs(original.interface.inputs, target, np.random.default_rng(0))[0]
        expected = original.run(feeds)
    rival = OpenVino(source, feeds, threads)
    row: dict[str, Any] = {"name": entry.name, "threads": threads, "conditions": conditions()}
    row["openvino"] = version("openvino")
    row["error"] = deviation(expected, rival.run(feeds))
    parts = []
    for _ in range(_OPENINGS):
        with ExitStack() as stack:
            sessions: dict[str, Any] = {
                name: stack.enter_context(open_session(path, target))
                for name, path in paths.items()
            }
            sessions["openvino"] = rival
            parts.append(rounds(sessions, feeds, count=15, seconds=12.0))
    original_ms, pwopt_ms, openvino_ms = np.concatenate(parts).T
    rng = np.random.default_rng(0)
    row["original_ms"] = float(np.median(original_ms))
    row["pwopt_ms"] = float(np.median(pwopt_ms))
    row["openvino_ms"] = float(np.median(openvino_ms))
    row["over_original"] = median_interval(original_ms / pwopt_ms, rng)
    row["over_openvino"] = median_interval(openvino_ms / pwopt_ms, rng)
    row["rounds"] = len(original_ms)
    return row


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--only", default="", help="Only models whose name contains this.")
@click.option(
    "--kept",
    type=click.Path(exists=True, path_type=Path),
    help="Folder where benchmarks.collection --keep left its models.",
)
def main(threads: int, only: str, kept: Path | None) -> None:
    """Measure and record; earlier rows of other models are kept."""
    path = Path(str(RECORD).format(threads=threads))
    path.parent.mkdir(exist_ok=True)
    rows = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    for entry in collection(only):
        if entry.name not in MODELS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows[entry.name] = row = measure(entry, Path(folder), threads, kept)
        path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        print(f"{entry.name:20} {row['over_openvino']} over OpenVINO, {row['over_original']}")


if __name__ == "__main__":
    main()
