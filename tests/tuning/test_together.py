"""Exact passes over one graph: they come to an end, leave it alone then, and compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pwopt import passes
from pwopt.graph import parse
from pwopt.passes.contract import Variant
from pwopt.remark import Exactness
from pwopt.tuning.candidate import Candidate
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import StopReason, run_passes
from tests.passes.channel_models import networks
from tests.passes.linear_models import assert_agree

EXACT = tuple(p for p in passes.LOWER if p.exactness is not Exactness.APPROXIMATE)
DEPTH = 64.0
"""Networks are up to a dozen layers deep, and Winograd rounds ten times as much as a sum."""


def check(proto: onnx.ModelProto, order: list[int], lowering: list[int], pick: int) -> None:
    model = parse(proto)
    model.unlist_initializers()
    driver = Driver(model)
    driver.rewriter.infer_shapes()
    simplify = [passes.SIMPLIFY[i] for i in order]
    assert run_passes(driver, simplify) is StopReason.FIXED_POINT
    simple = model.to_proto()
    assert_agree(proto, simple, np.random.default_rng(0), factor=DEPTH)
    again = Driver(parse(simple))
    again.rewriter.infer_shapes()
    assert run_passes(again, simplify) is StopReason.FIXED_POINT

    def choose(candidate: Candidate) -> Variant:
        return candidate.variants[pick % len(candidate.variants)]

    for index in lowering:
        driver.run(EXACT[index], choose)
        driver.rewriter.infer_shapes()
    assert run_passes(driver, ()) is StopReason.FIXED_POINT
    lowered = model.to_proto()
    onnx.checker.check_model(lowered, full_check=True)
    assert_agree(proto, lowered, np.random.default_rng(0), factor=DEPTH)


together: dict[str, Any] = {
    "proto": networks(wide=True),
    "order": st.permutations(range(len(passes.SIMPLIFY))),
    "lowering": st.permutations(range(len(EXACT))),
    "pick": st.integers(0, 5),
}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**together)
def test_any_network_in_any_order(
    proto: onnx.ModelProto, order: list[int], lowering: list[int], pick: int
) -> None:
    check(proto, order, lowering, pick)


@pytest.mark.slow
@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**together)
def test_many_networks_in_any_order(
    proto: onnx.ModelProto, order: list[int], lowering: list[int], pick: int
) -> None:
    check(proto, order, lowering, pick)
