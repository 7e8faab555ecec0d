"""Two functions that no single linear convolution computes, as 1x1 convolutions with Relu.

XOR is the textbook case: I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning" (MIT Press, 2016),
section 6.1. The distance ``|x1 - x2|`` is a perceptron at each pixel in the sense of M. Lin,
Q. Chen, S. Yan, "Network In Network" (arXiv:1312.4400, 2013). The weights are set by hand, so the
answers are known exactly at every pixel; a seed changes nothing.
"""

from __future__ import annotations

from pwopt.models.network import Network
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_SHAPE = (1, 2, 16, 16)


def _xor(net: Network) -> None:
    """``relu(x1 + x2) - 2 relu(x1 + x2 - 1)``."""
    x = net.input()
    hidden = net.relu(net.pointwise(x, [[1, 1], [1, 1]], [0, -1]))
    net.output(net.pointwise(hidden, [[1, -2]], None), "xor")


def _abs_difference(net: Network) -> None:
    """``relu(x1 - x2) + relu(x2 - x1)``."""
    x = net.input()
    hidden = net.relu(net.pointwise(x, [[1, -1], [-1, 1]], None))
    net.output(net.pointwise(hidden, [[1, 1]], None), "distance")


RECIPES = (
    Recipe(
        ModelInfo(
            "xor",
            "XOR of two channels",
            Paper("I. Goodfellow, Y. Bengio, A. Courville", "Deep Learning", 2016, "MIT Press"),
            _SHAPE,
            "weights set by hand; exact for inputs 0 and 1",
        ),
        _xor,
    ),
    Recipe(
        ModelInfo(
            "abs_difference",
            "|x1 - x2| of two channels",
            Paper("M. Lin, Q. Chen, S. Yan", "Network In Network", 2013, "arXiv:1312.4400"),
            _SHAPE,
            "weights set by hand; exact for all inputs whose difference is exact",
        ),
        _abs_difference,
    ),
)
