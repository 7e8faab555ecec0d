"""Looking into a model from outside: every value an output, every node a name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx

__all__ = ["Step", "exposed", "join_casts", "named_steps"]


@dataclass(frozen=True)
class Step:
    """A node of the main graph, in the order of execution.

    Attributes:
        name: of the node; unique.
        op: operator type.
        reads: names of the tensors it reads.
        writes: names of the tensors it writes.
    """

    name: str
    op: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def named_steps(proto: onnx.ModelProto) -> list[Step]:
    """The nodes of the main graph of *proto*, each of which is given a name of its own."""
    taken: set[str] = set()
    steps = []
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = _unused(node.name or f"{node.op_type}_{index}", taken)
        taken.add(node.name)
        steps.append(
            Step(
                node.name,
                _op_name(node),
                tuple(name for name in node.input if name),
                tuple(name for name in node.output if name),
            )
        )
    return steps


def exposed(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of *proto* whose outputs are the tensors *names* and no others."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _op_name(node: onnx.NodeProto) -> str:
    """``Conv``, or ``domain.Op`` outside the standard domain."""
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _unused(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name


def join_casts(proto: onnx.ModelProto, own: Collection[str]) -> None:
    """Let what reads a fp32 value, cast to fp16 and back, read the value itself.

    Casting there and back is no identity. It is what a conversion leaves between two nodes that
    are both to stay in fp32, which is then lost on large values.

    Args:
        proto: a converted model.
        own: names of the nodes it had before; their Casts mean what they say.
    """
    graph = proto.graph
    narrowed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.name not in own and _casts_to(node, onnx.TensorProto.FLOAT16)
    }
    origin = {
        node.output[0]: narrowed[node.input[0]]
        for node in graph.node
        if node.name not in own
        and _casts_to(node, onnx.TensorProto.FLOAT)
        and node.input[0] in narrowed
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = origin.get(name, name)


def _casts_to(node: onnx.NodeProto, elem_type: int) -> bool:
    return node.op_type == "Cast" and any(
        attribute.name == "to" and attribute.i == elem_type for attribute in node.attribute
    )
