"""Convolutional networks as frameworks with channels last export them.

Such an export computes everything with the channels last, but for what ONNX has with the channels
in front only: around each of these operators it puts a pair of Transposes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["tangle"]

Array = np.ndarray[Any, Any]

# fmt: off
_FIRST_ONLY = frozenset({
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "DepthToSpace",
    "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "LRN", "MaxPool", "Resize",
    "SpaceToDepth", "Upsample",
})
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "PRelu", "Pow", "Relu", "Sigmoid",
    "Softplus", "Sqrt", "Sub", "Sum", "Tanh",
})
# fmt: on


def tangle(
    proto: onnx.ModelProto,
    *,
    biases: bool = True,
    norms: bool = True,
    products: bool = False,
) -> onnx.ModelProto:
    """*proto*, which has its channels in front, as an export with channels last.

    Inputs and outputs stay as they are: a Transpose follows the former and precedes the latter.

    Args:
        proto: a model whose shapes ONNX can infer.
        biases: let an Add behind the Transposes take the bias of each Conv.
        norms: let a Mul and an Add with the channels last take the place of BatchNormalization.
        products: let MatMul over the last axis take the place of Conv with 1x1 kernels.
    """
    return _Tangler(proto, biases=biases, norms=norms, products=products).tangled()


class _Tangler:
    """Tensors of four axes live with the channels last, under their names and ``/last``."""

    def __init__(
        self, proto: onnx.ModelProto, *, biases: bool, norms: bool, products: bool
    ) -> None:
        self.proto = proto
        self.biases, self.norms, self.products = biases, norms, products
        self.weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "Constant":
                value = helper.get_node_attr_value(node, "value")
                self.weights[node.output[0]] = numpy_helper.to_array(value)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values}
        self.ranks.update({k: v.ndim for k, v in self.weights.items()})
        self.opset = next(i.version for i in proto.opset_import if not i.domain)
        self.nodes: list[onnx.NodeProto] = []
        self.serial = 0

    def tangled(self) -> onnx.ModelProto:
        for value in self.proto.graph.input:
            if value.name not in self.weights and self.moves(value.name):
                self.to_last(value.name, last(value.name))
        for node in self.proto.graph.node:
            if node.op_type != "Constant":
                self.write(node)
        for value in self.proto.graph.output:
            if self.moves(value.name):
                self.to_first(last(value.name), value.name)
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "tangled",
            [v for v in self.proto.graph.input if v.name not in self.weights],
            list(self.proto.graph.output),
            [numpy_helper.from_array(v, k) for k, v in self.weights.items() if k in used],
        )
        result = helper.make_model(
            graph,
            opset_imports=self.proto.opset_import,
            ir_version=max(self.proto.ir_version, 4),
        )
        onnx.checker.check_model(result)
        return result

    def write(self, node: onnx.NodeProto) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        moving = [name for name in (*node.input, *node.output) if self.moves(name)]
        op = node.op_type
        if not moving:
            self.nodes.append(node)
        elif op == "BatchNormalization" and self.norms:
            self.write_norm(node, attributes)
        elif op == "Conv" and self.products and self.is_pointwise(node, attributes):
            self.write_product(node)
        elif op == "Conv" and self.biases and len(node.input) > 2:
            self.write_first(node, attributes, without_bias=True)
        elif op in _ELEMENTWISE and len(moving) == len(node.input) + 1 - self.constants(node):
            inputs = [self.operand(name) for name in node.input]
            self.emit(op, inputs, [last(node.output[0])], **attributes)
        elif op in ("Concat", "Split", "Softmax") and "axis" in attributes and self.opset >= 13:
            renamed = {**attributes, "axis": (0, 3, 1, 2)[attributes["axis"]]}
            inputs = [self.operand(name) for name in node.input]
            if op == "Split":
                inputs[1:] = node.input[1:]
            self.emit(op, inputs, [last(name) for name in node.output], **renamed)
        elif op == "ReduceMean" and "axes" in attributes and self.is_kept(node, attributes):
            renamed = {**attributes, "axes": [(0, 3, 1, 2)[axis] for axis in attributes["axes"]]}
            outputs = [last(n) if self.moves(n) else n for n in node.output]
            self.emit(op, [self.operand(node.input[0])], outputs, **renamed)
        else:
            self.write_first(node, attributes)

    # -- operators -----------------------------------------------------------------------------

    def write_first(
        self, node: onnx.NodeProto, attributes: dict[str, Any], *, without_bias: bool = False
    ) -> None:
        """The operator as it is, between Transposes."""
        inputs = list(node.input)[: 2 if without_bias else None]
        for index, name in enumerate(inputs):
            if self.moves(name) and (name not in self.weights):
                inputs[index] = self.to_first(last(name), self.name(name))
        outputs = [self.name(n) if self.moves(n) else n for n in node.output]
        self.emit(node.op_type, inputs, outputs, domain=node.domain, **attributes)
        for name, written in zip(node.output, outputs, strict=True):
            if not self.moves(name):
                continue
            if without_bias:
                moved = self.to_last(written, self.name(name))
                self.emit("Add", [moved, node.input[2]], [last(name)])
            else:
                self.to_last(written, last(name))

    def write_norm(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        scale, shift, mean, variance = (self.weights[n].astype(np.float64) for n in node.input[1:])
        factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        dtype = self.weights[node.input[1]].dtype
        inner, result = self.name(node.output[0]), last(node.output[0])
        by, plus = self.constant(factor.astype(dtype)), self.constant(shift - mean * factor, dtype)
        self.emit("Mul", [last(node.input[0]), by], [inner])
        self.emit("Add", [inner, plus], [result])

    def write_product(self, node: onnx.NodeProto) -> None:
        weight = self.weights[node.input[1]]
        matrix = self.constant(weight.reshape(weight.shape[:2]).T)
        result = last(node.output[0])
        inner = self.name(node.output[0]) if len(node.input) > 2 else result
        self.emit("MatMul", [last(node.input[0]), matrix], [inner])
        if len(node.input) > 2:
            self.emit("Add", [inner, node.input[2]], [result])

    # -- questions -----------------------------------------------------------------------------

    def moves(self, name: str) -> bool:
        return self.ranks.get(name) == 4 and name not in self.weights

    def constants(self, node: onnx.NodeProto) -> int:
        return sum(name in self.weights or not name for name in node.input)

    def is_pointwise(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> bool:
        ones = all(v == 1 for v in attributes.get("strides", (1,)))
        is_single = attributes.get("group", 1) == 1 and not any(attributes.get("pads", ()))
        return ones and is_single and self.weights[node.input[1]].shape[2:] == (1, 1)

    def is_kept(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> bool:
        return self.moves(node.input[0]) and (
            bool(attributes.get("keepdims", 1)) or sorted(attributes["axes"]) == [2, 3]
        )

    # -- writing -------------------------------------------------------------------------------

    def operand(self, name: str) -> str:
        """*name* with the channels last."""
        if name not in self.weights:
            return last(name) if name else ""
        values = self.weights[name]
        if values.size == 1:
            return name
        full = values.reshape((1,) * (4 - values.ndim) + values.shape)
        return self.constant(full.transpose(0, 2, 3, 1))

    def constant(self, values: Array, dtype: Any = None) -> str:
        name = self.name("constant")
        self.weights[name] = np.ascontiguousarray(values, dtype)
        return name

    def to_last(self, source: str, result: str) -> str:
        return self.emit("Transpose", [source], [result], perm=[0, 2, 3, 1])

    def to_first(self, source: str, result: str) -> str:
        return self.emit("Transpose", [source], [result], perm=[0, 3, 1, 2])

    def emit(
        self, op: str, inputs: Iterable[str], outputs: Sequence[str], **attributes: Any
    ) -> str:
        name = self.name(op)
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return outputs[0]

    def name(self, hint: str) -> str:
        self.serial += 1
        return f"{hint}/{self.serial}"


def last(name: str) -> str:
    """What the tensor *name* is called with its channels last."""
    return f"{name}/last"
