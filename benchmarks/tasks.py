"""What the trained models of the collection are for: their data, preprocessing and metric."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pwopt import Preprocess
from pwopt.calibration import Given, Samples, load_samples
from pwopt.runtime import open_session
from pwopt.target import Target

__all__ = ["TASKS", "Task", "find_tasks"]

Feed = Mapping[str, npt.NDArray[Any]]
_NOISE = 25 / 255


@dataclass(frozen=True)
class Task:
    """A trained model with real data.

    Attributes:
        model: its name in the collection.
        data: name of the folder with the data.
        what: of the data, in words.
        preprocess: what is done to images, as ``--preprocess`` takes it.
        metric: as ``--metric`` takes it; ``None`` for the one that suits.
        feeds: makes feeds of the folder, where preprocessing alone does not.
    """

    model: str
    data: str
    what: str
    preprocess: str | None = None
    metric: str | None = None
    feeds: Callable[[Path], Iterator[Feed]] | None = None

    @property
    def model_path(self) -> Path:
        """Where the model lies."""
        return _zoo() / "models" / f"{self.model}.onnx"

    def given(self) -> Given:
        """What pwopt takes as data."""
        folder = _zoo() / "data" / self.data
        return folder if self.feeds is None else self.feeds(folder)

    @property
    def steps(self) -> Preprocess | None:
        """The preprocessing."""
        return None if self.preprocess is None else Preprocess.parse(self.preprocess)

    def samples(self) -> Samples:
        """All samples, for the model's inputs."""
        with open_session(self.model_path, Target(), optimized=False) as session:
            return load_samples(self.given(), session.interface.inputs, self.steps)


def find_tasks(pattern: str = "") -> Iterator[Task]:
    """Every task whose model's name contains *pattern*."""
    return (task for task in TASKS if pattern in task.model)


def _zoo() -> Path:
    return Path(os.environ["PWOPT_ZOO"])


def _digits(folder: Path, name: str) -> Iterator[Feed]:
    """MNIST's files: a header of big-endian sizes, then bytes."""
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    yield {name: pixels, "labels": np.frombuffer(labels, np.uint8, offset=8)}


def _planes(image: Image.Image) -> npt.NDArray[np.float32]:
    """``[1, channels, height, width]`` from 0 to 1."""
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return np.atleast_3d(pixels).transpose(2, 0, 1)[None]


def _noisy(folder: Path, name: str) -> Iterator[Feed]:
    """Grey images with Gaussian noise, each from a seed of its own; the target is without."""
    for seed, path in enumerate(sorted(folder.glob("*.png"))):
        with Image.open(path) as image:
            clean = _planes(image.convert("L"))
        noise = np.random.default_rng(seed).standard_normal(clean.shape, dtype=np.float32)
        yield {name: clean + np.float32(_NOISE) * noise, "targets": clean}


def _small(
    folder: Path, name: str, *, scale: int, side: int | None = None, mode: str = "RGB", cut: int = 0
) -> Iterator[Feed]:
    """Images made *scale* times smaller by bicubic resampling; the target is the large one.

    Args:
        folder: holds the images; those smaller than *side* are left out.
        name: of the input.
        scale: whole factor.
        side: length of the large image, cropped from the centre; by default all of it.
        mode: Pillow's: ``RGB``, or ``L`` for luma.
        cut: pixels that the model's output lacks at each edge.
    """
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png")):
        with Image.open(path) as found:
            image = found.convert(mode)
        width, height = (side or length // scale * scale for length in image.size)
        if width > image.width or height > image.height:
            continue
        left, top = (image.width - width) // 2, (image.height - height) // 2
        large = image.crop((left, top, left + width, top + height))
        small = large.resize((width // scale, height // scale), Image.Resampling.BICUBIC)
        target = _planes(large)[:, :, cut : height - cut, cut : width - cut]
        yield {name: _planes(small), "targets": target}


IMAGENET = ("imagenet_val_800", "800 ImageNet validation images")
CIFAR = ("cifar10_test_5000", "5,000 CIFAR-10 test images, as JPEG")
CIFAR_LOSSLESS = ("cifar10_lossless_200", "200 CIFAR-10 test images, lossless")

TASKS = (
    Task("squeezenet1.1_gluon", *IMAGENET, preprocess="torch,crop=224"),
    Task("squeezenet1.1", *IMAGENET, preprocess="caffe,crop=224"),
    Task("mobilenetv2_1.0_224", *IMAGENET, preprocess="torch,crop=224"),
    Task("mobilenetv1_0.25_224", *IMAGENET, preprocess="tf,crop=224,label_offset=1"),
    Task("resnet50v2_trunk_s1-3", *IMAGENET, preprocess="torch,crop=224", metric="relative-error"),
    Task("cifar10_resnet20", *CIFAR, preprocess="torch"),
    Task("cifar10_resnet56", *CIFAR, preprocess="torch"),
    Task("cifar10_resnet20", *CIFAR_LOSSLESS, preprocess="torch"),
    Task("cifar10_resnet56", *CIFAR_LOSSLESS, preprocess="torch"),
    Task("cifar10_resnet8", *CIFAR_LOSSLESS, preprocess="raw"),
    Task("kws_dscnn", "kws01", "1,000 spoken words", "dtype=int8,mean=83,std=1/0.5847"),
    Task("mnist_cnn", "mnist", "10,000 test digits", feeds=partial(_digits, name="Input3")),
    Task(
        "dncnn_sigma25_bn",
        "bsd68",
        "68 grey photographs, noise of 25/255",
        feeds=partial(_noisy, name="input"),
    ),
    Task(
        "realesr_animevideov3_x2",
        "set5",
        "5 images, made 2 times smaller",
        metric="psnr:border=2",
        feeds=partial(_small, name="data", scale=2),
    ),
    Task(
        "super_resolution_espcn_x3",
        "faces",
        "luma of photographs, 672x672, made 3 times smaller",
        metric="psnr:border=3",
        feeds=partial(_small, name="input", scale=3, side=672, mode="L"),
    ),
    Task(
        "waifu2x_cunet_x2",
        "faces",
        "photographs, 400x400, made 2 times smaller",
        feeds=partial(_small, name="Input1", scale=2, side=400, cut=36),
    ),
    Task("fns_mosaic", "faces", "12 photographs", "raw,resize=720x720", "psnr:peak=255"),
)
