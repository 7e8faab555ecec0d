"""Sizes that an operator leaves as they are, where ONNX's inference calls them by new names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import onnx

__all__ = ["name_kept_sizes"]

_Dims = Sequence[onnx.TensorShapeProto.Dimension]
_Sizes = list[int | str]

_WINDOWS = frozenset({"AveragePool", "Conv", "LpPool", "MaxPool"})
_BROADCASTING = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Sub", "Sum"})


def name_kept_sizes(inferred: onnx.ModelProto) -> None:
    """Let dimensions that are certain to be equal bear one name.

    ONNX infers a new symbol for what a convolution makes of a symbolic size, even if its pads leave
    it as it is, and one for sums of different symbols. Such symbols are replaced, wherever they
    stand, unless it is in an input.

    Args:
        inferred: a model with inferred shapes, in topological order; changed in place.
    """
    graph = inferred.graph
    values = list(chain(graph.input, graph.value_info, graph.output))
    sizes = _Known({v.name: v for v in values}, {t.name: list(t.dims) for t in graph.initializer})
    inputs = [_dims(value) for value in graph.input]
    fixed = {dim.dim_param for dims in inputs for dim in dims}
    ambiguous = _ambiguous(inputs)
    for node in graph.node:
        after = sizes.of(node.output[0]) if node.output else None
        if after is None or not any(_is_invented(name) for name in after):
            continue
        kept = _kept(node, [sizes.of(name) for name in node.input if name], len(after))
        for axis, source in kept.items():
            name = after[axis]
            if _is_invented(name) and name not in fixed | {source} and source not in ambiguous:
                sizes.names[str(name)] = source
    for value in values:
        for dim in _dims(value):
            if dim.dim_param in sizes.names:
                dim.dim_param = sizes.names[dim.dim_param]


@dataclass(frozen=True)
class _Known:
    """Sizes of tensors, by the names that their symbols have got so far."""

    values: Mapping[str, onnx.ValueInfoProto]
    constants: Mapping[str, list[int]]
    names: dict[str, str] = field(default_factory=dict)

    def of(self, tensor: str) -> _Sizes | None:
        if tensor in self.constants:
            return list(self.constants[tensor])
        value = self.values.get(tensor)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return [
            d.dim_value if d.HasField("dim_value") else self.names.get(d.dim_param, d.dim_param)
            for d in _dims(value)
        ]


def _is_invented(dim: int | str) -> bool:
    """Whether ONNX gave it its name, now or when the model was exported."""
    return isinstance(dim, str) and re.fullmatch(r"unk__\d+", dim) is not None


def _dims(value: onnx.ValueInfoProto) -> _Dims:
    return value.type.tensor_type.shape.dim


def _ambiguous(shapes: Iterable[_Dims]) -> set[str]:
    """What is no name, or stands at several places: some exporters call all unknown sizes alike."""
    places: dict[str, set[int]] = {}
    for dims in shapes:
        for axis, dim in enumerate(dims):
            places.setdefault(dim.dim_param, set()).add(axis)
    return {"", *(name for name, axes in places.items() if len(axes) > 1)}


def _kept(node: onnx.NodeProto, sources: Sequence[_Sizes | None], rank: int) -> Mapping[int, str]:
    """The symbols of the first output's sizes that are an input's, by axis."""
    known = [sizes for sizes in sources if sizes is not None]
    if node.domain not in ("", "ai.onnx") or len(known) < len(sources):
        return {}
    if node.op_type in _WINDOWS:
        return _kept_by_window(node, known)
    return _kept_by_broadcast(known, rank) if node.op_type in _BROADCASTING else {}


def _kept_by_window(node: onnx.NodeProto, sources: Sequence[_Sizes]) -> Mapping[int, str]:
    """Symbols by axis, where as many windows fit as there are elements."""
    ints = {a.name: list(a.ints) for a in node.attribute}
    auto_pad = next((a.s.decode() for a in node.attribute if a.name == "auto_pad"), "NOTSET")
    rank = len(sources[0]) - 2
    if rank < 1:
        return {}
    kernel: _Sizes = [*ints.get("kernel_shape", sources[1][2:] if len(sources) > 1 else ())]
    strides, dilations = ints.get("strides", [1] * rank), ints.get("dilations", [1] * rank)
    pads = ints.get("pads", [0] * 2 * rank)
    if not len(kernel) == len(strides) == len(dilations) == len(pads) // 2 == rank:
        return {}
    kept = {}
    for axis, (size, source) in enumerate(zip(kernel, sources[0][2:], strict=True)):
        reach = (size - 1) * dilations[axis] if isinstance(size, int) else -1
        pad = {"NOTSET": pads[axis] + pads[axis + rank], "VALID": 0}.get(auto_pad, reach)
        if isinstance(source, str) and strides[axis] == 1 and pad == reach:
            kept[axis + 2] = source
    return kept


def _kept_by_broadcast(sources: Sequence[_Sizes], rank: int) -> Mapping[int, str]:
    """Symbols by axis, where all operands agree but those that are repeated."""
    kept = {}
    for axis in range(rank):
        sizes = {dims[axis - rank] for dims in sources if rank - axis <= len(dims)} - {1}
        name = sizes.pop() if len(sizes) == 1 else ""
        if isinstance(name, str):
            kept[axis] = name
    return kept
