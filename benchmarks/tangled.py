"""Exports with channels last against the networks that they were made from.

Each reference network is written as a framework with channels last exports it: everything computed
with the channels last, and Transposes around what ONNX has with the channels in front only. In the
form *affine* normalizations are a Mul and an Add, in *products* pointwise convolutions are MatMuls
too. The simplifying passes alone bring it back; the clean network is timed as it is.

    python -m benchmarks.tangled
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

import pwopt
from benchmarks.conditions import conditions
from benchmarks.peers import opened_anew
from pwopt import models
from pwopt.passes import SIMPLIFY
from pwopt.runtime import make_inputs, median_interval, open_session, resolve
from pwopt.tuning.effort import Effort
from tests.passes.tangled import tangle

RECORD = Path(__file__).parent / "records" / "tangled-1.json"
FORMS = {"affine": False, "products": True}
NETWORKS = (
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "resnet50",
    "shufflenet_v2_1_0x",
    "squeezenet1_1",
)


def write(name: str, form: str, folder: Path) -> dict[str, Path]:
    """The network clean, tangled, and brought back."""
    paths = {what: folder / f"{what}.onnx" for what in ("clean", "tangled", "optimized")}
    clean = models.build(name)
    onnx.save(clean, str(paths["clean"]))
    onnx.save(tangle(clean, products=FORMS[form]), str(paths["tangled"]))
    options = pwopt.Options(effort=Effort.NONE, passes=SIMPLIFY)
    target = pwopt.Target("cpu", threads=1)
    pwopt.optimize(paths["tangled"], paths["optimized"], target, options)
    return paths


def measure(name: str, form: str, paths: dict[str, Path]) -> dict[str, Any]:
    """Ratios of times within rounds, with 95% intervals; above 1 the clean network is slower."""
    target = resolve(pwopt.Target("cpu", threads=1))
    with open_session(paths["clean"], target) as session:
        feeds = make_inputs(session.interface.inputs, target, np.random.default_rng(0))[0]
    times = dict(zip(paths, opened_anew(paths, target, feeds).T, strict=True))
    rng = np.random.default_rng(0)
    operators = {
        what: len(onnx.load(str(path), load_external_data=False).graph.node)
        for what, path in paths.items()
    }
    return {
        "name": name,
        "form": form,
        "clean_ms": float(np.median(times["clean"])),
        "rounds": len(times["clean"]),
        "operators": operators,
        "tangled": median_interval(times["clean"] / times["tangled"], rng),
        "optimized": median_interval(times["clean"] / times["optimized"], rng),
        "conditions": conditions(),
    }


@click.command()
@click.option("--only", default="", help="Only networks whose name contains this.")
@click.option("--form", type=click.Choice(sorted(FORMS)), help="Only this form.")
@click.option(
    "--prepared",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where models are kept between runs, to write them first and measure later.",
)
@click.option("--write-only", is_flag=True, help="Measure nothing.")
def main(only: str, form: str | None, prepared: Path | None, *, write_only: bool) -> None:
    """Measure and record; earlier rows are kept."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = {(r["name"], r["form"]): r for r in known}
    chosen = [(n, f) for n in NETWORKS for f in FORMS if only in n and form in (None, f)]
    for name, shape in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (prepared or Path(temporary)) / f"{name}-{shape}"
            folder.mkdir(parents=True, exist_ok=True)
            written = {p.stem: p for p in sorted(folder.glob("*.onnx"))}
            paths = written if len(written) > 2 else write(name, shape, folder)
            if write_only:
                continue
            row = measure(name, shape, paths)
        rows[name, shape] = row
        RECORD.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")
        print(f"{name:24} {shape:10} {row['tangled']} {row['optimized']}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
