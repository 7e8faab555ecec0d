"""Shapes under concrete inputs, inferred apart: the model keeps its dynamic dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pwopt.errors import InvalidModelError, UsageError
from pwopt.graph.model import DEFAULT_DOMAINS, Constant, Model, Tensor, one_line
from pwopt.graph.stand_ins import put_stand_ins

__all__ = ["TensorType", "concrete_dims", "concrete_shapes", "concrete_types", "element_bits"]

Dims = tuple[int, ...]
Array = np.ndarray[Any, Any]

_BITS_WITHOUT_NUMPY: Mapping[int, int] = {
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.FLOAT8E4M3FN: 8,
    onnx.TensorProto.FLOAT8E4M3FNUZ: 8,
    onnx.TensorProto.FLOAT8E5M2: 8,
    onnx.TensorProto.FLOAT8E5M2FNUZ: 8,
}
"""Element sizes of the types for which graphsurgeon keeps ONNX's number."""

_HALF_BYTE_NAMES = frozenset({"int4", "uint4", "float4_e2m1fn"})

_SHAPE_ARITHMETIC = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Floor",
        "Gather",
        "Greater",
        "Identity",
        "Less",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Range",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "Round",
        "Shape",
        "Size",
        "Slice",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""What exporters compute shapes with."""
_SMALL_ELEMENTS = 1024
"""Values larger than this are weights, not shapes."""


@dataclass(frozen=True)
class TensorType:
    """What is known of a tensor: its shape, and bits per element; ``None`` where not known."""

    shape: Dims | None
    bits: int | None


def element_bits(tensor: Tensor) -> int | None:
    """Bits that one element of *tensor* takes in memory; ``None`` for strings and unknown types."""
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, int):
        return _BITS_WITHOUT_NUMPY.get(tensor.dtype)
    return _bits(np.dtype(tensor.dtype))


def concrete_shapes(
    model: Model, input_shapes: Mapping[str, Dims] | None = None
) -> Mapping[str, Dims]:
    """The shapes, by tensor name, that a run with inputs of *input_shapes* would see.

    Shapes are inferred on a skeleton of the model; the model itself is left as it is. A dynamic
    first dimension that is not given is a batch of 1, unless another input gives its symbol a
    value. Tensors whose shape stays unknown (another dynamic dimension that is not given,
    data-dependent outputs, operators without inference) are missing.

    Raises:
        UsageError: *input_shapes* names something that is no input, or contradicts a fixed
            dimension or another input.
        InvalidModelError: shape inference finds the model invalid.
    """
    types = concrete_types(model, input_shapes)
    return {name: known.shape for name, known in types.items() if known.shape is not None}


def concrete_types(
    model: Model, input_shapes: Mapping[str, Dims] | None = None
) -> Mapping[str, TensorType]:
    """As :func:`concrete_shapes`, with element sizes; tensors of an unknown type are missing.

    Raises:
        UsageError, InvalidModelError: as :func:`concrete_shapes`.
    """
    protos = _concrete_protos(model, input_shapes or {})
    constants = {t.name: TensorType(tuple(t.shape), element_bits(t)) for t in model.constants()}
    return {name: _tensor_type(proto) for name, proto in protos.items()} | constants


def concrete_dims(
    model: Model, input_shapes: Mapping[str, Dims] | None = None
) -> Mapping[str, int]:
    """The values that *input_shapes* give to the symbolic dimensions of *model*'s tensors.

    Symbols that name different sizes in different places are missing.

    Raises:
        UsageError, InvalidModelError: as :func:`concrete_shapes`.
    """
    protos = _concrete_protos(model, input_shapes or {})
    return _symbols((*model.inputs, *_computed(model)), protos)


# -- inputs --------------------------------------------------------------------------------------


def _fixed_inputs(model: Model, given: Mapping[str, Dims]) -> dict[str, list[int | None]]:
    """Shapes of the inputs as far as they are known, with *given* and a batch of 1 put in."""
    ranked = {t.name: t.shape for t in model.inputs if t.shape is not None}
    names = {t.name for t in model.inputs}
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        if name not in names:
            raise UsageError(
                f"the model has no input '{name}' (its inputs: {', '.join(sorted(names))})"
            )
        _unify(name, ranked.get(name), shape, symbols)
    fixed: dict[str, list[int | None]] = {n: list(s) for n, s in given.items()}
    for name, declared in ranked.items():
        if name in fixed:
            continue
        fixed[name] = [_value(dim, symbols) for dim in declared]
        if declared and fixed[name][0] is None:
            fixed[name][0] = 1
            if isinstance(declared[0], str) and declared[0]:
                symbols[declared[0]] = 1
    # A batch of 1 that was put in late also holds for inputs that were looked at before.
    for name, declared in ranked.items():
        fixed[name] = [
            _value(dim, symbols) if size is None else size
            for dim, size in zip(declared, fixed[name], strict=True)
        ]
    return fixed


def _unify(name: str, declared: object, shape: Dims, symbols: dict[str, int]) -> None:
    if any(size < 0 for size in shape):
        raise UsageError(f"input '{name}': {_text(shape)} has a negative dimension")
    if not isinstance(declared, (list, tuple)):
        return
    if len(declared) != len(shape):
        raise UsageError(
            f"input '{name}' has {len(declared)} dimensions, but {_text(shape)} has {len(shape)}"
        )
    for dim, size in zip(declared, shape, strict=True):
        expected = _value(dim, symbols)
        if expected is not None and expected != size:
            raise UsageError(
                f"input '{name}' cannot be {_text(shape)}: its dimension '{dim}' is {expected}"
            )
        if isinstance(dim, str) and dim:
            symbols[dim] = size


def _value(dim: int | str | None, symbols: Mapping[str, int]) -> int | None:
    if isinstance(dim, str):
        return symbols.get(dim)
    return None if dim is None or dim < 0 else int(dim)


def _text(shape: Dims) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


# -- inference -----------------------------------------------------------------------------------


def _concrete_protos(model: Model, given: Mapping[str, Dims]) -> dict[str, onnx.TypeProto]:
    skeleton = _bare_skeleton(model, _fixed_inputs(model, given))
    types = _inferred(skeleton)
    if any(_sizes(types.get(t.name)) is None for t in _computed(model)):
        _walk(model, skeleton, types)
    return types


def _bare_skeleton(model: Model, inputs: Mapping[str, list[int | None]]) -> onnx.ModelProto:
    """The skeleton with *inputs* put in and without annotations, which may contradict them."""
    skeleton = model.skeleton()
    graph = skeleton.graph
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for value in graph.input:
        if value.name not in inputs or not value.type.HasField("tensor_type"):
            continue
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for size in inputs[value.name]:
            dim = shape.dim.add()
            if size is not None:
                dim.dim_value = size
    put_stand_ins(skeleton)
    return skeleton


def _inferred(skeleton: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise InvalidModelError(f"shape inference failed: {one_line(error)}") from error
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type for value in values}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
    return types


def _walk(model: Model, skeleton: onnx.ModelProto, types: dict[str, onnx.TypeProto]) -> None:
    """Infer what is unknown node by node, in one pass that computes shape arithmetic on its way.

    What neither can say, the file's own annotations may; they go last since they may be outdated.
    """
    annotated = {t.name: t for t in _computed(model)}
    values = {
        t.name: numpy_helper.to_array(t)
        for t in skeleton.graph.initializer
        if t.data_type != onnx.TensorProto.STRING
    }
    symbols = _symbols(model.inputs, types)
    for node in skeleton.graph.node:
        if any(_sizes(types.get(name)) is None for name in node.output if name):
            types.update(_node_types(node, model.opset, types, values))
        for name in filter(None, node.output):
            if _sizes(types.get(name)) is None and name in annotated:
                types.update(_annotation(annotated[name], symbols))
        value = _value_of(node, model.opset, types, values)
        if value is not None:
            values[node.output[0]] = value


def _node_types(
    node: onnx.NodeProto,
    opset: int,
    types: Mapping[str, onnx.TypeProto],
    values: Mapping[str, Array],
) -> Mapping[str, onnx.TypeProto]:
    names = [name for name in node.input if name]
    if node.domain not in DEFAULT_DOMAINS or any(name not in types for name in names):
        return {}
    if any(attribute.HasField("g") for attribute in node.attribute):
        return {}
    data = {n: numpy_helper.from_array(values[n], n) for n in names if n in values}
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
        return onnx.shape_inference.infer_node_outputs(
            schema,
            node,
            {name: types[name] for name in names},
            data,
            opset_imports=[onnx.helper.make_opsetid("", opset)],
        )
    except (
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
    ):
        return {}


def _annotation(tensor: Tensor, symbols: Mapping[str, int]) -> Mapping[str, onnx.TypeProto]:
    bound = _bound(tensor.shape, symbols)
    if bound is None or element_bits(tensor) is None:
        return {}
    number = (
        tensor.dtype
        if isinstance(tensor.dtype, int)
        else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    return {tensor.name: onnx.helper.make_tensor_type_proto(number, bound)}


def _value_of(
    node: onnx.NodeProto,
    opset: int,
    types: Mapping[str, onnx.TypeProto],
    values: Mapping[str, Array],
) -> Array | None:
    """The value of a small tensor of numbers, if *node* computes one from known values."""
    if node.op_type not in _SHAPE_ARITHMETIC or node.domain not in DEFAULT_DOMAINS:
        return None
    shapes = [_sizes(types.get(name)) for name in node.output]
    if len(shapes) != 1 or shapes[0] is None or math.prod(shapes[0]) > _SMALL_ELEMENTS:
        return None
    names = list(dict.fromkeys(name for name in node.input if name))
    if node.op_type in ("Shape", "Size"):
        source = _sizes(types.get(names[0]))
        if source is None:
            return None
        # The evaluator asks for the shape alone, so nothing is allocated for the values.
        return _evaluated(node, opset, {names[0]: np.broadcast_to(np.int8(0), source)})
    if not all(name in values for name in names):
        return None
    return _evaluated(node, opset, {name: values[name] for name in names})


def _evaluated(node: onnx.NodeProto, opset: int, feeds: dict[str, Array]) -> Array | None:
    from onnx.reference import ReferenceEvaluator  # slow to import, seldom needed

    imports = [onnx.helper.make_opsetid("", opset)]
    # The evaluator picks the operator's version by a function's imports, not by a lone node's.
    function = onnx.helper.make_function(
        "pwopt", "value", list(feeds), list(node.output), [node], imports
    )
    try:
        with np.errstate(all="ignore"):
            results = list(ReferenceEvaluator(function).run(None, feeds, attributes={}))
    except Exception:  # the evaluator raises whatever NumPy does, where the node is invalid
        return None
    value = np.asarray(results[0])
    return value if value.dtype.kind in "biuf" else None


def _sizes(proto: onnx.TypeProto | None) -> Dims | None:
    """The shape that *proto* states, if every dimension is known."""
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    sizes = tuple(d.dim_value for d in dims if d.HasField("dim_value"))
    return sizes if len(sizes) == len(dims) else None


def _tensor_type(proto: onnx.TypeProto) -> TensorType:
    elem_type = proto.tensor_type.elem_type
    if elem_type in _BITS_WITHOUT_NUMPY:
        return TensorType(_sizes(proto), _BITS_WITHOUT_NUMPY[elem_type])
    if elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return TensorType(_sizes(proto), None)
    return TensorType(_sizes(proto), _bits(onnx.helper.tensor_dtype_to_np_dtype(elem_type)))


def _bits(dtype: np.dtype[Any]) -> int | None:
    # NumPy's own types are never "V"; asking for a name takes its time.
    if dtype.kind == "V" and dtype.name in _HALF_BYTE_NAMES:
        return 4
    return None if dtype.hasobject or not dtype.itemsize else 8 * dtype.itemsize


# -- symbols -------------------------------------------------------------------------------------


def _computed(model: Model) -> Iterator[Tensor]:
    for node in model.nodes.values():
        yield from (t for t in node.outputs if not isinstance(t, Constant) and not t.is_empty())


def _symbols(tensors: Iterable[Tensor], types: Mapping[str, onnx.TypeProto]) -> dict[str, int]:
    """Values of the symbolic dimensions, as far as all *tensors* whose sizes are known agree."""
    values: dict[str, set[int]] = {}
    for tensor in tensors:
        sizes = _sizes(types.get(tensor.name))
        if sizes is None or tensor.shape is None or len(sizes) != len(tensor.shape):
            continue
        for dim, size in zip(tensor.shape, sizes, strict=True):
            if isinstance(dim, str) and dim:
                values.setdefault(dim, set()).add(size)
    return {symbol: found.pop() for symbol, found in values.items() if len(found) == 1}


def _bound(shape: object, symbols: Mapping[str, int]) -> list[int] | None:
    if not isinstance(shape, (list, tuple)):
        return None
    sizes = [_value(dim, symbols) for dim in shape]
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None
