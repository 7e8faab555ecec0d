"""Whether the statistics are honest: equal models, a planted slowdown, and a disturbed machine.

A model is compared with a copy of itself as the search compares (twice, with the sessions opened
anew in between, where it looks like a gain); then with copies that were slowed by 3%: an idle loop
that lasts 3% of the model's own time follows every run. Runs are real sessions in real time.

    python -m benchmarks.honesty
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.conditions import conditions
from benchmarks.zoo import collection
from pwopt.runtime import Comparison, Session, make_inputs, open_session
from pwopt.runtime.measure import WarmSampler, compare_samplers
from pwopt.target import Target
from pwopt.tuning.verdicts import MARGIN

RECORD = Path(__file__).parent / "records" / "honesty.json"
PLANTED = 0.03
MODELS = ("vww_mobilenetv1_0.25_96", "cifar10_resnet20", "cifar10_resnet56")
PAIRS = (7, 201)
SECONDS = 0.6


def slowed(run: Callable[[], object], by: float) -> Callable[[], object]:
    """*run*, and an idle loop of *by* times what it took at its fastest so far."""
    fastest = float("inf")

    def slower() -> None:
        nonlocal fastest
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        fastest = min(fastest, end - start)
        until = end + by * fastest
        while time.perf_counter() < until:
            pass

    return slower


def compared(
    paths: tuple[Path, Path], feeds: Mapping[str, Any], target: Target, by: float, seed: int
) -> Comparison:
    """Both models in pairs, the second one slowed *by* so much; sessions of their own."""
    with open_session(paths[0], target) as first, open_session(paths[1], target) as second:
        return compare_samplers(
            _sampler(first, feeds, 0.0),
            _sampler(second, feeds, by),
            min_pairs=PAIRS[0],
            max_pairs=PAIRS[1],
            time_limit_s=SECONDS,
            precision=0.005,
            rng=np.random.default_rng(seed),
            decide=1 + MARGIN if by == 0.0 else 1.0,
        )


def _sampler(session: Session, feeds: Mapping[str, Any], by: float) -> WarmSampler:
    run = session.timed_runner(feeds)
    return WarmSampler.warmed_up(slowed(run, by) if by else run)


def trials(name: str, folder: Path, count: int) -> dict[str, Any]:
    entry = next(e for e in collection(name) if e.name == name)
    paths = folder / f"{name}.onnx", folder / f"{name}-copy.onnx"
    for path in paths:
        entry.write(path)
    target = Target("cpu", threads=1, input_shapes=entry.input_shapes)
    with open_session(paths[0], target) as session:
        feeds = make_inputs(session.interface.inputs, target, np.random.default_rng(0))[0]
    once = claimed = found = 0
    widths, speedups = [], []
    for seed in range(count):
        same = compared(paths, feeds, target, 0.0, seed)
        widths.append((same.ci95[1] - same.ci95[0]) / 2)
        speedups.append(same.speedup)
        if same.ci95[0] > 1 + MARGIN:
            once += 1
            again = same.joined(compared((paths[1], paths[0]), feeds, target, 0.0, count + seed))
            claimed += again.ci95[0] > 1 + MARGIN
        found += compared(paths, feeds, target, PLANTED, seed).ci95[1] < 1
    return {
        "model": name,
        "trials": count,
        "looked_like_gains": once,
        "claimed": claimed,
        "found": found,
        "half_width": float(np.median(widths)),
        "spread": [float(np.percentile(speedups, q)) for q in (5, 95)],
    }


@click.command()
@click.option("--trials", "count", default=100, show_default=True)
@click.option("--only", default="", help="Only models whose name contains this.")
def main(count: int, only: str) -> None:
    """Measure, print and record; earlier rows of other models are kept."""
    rows = {r["model"]: r for r in json.loads(RECORD.read_text())} if RECORD.exists() else {}
    for name in (m for m in MODELS if only in m):
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = trials(name, Path(folder), count) | {"conditions": conditions()}
        RECORD.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        print(json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    main()
