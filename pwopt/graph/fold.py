"""Constant evaluation: what a node with constant inputs computes, by ONNX's reference evaluator.

Only operators take part whose reference implementation and ONNX Runtime agree: data movement,
integer and Boolean arithmetic, and the floating-point operations that IEEE 754 rounds correctly
(or, for powers and sums, that differ in the last places only). What the two define differently is
left to the runtime: integers divided by zero, casts out of range, sums in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pwopt.graph.facts import Facts
from pwopt.graph.model import DEFAULT_DOMAINS, Node

__all__ = ["EVALUATED", "FOLD_LIMIT", "Unfoldable", "fold"]

Array = np.ndarray[Any, Any]
Inputs = Sequence[Array | None]

FOLD_LIMIT = 1024
"""Elements that a result may always have, however few elements it is computed from."""

_OLDEST_OPSET = 7
"""Before, binary operators broadcast by attributes, which the reference evaluator ignores."""
_SHOWN_ELEMENTS = 1024
"""Inputs up to this many elements are shown to shape inference as data."""

_MOVEMENT = frozenset(
    {
        "Cast",
        "Concat",
        "ConstantOfShape",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "NonZero",
        "Pad",
        "Range",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
_ROUNDED_ONCE = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Ceil",
        "Clip",
        "Div",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Reciprocal",
        "Relu",
        "Sign",
        "Sqrt",
        "Sub",
        "Xor",
    }
)
_ACCUMULATED = frozenset(
    {
        "Pow",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    }
)
EVALUATED = _MOVEMENT | _ROUNDED_ONCE | _ACCUMULATED
"""Standard operators that are evaluated."""


class Unfoldable(StrEnum):
    """Why a node is not evaluated."""

    NOT_CONSTANT = "inputs-not-constant"
    NOT_EVALUATED = "operator-not-evaluated"
    TOO_LARGE = "result-too-large"
    NOT_DEFINED = "result-not-defined"


@dataclass(frozen=True, eq=False)
class _Call:
    """A node with its constant inputs; omitted ones are ``None``."""

    node: Node
    proto: onnx.NodeProto
    opset: int
    inputs: Inputs

    @property
    def given(self) -> Mapping[str, Array]:
        """The distinct inputs by name."""
        pairs = zip(self.proto.input, self.inputs, strict=True)
        return {name: values for name, values in pairs if values is not None}


def fold(facts: Facts, node: Node, limit: int = FOLD_LIMIT) -> tuple[Array, ...] | Unfoldable:
    """Evaluate *node* if its inputs are constants.

    Args:
        facts: of the model that *node* lives in.
        node: any node.
        limit: elements that the result may have at least; more than that only if the distinct
            inputs together have as many.

    Returns:
        The values of its outputs, or why there are none.
    """
    if not _is_candidate(facts, node):
        return Unfoldable.NOT_CONSTANT
    if node.domain not in DEFAULT_DOMAINS or node.op not in EVALUATED:
        return Unfoldable.NOT_EVALUATED
    if facts.opset < _OLDEST_OPSET:
        return Unfoldable.NOT_EVALUATED
    inputs = [facts.constant(facts.input(node, i)) for i in range(len(node.inputs))]
    if not all(_is_plain(values, node.op) for values in inputs if values is not None):
        return Unfoldable.NOT_EVALUATED
    call = _Call(node, facts.node_proto(node), facts.opset, inputs)
    guard = _GUARDS.get(node.op)
    if guard is not None and not guard(call):
        return Unfoldable.NOT_DEFINED
    return _evaluate_within(call, limit)


def _is_candidate(facts: Facts, node: Node) -> bool:
    given = [t for t in node.inputs if not t.is_empty()]
    return bool(given) and all(facts.is_constant(t) for t in given)


def _is_plain(values: Array, op: str) -> bool:
    """Whether NumPy's arithmetic for this dtype is the runtime's."""
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        return False
    return not (op in _ACCUMULATED and values.dtype == np.float16)


# -- what is not defined, or defined differently ---------------------------------------------------


def _divides(call: _Call) -> bool:
    divisor = call.inputs[1]
    if divisor is None or divisor.dtype.kind == "f":
        return divisor is not None and call.node.op == "Div"
    dividend = call.inputs[0]
    assert dividend is not None
    least = np.iinfo(divisor.dtype).min
    overflows = least < 0 and bool(np.any(dividend == least)) and bool(np.any(divisor == -1))
    return bool(np.all(divisor != 0)) and not overflows


def _casts(call: _Call) -> bool:
    values = call.inputs[0]
    to = onnx.helper.tensor_dtype_to_np_dtype(int(call.node.attrs["to"]))
    if values is None or to.kind not in "biuf" or to.itemsize > 8:
        return False
    if to.kind in "bf" or not values.size:
        return True
    low, high = np.iinfo(to).min, np.iinfo(to).max
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return False
    return low <= int(values.min()) and int(values.max()) <= high


def _raises(call: _Call) -> bool:
    return all(values is not None and values.dtype.kind == "f" for values in call.inputs)


def _counts(call: _Call) -> bool:
    kinds = [values.dtype.kind for values in call.inputs if values is not None]
    return all(kind in "iu" for kind in kinds) and bool(call.inputs[2])


def _pads(call: _Call) -> bool:
    if str(call.node.attrs.get("mode", "constant")) != "constant":
        return False
    pads = call.inputs[1] if call.opset >= 11 else np.asarray(call.node.attrs["pads"])
    return pads is not None and bool(np.all(pads >= 0))


_GUARDS: Mapping[str, Callable[[_Call], bool]] = {
    "Div": _divides,
    "Mod": _divides,
    "Cast": _casts,
    "Pow": _raises,
    "Range": _counts,
    "Pad": _pads,
}


# -- evaluation ------------------------------------------------------------------------------------


def _evaluate_within(call: _Call, limit: int) -> tuple[Array, ...] | Unfoldable:
    types = _infer(call)
    if types is None or (call.node.op != "NonZero" and any(shape is None for _, shape in types)):
        return Unfoldable.NOT_DEFINED
    allowed_elements = max(limit, sum(values.size for values in call.given.values()))
    allowed_bytes = max(8 * limit, 2 * sum(values.nbytes for values in call.given.values()))
    elements = nbytes = 0
    for dtype, shape in types:
        if shape is None:
            continue
        elements += math.prod(shape)
        nbytes += math.prod(shape) * dtype.itemsize
    if elements > allowed_elements or nbytes > allowed_bytes:
        return Unfoldable.TOO_LARGE
    results = _evaluate(call)
    if results is None:
        return Unfoldable.NOT_DEFINED
    for values, (dtype, shape) in zip(results, types, strict=True):
        if values.dtype != dtype or (shape is not None and values.shape != shape):
            return Unfoldable.NOT_DEFINED
    return results if sum(v.size for v in results) <= allowed_elements else Unfoldable.TOO_LARGE


def _infer(call: _Call) -> list[tuple[np.dtype[Any], tuple[int, ...] | None]] | None:
    """Types of the outputs by shape inference, ``None`` if the node breaks its operator's rules."""
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name, values in call.given.items():
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        types[name] = onnx.helper.make_tensor_type_proto(elem_type, values.shape)
        if values.size <= _SHOWN_ELEMENTS:
            data[name] = numpy_helper.from_array(values, name)
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(call.proto.op_type, call.opset, ""),
            call.proto,
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid("", call.opset)],
        )
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError, RuntimeError):
        return None
    if any(name not in inferred for name in call.proto.output):
        return None
    found = [_tensor_type(inferred[name].tensor_type) for name in call.proto.output]
    if call.node.op in _ROUNDED_ONCE and found[0][1] is None:  # functions in some opsets
        shapes = [values.shape for values in call.given.values()]
        return [(found[0][0], np.broadcast_shapes(*shapes))]
    return found


def _tensor_type(
    tensor: onnx.TypeProto.Tensor,
) -> tuple[np.dtype[Any], tuple[int, ...] | None]:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    dims = tensor.shape.dim
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") for d in dims):
        return dtype, None
    return dtype, tuple(d.dim_value for d in dims)


def _evaluate(call: _Call) -> tuple[Array, ...] | None:
    from onnx.reference import ReferenceEvaluator  # slow to import, seldom needed

    function = onnx.helper.make_function(
        "pwopt",
        "fold",
        list(call.given),
        list(call.proto.output),
        [call.proto],
        [onnx.helper.make_opsetid("", call.opset)],
    )
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(function).run(None, dict(call.given), attributes={})
    except Exception:  # the evaluator raises whatever NumPy does
        return None
    return tuple(np.asarray(values) for values in results)
