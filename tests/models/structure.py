"""The structure of a model without its weights, and its parameters and multiply-accumulates."""

from __future__ import annotations

import math

import onnx

_LARGE = 64


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """*model* with its large weights turned into inputs of the same type: light to check."""
    graph = onnx.GraphProto(name=model.graph.name)
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _LARGE:
            graph.initializer.append(tensor)
            continue
        graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return onnx.ModelProto(
        graph=graph, ir_version=model.ir_version, opset_import=model.opset_import
    )


def parameters(model: onnx.ModelProto) -> int:
    """Trainable float parameters: BatchNormalization's gamma and beta count, its statistics don't.

    Scalars (bounds, ratios, literals) and Resize's scales are settings, not parameters.
    """
    settings = set()
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            settings.update(node.input[3:])
        if node.op_type in ("Resize", "Upsample"):
            settings.update(node.input[1:])
    return sum(
        math.prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and tensor.dims
        and tensor.name not in settings
    )


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and matrix products, for a model of fixed shapes."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    shape = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.value_info, *graph.output]
    }
    shape |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            total += math.prod(shape[node.output[0]]) * math.prod(shape[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += math.prod(shape[node.input[0]]) * math.prod(shape[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            total += math.prod(shape[node.output[0]]) * shape[node.input[0]][-1]
    return total
