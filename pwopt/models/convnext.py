"""A convolutional network with a Transformer's block, as its PyTorch code exports.

Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer, T. Darrell, S. Xie: "A ConvNet for the 2020s"
(arXiv:2201.03545, 2022). The tiny network. The depthwise convolution works in NCHW; then a
Transpose leads to NHWC, where the block's pointwise convolutions are MatMul and Add over the last
axis, with LayerNormalization (an operator from opset 17 on, its parts before), GELU through Erf and
the layer scale; a second Transpose leads back. The norms between stages work in NCHW.
"""

from __future__ import annotations

import math

from pwopt.graph.builder import Tensor
from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer, T. Darrell, S. Xie",
    "A ConvNet for the 2020s",
    2022,
    "arXiv:2201.03545",
)
_STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))
"""Channels and blocks of each stage."""
_EPSILON = 1e-6
_LAYER_SCALE = 0.3
"""Typical size of the trained layer scale."""


def _standardise(net: Network, x: Tensor, axis: int) -> Tensor:
    """``(x - mean) / sqrt(variance + epsilon)`` over *axis*, as exporters spell it out."""
    graph = net.graph
    centred = graph.node("Sub", x, graph.reduce_mean(x, [axis]))
    square = graph.node("Pow", centred, net.literal(2.0))
    variance = graph.reduce_mean(square, [axis])
    deviation = graph.node("Sqrt", graph.node("Add", variance, net.literal(_EPSILON)))
    return graph.node("Div", centred, deviation)


def _layer_norm(net: Network, x: Tensor) -> Tensor:
    """Over the last axis."""
    channels = x.size(-1)
    weight = net.normal_parameter((channels,), "LayerNormalization.weight", mean=1.0)
    bias = net.normal_parameter((channels,), "LayerNormalization.bias", mean=0.0)
    if net.graph.opset >= 17:
        return net.graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=_EPSILON)
    scaled = net.graph.node("Mul", _standardise(net, x, -1), weight)
    return net.graph.node("Add", scaled, bias)


def _layer_norm_nchw(net: Network, x: Value) -> Value:
    """Over axis 1, for which there is no operator."""
    shape = (x.channels, 1, 1)
    weight = net.normal_parameter(shape, "LayerNormalization.weight", mean=1.0)
    bias = net.normal_parameter(shape, "LayerNormalization.bias", mean=0.0)
    scaled = net.graph.node("Mul", weight, _standardise(net, x.tensor, 1))
    return Value(net.graph.node("Add", scaled, bias))


def _gelu(net: Network, x: Tensor) -> Tensor:
    """``x (1 + erf(x / sqrt 2)) / 2``."""
    graph = net.graph
    erf = graph.node("Erf", graph.node("Div", x, net.literal(math.sqrt(2.0))))
    product = graph.node("Mul", x, graph.node("Add", erf, net.literal(1.0)))
    return graph.node("Mul", product, net.literal(0.5))


def _block(net: Network, x: Value) -> Value:
    graph = net.graph
    width = x.channels
    y = net.conv(x, width, 7, group=width, gain=1.0)
    inner = _layer_norm(net, graph.node("Transpose", y.tensor, perm=[0, 2, 3, 1]))
    inner = _gelu(net, net.matmul(Value(inner), 4 * width).tensor)
    inner = net.matmul(Value(inner), width, gain=2.0).tensor
    scale = net.normal_parameter((width,), "gamma", mean=_LAYER_SCALE)
    inner = graph.node("Mul", scale, inner)
    branch = graph.node("Transpose", inner, perm=[0, 3, 1, 2])
    return net.add(x, Value(branch))


def _construct(net: Network) -> None:
    x = net.input()
    for stage, (width, depth) in enumerate(_STAGES):
        with net.scope(f"downsample{stage}"):
            if stage == 0:
                x = _layer_norm_nchw(net, net.conv(x, width, 4, stride=4, pads=0, gain=1.0))
            else:
                x = _layer_norm_nchw(net, x)
                x = net.conv(x, width, 2, stride=2, pads=0, gain=1.0)
        for index in range(depth):
            with net.scope(f"stage{stage}.{index}"):
                x = _block(net, x)
    pooled = net.spatial_mean(x)
    x = Value(_layer_norm(net, pooled.tensor))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "convnext_tiny",
            "ConvNeXt-T",
            _PAPER,
            (1, 3, 224, 224),
            "pointwise convolutions as MatMul in NHWC; GELU through Erf",
        ),
        _construct,
    ),
)
