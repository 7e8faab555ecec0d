"""Network in Network: every convolution is followed by a small perceptron at each pixel.

M. Lin, Q. Chen, S. Yan: "Network In Network" (arXiv:1312.4400, 2013). An MLP convolution is a
KxK convolution and two 1x1 convolutions with Relu; the last one has a channel per class, averaged
over the image. ``nin`` is the authors' ImageNet network, ``nin_cifar10`` the one of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper("M. Lin, Q. Chen, S. Yan", "Network In Network", 2013, "arXiv:1312.4400")


def _mlp_conv(
    net: Network, x: Value, widths: Sequence[int], kernel: int, *, stride: int = 1, pads: int
) -> Value:
    x = net.conv_relu(x, widths[0], kernel, stride=stride, pads=pads)
    for width in widths[1:]:
        x = net.conv_relu(x, width, 1)
    return x


def _classify(net: Network, x: Value) -> None:
    x = net.flatten(net.global_average_pool(x))
    net.output(net.softmax(x), "probabilities")


def _imagenet(net: Network) -> None:
    x = net.input()
    with net.scope("mlpconv1"):
        x = _mlp_conv(net, x, (96, 96, 96), 11, stride=4, pads=0)
        # Caffe rounds pooled sizes up; the extra row and column are explicit here.
        x = net.max_pool(x, 3, stride=2, pads=(0, 0, 1, 1))
    with net.scope("mlpconv2"):
        x = _mlp_conv(net, x, (256, 256, 256), 5, pads=2)
        x = net.max_pool(x, 3, stride=2)
    with net.scope("mlpconv3"):
        x = _mlp_conv(net, x, (384, 384, 384), 3, pads=1)
        x = net.dropout(net.max_pool(x, 3, stride=2))
    with net.scope("mlpconv4"):
        x = _mlp_conv(net, x, (1024, 1024, 1000), 3, pads=1)
    _classify(net, x)


def _cifar10(net: Network) -> None:
    x = net.input()
    with net.scope("mlpconv1"):
        x = _mlp_conv(net, x, (192, 160, 96), 5, pads=2)
        x = net.dropout(net.max_pool(x, 3, stride=2, pads=(0, 0, 1, 1)))
    with net.scope("mlpconv2"):
        x = _mlp_conv(net, x, (192, 192, 192), 5, pads=2)
        x = net.dropout(net.average_pool(x, 3, stride=2, pads=(0, 0, 1, 1)))
    with net.scope("mlpconv3"):
        x = _mlp_conv(net, x, (192, 192, 10), 3, pads=1)
    _classify(net, x)


RECIPES = (
    Recipe(
        ModelInfo(
            "nin", "Network in Network", _PAPER, (1, 3, 224, 224), "ImageNet; softmax at the end"
        ),
        _imagenet,
    ),
    Recipe(
        ModelInfo(
            "nin_cifar10",
            "Network in Network, CIFAR-10",
            _PAPER,
            (1, 3, 32, 32),
            "softmax at the end",
        ),
        _cifar10,
    ),
)
