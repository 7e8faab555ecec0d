from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pwopt.runtime import Reference, make_inputs, open_session
from pwopt.target import Target

ZOO = os.environ.get("PWOPT_ZOO")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(not ZOO, reason="PWOPT_ZOO does not name the model collection"),
]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("squeezenet1.1", {}),
        ("cifar10_resnet20", {}),
        ("kws_dscnn", {}),
        ("dncnn_sigma25_bn", {"input": (1, 1, 40, 40)}),
    ],
)
def test_trained_models_agree_with_themselves_within_a_tight_tolerance(
    name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = Path(str(ZOO)) / "models" / f"{name}.onnx"
    with open_session(path, Target(threads=1)) as session:
        specs = session.interface.inputs
    assert len(specs) == 1
    target = Target(threads=1, input_shapes=shapes)
    feeds = make_inputs(specs, target, np.random.default_rng(0))
    reference = Reference.of(path, target, feeds, depth=20)
    result = reference.verify(path)
    assert (result.ok, result.tested, reference.dropped) == (True, True, ())
    assert 1e-6 < result.tolerance < 1e-4
