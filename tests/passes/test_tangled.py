"""Exports with channels last come back as the network that they were made from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from pwopt import models
from pwopt.graph import parse
from pwopt.passes import (
    EliminateTranspose,
    FoldAffine,
    FoldBatchNormalization,
    RaiseActivation,
    RaisePointwiseMatmul,
)
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import run_passes
from tests.passes.harness import assert_same_outputs
from tests.passes.tangled import tangle

# Products first: elsewhere Transposes around a single pixel are taken for Reshapes.
PASSES = (
    RaisePointwiseMatmul(),
    EliminateTranspose(),
    RaiseActivation(),
    FoldBatchNormalization(),
    FoldAffine(),
)


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    wrapped = parse(proto)
    wrapped.unlist_initializers()
    driver = Driver(wrapped)
    driver.rewriter.infer_shapes()
    run_passes(driver, PASSES)
    return wrapped.to_proto()


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def check(name: str, *, norms: bool, products: bool) -> None:
    clean = models.build(name)
    proto = tangle(clean, biases=norms, norms=norms, products=products)
    before = operators(clean)
    assert operators(proto)["Transpose"] > before["Conv"] // 2
    # A hundred layers round a hundred times.
    assert_same_outputs(clean, proto, np.random.default_rng(0), factor=25)
    after = simplified(proto)
    assert operators(after) == operators(simplified(clean))
    assert_same_outputs(clean, after, np.random.default_rng(0), factor=25)


FORMS = [
    pytest.param(True, False, id="affine"),
    pytest.param(False, False, id="batch-norm"),
    pytest.param(True, True, id="products"),
]


@pytest.mark.parametrize(("norms", "products"), FORMS)
def test_a_light_network(norms: bool, products: bool) -> None:
    check("mobilenet_v2", norms=norms, products=products)


@pytest.mark.slow
@pytest.mark.parametrize(("norms", "products"), FORMS)
@pytest.mark.parametrize(
    "name",
    [
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "inception_v3",
        "mobilenet_v3_large",
        "resnet50",
        "shufflenet_v2_1_0x",
        "squeezenet1_1",
        "unet_resize",
    ],
)
def test_any_network(name: str, norms: bool, products: bool) -> None:
    check(name, norms=norms, products=products)
