"""Grouped 1x1 convolutions, mixed by a channel shuffle.

X. Zhang, X. Zhou, M. Lin, J. Sun: "ShuffleNet: An Extremely Efficient Convolutional Neural Network
for Mobile Devices" (arXiv:1707.01083, 2017). Three groups, width 1x; the shuffle is written as
Reshape, Transpose, Reshape.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "X. Zhang, X. Zhou, M. Lin, J. Sun",
    "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
    2017,
    "arXiv:1707.01083",
)
_GROUPS = 3
_STAGES = ((240, 4), (480, 8), (960, 4))
"""Output channels and number of units of stages 2 to 4 (Table 1)."""


def _unit(net: Network, x: Value, width: int, *, stride: int, group: int) -> Value:
    """Figure 2 (b) and, with stride 2, (c); *group* is that of the first convolution."""
    hidden = width // 4
    branch = width - x.channels if stride > 1 else width
    y = net.relu(net.conv_bn(x, hidden, 1, group=group))
    y = net.channel_shuffle(y, _GROUPS)
    y = net.conv_bn(y, hidden, 3, stride=stride, group=hidden)
    if stride > 1:
        y = net.conv_bn(y, branch, 1, group=_GROUPS)
        return net.relu(net.concat([net.average_pool(x, 3, stride=2, pads=1), y]))
    return net.relu(net.add(x, net.conv_bn(y, branch, 1, group=_GROUPS, gain=0.5)))


def _construct(net: Network) -> None:
    x = net.input(sample_size=160)
    x = net.relu(net.conv_bn(x, 24, 3, stride=2))
    x = net.max_pool(x, 3, stride=2, pads=1)
    for stage, (width, units) in enumerate(_STAGES):
        for index in range(units):
            # The stem has too few channels to be grouped (section 3.2).
            group = 1 if stage == 0 and index == 0 else _GROUPS
            with net.scope(f"stage{stage + 2}.{index}"):
                x = _unit(net, x, width, stride=2 if index == 0 else 1, group=group)
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "shufflenet_v1",
            "ShuffleNet v1 1x, g = 3",
            _PAPER,
            (1, 3, 224, 224),
            "channel shuffle as Reshape, Transpose, Reshape",
        ),
        _construct,
    ),
)
