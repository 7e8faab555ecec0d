"""Factorised models: how much smaller and faster they are, and what they lose.

In two steps, so that the second one has the machine to itself only for as long as timing takes:

    python -m benchmarks.factorize make --only cifar10
    python -m benchmarks.factorize time --only cifar10
    python -m benchmarks.factorize ablate --model cifar10_resnet56

Models and reports of the first step lie in a folder (``--folder``) until the second one has timed
them. Calibration and judging never share a sample; seeds are fixed.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

import pwopt
from benchmarks.conditions import conditions
from pwopt.calibration import Batch, Judge, Preprocess, Samples, load_samples
from pwopt.cost import model_cost
from pwopt.graph import Facts, ModelProto, load, parse
from pwopt.numerics.lowrank import Method
from pwopt.passes.factorize_conv import Form
from pwopt.report.json import dump, to_json
from pwopt.report.terminal import accuracy_text
from pwopt.runtime import compare, input_sets, open_session, resolve
from pwopt.target import Target
from pwopt.tuning.effort import Effort
from pwopt.tuning.factorize import Fitting, base_model, fitted, written

RECORD = Path(__file__).parent / "records" / "factorize-1.json"
ABLATION = RECORD.with_name("factorize-ablation.json")
FOLDER = Path("factorized")
THREADS = 1
SIGMA = 25 / 255

Array = np.ndarray[Any, Any]
Data = tuple[Any, Any]
"""What to calibrate with, and what to judge on."""


@dataclass(frozen=True)
class Case:
    """A model, its data, and what is asked of it.

    Attributes:
        data: feeds to calibrate with and to judge on.
        asked: what the project wants to show, in words.
        shapes: fix dynamic dimensions for measuring.
    """

    name: str
    model: str
    data: Callable[[], Data]
    asked: str
    drop: float | None = None
    speedup: float | None = None
    metric: Any = None
    effort: Effort = Effort.QUICK
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def zoo() -> Path:
    return Path(os.environ["PWOPT_ZOO"])


def images(name: str, model: str, steps: str) -> Samples:
    path = zoo() / "models" / f"{model}.onnx"
    with open_session(path, Target(threads=1), optimized=False) as session:
        specs = session.interface.inputs
    return load_samples(zoo() / "data" / name, specs, Preprocess.parse(steps))


def parts(name: str, model: str, steps: str, count: int) -> Data:
    """A folder of labelled images in two: *count* to calibrate with, class by class, the rest."""
    samples = images(name, model, steps)
    first, rest = samples.split(count, np.random.default_rng(0))
    return feeds(first), feeds(rest)


def feeds(samples: Samples) -> Iterator[dict[str, Any]]:
    for batch in samples.stream(1):
        labels = {} if batch.labels is None else {"labels": batch.labels}
        yield {**batch.feeds, **labels}


def grey_crops(count: int, side: int) -> Iterator[Array]:
    """The middles of photographs."""
    for path in sorted((zoo() / "data" / "imagenet_val_800").glob("*.JP*G"))[:count]:
        pixels = np.asarray(Image.open(path).convert("L"), np.float32) / 255
        yield middle(pixels, side)


def middle(pixels: Array, side: int) -> Array:
    top, left = ((n - side) // 2 for n in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def noisy() -> Data:
    """Grey photographs to calibrate with, BSD68 to judge on; both with noise."""
    rng = np.random.default_rng(0)

    def feed(pixels: Array) -> dict[str, Any]:
        x = pixels[None, None]
        noise = rng.standard_normal(x.shape).astype(np.float32) * np.float32(SIGMA)
        return {"input": x + noise, "targets": x}

    bsd = [
        middle(np.asarray(Image.open(path).convert("L"), np.float32) / 255, 160)
        for path in sorted((zoo() / "data" / "bsd68").glob("*.png"))
    ]
    return [feed(p) for p in grey_crops(24, 96)], [feed(p) for p in bsd]


MOST_DB = 60.0
"""What counts as the same image."""


def own_psnr(outputs: dict[str, Array], batch: Batch) -> Array:
    """Decibels against the original's output, which is the target."""
    (ours,) = outputs.values()
    error = np.square(ours - np.asarray(batch.targets)).mean(axis=(1, 2, 3), dtype=np.float64)
    return np.asarray(-10 * np.log10(np.maximum(error, 10 ** (-MOST_DB / 10))))


own_psnr.unit = "dB"  # type: ignore[attr-defined]


def photographs() -> Data:
    """Colour photographs to calibrate with, others to judge on."""
    paths = sorted((zoo() / "data" / "imagenet_val_800").glob("*.JP*G"))

    def feeds_of(some: list[Path], side: int) -> Iterator[dict[str, Any]]:
        for path in some:
            pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
            yield {"data": middle(pixels, side).transpose(2, 0, 1)[None].copy()}

    model = zoo() / "models" / "realesr_animevideov3_x2.onnx"
    with open_session(model, Target(threads=1)) as session:
        judged = [
            {**feed, "targets": next(iter(session.run(feed).values()))}
            for feed in feeds_of(paths[400:432], 128)
        ]
    return list(feeds_of(paths[:32], 64)), judged


def pooled_cosine(outputs: dict[str, Array], batch: Batch) -> Array:
    """Cosine of the pooled features with the original's, which are the targets; in percent."""
    ours, theirs = outputs["pooled"], np.asarray(batch.targets)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.asarray(100 * (ours * theirs).sum(axis=1) / lengths)


def trunk_features() -> Data:
    model = "resnet50v2_trunk_s1-3"
    samples = images("imagenet_val_800", model, "torch,crop=224").spread(120)
    order = np.random.default_rng(0).permutation(len(samples))
    first, rest = samples.take(order[:64]), samples.take(order[64:])
    path = zoo() / "models" / f"{model}.onnx"
    with open_session(path, Target(threads=1)) as session:
        judged = [{**f, "targets": session.run(f)["pooled"]} for f in rest.batches(1)]
    return [dict(f) for f in first.batches(1)], judged


CASES = (
    Case(
        "cifar10_resnet20, half the MACs",
        "cifar10_resnet20",
        lambda: parts("cifar10_test_5000", "cifar10_resnet20", "torch", 1000),
        "2x fewer MACs at 1 point of top-1, 1.25x faster",
        speedup=2.0,
        effort=Effort.NONE,
    ),
    Case(
        "cifar10_resnet20",
        "cifar10_resnet20",
        lambda: parts("cifar10_test_5000", "cifar10_resnet20", "torch", 1000),
        "1.25x faster at 1 point of top-1",
        drop=1.0,
    ),
    Case(
        "cifar10_resnet56, half the MACs",
        "cifar10_resnet56",
        lambda: parts("cifar10_test_5000", "cifar10_resnet56", "torch", 1000),
        "2x fewer MACs at 1 point of top-1, 1.25x faster",
        speedup=2.0,
        effort=Effort.NONE,
    ),
    Case(
        "squeezenet1.1_gluon",
        "squeezenet1.1_gluon",
        lambda: parts("imagenet_val_800", "squeezenet1.1_gluon", "torch,crop=224", 200),
        "1.15x faster at 1 point of top-1",
        drop=1.0,
    ),
    Case(
        "squeezenet1.1_gluon, three quarters of the MACs",
        "squeezenet1.1_gluon",
        lambda: parts("imagenet_val_800", "squeezenet1.1_gluon", "torch,crop=224", 200),
        "1.15x faster at 1 point of top-1",
        speedup=1.3,
        effort=Effort.NONE,
    ),
    Case(
        "mobilenetv2_1.0_224",
        "mobilenetv2_1.0_224",
        lambda: parts("imagenet_val_800", "mobilenetv2_1.0_224", "torch,crop=224", 200),
        "whatever can be had at 1 point of top-1",
        drop=1.0,
    ),
    Case(
        "dncnn_sigma25_bn",
        "dncnn_sigma25_bn",
        noisy,
        "1.6x faster at 0.1 dB",
        drop=0.1,
        shapes={"input": (1, 1, 160, 160)},
    ),
    Case(
        "dncnn_sigma25_bn, two thirds of the MACs",
        "dncnn_sigma25_bn",
        noisy,
        "a plain chain of layers for the ablation",
        speedup=1.5,
        effort=Effort.NONE,
        shapes={"input": (1, 1, 160, 160)},
    ),
    Case(
        "realesr_animevideov3_x2",
        "realesr_animevideov3_x2",
        photographs,
        "1.6x faster at 40 dB against its own output",
        drop=MOST_DB - 40,
        metric="benchmarks.factorize:own_psnr",
        shapes={"data": (1, 3, 128, 128)},
    ),
    Case(
        "resnet50v2_trunk_s1-3",
        "resnet50v2_trunk_s1-3",
        trunk_features,
        "1.4x faster at a cosine of 0.98 of the pooled features",
        drop=2.0,
        metric="benchmarks.factorize:pooled_cosine",
    ),
)


class Told:
    """Says what is going on, and from which second on."""

    def __init__(self) -> None:
        self.start = clock.perf_counter()
        self.label = ""

    def __call__(self, label: str, _: float | None) -> None:
        """Take note of the progress of a run."""
        if label != self.label:
            print(f"{clock.perf_counter() - self.start:7.1f} s {label}", flush=True)
        self.label = label


def peak_mib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def named(folder: Path, case: Case) -> Path:
    return folder / case.name.replace(", ", "-").replace(" ", "_").replace(".", "-")


def chosen(only: str) -> list[Case]:
    """The case of that name, or all whose names contain it."""
    named_so = [case for case in CASES if case.name == only]
    return named_so or [case for case in CASES if only in case.name]


@click.group()
def main() -> None:
    """Make, then time."""


@main.command()
@click.option("--only", default="", help="Only cases whose name contains this.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER)
def make(only: str, folder: Path) -> None:
    """Factorise and judge; in a process for each case the memory taken is that case's."""
    folder.mkdir(exist_ok=True)
    for case in chosen(only):
        calibration, validation = case.data()
        options = pwopt.Options(
            effort=case.effort,
            calibration=calibration,
            validation=validation,
            max_accuracy_drop=case.drop,
            target_speedup=case.speedup,
            metric=case.metric,
        )
        path = named(folder, case)
        report = pwopt.optimize(
            zoo() / "models" / f"{case.model}.onnx",
            path.with_suffix(".onnx"),
            Target("cpu", THREADS, input_shapes=case.shapes),
            options,
            Told(),
        )
        found = to_json(report) | {"peak_mib": peak_mib(), "conditions": conditions()}
        path.with_suffix(".json").write_text(dump(found))
        assert report.accuracy is not None
        print(f"{case.name}: {accuracy_text(report.accuracy)}", flush=True)


@main.command()
@click.option("--only", default="", help="Only cases whose name contains this.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER)
@click.option("--seconds", default=20.0, show_default=True, help="For each model.")
def time(only: str, folder: Path, seconds: float) -> None:
    """Time what was made against the originals, and record it."""
    RECORD.parent.mkdir(exist_ok=True)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = {row["name"]: row for row in known}
    for case in chosen(only):
        path = named(folder, case)
        if not path.with_suffix(".json").exists():
            continue
        found = json.loads(path.with_suffix(".json").read_text())
        original = zoo() / "models" / f"{case.model}.onnx"
        target = resolve(Target("cpu", THREADS, input_shapes=case.shapes))
        rng = np.random.default_rng(0)
        feed = input_sets(original, None, target, rng)[0]
        made = path.with_suffix(".onnx")
        with open_session(original, target) as first, open_session(made, target) as second:
            timed = compare(
                first, second, feed, min_pairs=15, max_pairs=2001, time_limit_s=seconds, rng=rng
            )
        costs = [model_cost(load(p), case.shapes) for p in (original, made)]
        points = (found["factorization"] or {"points": []})["points"]
        rows[case.name] = {
            "name": case.name,
            "asked": case.asked,
            "threads": THREADS,
            "latency": timed.to_json(),
            "accuracy": found["accuracy"],
            "macs": [cost.macs for cost in costs],
            "params": [cost.params for cost in costs],
            "fitted_to": (found["factorization"] or {"samples": 0})["samples"],
            "points": [
                {k: point[k] for k in ("speedup", "ci95", "macs", "accuracy", "final")}
                | {"forms": sorted(point["plan"].values())}
                for point in points
            ],
            "selected_on": (found["factorization"] or {}).get("selected_on", 0),
            "seconds": found["seconds"]["total"],
            "peak_mib": found["peak_mib"],
            "conditions": found["conditions"],
        }
        print(f"{case.name}: {timed.speedup:.3f}x {timed.ci95}", flush=True)
        RECORD.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


WAYS = {
    "as it is": Fitting(),
    "without the activation": Fitting(rectified=0),
    "without the shortcut": Fitting(rectified=0, residual=False),
    "symmetric": Fitting(rectified=0, residual=False, asymmetric=False),
    "without data": Fitting(on_data=False),
}


@main.command()
@click.option("--model", default="cifar10_resnet56", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER)
def ablate(model: str, folder: Path) -> None:
    """Fit a plan made by MACs in other ways, and uniform ranks in the best way."""
    case = next(c for c in CASES if c.model == model and c.effort is Effort.NONE)
    found = json.loads(named(folder, case).with_suffix(".json").read_text())["factorization"]
    point = found["points"][found["chosen"] - 1]
    plan = {site: Form.parse(name) for site, name in point["plan"].items()}
    path = zoo() / "models" / f"{model}.onnx"
    target = resolve(Target("cpu", THREADS, input_shapes=case.shapes))
    with open_session(path, target) as session:
        specs = session.interface.inputs
    calibration, validation = (load_samples(given, specs) for given in case.data())
    judge = Judge.of(path, validation, target)
    base = base_model(load(path).to_proto())
    tried = [(f"allocated, {how}", plan, fitting) for how, fitting in WAYS.items()]
    tried.append(("uniform ranks, as it is", uniform(base), Fitting()))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for how, forms, fitting in tried:
            factors = fitted(base, forms, calibration, target, Path(scratch), 0, fitting)
            made = written(base, factors, Path(scratch) / "model.onnx")
            accuracy = judge.figures(made.path)
            print(f"{how}: {accuracy_text(accuracy)}", flush=True)
            macs = model_cost(load(made.path), case.shapes).macs
            rows.append({"how": how, "macs": macs, "accuracy": asdict(accuracy)})
    earlier = json.loads(ABLATION.read_text()) if ABLATION.exists() else []
    whole_macs = model_cost(load(path), case.shapes).macs
    record = {"model": model, "macs": whole_macs, "rows": rows, "conditions": conditions()}
    records = [record, *(r for r in earlier if r["model"] != model)]
    ABLATION.write_text(json.dumps(records, indent=1) + "\n")


def uniform(base: ModelProto) -> dict[str, Form]:
    """Every 3x3 but the first one spatial, with half of its multiplications."""
    model = parse(base)
    facts = Facts(model)
    plan = {}
    for node in model.by_op["Conv"].values():
        conv = facts.conv(node)
        if conv is not None and conv.cin > 3:
            rank = round(conv.cin * conv.cout * 3 / (2 * (conv.cin + conv.cout)))
            plan[facts.site(node)] = Form(Method.SPATIAL, (rank,))
    return plan


if __name__ == "__main__":
    main()
