"""The catalogue, and the structure of every model in it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import onnx
import pytest

from pwopt import models
from pwopt.errors import UsageError
from tests.models.structure import macs, parameters, skeleton

HEAVY = {"vgg16", "vgg19"}
"""Hundreds of megabytes of weights: built in the slow suite only."""

PARAMETERS_M = {
    "nin": 7.60,
    "nin_cifar10": 0.967,
    "vgg16": 138.36,
    "vgg19": 143.67,
    "googlenet": 6.999,
    "inception_v3": 23.83,
    "resnet18": 11.69,
    "resnet34": 21.80,
    "resnet50": 25.557,
    "resnet50_original": 25.557,
    "resnet50_v2": 25.55,
    "resnext50_32x4d": 25.03,
    "densenet121": 7.98,
    "squeezenet1_1": 1.235,
    "mobilenet_v1": 4.23,
    "mobilenet_v2": 3.505,
    "mobilenet_v3_large": 5.48,
    "mobilenet_v3_large_decomposed": 5.48,
    "efficientnet_b0": 5.29,
    "shufflenet_v1": 1.87,
    "shufflenet_v2_1_0x": 2.28,
    "repvgg_a0": 9.11,
    "convnext_tiny": 28.59,
    "unet_transpose": 31.03,
    "prelu_super_resolution": 0.621,
}
"""Published trainable parameters, in millions; BatchNormalization's gamma and beta count."""

GMACS = {
    "vgg16": 15.5,
    "vgg19": 19.63,
    "inception_v3": 5.71,
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.09,
    "resnet50_original": 3.86,
    "resnext50_32x4d": 4.23,
    "densenet121": 2.83,
    "squeezenet1_1": 0.349,
    "mobilenet_v1": 0.569,
    "mobilenet_v2": 0.30,
    "mobilenet_v3_large": 0.217,
    "mobilenet_v3_large_decomposed": 0.217,
    "efficientnet_b0": 0.386,
    "shufflenet_v1": 0.138,
    "shufflenet_v2_1_0x": 0.145,
    "convnext_tiny": 4.456,
}
"""Published multiply-accumulates of convolutions and matrix products, in billions."""

OPERATORS = {
    "resnet18": {"Conv": 20, "Slice": 0, "Pad": 0},
    "resnet18_original": {"Conv": 17, "Slice": 3, "Pad": 3},
    "nin_cifar10": {"Conv": 9, "Relu": 9, "Dropout": 2, "Softmax": 1},
    "googlenet": {"LRN": 2, "Conv": 57, "Concat": 9, "BatchNormalization": 0},
    "inception_v3": {"Conv": 94, "BatchNormalization": 94, "Concat": 11 + 4},
    "densenet121": {"Conv": 120, "BatchNormalization": 121, "AveragePool": 3},
    "squeezenet1_1": {"Conv": 26, "Concat": 8, "Dropout": 1},
    "efficientnet_b0": {"Conv": 81, "Sigmoid": 65, "Mul": 65, "BatchNormalization": 49},
    "shufflenet_v1": {"Reshape": 32, "Transpose": 16, "Concat": 3, "Add": 13},
    "shufflenet_v2_1_0x": {"Split": 13, "Transpose": 16, "Concat": 16, "ReduceMean": 1},
    "repvgg_a0": {"Conv": 44, "BatchNormalization": 44 + 17, "Add": 22 + 17},
    "convnext_tiny": {"MatMul": 36, "Transpose": 36, "Erf": 18, "LayerNormalization": 19},
    "unet_transpose": {"ConvTranspose": 4, "Conv": 19, "Concat": 4, "Resize": 0},
    "unet_resize": {"ConvTranspose": 0, "Conv": 23, "Concat": 4, "Resize": 4},
    "prelu_super_resolution": {"PRelu": 17, "Conv": 18, "DepthToSpace": 1, "Resize": 1},
}
"""How often the operators that make the network occur in it, by its paper."""

EVERY_NAME = [
    pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in models.names()
]


@pytest.mark.parametrize("name", EVERY_NAME)
def test_model_is_valid_named_and_as_published(name: str) -> None:
    info = models.describe(name)
    model = models.build(name)
    light = skeleton(model)
    onnx.checker.check_model(light, full_check=True)

    assert model.ir_version == 8
    assert [value.name for value in model.graph.input] == ["input"]
    (source,) = model.graph.input
    assert tuple(d.dim_value for d in source.type.tensor_type.shape.dim) == info.input_shape
    assert len(model.graph.output) == 1
    node_names = [node.name for node in model.graph.node]
    assert all(node_names)
    assert len(set(node_names)) == len(node_names)
    read = {name for node in model.graph.node for name in node.input}
    assert all(tensor.name in read for tensor in model.graph.initializer)

    total_macs = macs(light)
    assert total_macs > 0
    if name in PARAMETERS_M:
        assert parameters(model) == pytest.approx(PARAMETERS_M[name] * 1e6, rel=0.01)
    ops = _ops(model)
    expected = OPERATORS.get(name, {})
    assert {op: ops[op] for op in expected} == expected
    if name in GMACS:
        assert total_macs == pytest.approx(GMACS[name] * 1e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_model_with_its_weights_passes_the_full_check(name: str) -> None:
    model = models.build(name)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_every_model_is_described() -> None:
    assert len(set(models.names())) == len(models.names())
    for name in models.names():
        info = models.describe(name)
        assert info.name == name
        assert info.title
        assert info.paper.authors
        assert info.paper.title
        assert 1950 < info.paper.year < 2030
        assert info.paper.venue
        assert info.paper.title in str(info.paper)
        assert math.prod(info.input_shape) > 0


def test_published_figures_name_existing_models() -> None:
    assert set(PARAMETERS_M) | set(GMACS) | set(OPERATORS) | HEAVY <= set(models.names())


@pytest.mark.parametrize(
    ("mistake", "meant"),
    [("resnet5", "resnet50"), ("mobilenet-v2", "mobilenet_v2"), ("vgg_19", "vgg19")],
)
def test_unknown_name_is_answered_with_close_matches(mistake: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"{mistake}.*did you mean .*{meant}"):
        models.build(mistake)
    with pytest.raises(UsageError, match=meant):
        models.describe(mistake)


def test_hopeless_name_is_answered_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"known: .*resnet50"):
        models.build("zzzzzz")


@pytest.mark.parametrize("batch", [0, -1, "", "1N", "N M"])
def test_bad_batch_is_refused(batch: int | str) -> None:
    with pytest.raises(UsageError, match="batch"):
        models.build("mobilenet_v2", batch=batch)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="seed -1"):
        models.build("mobilenet_v2", seed=-1)


@pytest.mark.parametrize(("name", "opset"), [("mobilenet_v3_large", 13), ("mobilenet_v2", 8)])
def test_opset_without_the_operators_is_refused(name: str, opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset}"):
        models.build(name, opset=opset)


def test_same_seed_same_bytes_other_seed_other_weights() -> None:
    first, again, other = (models.build("shufflenet_v2_1_0x", seed=seed) for seed in (3, 3, 4))
    assert first.SerializeToString() == again.SerializeToString()
    for one, two in zip(first.graph.initializer, other.graph.initializer, strict=True):
        assert one.name == two.name
        if one.data_type == onnx.TensorProto.FLOAT and one.dims:
            assert one.raw_data != two.raw_data, one.name


def _ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _strided_kernels(model: onnx.ModelProto) -> set[int]:
    """Kernel sizes of the strided convolutions inside blocks that are not shortcuts."""
    kernels = set()
    for node in model.graph.node:
        if node.op_type != "Conv" or "/" not in node.name or node.name.endswith("/Conv_3"):
            continue
        attributes = _attributes(node)
        if attributes["strides"] == [2, 2]:
            kernels.add(attributes["kernel_shape"][0])
    return kernels


def test_forms_of_resnet_differ_where_the_stride_sits() -> None:
    later = models.build("resnet50")
    assert _strided_kernels(later) == {3}
    assert _strided_kernels(models.build("resnet50_original")) == {1}

    producer = {output: node for node in later.graph.node for output in node.output}
    norms = [node for node in later.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == 53
    for norm in norms:
        source = producer[norm.input[0]]
        assert source.op_type == "Conv"
        assert len(source.input) == 2, "a convolution before BatchNormalization has no bias"


def test_forms_of_mobilenet_v3_differ_in_their_activations() -> None:
    operators = _ops(models.build("mobilenet_v3_large"))
    decomposed_model = models.build("mobilenet_v3_large_decomposed")
    decomposed = _ops(decomposed_model)
    assert (operators["HardSwish"], operators["HardSigmoid"]) == (21, 8)
    assert operators["Clip"] == operators["Constant"] == 0
    assert decomposed["HardSwish"] == decomposed["HardSigmoid"] == 0
    assert decomposed["Clip"] == decomposed["Div"] == 29
    assert decomposed["Constant"] == 4 * 29
    assert decomposed_model.opset_import[0].version == 11
