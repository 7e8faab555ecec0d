"""Factors of convolutions, chosen over the whole network and fitted layer by layer.

What a form of a layer costs is measured: its error on calibration data, how much of that error
reaches the outputs, and the time it saves in a window of the real graph, next to that of the best
exact form. The forms that lose least for each millisecond make a front of models; the ones on it
that are looked at are fitted anew, each layer on inputs from the layers approximated before it,
and judged on data held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pwopt.calibration import Samples
from pwopt.calibration.side_by_side import SideBySide, Station
from pwopt.errors import InvalidModelError
from pwopt.graph import ModelProto, Written, parse, save
from pwopt.numerics import lowrank
from pwopt.numerics.lowrank import Moments
from pwopt.passes import FactorizeConv, FoldAffine, FoldBatchNormalization
from pwopt.passes.factorize_conv import Form, SiteFactors
from pwopt.remark import Kind
from pwopt.target import Target
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import run_passes

__all__ = ["Fitting", "Plan", "base_model", "fitted", "written"]

Array = npt.NDArray[np.float64]
Plan = Mapping[str, Form]
"""The form of each site that has one."""


@dataclass(frozen=True)
class Fitting:
    """How the layers of a plan are fitted.

    Attributes:
        on_data: to the response on calibration data; otherwise to the weights.
        asymmetric: inputs come from the approximated network.
        residual: where the result is added to something, errors of that are made up for.
        rectified: rounds of fitting behind the activation, where nothing is added before it.
    """

    on_data: bool = True
    asymmetric: bool = True
    residual: bool = True
    rectified: int = 3


def base_model(model: ModelProto) -> ModelProto:
    """*model* with what is fixed folded into its convolutions, which is where factors start."""
    driver = Driver(parse(model))
    driver.model.unlist_initializers()
    driver.rewriter.infer_shapes()
    run_passes(driver, (FoldBatchNormalization(), FoldAffine()))
    return driver.model.to_proto()


def fitted(
    base: ModelProto,
    plan: Plan,
    samples: Samples,
    target: Target,
    scratch: Path,
    seed: int,
    fitting: Fitting = Fitting(),
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, SiteFactors]:
    """The factors of *plan*, layer by layer.

    Args:
        base: as :func:`base_model` makes it.
        plan: forms by site.
        samples: calibration data.
        target: threads to run with.
        scratch: folder for files.
        seed: of the positions that are looked at.
        fitting: what is taken into account.
        on_progress: told how many layers are done.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, SiteFactors] = {}
    with SideBySide(base, plan, samples, target, scratch, rng) as networks:
        for station in networks.stations(on_progress):
            factors = _fitted_site(networks, station, plan[station.site], fitting)
            kernels = [lowrank.compose(factors.form.method, list(g)) for g in factors.groups]
            networks.replace(station, np.concatenate(kernels), factors.bias)
            found[station.site] = factors
    return found


def _fitted_site(
    networks: SideBySide, station: Station, form: Form, fitting: Fitting
) -> SiteFactors:
    if not fitting.on_data:
        flat = station.weight.reshape(*station.weight.shape[:3], -1).astype(np.float64)
        parts = np.split(flat, station.conv.group)
        groups = [lowrank.fit(form.method, form.ranks, Moments.of_weight(p)) for p in parts]
        return _site_factors(form, groups, station.bias.astype(np.float64))
    slope = station.slope if fitting.rectified else None
    seen = networks.observe(
        station,
        symmetric=not fitting.asymmetric,
        plain=not fitting.residual,
        keeps_rows=slope is not None,
    )
    moments = seen.moments()
    groups = [lowrank.fit(form.method, form.ranks, m) for m in moments]
    biases = [m.bias(lowrank.compose(form.method, g)) for m, g in zip(moments, groups, strict=True)]
    if slope is not None:
        slopes = np.split(np.broadcast_to(slope, (station.conv.cout,)), len(moments))
        pairs = [
            lowrank.fit_rectified(
                form.method, form.ranks, m, rows, below, start=g, rounds=fitting.rectified
            )
            for m, rows, below, g in zip(moments, seen.kept(), slopes, groups, strict=True)
        ]
        groups, biases = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return _site_factors(form, groups, np.concatenate(biases))


def _site_factors(form: Form, groups: Sequence[Sequence[Array]], bias: Array) -> SiteFactors:
    return SiteFactors(form, tuple(tuple(group) for group in groups), bias)


def written(base: ModelProto, factors: Mapping[str, SiteFactors], path: Path) -> Written:
    """The base with the factors in place, saved at *path*."""
    driver = Driver(parse(base))
    driver.rewriter.infer_shapes()
    driver.run(FactorizeConv(plan=factors))
    left = set(factors) - {r.site for r in driver.ledger.remarks() if r.kind is Kind.APPLIED}
    if left:
        raise InvalidModelError(f"'{min(left)}' is not what its factors were made for")
    return save(driver.model, path, durable=False)
