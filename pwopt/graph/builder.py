"""A small typed builder for ONNX models: the one place where the reference models touch onnx.

Shapes and element types come from onnx's own inference, one node at a time, so a wrong graph fails
at the line that builds it. Weights go straight into the model under construction: nothing is copied
when the model is handed over, which matters from a few hundred megabytes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from pwopt.errors import InvalidModelError, UsageError

__all__ = ["MAX_OPSET", "MIN_OPSET", "Dim", "GraphBuilder", "Model", "Tensor"]

Model: TypeAlias = onnx.ModelProto
"""A finished model, for those who may not import onnx."""

Dim: TypeAlias = int | str
"""A fixed size, or the name of a dynamic one."""

Attribute: TypeAlias = int | float | str | Sequence[int] | Sequence[float]

MIN_OPSET = 9
MAX_OPSET = 22
"""Opsets the builder writes; the newest one is the oldest that every supported onnx release has."""

_MIN_IR_VERSION = 8
_SMALL = 64
"""Constants up to this many elements are shown to shape inference: shapes, axes, scales."""


@dataclass(frozen=True)
class Tensor:
    """A named value of a graph under construction; ``shape`` holds sizes and dimension names."""

    name: str
    shape: tuple[Dim, ...]
    dtype: np.dtype[Any]

    def size(self, axis: int) -> int:
        """The fixed size of *axis*.

        Raises:
            InvalidModelError: the dimension is dynamic.
        """
        dim = self.shape[axis]
        if isinstance(dim, str):
            raise InvalidModelError(
                f"dimension {axis} of {self.name} is dynamic ({dim}); a fixed size is needed"
            )
        return dim


class GraphBuilder:
    """Builds one model, node by node, in topological order.

    Every node, weight and intermediate value gets a readable unique name from the enclosing
    :meth:`scope` and its op type: ``layer1.0/Conv_1``, ``layer1.0.Conv_1.weight``.
    """

    def __init__(self, name: str, *, opset: int = 17) -> None:
        if not MIN_OPSET <= opset <= MAX_OPSET:
            raise UsageError(f"opset {opset} is outside {MIN_OPSET}..{MAX_OPSET}")
        self.opset = opset
        self._model = onnx.ModelProto(producer_name="pwopt")
        self._model.opset_import.append(onnx.helper.make_opsetid("", opset))
        self._model.ir_version = max(
            _MIN_IR_VERSION, onnx.helper.find_min_ir_version_for(list(self._model.opset_import))
        )
        self._graph = self._model.graph
        self._graph.name = name
        self._types: dict[str, onnx.TypeProto] = {}
        self._data: dict[str, onnx.TensorProto] = {}
        self._scopes: list[str] = []
        self._used: Counter[str] = Counter()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of everything built inside with *name*; scopes nest."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def name(self, stem: str) -> str:
        """A fresh name for *stem* in the present scope; the first one carries no number."""
        scope = ".".join(self._scopes)
        base = f"{scope}/{stem}" if scope else stem
        count = self._used[base]
        self._used[base] += 1
        return f"{base}_{count}" if count else base

    def input(self, name: str, shape: Sequence[Dim], dtype: npt.DTypeLike = np.float32) -> Tensor:
        """Declare a graph input; a string in *shape* names a dynamic dimension."""
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        info = onnx.helper.make_tensor_value_info(name, elem_type, list(shape))
        self._graph.input.append(info)
        return self._declare(name, info.type)

    def initializer(self, array: npt.NDArray[Any], name: str) -> Tensor:
        """Store *array* as a weight under *name*, which must be unused."""
        if name in self._types:
            raise InvalidModelError(f"the name {name} is used twice")
        tensor = self._graph.initializer.add()
        _fill(tensor, array, name)
        if array.size <= _SMALL:
            self._data[name] = tensor
        return self._declare(name, _type_of(array))

    def constant(self, array: npt.NDArray[Any]) -> Tensor:
        """A ``Constant`` node with *array*, as exporters by tracing write literals."""
        node = self._graph.node.add(op_type="Constant", name=self.name("Constant"))
        output = f"{node.name}_output"
        node.output.append(output)
        attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
        _fill(attribute.t, array, "")
        if array.size <= _SMALL:
            self._data[output] = attribute.t
        return self._declare(output, _type_of(array))

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[Tensor | None],
        *,
        outputs: int = 1,
        name: str | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> tuple[Tensor, ...]:
        """Append one node with several outputs and return them; ``None`` is an absent input.

        Raises:
            InvalidModelError: the opset lacks *op_type*, or onnx rejects the inputs.
        """
        name = name or self.name(op_type)
        try:
            schema = onnx.defs.get_schema(op_type, self.opset, "")
        except onnx.defs.SchemaError as error:
            raise InvalidModelError(f"opset {self.opset} has no operator {op_type}") from error
        stems = (
            [f"{name}_output"] if outputs == 1 else [f"{name}_output{i}" for i in range(outputs)]
        )
        node = onnx.helper.make_node(
            op_type,
            [tensor.name if tensor else "" for tensor in inputs],
            stems,
            name=name,
        )
        for key, value in (attributes or {}).items():
            node.attribute.append(onnx.helper.make_attribute(key, value))
        known = {tensor.name: self._types[tensor.name] for tensor in inputs if tensor}
        data = {key: self._data[key] for key in known if key in self._data}
        try:
            inferred = onnx.shape_inference.infer_node_outputs(
                schema, node, known, data, opset_imports=list(self._model.opset_import)
            )
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise InvalidModelError(f"{op_type} {name}: {error}") from error
        self._graph.node.append(node)
        return tuple(self._declare(stem, inferred[stem]) for stem in stems)

    def node(
        self,
        op_type: str,
        *inputs: Tensor | None,
        name: str | None = None,
        **attributes: Attribute,
    ) -> Tensor:
        """Append one node with a single output and return it.

        Raises:
            InvalidModelError: as :meth:`nodes`.
        """
        return self.nodes(op_type, inputs, name=name, attributes=attributes)[0]

    def clip(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """``Clip`` between two scalars: attributes before opset 11, inputs from then on."""
        if self.opset >= 11:
            return self.node("Clip", x, self._scalar(low), self._scalar(high))
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            raise InvalidModelError(f"Clip of opset {self.opset} takes its bounds as numbers only")
        return self.node("Clip", x, min=float(low), max=float(high))

    def dropout(self, x: Tensor, ratio: float) -> Tensor:
        """An inference-mode ``Dropout``: the identity, as exports of a trained model keep it."""
        if self.opset >= 12:
            return self.node("Dropout", x, self._scalar(ratio))
        return self.node("Dropout", x, ratio=ratio)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        """``Split`` along *axis* into pieces of the given *sizes*."""
        name = self.name("Split")
        if self.opset >= 13:
            split = self.initializer(np.array(sizes, np.int64), f"{name}.split")
            return self.nodes(
                "Split", (x, split), outputs=len(sizes), name=name, attributes={"axis": axis}
            )
        attributes: dict[str, Attribute] = {"axis": axis, "split": list(sizes)}
        return self.nodes("Split", (x,), outputs=len(sizes), name=name, attributes=attributes)

    def reduce_mean(self, x: Tensor, axes: Sequence[int], *, keepdims: bool = True) -> Tensor:
        """``ReduceMean`` over *axes*: an attribute before opset 18, an input from then on."""
        if self.opset < 18:
            return self.node("ReduceMean", x, axes=list(axes), keepdims=int(keepdims))
        name = self.name("ReduceMean")
        indices = self.initializer(np.array(axes, np.int64), f"{name}.axes")
        return self.node("ReduceMean", x, indices, name=name, keepdims=int(keepdims))

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """``Reshape`` to *shape*, where 0 copies the input's dimension and -1 is inferred."""
        name = self.name("Reshape")
        target = self.initializer(np.array(shape, np.int64), f"{name}.shape")
        return self.node("Reshape", x, target, name=name)

    def resize(self, x: Tensor, scale: int, mode: str) -> Tensor:
        """Enlarge the two spatial axes of NCHW *x* by *scale*, ``nearest`` or ``linear``.

        ``linear`` samples at pixel centres, which only opset 11 and up can say.

        Raises:
            InvalidModelError: ``linear`` before opset 11.
        """
        if mode == "linear" and self.opset < 11:
            raise InvalidModelError(f"opset {self.opset} cannot enlarge from pixel centres; use 11")
        op_type = "Resize" if self.opset >= 10 else "Upsample"
        name = self.name(op_type)
        scales = self.initializer(np.array([1, 1, scale, scale], np.float32), f"{name}.scales")
        if self.opset < 11:
            return self.node(op_type, x, scales, name=name, mode=mode)
        # Opset 11 demands the region of interest as an input even where it is not used.
        roi = self.initializer(np.empty(0, np.float32), f"{name}.roi") if self.opset < 13 else None
        if mode == "linear":
            coordinates = {"coordinate_transformation_mode": "half_pixel"}
        else:
            coordinates = {
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            }
        return self.node(op_type, x, roi, scales, name=name, mode=mode, **coordinates)

    def slice(
        self,
        x: Tensor,
        axes: Sequence[int],
        starts: Sequence[int],
        ends: Sequence[int],
        steps: Sequence[int],
    ) -> Tensor:
        """Strided ``Slice`` with constant bounds; needs opset 10."""
        name = self.name("Slice")
        parts = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
        constants = [
            self.initializer(np.array(values, np.int64), f"{name}.{key}")
            for key, values in parts.items()
        ]
        return self.node("Slice", x, *constants, name=name)

    def pad(self, x: Tensor, pads: Sequence[int]) -> Tensor:
        """Constant ``Pad`` with zeros: an attribute before opset 11, an input from then on."""
        if self.opset < 11:
            return self.node("Pad", x, pads=list(pads))
        name = self.name("Pad")
        amounts = self.initializer(np.array(pads, np.int64), f"{name}.pads")
        return self.node("Pad", x, amounts, name=name, mode="constant")

    def output(self, tensor: Tensor, name: str, shape: Sequence[Dim] | None = None) -> None:
        """Make *tensor* a graph output called *name*.

        *shape* replaces the inferred one where inference loses a dynamic dimension's name.
        """
        if name in self._types:
            raise InvalidModelError(f"the name {name} is used twice")
        for node in self._graph.node:
            _rename(node.input, tensor.name, name)
            _rename(node.output, tensor.name, name)
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
        sizes = tensor.shape if shape is None else shape
        info = onnx.helper.make_tensor_value_info(name, elem_type, list(sizes))
        self._graph.output.append(info)
        self._declare(name, info.type)

    def finish(self) -> Model:
        """The model; the builder must not be used afterwards."""
        return self._model

    def _scalar(self, value: Tensor | float) -> Tensor:
        """*value* itself, or a float32 scalar weight shared by everybody who asks for it."""
        if isinstance(value, Tensor):
            return value
        name = f"scalar_{float(value)!r}"
        if name in self._types:
            return self._tensor(name)
        return self.initializer(np.array(value, np.float32), name)

    def _declare(self, name: str, value_type: onnx.TypeProto) -> Tensor:
        self._types[name] = value_type
        return self._tensor(name)

    def _tensor(self, name: str) -> Tensor:
        tensor_type = self._types[name].tensor_type
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in tensor_type.shape.dim
        )
        return Tensor(name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type))


def _fill(tensor: onnx.TensorProto, array: npt.NDArray[Any], name: str) -> None:
    """Write *array* into *tensor* in place: ``numpy_helper.from_array`` would add one more copy."""
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.raw_data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _type_of(array: npt.NDArray[Any]) -> onnx.TypeProto:
    elem_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_type_proto(elem_type, list(array.shape))


def _rename(names: Any, old: str, new: str) -> None:
    for position, name in enumerate(names):
        if name == old:
            names[position] = new
