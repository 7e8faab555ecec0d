"""Encoder and decoder with connections at every resolution.

O. Ronneberger, P. Fischer, T. Brox: "U-Net: Convolutional Networks for Biomedical Image
Segmentation" (arXiv:1505.04597, 2015), with the paper's widths. Convolutions are padded, so that
nothing is cropped and the output has the input's size (256x256).

``unet_transpose`` enlarges by ConvTranspose as the paper's "up-convolution"; ``unet_resize`` by
bilinear Resize and a 1x1 convolution, which avoids checkerboard patterns (A. Odena, V. Dumoulin,
C. Olah: "Deconvolution and Checkerboard Artifacts", Distill, 2016).
"""

from __future__ import annotations

from functools import partial

from pwopt.models.network import Network, Value
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["RECIPES"]

_PAPER = Paper(
    "O. Ronneberger, P. Fischer, T. Brox",
    "U-Net: Convolutional Networks for Biomedical Image Segmentation",
    2015,
    "arXiv:1505.04597",
)
_WIDTHS = (64, 128, 256, 512)
_BOTTOM = 1024
_CLASSES = 2


def _double_conv(net: Network, x: Value, width: int) -> Value:
    return net.conv_relu(net.conv_relu(x, width, 3), width, 3)


def _construct(net: Network, *, resize: bool) -> None:
    x = net.input()
    skips = []
    for level, width in enumerate(_WIDTHS):
        with net.scope(f"down{level + 1}"):
            x = _double_conv(net, x, width)
            skips.append(x)
            x = net.max_pool(x, 2, stride=2)
    with net.scope("bottom"):
        x = _double_conv(net, x, _BOTTOM)
    for level in reversed(range(len(_WIDTHS))):
        width = _WIDTHS[level]
        with net.scope(f"up{level + 1}"):
            if resize:
                x = net.conv(net.resize(x, 2, "linear"), width, 1, gain=1.0)
            else:
                x = net.conv_transpose(x, width, 2, stride=2)
            x = _double_conv(net, net.concat([skips[level], x]), width)
    net.output(net.conv(x, _CLASSES, 1, gain=1.0), "logits")


RECIPES = (
    Recipe(
        ModelInfo(
            "unet_transpose",
            "U-Net with ConvTranspose",
            _PAPER,
            (1, 1, 256, 256),
            "padded convolutions; two classes",
        ),
        partial(_construct, resize=False),
    ),
    Recipe(
        ModelInfo(
            "unet_resize",
            "U-Net with Resize",
            _PAPER,
            (1, 1, 256, 256),
            "padded convolutions; bilinear Resize and 1x1 convolution; two classes",
            min_opset=11,
        ),
        partial(_construct, resize=True),
    ),
)
