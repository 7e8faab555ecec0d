"""Few parameters by narrow 1x1 layers between wide ones.

F. N. Iandola, S. Han, M. W. Moskewicz, K. Ashraf, W. J. Dally, K. Keutzer: "SqueezeNet:
AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size" (arXiv:1602.07360, 2016).
Version 1.1 of the authors' code: 3x3 stem and earlier pooling.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "F. N. Iandola, S. Han, M. W. Moskewicz, K. Ashraf, W. J. Dally, K. Keutzer",
    "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size",
    2016,
    "arXiv:1602.07360",
)
_STAGES = ((16, 16), (32, 32), (48, 48, 64, 64))
"""Squeeze width of every fire module; each expands to four times as many 1x1 and 3x3 channels."""


def _fire(net: Network, x: Value, squeeze: int) -> Value:
    x = net.conv_relu(x, squeeze, 1)
    return net.concat([net.conv_relu(x, 4 * squeeze, kernel) for kernel in (1, 3)])


def _construct(net: Network) -> None:
    x = net.input()
    x = net.conv_relu(x, 64, 3, stride=2, pads=0)
    number = 2
    for stage in _STAGES:
        x = net.max_pool(x, 3, stride=2)
        for squeeze in stage:
            with net.scope(f"fire{number}"):
                x = _fire(net, x, squeeze)
            number += 1
    with net.scope("classifier"):
        x = net.conv_relu(net.dropout(x), 1000, 1)
    net.output(net.flatten(net.global_average_pool(x)), "logits")


RECIPES = (
    Recipe(
        ModelInfo("squeezenet1_1", "SqueezeNet 1.1", _PAPER, (1, 3, 224, 224), "version 1.1"),
        _construct,
    ),
)
