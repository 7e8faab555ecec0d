"""Where the time of each model goes: convolutions, their layout, and the rest.

What a network spends outside of its convolutions bounds what rewrites can gain that leave the
convolutions as they are; how many operations a second these do shows how much is in them.

    python -m benchmarks.shares
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import pwopt
from benchmarks.conditions import conditions
from benchmarks.zoo import Entry, collection
from pwopt.cost import model_cost
from pwopt.graph import load
from pwopt.runtime import make_inputs, open_session, profile, resolve

RECORD = Path(__file__).parent / "records" / "shares-1.json"
_LONGEST_MS = 200.0
_RUNS = 21
_KINDS = {
    "Conv": "convolutions",
    "FusedConv": "convolutions",
    "ReorderInput": "layout",
    "ReorderOutput": "layout",
    "Transpose": "layout",
}


def measure(entry: Entry, folder: Path) -> dict[str, Any]:
    path = folder / "model.onnx"
    entry.write(path)
    target = resolve(pwopt.Target("cpu", threads=1, input_shapes=entry.input_shapes))
    with open_session(path, target) as session:
        feeds = make_inputs(session.interface.inputs, target, np.random.default_rng(0))[0]
    first = profile(path, target, feeds, runs=1)
    runs = _RUNS if first.run_us < _LONGEST_MS * 1e3 else 5
    found = profile(path, target, feeds, runs=runs)
    shares = dict.fromkeys([*_KINDS.values(), "rest"], 0.0)
    for node in found.nodes:
        shares[_KINDS.get(node.op, "rest")] += node.share
    model = load(path)
    model.unlist_initializers()
    model.infer_shapes()
    shapes = {name: np.asarray(value).shape for name, value in feeds.items()}
    costs = model_cost(model, shapes).nodes
    operations = 2 * sum(c.macs or 0 for c in costs if c.op == "Conv")
    seconds = shares["convolutions"] * found.total_us / 1e6
    return {
        "name": entry.name,
        "ms": found.total_us / 1e3,
        "shares": shares,
        "gflops": operations / seconds / 1e9,
        "runs": runs,
        "conditions": conditions(),
    }


@click.command()
@click.option("--only", default="", help="Only models whose name contains this.")
@click.option("--kind", default="reference", show_default=True)
def main(only: str, kind: str) -> None:
    """Measure and record; earlier rows of other models are kept."""
    rows = {r["name"]: r for r in json.loads(RECORD.read_text())} if RECORD.exists() else {}
    for entry in collection(only):
        if entry.kind != kind:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(entry, Path(folder))
        rows[entry.name] = row
        RECORD.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        print(f"{entry.name:32} {row['ms']:8.2f} {row['shares']} {row['gflops']:.0f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
