"""The input of a model that images go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pwopt.calibration.preprocess import Layout, Preprocess
from pwopt.calibration.source import Array, dims
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec

__all__ = ["IMAGE_AXES", "IMAGE_CHANNELS", "ImageInput"]

IMAGE_AXES: Final = 4
IMAGE_CHANNELS: Final = (1, 3)


@dataclass(frozen=True)
class ImageInput:
    """The input that images go to."""

    spec: TensorSpec
    layout: Layout
    channels: int

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], preprocess: Preprocess, where: object) -> ImageInput:
        """The only input of a model.

        Raises:
            UsageError: there are more, or it takes no images.
        """
        if len(specs) != 1:
            names = ", ".join(f"'{spec.name}'" for spec in specs) or "none"
            raise UsageError(
                f"{where}: images feed a model with one input, but the inputs are {names}; save"
                " arrays named like them as .npz."
            )
        return cls.for_spec(specs[0], preprocess, where)

    @classmethod
    def for_spec(cls, spec: TensorSpec, preprocess: Preprocess, where: object) -> ImageInput:
        """One input among others.

        Raises:
            UsageError: it takes no images.
        """
        if len(spec.shape) != IMAGE_AXES:
            raise UsageError(
                f"{where}: input '{spec.name}' has shape {dims(spec.shape)}; images need four"
                " axes, batch among them. Save arrays that fit as .npz."
            )
        layout = preprocess.layout or _layout_of(spec)
        channels = spec.shape[1 if layout is Layout.NCHW else 3]
        if channels not in IMAGE_CHANNELS:
            raise UsageError(
                f"{where}: input '{spec.name}' has shape {dims(spec.shape)}, that is"
                f" {channels or '?'} channels in layout {layout}; images have 1 or 3."
                " Set layout in --preprocess, or save arrays as .npz."
            )
        if spec.dtype is None or spec.dtype.kind not in "fiu":
            raise UsageError(f"{where}: input '{spec.name}' has type {spec.type}, no image's.")
        if spec.dtype.kind != "f" and not preprocess.keeps_values:
            raise UsageError(
                f"{where}: input '{spec.name}' takes {spec.dtype}; scale, mean and std are for"
                " floats. Use --preprocess raw."
            )
        return cls(spec, layout, int(channels))

    @property
    def size(self) -> tuple[int | str | None, int | str | None]:
        """Height and width."""
        axes = self.spec.shape
        return (axes[2], axes[3]) if self.layout is Layout.NCHW else (axes[1], axes[2])

    def arranged(self, pixels: Array, preprocess: Preprocess, where: object) -> Array:
        """Pixels ``[h, w, c]`` as the model takes them, without the batch axis.

        Raises:
            UsageError: their size is not the model's.
        """
        have = pixels.shape[:2]
        if any(
            isinstance(want, int) and want != got for want, got in zip(self.size, have, strict=True)
        ):
            want = dims(self.size)
            raise UsageError(
                f"{where}: is {have[0]}x{have[1]}, but the input is {want}; add crop={want} or"
                f" resize={want} to --preprocess."
            )
        assert self.spec.dtype is not None
        values: Array = pixels if preprocess.keeps_values else preprocess.normalise(pixels)
        if self.layout is Layout.NCHW:
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values, dtype=self.spec.dtype)


def _layout_of(spec: TensorSpec) -> Layout:
    """Channels first unless only the last axis looks like channels."""
    last = spec.shape[3] in IMAGE_CHANNELS and spec.shape[1] not in IMAGE_CHANNELS
    return Layout.NHWC if last else Layout.NCHW
