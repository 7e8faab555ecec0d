"""Pre-activation residual network for ImageNet.

K. He, X. Zhang, S. Ren, J. Sun: "Identity Mappings in Deep Residual Networks"
(arXiv:1603.05027, 2016).

BatchNormalization and Relu come before each convolution, so none of them follows its convolution
directly into an Add; projections read the activated input, and one more pair ends the trunk.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "K. He, X. Zhang, S. Ren, J. Sun",
    "Identity Mappings in Deep Residual Networks",
    2016,
    "arXiv:1603.05027",
)


def _bottleneck(net: Network, x: Value, width: int, stride: int) -> Value:
    active = net.relu(net.batch_norm(x))
    y = net.conv(active, width, 1, bias=False)
    y = net.relu(net.batch_norm(y))
    y = net.conv(y, width, 3, stride=stride, bias=False)
    y = net.relu(net.batch_norm(y))
    # No BatchNormalization follows: the branch's share of the sum is set by the weights.
    y = net.conv(y, 4 * width, 1, bias=False, gain=0.5)
    if stride > 1 or x.channels != 4 * width:
        x = net.conv(active, 4 * width, 1, stride=stride, bias=False)
    return net.add(y, x)


def _construct(net: Network) -> None:
    x = net.input(sample_size=112)
    x = net.conv(x, 64, 7, stride=2, bias=False)
    x = net.max_pool(x, 3, stride=2, pads=1)
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            with net.scope(f"layer{stage + 1}.{index}"):
                x = _bottleneck(net, x, 64 << stage, stride)
    x = net.relu(net.batch_norm(x))
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "resnet50_v2",
            "ResNet-50 v2",
            _PAPER,
            (1, 3, 224, 224),
            "pre-activation; stride in the 3x3 convolution; projection shortcuts",
        ),
        _construct,
    ),
)
