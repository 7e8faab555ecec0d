"""What flows through the models: executed on ONNX Runtime with every intermediate value visible."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from pwopt import models

Array = npt.NDArray[np.float32]

QUICK = {"resnet18", "mobilenet_v2", "mobilenet_v3_large", "repvgg_a0"}
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


def expose(model: onnx.ModelProto) -> None:
    """Make every value that a node computes from the input an output of *model*."""
    shown = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        for name in node.output:
            if name not in shown:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))


@pytest.mark.parametrize("name", EVERY_NAME)
def test_signals_keep_their_scale_and_carry_the_input(name: str) -> None:
    model = models.build(name)
    output = model.graph.output[0].name
    expose(model)
    rng = np.random.default_rng(20)
    shape = models.describe(name).input_shape
    first, second = (run(model, rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))

    for value, activation in first.items():
        assert np.isfinite(activation).all(), value
        if value != output:
            assert 1e-3 < activation.std() < 1e3, f"{value} has {activation.std()}"

    answers = first[output], second[output]
    if "Softmax" in {node.op_type for node in model.graph.node}:
        assert answers[0].max() < 0.9, "saturated softmax"
        answers = np.log(answers[0]), np.log(answers[1])
    assert 0.05 < answers[0].std() < 50
    change = np.abs(answers[0] - answers[1]).mean() / answers[0].std()
    assert change > 0.02, f"another input changes the output by {change} of its spread only"


@pytest.mark.parametrize("name", EVERY_NAME)
def test_batch_normalization_statistics_fit_the_activations(name: str) -> None:
    model = models.build(name)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    if not norms:
        return
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    expose(model)
    rng = np.random.default_rng(21)
    shape = models.describe(name).input_shape
    values = run(model, rng.standard_normal(shape, dtype=np.float32))
    for norm in norms:
        gamma, beta, mean, variance = (weights[key] for key in norm.input[1:])
        assert np.all(gamma != 0)
        assert np.all(beta != 0)
        assert np.all(mean != 0)
        assert np.ptp(variance) > 0
        normalised = (values[norm.output[0]] - beta[:, None, None]) / gamma[:, None, None]
        assert np.abs(normalised.mean(axis=(0, 2, 3))).mean() < 2, norm.name
        assert 0.1 < normalised.var(axis=(0, 2, 3)).mean() < 20, norm.name


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large_decomposed"])
def test_dynamic_batch_gives_the_same_answers(name: str) -> None:
    rng = np.random.default_rng(22)
    x = rng.standard_normal((3, *models.describe(name).input_shape[1:]), dtype=np.float32)
    dynamic = models.build(name, batch="N")
    onnx.checker.check_model(dynamic, full_check=True)
    assert dynamic.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert dynamic.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
    (together,) = run(dynamic, x).values()
    (fixed,) = run(models.build(name, batch=3), x).values()
    (alone,) = run(dynamic, x[:1]).values()
    np.testing.assert_allclose(together, fixed, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "opset"), [("mobilenet_v3_large", 22), ("mobilenet_v2", 9)])
def test_other_opsets_give_the_same_answers(name: str, opset: int) -> None:
    x = np.random.default_rng(23).standard_normal(
        models.describe(name).input_shape, dtype=np.float32
    )
    other = models.build(name, opset=opset)
    onnx.checker.check_model(other, full_check=True)
    assert other.opset_import[0].version == opset
    (expected,) = run(models.build(name), x).values()
    (actual,) = run(other, x).values()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_decomposed_hard_swish_is_the_same_function() -> None:
    x = np.random.default_rng(24).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (expected,) = run(models.build("mobilenet_v3_large"), x).values()
    (actual,) = run(models.build("mobilenet_v3_large_decomposed"), x).values()
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
