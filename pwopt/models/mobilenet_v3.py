"""Inverted residuals with squeeze-excite and hard-swish.

A. Howard, M. Sandler, G. Chu, L.-C. Chen, B. Chen, M. Tan, W. Wang, Y. Zhu, R. Pang, V. Vasudevan,
Q. V. Le, H. Adam: "Searching for MobileNetV3" (arXiv:1905.02244, 2019). The large network.

``mobilenet_v3_large`` has ONNX's ``HardSwish`` and ``HardSigmoid``. In
``mobilenet_v3_large_decomposed`` they are ``x * Clip(x + 3, 0, 6) / 6`` and ``Clip(x + 3, 0, 6) /
6``, each with its own ``Constant`` nodes: what PyTorch's exporter wrote before opset 14.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "A. Howard, M. Sandler, G. Chu, L.-C. Chen, B. Chen, M. Tan, W. Wang, Y. Zhu, R. Pang, "
    "V. Vasudevan, Q. V. Le, H. Adam",
    "Searching for MobileNetV3",
    2019,
    "arXiv:1905.02244",
)
_EPSILON = 1e-3
_BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
"""Kernel, expansion size, output channels, squeeze-excite, hard-swish, stride (Table 1)."""


def _squeeze_channels(channels: int) -> int:
    """A quarter of *channels* in multiples of eight, never below nine tenths of the quarter."""
    quarter = channels / 4
    rounded = max(8, int(quarter + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * quarter else rounded + 8


def _block(
    net: Network,
    x: Value,
    row: tuple[int, int, int, bool, bool, int],
    hard_swish: Callable[[Value], Value],
    hard_sigmoid: Callable[[Value], Value],
) -> Value:
    kernel, hidden, width, squeeze, swish, stride = row
    activation = hard_swish if swish else net.relu
    y = x
    if hidden != x.channels:
        y = activation(net.conv_bn(y, hidden, 1, epsilon=_EPSILON))
    y = net.conv_bn(y, hidden, kernel, stride=stride, group=hidden, epsilon=_EPSILON)
    y = activation(y)
    if squeeze:
        gate = net.relu(net.conv(net.global_average_pool(y), _squeeze_channels(hidden), 1))
        y = net.multiply(hard_sigmoid(net.conv(gate, hidden, 1, gain=4.0)), y)
    if stride > 1 or x.channels != width:
        return net.conv_bn(y, width, 1, epsilon=_EPSILON)
    return net.add(net.conv_bn(y, width, 1, gain=0.4, epsilon=_EPSILON), x)


def _construct(net: Network, *, decomposed: bool) -> None:
    hard_swish = net.hard_swish_decomposed if decomposed else net.hard_swish
    hard_sigmoid = net.hard_sigmoid_decomposed if decomposed else net.hard_sigmoid
    x = net.input(sample_size=160)
    x = hard_swish(net.conv_bn(x, 16, 3, stride=2, epsilon=_EPSILON))
    for index, row in enumerate(_BLOCKS):
        with net.scope(f"block{index + 1}"):
            x = _block(net, x, row, hard_swish, hard_sigmoid)
    x = hard_swish(net.conv_bn(x, 960, 1, epsilon=_EPSILON))
    x = net.flatten(net.global_average_pool(x))
    x = hard_swish(net.linear(x, 1280, gain=4.0))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "mobilenet_v3_large",
            "MobileNetV3-Large",
            _PAPER,
            (1, 3, 224, 224),
            "HardSwish and HardSigmoid as operators",
            min_opset=14,
        ),
        partial(_construct, decomposed=False),
    ),
    Recipe(
        ModelInfo(
            "mobilenet_v3_large_decomposed",
            "MobileNetV3-Large, decomposed",
            _PAPER,
            (1, 3, 224, 224),
            "hard-swish as Add, Clip, Mul, Div, as exporters before opset 14 wrote it",
            opset=11,
            min_opset=11,
        ),
        partial(_construct, decomposed=True),
    ),
)
