"""Inception with factorised convolutions and BatchNormalization.

C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna: "Rethinking the Inception Architecture for
Computer Vision" (arXiv:1512.00567, 2015). Without the auxiliary classifier, which only training
uses; input 299x299.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna",
    "Rethinking the Inception Architecture for Computer Vision",
    2015,
    "arXiv:1512.00567",
)
_Kernel = int | tuple[int, int]


def _layer(
    net: Network, x: Value, width: int, kernel: _Kernel, *, stride: int = 1, pads: int | None = None
) -> Value:
    return net.relu(net.conv_bn(x, width, kernel, stride=stride, pads=pads, epsilon=1e-3))


def _chain(net: Network, x: Value, *layers: tuple[int, _Kernel]) -> Value:
    for width, kernel in layers:
        x = _layer(net, x, width, kernel)
    return x


def _mixed_35(net: Network, x: Value, pool: int) -> Value:
    """The module at 35x35 (Figure 5): the 5x5 branch also as two 3x3."""
    return net.concat(
        [
            _chain(net, x, (64, 1)),
            _chain(net, x, (48, 1), (64, 5)),
            _chain(net, x, (64, 1), (96, 3), (96, 3)),
            _chain(net, net.average_pool(x, 3, stride=1, pads=1), (pool, 1)),
        ]
    )


def _reduce_35(net: Network, x: Value) -> Value:
    """35x35 to 17x17 (Figure 10)."""
    return net.concat(
        [
            _layer(net, x, 384, 3, stride=2, pads=0),
            _layer(net, _chain(net, x, (64, 1), (96, 3)), 96, 3, stride=2, pads=0),
            net.max_pool(x, 3, stride=2),
        ]
    )


def _mixed_17(net: Network, x: Value, width: int) -> Value:
    """The module at 17x17 (Figure 6): 7x7 as 1x7 and 7x1."""
    across, down = (1, 7), (7, 1)
    return net.concat(
        [
            _chain(net, x, (192, 1)),
            _chain(net, x, (width, 1), (width, across), (192, down)),
            _chain(
                net,
                x,
                (width, 1),
                (width, down),
                (width, across),
                (width, down),
                (192, across),
            ),
            _chain(net, net.average_pool(x, 3, stride=1, pads=1), (192, 1)),
        ]
    )


def _reduce_17(net: Network, x: Value) -> Value:
    """17x17 to 8x8."""
    wide = _chain(net, x, (192, 1), (192, (1, 7)), (192, (7, 1)))
    return net.concat(
        [
            _layer(net, _chain(net, x, (192, 1)), 320, 3, stride=2, pads=0),
            _layer(net, wide, 192, 3, stride=2, pads=0),
            net.max_pool(x, 3, stride=2),
        ]
    )


def _mixed_8(net: Network, x: Value) -> Value:
    """The module at 8x8 (Figure 7): 1x3 and 3x1 side by side."""

    def fork(source: Value) -> list[Value]:
        return [_layer(net, source, 384, (1, 3)), _layer(net, source, 384, (3, 1))]

    return net.concat(
        [
            _chain(net, x, (320, 1)),
            net.concat(fork(_chain(net, x, (384, 1)))),
            net.concat(fork(_chain(net, x, (448, 1), (384, 3)))),
            _chain(net, net.average_pool(x, 3, stride=1, pads=1), (192, 1)),
        ]
    )


def _construct(net: Network) -> None:
    x = net.input(sample_size=171)
    with net.scope("stem"):
        x = _layer(net, x, 32, 3, stride=2, pads=0)
        x = _layer(net, x, 32, 3, pads=0)
        x = _layer(net, x, 64, 3)
        x = net.max_pool(x, 3, stride=2)
        x = _layer(net, x, 80, 1)
        x = _layer(net, x, 192, 3, pads=0)
        x = net.max_pool(x, 3, stride=2)
    for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
        with net.scope(f"mixed{name}"):
            x = _mixed_35(net, x, pool)
    with net.scope("mixed6a"):
        x = _reduce_35(net, x)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        with net.scope(f"mixed{name}"):
            x = _mixed_17(net, x, width)
    with net.scope("mixed7a"):
        x = _reduce_17(net, x)
    for name in ("7b", "7c"):
        with net.scope(f"mixed{name}"):
            x = _mixed_8(net, x)
    x = net.flatten(net.global_average_pool(x))
    net.output(net.linear(x, 1000), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "inception_v3",
            "Inception-v3",
            _PAPER,
            (1, 3, 299, 299),
            "without the auxiliary classifier",
        ),
        _construct,
    ),
)
