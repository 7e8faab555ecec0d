"""A plain PRelu network at low resolution, pixel shuffle at the end.

X. Wang, L. Xie, C. Dong, Y. Shan: "Real-ESRGAN: Training Real-World Blind Super-Resolution with
Pure Synthetic Data" (arXiv:2107.10833, 2021), its compact network: 64 channels, 16 body
convolutions, scale 4, added to the enlarged input. PRelu is from K. He et al.: "Delving Deep into
Rectifiers" (arXiv:1502.01852, 2015), the pixel shuffle from W. Shi et al. (arXiv:1609.05158, 2016).
"""

from __future__ import annotations

from pwopt.models.network import Network
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "X. Wang, L. Xie, C. Dong, Y. Shan",
    "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data",
    2021,
    "arXiv:2107.10833",
)
_WIDTH = 64
_BODY = 16
_SCALE = 4


def _construct(net: Network) -> None:
    image = net.input()
    x = net.prelu(net.conv(image, _WIDTH, 3))
    for index in range(_BODY):
        with net.scope(f"body{index}"):
            x = net.prelu(net.conv(x, _WIDTH, 3))
    # The branch is a correction of the enlarged image, so it ends small.
    x = net.conv(x, image.channels * _SCALE**2, 3, gain=0.05, bias_scale=0.02)
    x = net.depth_to_space(x, _SCALE)
    net.output(net.add(x, net.resize(image, _SCALE, "nearest")), "enlarged")


RECIPES = (
    Recipe(
        ModelInfo(
            "prelu_super_resolution",
            "Compact super-resolution with PRelu",
            _PAPER,
            (1, 3, 128, 128),
            "scale 4; PRelu with a slope per channel; DepthToSpace",
            min_opset=11,
        ),
        _construct,
    ),
)
