"""Inverted residuals with linear bottlenecks.

M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen: "MobileNetV2: Inverted Residuals and
Linear Bottlenecks" (arXiv:1801.04381, 2018).
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen",
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    2018,
    "arXiv:1801.04381",
)
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, repeats and first stride of each stage (Table 2)."""


def _inverted_residual(net: Network, x: Value, width: int, stride: int, expansion: int) -> Value:
    hidden = x.channels * expansion
    y = x
    if expansion != 1:
        y = net.relu6(net.conv_bn(y, hidden, 1))
    y = net.relu6(net.conv_bn(y, hidden, 3, stride=stride, group=hidden))
    if stride > 1 or x.channels != width:
        return net.conv_bn(y, width, 1)
    return net.add(x, net.conv_bn(y, width, 1, gain=0.4))


def _construct(net: Network) -> None:
    x = net.input(sample_size=160)
    x = net.relu6(net.conv_bn(x, 32, 3, stride=2))
    for stage, (expansion, width, repeats, first_stride) in enumerate(_STAGES):
        for index in range(repeats):
            with net.scope(f"stage{stage + 1}.{index}"):
                stride = first_stride if index == 0 else 1
                x = _inverted_residual(net, x, width, stride, expansion)
    x = net.relu6(net.conv_bn(x, 1280, 1))
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "mobilenet_v2", "MobileNetV2 1.0", _PAPER, (1, 3, 224, 224), "width 1.0; Relu6 as Clip"
        ),
        _construct,
    ),
)
