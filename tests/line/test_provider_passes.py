"""Which rewrites run for which provider."""

from __future__ import annotations

from benchmarks.cuda import bottlenecks
from pwopt import passes
from pwopt.cost import Machine
from pwopt.graph import parse
from pwopt.line import default_passes
from pwopt.runtime.providers import find_provider
from pwopt.target import Target
from pwopt.tuning.driver import Driver
from pwopt.tuning.gate import analytic_review


def test_the_cpu_runs_the_default_passes() -> None:
    assert default_passes(Target()) == tuple(p for p in passes.ALL if p.by_default)


def test_cuda_also_fuses_activations_and_prices_layouts_otherwise() -> None:
    specs = {p.name: p.spec() for p in default_passes(Target("cuda"))}
    assert specs["fuse-pointwise-activation"] == "fuse-pointwise-activation:gemm=fused-conv"
    assert specs["assign-layout"] == "assign-layout:product=1.0:beside_conv=1.0"
    by_default = [p.name for p in passes.ALL if p.by_default]
    assert [n for n in specs if n != "fuse-pointwise-activation"] == by_default


def test_without_a_clock_cuda_fuses_what_its_runtime_does_not() -> None:
    model = parse(bottlenecks(1, blocks=1, width=16, size=14))
    driver = Driver(model)
    driver.rewriter.infer_shapes()
    fuse = next(p for p in default_passes(Target("cuda")) if p.name == "fuse-pointwise-activation")
    applied = {}
    for provider in ("cpu", "cuda"):
        start = driver.checkpoint()
        machine = Machine(**find_provider(provider).roofline)
        review = analytic_review(driver.facts, {}, machine)
        applied[provider], _ = driver.run(fuse, review=review)
        driver.restore(start)
    assert applied["cuda"] == 3
    assert applied["cpu"] < 3
