"""Depthwise separable convolutions in a plain stack.

A. G. Howard, M. Zhu, B. Chen, D. Kalenichenko, W. Wang, T. Weyand, M. Andreetto, H. Adam:
"MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(arXiv:1704.04861, 2017).
"""

from __future__ import annotations

from pwopt.models.network import Network
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "A. G. Howard, M. Zhu, B. Chen, D. Kalenichenko, W. Wang, T. Weyand, M. Andreetto, H. Adam",
    "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
    2017,
    "arXiv:1704.04861",
)
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
"""Output channels and stride of each depthwise separable convolution (Table 1)."""


def _construct(net: Network) -> None:
    x = net.input(sample_size=160)
    x = net.relu(net.conv_bn(x, 32, 3, stride=2))
    for index, (width, stride) in enumerate(_BLOCKS):
        with net.scope(f"separable{index + 1}"):
            x = net.relu(net.conv_bn(x, x.channels, 3, stride=stride, group=x.channels))
            x = net.relu(net.conv_bn(x, width, 1))
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo("mobilenet_v1", "MobileNet v1 1.0", _PAPER, (1, 3, 224, 224), "width 1.0"),
        _construct,
    ),
)
