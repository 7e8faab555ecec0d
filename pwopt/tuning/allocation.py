"""What each form of each convolution costs and saves, and the front of models that follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pwopt.calibration import Samples
from pwopt.calibration.moments import Gatherer
from pwopt.calibration.side_by_side import SideBySide, Station
from pwopt.cost import model_cost
from pwopt.errors import PwoptError, UsageError
from pwopt.graph import Facts, ModelProto, Rewriter, parse
from pwopt.numerics import lowrank
from pwopt.numerics.lowrank import Moments
from pwopt.passes import FactorizeConv, LowerConvWinograd
from pwopt.passes.factorize_conv import FactorizeConvMatch, Form, form_cost, forms, group_kernel
from pwopt.remark import Kind, Remark, Verdict
from pwopt.runtime import Outputs, open_session
from pwopt.target import Target
from pwopt.tuning.candidate import offered_forms
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.workbench import Build, Precision, Progress, Workbench, counting

__all__ = ["Layer", "Option", "Step", "front", "survey"]

Array = npt.NDArray[np.float64]
_Started: TypeAlias = list[list[Array]]
"""Factors of each group."""

_WINDOW: Final = Precision(5, 61, 0.4)
_PROBE: Final = 0.05
"""The response error that a layer's weight on the outputs is looked up at."""
_PROBE_MACS: Final = 1.5e12
"""Work to spend on these weights, in multiplications."""
_PROBE_SAMPLES: Final = (4, 256)
_SURVEY_SAMPLES: Final = 256
_LEAST_SHARE: Final = 0.002
"""Convolutions with less of the multiplications than this are left alone."""
_LEAST_GAIN: Final = 0.02
_POSITIONS_PER_SIZE: Final = 4
"""Output positions that it takes for each element of a patch; layers with fewer are left alone."""
_GLANCE: Final = 1.5
"""How much a first look may overrate an error."""
_NEGLIGIBLE: Final = 1e-4
"""A response error that is as good as none."""
_STEPS: Final = 3


@dataclass(frozen=True)
class Option:
    """One form of a layer.

    Attributes:
        form: ``None``: as it is, or in its best exact form.
        error: of its response on calibration data, relative to the power of the response.
        saved: milliseconds in its window, next to the layer as it is; without a clock,
            multiplications.
    """

    form: Form | None
    error: float
    saved: float


@dataclass(frozen=True)
class Layer:
    """One convolution.

    Attributes:
        site: its name.
        weight: error of the outputs, relative to their power, per response error of this layer.
        options: what it may become; the first one is exact.
    """

    site: str
    weight: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Step:
    """A point of the front.

    Attributes:
        plan: the form of each layer that has one.
        loss: predicted error of the outputs, relative to their power.
        saved: predicted, as of :class:`Option`.
    """

    plan: Mapping[str, Form]
    loss: float
    saved: float


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Errors of the forms of one site, what they save, and one kernel to probe the network with."""

    errors: Mapping[Form, float]
    saved_macs: dict[Form, float]
    kernel: Array
    bias: Array
    error: float


def survey(
    base: ModelProto,
    bench: Workbench,
    samples: Samples,
    scratch: Path,
    seed: int,
    *,
    clock: bool = True,
) -> list[Layer]:
    """Look at every convolution that may be worth it.

    Args:
        base: the model.
        bench: holds the same model, with the passes that compete.
        samples: calibration data.
        scratch: folder for files.
        seed: of the positions that are looked at.
        clock: whether to measure what is saved; otherwise multiplications are counted.
    """
    spectra = _spectra(base, bench, samples, scratch, seed, fine=not clock)
    weights = _weights(base, spectra, samples, bench.target, scratch, bench.progress)
    if clock:
        saved = _saved(bench, {site: list(s.errors) for site, s in spectra.items()})
    else:
        saved = {site: (0.0, s.saved_macs) for site, s in spectra.items()}
    layers = []
    for site, spectrum in spectra.items():
        exact, by_form = saved.get(site, (0.0, {}))
        options = [Option(None, 0.0, exact)]
        options += [Option(f, spectrum.errors[f], ms) for f, ms in by_form.items() if ms > exact]
        if len(options) > 1:
            layers.append(Layer(site, weights[site], tuple(options)))
    return layers


def front(layers: Sequence[Layer]) -> list[Step]:
    """From nothing factorised to everything, by the least marginal loss for each millisecond.

    Each layer goes along the lower convex hull of its options.
    """
    moves: list[tuple[float, str, Option, Option]] = []
    for layer in layers:
        hull = _hull(layer)
        for before, after in pairwise(hull):
            loss = layer.weight * (after.error - before.error)
            moves.append((loss / (after.saved - before.saved), layer.site, before, after))
    moves.sort(key=lambda move: move[0])
    weights = {layer.site: layer.weight for layer in layers}
    chosen = {layer.site: layer.options[0] for layer in layers}
    steps = []
    for _, site, _, after in moves:
        chosen[site] = after
        plan = {s: o.form for s, o in chosen.items() if o.form is not None}
        loss = sum(weights[s] * o.error for s, o in chosen.items())
        steps.append(Step(plan, loss, sum(o.saved for o in chosen.values())))
    return steps


def _hull(layer: Layer) -> list[Option]:
    """Options with less and less gain for the same loss."""
    hull: list[Option] = []
    for option in sorted(layer.options, key=lambda o: (o.saved, -o.error)):
        while hull and hull[-1].error >= option.error:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / max(b.saved - a.saved, 1e-12)


# -- errors ----------------------------------------------------------------------------------------


def _spectra(
    base: ModelProto,
    bench: Workbench,
    samples: Samples,
    scratch: Path,
    seed: int,
    *,
    fine: bool,
) -> dict[str, _Spectrum]:
    sites = _worthwhile(base)
    rng = np.random.default_rng(seed)
    found: dict[str, _Spectrum] = {}
    few = samples.spread(_SURVEY_SAMPLES)
    with SideBySide(base, sites, few, bench.target, scratch, rng) as networks:
        for station in networks.stations(
            counting(bench.progress, "looking at what layers can lose")
        ):
            seen = networks.observe(station, symmetric=True)
            if seen.count >= _POSITIONS_PER_SIZE * seen.size:
                found[station.site] = _spectrum(station, seen, fine=fine)
    if sum(sites[site] for site in found) < sum(sites.values()) / 2:
        raise UsageError(
            f"{len(samples)} calibration samples say too little about most layers; give more with"
            " --calibration."
        )
    return found


def _spectrum(station: Station, seen: Gatherer, *, fine: bool) -> _Spectrum:
    """Errors of those forms that no cheaper one beats."""
    moments = seen.moments()
    # Targets are the layer's own response: without restriction it stays as it is.
    fitters = [lowrank.Fitter(m, free=m.weight) for m in moments]
    looked_at = _at_a_glance(station, moments, fitters, fine=fine)
    errors: dict[Form, float] = {}
    probe: tuple[float, list[Array], float] | None = None
    least = math.inf
    for form, start in looked_at:
        kernels = _kernels(form, fitters, start, steps=_STEPS)[1]
        error = _response_error(moments, kernels)
        distance = abs(math.log(max(error, 1e-9) / _PROBE))
        if probe is None or distance < probe[0]:
            probe = distance, kernels, error
        if error < least:
            errors[form] = least = error
    assert probe is not None
    bias = np.concatenate([m.bias(k) for m, k in zip(moments, probe[1], strict=True)])
    whole, scale = math.prod(group_kernel(station.conv)), seen.pixels * station.conv.group
    saved = {form: scale * (whole - form_cost(station.conv, form)) for form in errors}
    return _Spectrum(errors, saved, np.concatenate(probe[1]), bias, probe[2])


def _at_a_glance(
    station: Station,
    moments: Sequence[Moments],
    fitters: Sequence[lowrank.Fitter],
    *,
    fine: bool,
) -> list[tuple[Form, _Started]]:
    """Forms that may be the best of their price, cheapest first, with factors to go on from."""
    found: list[tuple[Form, _Started]] = []
    least = math.inf
    for form in sorted(forms(station.conv, fine=fine), key=lambda f: form_cost(station.conv, f)):
        factors, kernels = _kernels(form, fitters, None, steps=1)
        error = _response_error(moments, kernels)
        if error < _GLANCE * least:
            found.append((form, factors))
        least = min(least, error)
        if least < _NEGLIGIBLE:  # what costs more has nothing left to gain
            break
    return found


def _kernels(
    form: Form, fitters: Sequence[lowrank.Fitter], start: _Started | None, steps: int
) -> tuple[_Started, list[Array]]:
    """One sweep from *start*: factors and their product for each group."""
    starts = start if start is not None else [None] * len(fitters)
    factors = [
        fitter.fit(form.method, form.ranks, start=one, sweeps=1, steps=steps)
        for fitter, one in zip(fitters, starts, strict=True)
    ]
    return factors, [lowrank.compose(form.method, one) for one in factors]


def _response_error(moments: Sequence[Moments], kernels: Sequence[Array]) -> float:
    """Over all groups, relative to the power of the response."""
    power = max(sum(m.power for m in moments), float(np.finfo(float).tiny))
    lost = sum(m.error(k) * m.power for m, k in zip(moments, kernels, strict=True))
    return max(lost / power, 0.0)


def _worthwhile(base: ModelProto) -> dict[str, float]:
    """Multiplications by site."""
    model = parse(base)
    model.infer_shapes()
    facts = Facts(model)
    pass_ = FactorizeConv()
    work: dict[str, float] = {}
    for node in model.by_op.get("Conv", {}).values():
        match = pass_.match(node, facts)
        if isinstance(match, FactorizeConvMatch):
            shape = facts.shape(match.conv.output) or ()
            pixels = math.prod(d for d in shape[2:] if isinstance(d, int))
            kernel = math.prod(group_kernel(match.conv)) * match.conv.group
            work[facts.site(node)] = float(pixels * kernel)
    total = sum(work.values())
    return {site: macs for site, macs in work.items() if macs >= _LEAST_SHARE * total}


# -- weights ---------------------------------------------------------------------------------------


def _weights(
    base: ModelProto,
    spectra: Mapping[str, _Spectrum],
    samples: Samples,
    target: Target,
    scratch: Path,
    progress: Progress,
) -> dict[str, float]:
    """How much of the error of each layer reaches the outputs."""
    model = parse(base)
    model.infer_shapes()
    rewriter, facts = Rewriter(model), Facts(model)
    nodes = {facts.site(n): n for n in model.by_op.get("Conv", {}).values()}
    path = scratch / "probe.onnx"

    def outputs(few: Samples) -> list[Outputs]:
        path.write_bytes(model.to_proto().SerializeToString())
        with open_session(path, Target(threads=target.threads)) as session:
            return [session.run(batch.feeds) for batch in few.stream(16)]

    few = samples.spread(_probe_count(base, target, len(spectra)))
    wanted = outputs(few)
    count = counting(progress, "looking at which layers matter")
    found: dict[str, float] = {}
    for done, (site, spectrum) in enumerate(spectra.items()):
        count(done, len(spectra))
        node, mark = nodes[site], rewriter.mark()
        conv = facts.conv(node)
        weight = None if conv is None else facts.constant(conv.weight)
        assert weight is not None
        values = spectrum.kernel.reshape(weight.shape).astype(weight.dtype)
        rewriter.set_weight(node, 1, values)
        rewriter.set_weight(node, 2, spectrum.bias.astype(weight.dtype))
        loss = _output_error(wanted, outputs(few))
        rewriter.rollback(mark)
        found[site] = loss / max(spectrum.error, 1e-9)
    return found


def _probe_count(base: ModelProto, target: Target, sites: int) -> int:
    """How many samples to probe with."""
    macs = model_cost(parse(base), target.input_shapes).macs or 1e9
    least, most = _PROBE_SAMPLES
    return int(min(most, max(least, _PROBE_MACS / macs / max(sites, 1))))


def _output_error(wanted: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """Squared error relative to the variance over samples, the mean over the float outputs."""
    errors = []
    for name, first in wanted[0].items():
        if np.asarray(first).dtype.kind != "f":
            continue
        right = [np.asarray(outputs[name], dtype=np.float64) for outputs in wanted]
        ours = [np.asarray(outputs[name], dtype=np.float64) for outputs in found]
        is_alike = len({array.shape[1:] for array in right}) == 1
        mean = np.mean(np.concatenate(right), axis=0) if is_alike else 0.0
        lost = sum(float(np.sum((r - o) ** 2)) for r, o in zip(right, ours, strict=True))
        power = sum(float(np.sum((r - mean) ** 2)) for r in right)
        errors.append(lost / max(power, float(np.finfo(float).tiny)))
    return float(np.mean(errors)) if errors else 0.0


# -- times -----------------------------------------------------------------------------------------


def _saved(
    bench: Workbench, wanted: Mapping[str, Sequence[Form]]
) -> dict[str, tuple[float, dict[Form, float]]]:
    """Milliseconds that the best exact form and each approximate one save, by site."""
    build = bench.build(Rulings(default=Ruling(Verdict.HELD)))
    held = [r for r in build.remarks if r.kind is Kind.HELD]
    exact: dict[str, Remark] = {r.site: r for r in held if r.pass_name == LowerConvWinograd.name}
    ours = {r.site: r for r in held if r.pass_name == FactorizeConv.name and r.site in wanted}
    groups: dict[str, list[str]] = {}
    for site, remark in ours.items():
        groups.setdefault(str(remark.facts["signature"]), []).append(site)
    found: dict[str, tuple[float, dict[Form, float]]] = {}
    label = "timing factors, layer by layer"
    for done, sites in enumerate(groups.values()):
        bench.progress(label, done / len(groups))
        names = {form.name: form for site in sites for form in wanted[site]}
        times = _window_times(bench, build, ours[sites[0]], list(names), label)
        best = 0.0
        if sites[0] in exact:
            variants = offered_forms(exact[sites[0]])
            for _, gain, ms in _window_times(bench, build, exact[sites[0]], variants, label):
                best = max(best, ms if gain > 1 + _LEAST_GAIN else 0.0)
        gains = {names[name]: ms for name, _, ms in times}
        for site in sites:
            found[site] = best, {f: gains[f] for f in wanted[site] if f in gains}
    return found


def _window_times(
    bench: Workbench, build: Build, remark: Remark, variants: Sequence[str], label: str
) -> Iterable[tuple[str, float, float]]:
    """(variant, speedup of the window, milliseconds saved)."""
    window = bench.cut(build, remark, variants)
    found = []
    for variant in variants if window is not None else ():
        assert window is not None
        if variant not in window.after:
            continue
        try:
            timed = bench.compare_window(window, variant, _WINDOW, label, decide=1.0)
        except PwoptError:  # a form that does not run is none
            continue
        # The ratio of pairs is steadier than the difference of medians.
        before = timed.baseline.median_ms
        found.append((variant, timed.speedup, before * (1 - 1 / timed.speedup)))
    return found
