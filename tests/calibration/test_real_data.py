"""Real data of every layout, on the trained models that it belongs to."""

from __future__ import annotations

import numpy as np
import pytest

from pwopt.calibration import Preprocess, Samples, load_samples
from pwopt.runtime import open_session
from pwopt.target import Target
from tests import zoo

pytestmark = pytest.mark.zoo


def loaded(model: str, data: str, preprocess: str) -> Samples:
    folder = zoo.folder()
    with open_session(folder / f"{model}.onnx", Target(threads=1)) as session:
        specs = session.interface.inputs
    return load_samples(folder.parent / "data" / data, specs, Preprocess.parse(preprocess))


def top1(model: str, samples: Samples) -> float:
    """Percent of the samples whose class the model finds."""
    hits = []
    with open_session(zoo.folder() / f"{model}.onnx", Target(threads=2)) as session:
        for batch in samples.stream(50):
            (scores,) = session.run(batch.feeds).values()
            found = np.asarray(scores).reshape(len(np.asarray(scores)), -1).argmax(axis=1)
            hits.append(found[: batch.size] == batch.labels)
    return float(100 * np.concatenate(hits).mean())


@pytest.mark.parametrize(
    ("model", "data", "preprocess", "count", "least"),
    [
        ("squeezenet1.1_gluon", "imagenet_val_800", "torch,crop=224", 50, 60),
        ("squeezenet1.1", "imagenet_val_800", "caffe,crop=224", 30, 55),
        ("mobilenetv1_0.25_224", "imagenet_val_800", "tf,crop=224,label_offset=1", 60, 55),
        ("cifar10_resnet20", "cifar10_lossless_200", "torch", 200, 88),
        ("cifar10_resnet20", "cifar10_test_5000", "torch", 200, 75),
        ("cifar10_resnet8", "cifar10_lossless_200", "raw", 200, 80),
        ("kws_dscnn", "kws01", "dtype=int8,mean=83,std=1/0.5847", 300, 82),
    ],
)
def test_trained_models_are_as_accurate_as_they_should_be(
    model: str, data: str, preprocess: str, count: int, least: float
) -> None:
    samples = loaded(model, data, preprocess)
    if count < len(samples):
        samples, _ = samples.split(count, np.random.default_rng(0))
    assert top1(model, samples) >= least
