"""How pixels become what a model takes: named presets, a short text form, a small file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pwopt.errors import UsageError
from pwopt.graph import atomic_write

__all__ = ["PRESETS", "Colour", "Interpolation", "Layout", "Preprocess"]


class Layout(StrEnum):
    """Order of the axes of an image input."""

    NCHW = "nchw"
    NHWC = "nhwc"


class Colour(StrEnum):
    """Order of the channels."""

    RGB = "rgb"
    BGR = "bgr"
    GREY = "grey"


class Interpolation(StrEnum):
    """How pixels are resampled; every one but ``nearest`` is antialiased when it makes smaller."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


@dataclass(frozen=True)
class Preprocess:
    """Steps from a decoded image to a model's input, in this order.

    1. resize, 2. crop the centre, 3. order the channels, 4. ``(pixel * scale - mean) / std``,
    5. order the axes.

    Attributes:
        resize: length of the shorter side, or (height, width); ``None`` leaves the size alone.
        crop: (height, width) of the centre to keep; ``None`` keeps everything.
        interpolation: for resizing.
        scale: factor on the pixels, which count from 0 to 255.
        mean: subtracted after scaling; one value, or one per channel in the order of *colour*.
        std: divided by at last; one value, or one per channel in the order of *colour*.
        colour: order of the channels; ``None`` takes grey for a model with one channel, else RGB.
        layout: order of the input's axes; ``None`` finds it from the model's input.
        dtype: element type of raw files (``.bin``): ``uint8`` or ``int8``.
        shape: shape of a raw file, channels last; ``None`` takes the model's height, width and
            channels.
        label_offset: added to every label: 1 for models whose class 0 is the background.
    """

    resize: tuple[int, ...] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Interpolation = Interpolation.BILINEAR
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    colour: Colour | None = None
    layout: Layout | None = None
    dtype: str = "uint8"
    shape: tuple[int, ...] | None = None
    label_offset: int = 0

    @classmethod
    def parse(cls, spec: str) -> Preprocess:
        """Read ``PRESET,key=value,...``, or the JSON file that *spec* names.

        A preset (default ``raw``) comes first, keys after it override its values. Numbers may be
        fractions (``scale=1/255``), lists are joined by colons (``mean=104:117:123``), sizes are
        ``HEIGHTxWIDTH``. A file holds one object with the same keys, and ``preset``.

        Raises:
            UsageError: an unknown preset or key, or a value that is none; says what is allowed.
        """
        if spec.endswith(".json"):
            return cls._from_file(Path(spec))
        words = [word.strip() for word in spec.split(",")]
        preset = "raw" if "=" in words[0] else words.pop(0)
        values: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise UsageError(
                    f"--preprocess {spec}: '{word}' is not of the form key=value"
                    " (a preset stands first)."
                )
            values[key.strip()] = value.strip()
        return _build(preset, values, f"--preprocess {spec}")

    @classmethod
    def _from_file(cls, path: Path) -> Preprocess:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise UsageError(f"{path}: is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise UsageError(f"{path}: holds no object with the keys {_listed(_KEYS)}.")
        preset = str(found.pop("preset", "raw"))
        return _build(preset, {key: _as_text(key, value) for key, value in found.items()}, path)

    def save(self, path: str | Path) -> None:
        """Write the file that :meth:`parse` reads.

        Raises:
            OutputError: it cannot be written.
        """
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        atomic_write(Path(path), lambda file: file.write(text.encode()))

    def as_dict(self) -> dict[str, Any]:
        """The keys that differ from preset ``raw``, with JSON's types."""
        differing = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return {name: _as_json(getattr(self, name)) for name in differing}

    def normalise(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """``(pixel * scale - mean) / std`` of an array whose last axis is the channels.

        Computed in float64 and rounded once.

        Raises:
            UsageError: there is neither one mean (std) nor one per channel.
        """
        channels = pixels.shape[-1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UsageError(
                    f"--preprocess: {name} has {len(values)} values, but there are {channels}"
                    f" channels; give 1 or {channels}."
                )
        scaled = pixels.astype(np.float64) * self.scale
        return ((scaled - self.mean) / self.std).astype(np.float32)

    @property
    def keeps_values(self) -> bool:
        """Whether pixels are passed on as they are."""
        return self.scale == 1 and not any(self.mean) and all(s == 1 for s in self.std)


PRESETS: Final[Mapping[str, Preprocess]] = MappingProxyType(
    {
        "raw": Preprocess(),
        "torch": Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        "tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
        "caffe": Preprocess(mean=(104.0, 117.0, 123.0), colour=Colour.BGR),
    }
)
"""The conventions of the large model collections, by name.

``raw``: 0 to 255 as they are. ``torch``: torchvision's, RGB. ``tf``: -1 to 1, RGB. ``caffe``: BGR
without the mean of ImageNet. None of them resizes or crops.
"""


def _build(preset: str, values: Mapping[str, str], where: object) -> Preprocess:
    if preset not in PRESETS:
        raise UsageError(f"{where}: there is no preset '{preset}'; choose from {_listed(PRESETS)}.")
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _KEYS:
            raise UsageError(f"{where}: there is no key '{key}'; the keys are {_listed(_KEYS)}.")
        read, allowed = _KEYS[key]
        try:
            changes[key] = read(value)
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(f"{where}: {key} takes {allowed}, not '{value}'.") from error
    return replace(PRESETS[preset], **changes)


def _number(text: str) -> float:
    above, _, below = text.partition("/")
    value = float(above) / float(below or 1)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _factor(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise ValueError(text)
    return value


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.lower().split("x"))
    if any(size < 1 for size in sizes):
        raise ValueError(text)
    return sizes


def _resize(text: str) -> tuple[int, ...]:
    sizes = _sizes(text)
    if len(sizes) > 2:
        raise ValueError(text)
    return sizes


def _crop(text: str) -> tuple[int, int]:
    sizes = _resize(text)
    return sizes[0], sizes[-1]


def _element(text: str) -> str:
    if text not in ("uint8", "int8"):
        raise ValueError(text)
    return text


def _each(read: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(read(part) for part in text.split(":"))


_KEYS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = MappingProxyType(
    {
        "resize": (_resize, "the length of the shorter side, or HEIGHTxWIDTH"),
        "crop": (_crop, "the length of both sides, or HEIGHTxWIDTH"),
        "interpolation": (Interpolation, "nearest, bilinear, bicubic or lanczos"),
        "scale": (_factor, "a number other than 0, such as 1/255"),
        "mean": (_each(_number), "one number, or one per channel joined by colons"),
        "std": (_each(_factor), "one number other than 0, or one per channel joined by colons"),
        "colour": (Colour, "rgb, bgr or grey"),
        "layout": (Layout, "nchw or nhwc"),
        "dtype": (_element, "uint8 or int8"),
        "shape": (_sizes, "HEIGHTxWIDTHxCHANNELS or HEIGHTxWIDTH"),
        "label_offset": (int, "a whole number"),
    }
)
"""How the text of each key is read, and what is allowed, in words."""

_SIZES: Final = frozenset({"resize", "crop", "shape"})


def _as_text(key: str, value: Any) -> str:
    """What a JSON file holds, as :meth:`Preprocess.parse` takes it."""
    if isinstance(value, list):
        return ("x" if key in _SIZES else ":").join(map(str, value))
    return str(value)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names)
