"""Inverted residuals with squeeze-excite and SiLU, scaled by one rule.

M. Tan, Q. V. Le: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv:1905.11946, 2019). The baseline network B0; SiLU is written as ``x * Sigmoid(x)``.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "M. Tan, Q. V. Le",
    "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    2019,
    "arXiv:1905.11946",
)
_EPSILON = 1e-3
_STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
"""Expansion, kernel, output channels, repeats and first stride of each stage (Table 1)."""


def _block(
    net: Network, x: Value, width: int, *, kernel: int, stride: int, expansion: int
) -> Value:
    hidden = x.channels * expansion
    y = x
    if expansion > 1:
        y = net.silu(net.conv_bn(y, hidden, 1, epsilon=_EPSILON))
    y = net.conv_bn(y, hidden, kernel, stride=stride, group=hidden, epsilon=_EPSILON)
    y = net.silu(y)
    gate = net.silu(net.conv(net.global_average_pool(y), x.channels // 4, 1))
    y = net.multiply(net.sigmoid(net.conv(gate, hidden, 1, gain=4.0)), y)
    if stride > 1 or x.channels != width:
        return net.conv_bn(y, width, 1, epsilon=_EPSILON)
    return net.add(net.conv_bn(y, width, 1, gain=0.4, epsilon=_EPSILON), x)


def _construct(net: Network) -> None:
    x = net.input(sample_size=160)
    x = net.silu(net.conv_bn(x, 32, 3, stride=2, epsilon=_EPSILON))
    for stage, (expansion, kernel, width, repeats, first_stride) in enumerate(_STAGES):
        for index in range(repeats):
            stride = first_stride if index == 0 else 1
            with net.scope(f"stage{stage + 1}.{index}"):
                x = _block(net, x, width, kernel=kernel, stride=stride, expansion=expansion)
    x = net.silu(net.conv_bn(x, 1280, 1, epsilon=_EPSILON))
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "efficientnet_b0", "EfficientNet-B0", _PAPER, (1, 3, 224, 224), "SiLU as x * Sigmoid(x)"
        ),
        _construct,
    ),
)
