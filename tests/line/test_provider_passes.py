"""Which rewrites run for which provider."""

from __future__ import annotations

from pwopt import passes
from pwopt.line import default_passes
from pwopt.target import Target


def test_the_cpu_runs_the_default_passes() -> None:
    assert default_passes(Target()) == tuple(p for p in passes.ALL if p.by_default)


def test_cuda_also_fuses_activations_and_prices_layouts_otherwise() -> None:
    specs = {p.name: p.spec() for p in default_passes(Target("cuda"))}
    assert specs["fuse-pointwise-activation"] == "fuse-pointwise-activation:gemm=fused-conv"
    assert specs["assign-layout"] == "assign-layout:product=1.0:beside_conv=1.0"
    by_default = [p.name for p in passes.ALL if p.by_default]
    assert [n for n in specs if n != "fuse-pointwise-activation"] == by_default
