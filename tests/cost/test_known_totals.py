"""Totals of whole networks against the published ones, within 1%."""

from __future__ import annotations

import pytest

from pwopt import models
from pwopt.cost import ModelCost, model_cost
from pwopt.graph import load, parse
from tests.zoo import folder

TOTALS = [
    # Published: He et al., arXiv:1512.03385 (3.8 billion, with the stride in the first 1x1).
    pytest.param("resnet50", 4.09e9, 25.56e6, id="resnet50"),
    pytest.param("resnet50_original", 3.86e9, 25.56e6, id="resnet50_original"),
    # Sandler et al., arXiv:1801.04381: 300 million, 3.4 to 3.5 million.
    pytest.param("mobilenet_v2", 0.301e9, 3.50e6, id="mobilenet_v2"),
    pytest.param("vgg16", 15.47e9, 138.36e6, id="vgg16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "macs", "params"), TOTALS)
def test_totals_are_the_published_ones(name: str, macs: float, params: float) -> None:
    cost = model_cost(parse(models.build(name)))
    assert cost.unknown == ()
    assert cost.macs == pytest.approx(macs, rel=0.01)
    assert cost.params == pytest.approx(params, rel=0.01)


def test_a_batch_multiplies_the_macs() -> None:
    cost = model_cost(parse(models.build("mobilenet_v2", batch="N")), {"input": (4, 3, 224, 224)})
    assert cost.macs == pytest.approx(4 * 0.301e9, rel=0.01)


def zoo(name: str) -> ModelCost:
    shapes = {"dncnn_sigma25_bn": {"input": (1, 1, 64, 64)}}
    return model_cost(load(folder() / f"{name}.onnx"), shapes.get(name))


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        ("squeezenet1.1", 0.349e9, 1.235e6),
        ("mobilenetv2_1.0_224", 0.301e9, 3.5e6),
        ("cifar10_resnet20", 40.8e6, 0.27e6),
        ("cifar10_resnet56", 125.5e6, 0.85e6),
    ],
)
def test_trained_networks(name: str, macs: float, params: float) -> None:
    cost = zoo(name)
    assert cost.unknown == ()
    assert cost.macs == pytest.approx(macs, rel=0.01)
    assert cost.params == pytest.approx(params, rel=0.01)


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ultraface_rfb_320", id="shape-arithmetic-of-opset-9"),
        pytest.param("fns_mosaic", id="removed-operators"),
        pytest.param("dncnn_sigma25_bn", id="dynamic-size"),
        pytest.param("yolox_nano_416", id="detector-head"),
    ],
)
def test_every_node_is_counted(name: str) -> None:
    assert zoo(name).unknown == ()
