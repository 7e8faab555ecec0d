"""Residual networks for ImageNet, original and later form.

K. He, X. Zhang, S. Ren, J. Sun: "Deep Residual Learning for Image Recognition"
(arXiv:1512.03385, 2015).

The *original* form is the paper's: a bottleneck carries its stride in the first 1x1 convolution,
and ResNet-18/34 have shortcuts without parameters where the channels grow (option A: every other
pixel, zeros for the new channels). The *later* form, the one most files have, moves the stride
into the 3x3 convolution and uses projection shortcuts (option B) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pwopt.graph.builder import MIN_OPSET
from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "K. He, X. Zhang, S. Ren, J. Sun",
    "Deep Residual Learning for Image Recognition",
    2015,
    "arXiv:1512.03385",
)
_SHAPE = (1, 3, 224, 224)
_BRANCH_GAIN = 0.4
"""Gamma of a branch's last BatchNormalization: keeps the sum of many branches from growing."""


def _basic_block(net: Network, x: Value, width: int, stride: int, *, original: bool) -> Value:
    y = net.relu(net.conv_bn(x, width, 3, stride=stride))
    y = net.conv_bn(y, width, 3, gain=_BRANCH_GAIN)
    if stride == 1 and x.channels == width:
        return net.relu(net.add(y, x))
    if original:
        shortcut = net.pad_channels(net.subsample(x, stride), width)
    else:
        shortcut = net.conv_bn(x, width, 1, stride=stride)
    return net.relu(net.add(y, shortcut))


def _bottleneck(net: Network, x: Value, width: int, stride: int, *, original: bool) -> Value:
    first, middle = (stride, 1) if original else (1, stride)
    y = net.relu(net.conv_bn(x, width, 1, stride=first))
    y = net.relu(net.conv_bn(y, width, 3, stride=middle))
    y = net.conv_bn(y, 4 * width, 1, gain=_BRANCH_GAIN)
    if stride > 1 or x.channels != 4 * width:
        x = net.conv_bn(x, 4 * width, 1, stride=stride)
    return net.relu(net.add(y, x))


def _construct(
    net: Network, *, blocks: Sequence[int], bottleneck: bool, original: bool = False
) -> None:
    block = _bottleneck if bottleneck else _basic_block
    x = net.input(sample_size=112)
    x = net.relu(net.conv_bn(x, 64, 7, stride=2))
    x = net.max_pool(x, 3, stride=2, pads=1)
    for stage, count in enumerate(blocks):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            with net.scope(f"layer{stage + 1}.{index}"):
                x = block(net, x, 64 << stage, stride, original=original)
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


def _info(name: str, title: str, notes: str, min_opset: int = MIN_OPSET) -> ModelInfo:
    return ModelInfo(name, title, _PAPER, _SHAPE, notes, min_opset=min_opset)


_PROJECTION = "projection shortcuts where the shape changes"
_OPTION_A = "as in the paper: parameter-free shortcuts (every other pixel, zero channels)"

RECIPES = (
    Recipe(
        _info("resnet18", "ResNet-18", _PROJECTION),
        partial(_construct, blocks=(2, 2, 2, 2), bottleneck=False),
    ),
    Recipe(
        _info("resnet18_original", "ResNet-18, original form", _OPTION_A, min_opset=10),
        partial(_construct, blocks=(2, 2, 2, 2), bottleneck=False, original=True),
    ),
    Recipe(
        _info("resnet34", "ResNet-34", _PROJECTION),
        partial(_construct, blocks=(3, 4, 6, 3), bottleneck=False),
    ),
    Recipe(
        _info("resnet34_original", "ResNet-34, original form", _OPTION_A, min_opset=10),
        partial(_construct, blocks=(3, 4, 6, 3), bottleneck=False, original=True),
    ),
    Recipe(
        _info("resnet50", "ResNet-50", "stride in the 3x3 convolution; projection shortcuts"),
        partial(_construct, blocks=(3, 4, 6, 3), bottleneck=True),
    ),
    Recipe(
        _info(
            "resnet50_original",
            "ResNet-50, original form",
            "as in the paper: stride in the first 1x1 convolution; projection shortcuts",
        ),
        partial(_construct, blocks=(3, 4, 6, 3), bottleneck=True, original=True),
    ),
)
