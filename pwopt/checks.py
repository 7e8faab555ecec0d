"""Verification, accuracy, latency and explanation as calls of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pwopt import passes as catalogue
from pwopt.calibration import Data, Given, Judge, Metric, Preprocess, parse_metric
from pwopt.graph import Facts, Model, ModelProto, has_float16, load, parse
from pwopt.passes.contract import Variant
from pwopt.remark import Remark, Verdict
from pwopt.result import AccuracyFigures
from pwopt.runtime import (
    Comparison,
    Feeds,
    Latency,
    Reference,
    Verification,
    compare,
    measure,
    open_session,
    profile,
    resolve,
)
from pwopt.target import Target
from pwopt.tuning.candidate import AnyPass, Candidate
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import run_passes
from pwopt.tuning.workbench import Progress, counting, silent

__all__ = ["bench", "explain", "judge", "node_times_us", "time", "verify"]

_DEFAULT_PAIRS = (15, 121)
_TIME_LIMIT_S = 30.0
_RUNTIME_AFFIXES = re.compile(r"^fused |(_nchwc)?(_token_\d+)?$")
"""What ONNX Runtime adds to the name of a node that it fused, or of the tensor that it writes."""


def verify(
    reference: str | Path,
    candidate: str | Path,
    inputs: str | Path | Sequence[Feeds] | None = None,
    *,
    preprocess: Preprocess | None = None,
    target: Target = Target(),  # noqa: B008 - frozen
    max_error: float | None = None,
    seed: int = 0,
) -> Verification:
    """Compare what two models compute.

    The oracle is *reference* on CPU with graph optimizations off; *candidate* runs on *target*
    with its optimizations on.

    Args:
        reference: path of the model to agree with.
        candidate: path of the other model.
        inputs: an ``.npz``/``.npy`` file, a folder of images (of which a few are taken), or feeds
            (arrays by input name); seeded ones by default.
        preprocess: what is done to images.
        target: where the candidate runs.
        max_error: tolerance relative to each output's scale; by default a small multiple of what
            the reference itself shows between optimization levels.
        seed: for generated inputs.

    Raises:
        PwoptError: a model cannot be loaded, or the reference cannot be executed.
    """
    resolved = resolve(target)
    feeds = _feeds(Path(reference), inputs, resolved, seed, preprocess)
    loaded = load(Path(reference))
    oracle = Reference.of(
        Path(reference),
        resolved,
        feeds,
        depth=loaded.depth,
        max_error=max_error,
        precision="float16" if has_float16(loaded) else None,
    )
    return oracle.verify(Path(candidate))


def judge(
    original: str | Path,
    candidate: str | Path,
    validation: Given,
    *,
    preprocess: Preprocess | None = None,
    metric: str | Metric | None = None,
    target: Target = Target(),  # noqa: B008 - frozen
    seed: int = 0,
    progress: Progress = silent,
) -> AccuracyFigures:
    """Compare how accurate two models are.

    Args:
        original: path of the model that sets the mark.
        candidate: path of the model to judge.
        validation: samples that neither was fitted to: a folder of images, an ``.npz``/``.npy``
            file, or feeds; see :func:`pwopt.calibration.load_samples`.
        preprocess: what is done to images.
        metric: ``top1``, ..., ``module:function``, or a :class:`~pwopt.calibration.Metric`; by
            default what suits data and model.
        target: where both run, at full optimization.
        seed: for the bootstrap.
        progress: told how far it is.

    Raises:
        PwoptError: a model cannot be loaded or run, or the samples do not suit it.
    """
    resolved = resolve(target)
    data = Data(Path(original), resolved, validation=validation, preprocess=preprocess)
    parts = data.held_out(seed)
    found = Judge.of(
        Path(original),
        parts.validation,
        resolved,
        metric=parse_metric(metric) if isinstance(metric, str) else metric,
        seed=seed,
        progress=counting(progress, "judging the original"),
    )
    return found.figures(Path(candidate), counting(progress, "judging the candidate"))


def bench(
    model: str | Path,
    baseline: str | Path,
    *,
    target: Target = Target(),  # noqa: B008 - frozen
    pairs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Time *model* against *baseline* in order-balanced pairs in this process.

    Args:
        model: path of the candidate.
        baseline: path of what it is compared with; the ratio is baseline over model.
        target: where both run, at full optimization.
        pairs: exactly so many; by default until the interval is narrow.
        seed: for generated inputs and the bootstrap.
        progress: told how far it is.

    Raises:
        PwoptError: a model cannot be loaded or run.
    """
    resolved = resolve(target)
    feeds = _feeds(Path(baseline), None, resolved, seed)[0]
    first = open_session(Path(baseline), resolved)
    second = open_session(Path(model), resolved)
    fewest, most = (pairs, pairs) if pairs is not None else _DEFAULT_PAIRS
    return compare(
        first,
        second,
        feeds,
        min_pairs=fewest,
        max_pairs=most,
        time_limit_s=_TIME_LIMIT_S if pairs is None else float("inf"),
        rng=np.random.default_rng(seed),
        on_progress=counting(progress, "timing"),
    )


def time(
    model: str | Path,
    *,
    target: Target = Target(),  # noqa: B008 - frozen
    runs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Latency:
    """Median latency of one model; for comparisons use :func:`bench`.

    Raises:
        PwoptError: the model cannot be loaded or run.
    """
    resolved = resolve(target)
    feeds = _feeds(Path(model), None, resolved, seed)[0]
    fewest, most = (runs, runs) if runs is not None else _DEFAULT_PAIRS
    return measure(
        open_session(Path(model), resolved),
        feeds,
        min_runs=fewest,
        max_runs=most,
        time_limit_s=_TIME_LIMIT_S if runs is None else float("inf"),
        rng=np.random.default_rng(seed),
        on_progress=counting(progress, "timing"),
    )


def node_times_us(model: str | Path, *, target: Target = Target()) -> Mapping[str, float]:  # noqa: B008
    """Median microseconds per node, by site, as ONNX Runtime's profiler sees them.

    The time of nodes that the runtime fused stands at the one whose output the fused node writes;
    nodes that it added, such as those between layouts, are listed under the runtime's names.

    Raises:
        PwoptError: the model cannot be loaded or run.
    """
    resolved = resolve(target)
    feeds = _feeds(Path(model), None, resolved, 0)[0]
    loaded = load(Path(model))
    facts = Facts(loaded)
    sites = {facts.site(node) for node in loaded.nodes.values()}
    writers = {t.name: facts.site(n) for n in loaded.nodes.values() for t in n.outputs}
    times: dict[str, float] = {}
    for node in profile(Path(model), resolved, feeds).nodes:
        stem = _RUNTIME_AFFIXES.sub("", node.name)
        site = stem if stem in sites else writers.get(stem, node.name)
        times[site] = times.get(site, 0.0) + node.median_us
    return times


def explain(
    model: str | Path | ModelProto | Model, passes: Sequence[AnyPass] | None = None
) -> list[Remark]:
    """What each pass says about each site, without measuring anything.

    Simplifying passes are applied as they go, so that what one exposes the next one sees;
    lowering passes only say where they would apply.
    """
    if isinstance(model, Model):
        wrapped = model
    else:
        wrapped = load(Path(model)) if isinstance(model, str | Path) else parse(model)
        wrapped.unlist_initializers()
    simplify, lower = catalogue.split(catalogue.ALL if passes is None else passes)
    driver = Driver(wrapped)
    driver.rewriter.infer_shapes()
    run_passes(driver, simplify)

    def hold(_: Candidate) -> Variant | Verdict:
        return Verdict.HELD

    for pass_ in lower:
        driver.run(pass_, hold)
    return driver.ledger.remarks()


def _feeds(
    model: Path,
    inputs: str | Path | Sequence[Feeds] | None,
    target: Target,
    seed: int,
    preprocess: Preprocess | None = None,
) -> list[Feeds]:
    if inputs is not None and not isinstance(inputs, str | Path):
        return list(inputs)
    rng = np.random.default_rng(seed)
    return Data(model, target, calibration=inputs, preprocess=preprocess).input_sets(rng)
