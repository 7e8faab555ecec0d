"""Residual network with grouped 3x3 convolutions.

S. Xie, R. Girshick, P. Dollár, Z. Tu, K. He: "Aggregated Residual Transformations for Deep Neural
Networks" (arXiv:1611.05431, 2016). The 50-layer network with cardinality 32 and width 4, in the
paper's form (c) with grouped convolutions.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "S. Xie, R. Girshick, P. Dollár, Z. Tu, K. He",
    "Aggregated Residual Transformations for Deep Neural Networks",
    2016,
    "arXiv:1611.05431",
)
_CARDINALITY = 32


def _block(net: Network, x: Value, width: int, stride: int) -> Value:
    y = net.relu(net.conv_bn(x, width, 1))
    y = net.relu(net.conv_bn(y, width, 3, stride=stride, group=_CARDINALITY))
    y = net.conv_bn(y, 2 * width, 1, gain=0.4)
    if stride > 1 or x.channels != 2 * width:
        x = net.conv_bn(x, 2 * width, 1, stride=stride)
    return net.relu(net.add(y, x))


def _construct(net: Network) -> None:
    x = net.input(sample_size=112)
    x = net.relu(net.conv_bn(x, 64, 7, stride=2))
    x = net.max_pool(x, 3, stride=2, pads=1)
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            with net.scope(f"layer{stage + 1}.{index}"):
                x = _block(net, x, 4 * _CARDINALITY << stage, stride)
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "resnext50_32x4d",
            "ResNeXt-50 32x4d",
            _PAPER,
            (1, 3, 224, 224),
            "grouped 3x3 convolutions; stride in the 3x3",
        ),
        _construct,
    ),
)
