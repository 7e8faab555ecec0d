"""A plain 3x3 network in the multi-branch form it is trained in.

X. Ding, X. Zhang, N. Ma, J. Han, G. Ding, J. Sun: "RepVGG: Making VGG-style ConvNets Great Again"
(arXiv:2101.03697, 2021). Every block is a sum of 3x3 + BN, 1x1 + BN and, where the shapes agree,
a BN of the input itself; the three are one 3x3 convolution in disguise.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "X. Ding, X. Zhang, N. Ma, J. Han, G. Ding, J. Sun",
    "RepVGG: Making VGG-style ConvNets Great Again",
    2021,
    "arXiv:2101.03697",
)
_STAGES = ((48, 1), (48, 2), (96, 4), (192, 14), (1280, 1))
"""Channels and depth of each stage of RepVGG-A0; every stage halves the image."""


def _block(net: Network, x: Value, width: int, stride: int) -> Value:
    y = net.conv_bn(x, width, 3, stride=stride, gain=0.6)
    y = net.add(y, net.conv_bn(x, width, 1, stride=stride, gain=0.6))
    if stride == 1 and x.channels == width:
        y = net.add(y, net.batch_norm(x, gain=0.6))
    return net.relu(y)


def _construct(net: Network) -> None:
    x = net.input(sample_size=160)
    for stage, (width, depth) in enumerate(_STAGES):
        for index in range(depth):
            with net.scope(f"stage{stage}.{index}"):
                x = _block(net, x, width, 2 if index == 0 else 1)
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "repvgg_a0",
            "RepVGG-A0, training form",
            _PAPER,
            (1, 3, 224, 224),
            "branches 3x3 + BN, 1x1 + BN and identity BN not yet merged",
        ),
        _construct,
    ),
)
