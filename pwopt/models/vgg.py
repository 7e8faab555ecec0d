"""Plain stacks of 3x3 convolutions.

K. Simonyan, A. Zisserman: "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(arXiv:1409.1556, 2014). Configurations D (VGG-16) and E (VGG-19), without BatchNormalization and
with the classifier's dropout layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pwopt.models.network import Network
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "K. Simonyan, A. Zisserman",
    "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    2014,
    "arXiv:1409.1556",
)


def _construct(net: Network, *, depths: Sequence[int]) -> None:
    x = net.input()
    for stage, depth in enumerate(depths):
        with net.scope(f"features{stage + 1}"):
            for _ in range(depth):
                x = net.conv_relu(x, min(64 << stage, 512), 3)
            x = net.max_pool(x, 2, stride=2)
    with net.scope("classifier"):
        x = net.flatten(x)
        for _ in range(2):
            x = net.dropout(net.relu(net.linear(x, 4096, gain=2.0)))
        net.output(net.linear(x, 1000), "logits")


def _recipe(layers: int, configuration: str, depths: Sequence[int]) -> Recipe:
    info = ModelInfo(
        f"vgg{layers}",
        f"VGG-{layers}",
        _PAPER,
        (1, 3, 224, 224),
        f"configuration {configuration}, without BatchNormalization",
    )
    return Recipe(info, partial(_construct, depths=depths))


RECIPES = (_recipe(16, "D", (2, 2, 3, 3, 3)), _recipe(19, "E", (2, 2, 4, 4, 4)))
