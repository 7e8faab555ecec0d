"""The first Inception network, with local response normalisation.

C. Szegedy, W. Liu, Y. Jia, P. Sermanet, S. Reed, D. Anguelov, D. Erhan, V. Vanhoucke,
A. Rabinovich: "Going Deeper with Convolutions" (arXiv:1409.4842, 2014). Without the auxiliary
classifiers, which only training uses.

Local response normalisation divides by ``(1 + 1e-4 mean-square)^0.75`` and only acts on activations
of the size that raw pixels (0 to 255) cause. The first convolution is therefore scaled up, so that
inputs of unit variance reach the size that images have in the original.
"""

from __future__ import annotations

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "C. Szegedy, W. Liu, Y. Jia, P. Sermanet, S. Reed, D. Anguelov, D. Erhan, V. Vanhoucke, "
    "A. Rabinovich",
    "Going Deeper with Convolutions",
    2014,
    "arXiv:1409.4842",
)
_PIXEL_SCALE = 60.0
"""Standard deviation of the pixels of natural images, in grey levels."""
_BIAS_SCALE = 0.1 * _PIXEL_SCALE
_INCEPTIONS = (
    ("3a", (64, 96, 128, 16, 32, 32), False),
    ("3b", (128, 128, 192, 32, 96, 64), True),
    ("4a", (192, 96, 208, 16, 48, 64), False),
    ("4b", (160, 112, 224, 24, 64, 64), False),
    ("4c", (128, 128, 256, 24, 64, 64), False),
    ("4d", (112, 144, 288, 32, 64, 64), False),
    ("4e", (256, 160, 320, 32, 128, 128), True),
    ("5a", (256, 160, 320, 32, 128, 128), False),
    ("5b", (384, 192, 384, 48, 128, 128), False),
)
"""Name, the widths of Table 1 (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool), pooling after it."""


def _inception(net: Network, x: Value, widths: tuple[int, int, int, int, int, int]) -> Value:
    def layer(source: Value, width: int, kernel: int) -> Value:
        return net.conv_relu(source, width, kernel, bias_scale=_BIAS_SCALE)

    one, reduce3, three, reduce5, five, pool = widths
    return net.concat(
        [
            layer(x, one, 1),
            layer(layer(x, reduce3, 1), three, 3),
            layer(layer(x, reduce5, 1), five, 5),
            layer(net.max_pool(x, 3, stride=1, pads=1), pool, 1),
        ]
    )


def _pool(net: Network, x: Value) -> Value:
    """Halve the image, rounding up as the original does: one row and column of padding behind."""
    return net.max_pool(x, 3, stride=2, pads=(0, 0, 1, 1))


def _normalise(net: Network, x: Value) -> Value:
    return net.lrn(x, size=5, alpha=1e-4, beta=0.75, bias=1.0)


def _construct(net: Network) -> None:
    x = net.input()
    x = net.conv(x, 64, 7, stride=2, gain=2 * _PIXEL_SCALE**2, bias_scale=_BIAS_SCALE)
    x = _normalise(net, _pool(net, net.relu(x)))
    x = net.conv_relu(x, 64, 1, bias_scale=_BIAS_SCALE)
    x = net.conv_relu(x, 192, 3, bias_scale=_BIAS_SCALE)
    x = _pool(net, _normalise(net, x))
    for name, widths, pooled in _INCEPTIONS:
        with net.scope(f"inception{name}"):
            x = _inception(net, x, widths)
        if pooled:
            x = _pool(net, x)
    x = net.dropout(net.flatten(net.global_average_pool(x)), 0.4)
    x = net.linear(x, 1000, gain=4 / _PIXEL_SCALE**2)
    net.output(net.softmax(x), "probabilities")


RECIPES = (
    Recipe(
        ModelInfo(
            "googlenet",
            "GoogLeNet",
            _PAPER,
            (1, 3, 224, 224),
            "with LRN, without auxiliary classifiers; softmax at the end",
        ),
        _construct,
    ),
)
