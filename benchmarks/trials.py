"""Passes applied everywhere, unsearched: what each way of speeding a network up gives by itself.

For figures that were hoped for: every trial simplifies the network, applies some lowering passes at
all of their sites, and is timed against the original.

    python -m benchmarks.trials
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

from benchmarks.conditions import conditions
from pwopt import models, passes
from pwopt.graph import parse
from pwopt.passes import Variant
from pwopt.runtime import Comparison, Feeds, compare, make_inputs, open_session, resolve
from pwopt.target import Target
from pwopt.tuning.candidate import Candidate
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import run_passes

RECORD = Path(__file__).parent / "records" / "trials-1.json"
GATES = ("", "lower-gate", "fold-gate=conv", "fold-gate=matmul")
TRIALS = {
    "efficientnet_b0": GATES,
    "mobilenet_v3_large_decomposed": (
        *GATES,
        "align-channels=blocks-of-16 lower-gate",
        "align-channels=blocks-of-8 lower-gate",
    ),
    "repvgg_a0": ("", "lower-conv-winograd"),
    "shufflenet_v1": (
        "",
        "absorb-channel-permutation",
        "merge-groups",
        "align-channels",
        "absorb-channel-permutation align-channels",
        "assign-layout",
        "lower-pointwise-conv",
    ),
    "unet_resize": ("split-concat-conv", "lower-conv-winograd"),
    "unet_transpose": (
        "lower-conv-transpose=transpose",
        "lower-conv-transpose=channels-last",
        "split-concat-conv",
        "lower-conv-winograd",
    ),
}
"""By network: passes, in order, each with the variant to take wherever it is offered."""


def rewritten(proto: onnx.ModelProto, trial: str) -> onnx.ModelProto:
    """*proto*, simplified and lowered."""
    model = parse(proto)
    model.unlist_initializers()
    driver = Driver(model)
    driver.rewriter.infer_shapes()
    run_passes(driver, passes.SIMPLIFY)
    for step in trial.split():
        name, _, wanted = step.partition("=")

        def choose(candidate: Candidate, wanted: str = wanted) -> Variant:
            named = (v for v in candidate.variants if v.name == wanted)
            return next(named, candidate.variants[0])

        driver.run(passes.find(name), choose)
        driver.rewriter.infer_shapes()
    return model.to_proto()


def timed(original: Path, candidate: Path, feeds: Feeds, target: Target) -> Comparison:
    """Both in pairs, with sessions opened in one order and then in the other."""
    found: list[Comparison] = []
    for first, second in ((original, candidate), (candidate, original)):
        with open_session(first, target) as one, open_session(second, target) as two:
            pair = (one, two) if first is original else (two, one)
            rng = np.random.default_rng(0)
            found.append(
                compare(*pair, feeds, max_pairs=201, time_limit_s=4, precision=0.003, rng=rng)
            )
    return found[0].joined(found[1])


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    target = resolve(Target("cpu", threads=1))
    original = folder / "original.onnx"
    onnx.save(models.build(name), str(original))
    with open_session(original, target) as session:
        feeds = make_inputs(session.interface.inputs, target, np.random.default_rng(0))[0]
    rows = []
    for trial in TRIALS[name]:
        candidate = folder / "candidate.onnx"
        onnx.save(rewritten(onnx.load(str(original)), trial), str(candidate))
        result = timed(original, candidate, feeds, target)
        row = {"name": name, "trial": trial, **result.to_json(), "conditions": conditions()}
        print(f"{name:32} {trial or 'simplified':40} {result.speedup:.3f} {result.ci95}")
        sys.stdout.flush()
        rows.append(row)
    return rows


@click.command()
@click.option("--only", default="", help="Only networks whose name contains this.")
def main(only: str) -> None:
    """Measure and record; earlier rows of other networks are kept."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    for name in (n for n in TRIALS if only in n):
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(name, Path(folder))
        known = sorted([r for r in known if r["name"] != name] + rows, key=lambda r: r["name"])
        RECORD.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
