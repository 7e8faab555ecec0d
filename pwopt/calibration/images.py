"""Decoding images; the only importer of Pillow, which is loaded when the first one is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pwopt.calibration.preprocess import Colour, Preprocess
from pwopt.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_SUFFIXES", "RAW_SUFFIXES", "pixels_of_array", "pixels_of_file"]

IMAGE_SUFFIXES: Final = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
RAW_SUFFIXES: Final = frozenset({".bin", ".raw"})
_CHANNELS: Final = {1: "L", 3: "RGB"}
_EIGHT_BITS: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


def pixels_of_file(path: Path, channels: int, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Decode an image and resize and crop it; ``[height, width, channels]``.

    Raises:
        UsageError: the file is no image that Pillow reads, or its pixels have more than 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BITS:
                raise UsageError(
                    f"{path}: has pixels of mode {image.mode}, not of 8 bits; give such data as"
                    " .npz arrays."
                )
            return _prepared(image, channels, preprocess, path)
    except UnidentifiedImageError as error:
        raise UsageError(f"{path}: is no image that can be read; remove it.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be decoded ({error}); remove it.") from error


def pixels_of_array(
    array: npt.NDArray[Any], channels: int, preprocess: Preprocess, where: object
) -> npt.NDArray[Any]:
    """Resize, crop and order the channels of ``[height, width, channels]``; keeps the dtype.

    Raises:
        UsageError: the array has other channels than the model takes, or is to be resized and
            does not hold uint8.
    """
    from PIL import Image

    if array.shape[-1] not in _CHANNELS:
        raise UsageError(f"{where}: has {array.shape[-1]} channels; images have 1 or 3.")
    if array.dtype == np.uint8:
        bare = array[..., 0] if array.shape[-1] == 1 else array
        return _prepared(Image.fromarray(bare), channels, preprocess, where)
    if preprocess.resize is not None or array.shape[-1] != channels:
        raise UsageError(
            f"{where}: holds {array.dtype} with {array.shape[-1]} channels; only uint8 can be"
            f" resized or brought to the {channels} channels of the model."
        )
    cropped = _cropped(array, preprocess, where)
    return cropped[..., ::-1] if preprocess.colour is Colour.BGR else cropped


def _prepared(
    image: Image, channels: int, preprocess: Preprocess, where: object
) -> npt.NDArray[np.uint8]:
    if preprocess.colour is Colour.GREY and channels != 1:
        raise UsageError(f"--preprocess: colour=grey has 1 channel, but the model takes {channels}")
    if preprocess.colour in (Colour.RGB, Colour.BGR) and channels != 3:
        raise UsageError(
            f"--preprocess: colour={preprocess.colour} has 3 channels, but the model takes"
            f" {channels}"
        )
    converted = image.convert(_CHANNELS[channels])
    if preprocess.resize is not None:
        converted = _resized(converted, preprocess)
    pixels = np.asarray(converted, dtype=np.uint8)
    pixels = _cropped(pixels[..., None] if channels == 1 else pixels, preprocess, where)
    return pixels[..., ::-1] if preprocess.colour is Colour.BGR else pixels


def _resized(image: Image, preprocess: Preprocess) -> Image:
    from PIL.Image import Resampling

    assert preprocess.resize is not None
    size = preprocess.resize
    if len(size) == 1:
        # As torchvision does it: the longer side is cut down to a whole number.
        (short,), shorter = size, min(image.size)
        width, height = (max(1, short * side // shorter) for side in image.size)
    else:
        height, width = size
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Resampling[preprocess.interpolation.name])


def _cropped(pixels: npt.NDArray[Any], preprocess: Preprocess, where: object) -> npt.NDArray[Any]:
    if preprocess.crop is None:
        return pixels
    height, width = preprocess.crop
    if height > pixels.shape[0] or width > pixels.shape[1]:
        raise UsageError(
            f"{where}: is {pixels.shape[0]}x{pixels.shape[1]}, smaller than crop={height}x{width};"
            f" put resize={max(height, width)} before it."
        )
    # As torchvision does it: half to even.
    top = round((pixels.shape[0] - height) / 2)
    left = round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]
