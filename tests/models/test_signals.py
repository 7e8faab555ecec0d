"""What flows through the models: executed on ONNX Runtime with every intermediate value visible."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from pwopt import models
from tests.models.structure import skeleton

Array = npt.NDArray[np.float32]

QUICK = {"nin_cifar10", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_1_0x"}
"""Small enough to execute in every run; the slow suite executes all."""

EVERY_NAME = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in models.names()
]


def run(model: onnx.ModelProto, x: Array) -> dict[str, Array]:
    """Every output of *model* for *x*, by name, without any optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": x}), strict=True))


def noise(name: str, seed: int, batch: int = 1) -> Array:
    """Inputs for the model *name* with zero mean and unit variance."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, *models.describe(name).input_shape[1:]), dtype=np.float32)


def expose(model: onnx.ModelProto) -> None:
    """Make every value that a node computes from the input an output of *model*."""
    shown = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        for name in node.output:
            if name not in shown:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))


def check_batch_norms(model: onnx.ModelProto, values: dict[str, Array]) -> None:
    """The running statistics describe the activations, and no parameter is trivial."""
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    for norm in (node for node in model.graph.node if node.op_type == "BatchNormalization"):
        gamma, beta, mean, variance = (weights[key] for key in norm.input[1:])
        for parameter in (gamma, beta, mean):
            assert np.all(parameter != 0), norm.name
        assert variance.min() > 0, norm.name
        assert np.ptp(variance) > 0, norm.name
        normalised = (values[norm.output[0]] - beta[:, None, None]) / gamma[:, None, None]
        assert np.abs(normalised.mean(axis=(0, 2, 3))).mean() < 4, norm.name
        assert 0.1 < normalised.var(axis=(0, 2, 3)).mean() < 40, norm.name


@pytest.mark.parametrize("name", EVERY_NAME)
def test_signals_keep_their_scale_and_carry_the_input(name: str) -> None:
    model = models.build(name)
    output = model.graph.output[0].name
    expose(model)
    first, second = (run(model, noise(name, seed)) for seed in (20, 21))

    for value, activation in first.items():
        assert np.isfinite(activation).all(), value
        if value != output:
            assert 1e-3 < activation.std() < 1e3, f"{value} has {activation.std()}"
    check_batch_norms(model, first)

    one, two = first[output], second[output]
    if "Softmax" in {node.op_type for node in model.graph.node}:
        assert one.max() < 0.9, "saturated softmax"
        one, two = np.log(one), np.log(two)
    assert 0.05 < one.std() < 50
    change = np.abs(one - two).mean() / one.std()
    assert change > 0.1, f"another input changes the output by {change} of its spread only"


DYNAMIC_QUICK = {"mobilenet_v3_large_decomposed", "shufflenet_v2_1_0x"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DYNAMIC_QUICK else pytest.mark.slow)
        for name in models.names()
    ],
)
def test_dynamic_batch_gives_the_same_answers(name: str) -> None:
    x = noise(name, 22, batch=2)
    model = models.build(name, batch="N")
    onnx.checker.check_model(skeleton(model), full_check=True)
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"
    (together,) = run(model, x).values()
    (alone,) = run(model, x[1:]).values()
    (fixed,) = run(models.build(name, batch=2), x).values()
    scale = np.abs(together).max()
    np.testing.assert_allclose(together, fixed, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(together[1:], alone, rtol=0, atol=1e-4 * scale)


OPSETS_QUICK = {"nin_cifar10", "shufflenet_v2_1_0x"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OPSETS_QUICK else pytest.mark.slow)
        for name in models.names()
        if not name.startswith("vgg")  # heavy, and the same in every opset but for Dropout
    ],
)
def test_every_opset_gives_the_same_answers(name: str) -> None:
    info = models.describe(name)
    x = noise(name, 23)
    (expected,) = run(models.build(name), x).values()
    for opset in sorted({info.min_opset, 13, 18, 22}):
        if opset < info.min_opset:
            continue
        other = models.build(name, opset=opset)
        onnx.checker.check_model(skeleton(other), full_check=True)
        assert other.opset_import[0].version == opset
        (actual,) = run(other, x).values()
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=f"opset {opset}"
        )


def test_decomposed_hard_swish_is_the_same_function() -> None:
    x = noise("mobilenet_v3_large", 24)
    (expected,) = run(models.build("mobilenet_v3_large"), x).values()
    (actual,) = run(models.build("mobilenet_v3_large_decomposed"), x).values()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
