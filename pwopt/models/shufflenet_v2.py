"""Half of the channels pass, half are convolved, then both are shuffled.

N. Ma, X. Zhang, H.-T. Zheng, J. Sun: "ShuffleNet V2: Practical Guidelines for Efficient CNN
Architecture Design" (arXiv:1807.11164, 2018). Width 1.0x; the channel split is Split, the shuffle
Reshape, Transpose, Reshape, and the global pooling ReduceMean.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "N. Ma, X. Zhang, H.-T. Zheng, J. Sun",
    "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
    2018,
    "arXiv:1807.11164",
)
_STAGES = ((116, 4), (232, 8), (464, 4))
"""Output channels and number of units of stages 2 to 4 (Table 5)."""


def _branch(net: Network, x: Value, width: int, stride: int) -> Value:
    y = net.relu(net.conv_bn(x, width, 1))
    y = net.conv_bn(y, width, 3, stride=stride, group=width)
    return net.relu(net.conv_bn(y, width, 1))


def _unit(net: Network, x: Value, width: int, stride: int) -> Value:
    """Figure 3 (c) and, with stride 2, (d)."""
    half = width // 2
    if stride == 1:
        kept, rest = net.split(x, [half, half])
    else:
        kept = net.conv_bn(x, x.channels, 3, stride=stride, group=x.channels)
        kept, rest = net.relu(net.conv_bn(kept, half, 1)), x
    return net.channel_shuffle(net.concat([kept, _branch(net, rest, half, stride)]), 2)


def _construct(net: Network) -> None:
    x = net.input(sample_size=160)
    x = net.relu(net.conv_bn(x, 24, 3, stride=2))
    x = net.max_pool(x, 3, stride=2, pads=1)
    for stage, (width, units) in enumerate(_STAGES):
        for index in range(units):
            with net.scope(f"stage{stage + 2}.{index}"):
                x = _unit(net, x, width, 2 if index == 0 else 1)
    x = net.relu(net.conv_bn(x, 1024, 1))
    net.output(net.linear(net.spatial_mean(x), 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "shufflenet_v2_1_0x", "ShuffleNet V2 1.0x", _PAPER, (1, 3, 224, 224), "width 1.0x"
        ),
        _construct,
    ),
)
