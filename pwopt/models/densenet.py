"""Every layer reads the outputs of all layers before it.

G. Huang, Z. Liu, L. van der Maaten, K. Q. Weinberger: "Densely Connected Convolutional Networks"
(arXiv:1608.06993, 2016). DenseNet-121 (the paper's -BC form): growth rate 32, compression 1/2.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "G. Huang, Z. Liu, L. van der Maaten, K. Q. Weinberger",
    "Densely Connected Convolutional Networks",
    2016,
    "arXiv:1608.06993",
)
_BLOCKS = (6, 12, 24, 16)
_GROWTH = 32


def _activate(net: Network, x: Value) -> Value:
    return net.relu(net.batch_norm(x))


def _dense_layer(net: Network, x: Value) -> Value:
    y = net.conv(_activate(net, x), 4 * _GROWTH, 1, bias=False)
    return net.conv(_activate(net, y), _GROWTH, 3, bias=False)


def _transition(net: Network, x: Value) -> Value:
    y = net.conv(_activate(net, x), x.channels // 2, 1, bias=False)
    return net.average_pool(y, 2, stride=2)


def _construct(net: Network) -> None:
    x = net.input(sample_size=128)
    x = net.relu(net.conv_bn(x, 64, 7, stride=2))
    x = net.max_pool(x, 3, stride=2, pads=1)
    for block, count in enumerate(_BLOCKS):
        features = [x]
        for index in range(count):
            with net.scope(f"dense{block + 1}.{index}"):
                joined = net.concat(features) if index else x
                features.append(_dense_layer(net, joined))
        x = net.concat(features)
        if block + 1 < len(_BLOCKS):
            with net.scope(f"transition{block + 1}"):
                x = _transition(net, x)
    x = net.flatten(net.global_average_pool(_activate(net, x)))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "densenet121", "DenseNet-121", _PAPER, (1, 3, 224, 224), "growth 32, compression 1/2"
        ),
        _construct,
    ),
)
