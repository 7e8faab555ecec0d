"""Lower the product with a squeeze-excite gate so that it stays in the channel-blocked layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerGate", "LowerGateMatch"]

_ACTIVATIONS = ("Clip", "HardSigmoid", "Relu", "Sigmoid", "Tanh")
_MAX_ACTIVATIONS = 3


@dataclass(frozen=True, eq=False)
class LowerGateMatch(Match):
    """A product with a gate.

    Attributes:
        gate: which input of the Mul the gate is.
        size: height and width of the other input.
    """

    gate: int
    size: tuple[int, int]


@dataclass(frozen=True)
class LowerGate(Pass[LowerGateMatch]):
    """Lower the product of a feature map and a gate per channel to one of equal shapes.

    Rewrites:
        ``Mul(x, g)`` with x ``[N, C, H, W]`` and a computed g ``[N, C, 1, 1]``, as
        squeeze-and-excitation blocks have it, into ``Mul(x, Resize(g))``, which repeats every
        gate H by W times (``Upsample`` in opset 9).

    Algebra:
        Broadcasting made explicit: nearest-neighbour interpolation from one pixel copies it
        (squeeze-and-excitation: Hu et al. 2018).

    Declines when:
        no operand is a gate of the other; the gate is constant, or does not come from a
        convolution by activations alone; height and width are not known; the element type is not
        float32; the opset is older than 9, whose Upsample the runtime has no blocked form of.

    Exactness:
        BITWISE. The same products.

    When it pays:
        ONNX Runtime's CPU provider multiplies in its blocked layout only what has equal shapes,
        and else reorders the feature map out of it and back; it repeats pixels in the layout. A
        few per cent of a network with a gate in every block, where the sizes, the batch too, are
        fixed.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        NO_GATE = "no-gate"
        SIZE_UNKNOWN = "size-unknown"
        CONSTANT_GATE = "constant-gate"
        NOT_FROM_CONVOLUTION = "not-from-convolution"
        ELEMENT_TYPE = "element-type"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "lower-gate"
    roots: ClassVar[tuple[str, ...]] = ("Mul",)
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def match(self, node: Node, facts: Facts) -> LowerGateMatch | Decline:
        """See the class."""
        shapes = [facts.shape(t) for t in node.inputs]
        first, second = shapes
        if first is None or second is None or len(first) != 4 or len(second) != 4:
            return Decline(self.Why.NO_GATE)
        gates = [i for i, s in enumerate(shapes) if s is not None and s[2:] == (1, 1)]
        if len(gates) != 1 or None in first[:2] or first[:2] != second[:2]:
            return Decline(self.Why.NO_GATE)
        (index,) = gates
        height, width = (first, second)[1 - index][2:]
        if not isinstance(height, int) or not isinstance(width, int):
            return Decline(self.Why.SIZE_UNKNOWN, {"height": height, "width": width})
        gate = node.inputs[index]
        if facts.is_constant(gate):
            return Decline(self.Why.CONSTANT_GATE)
        dtype = facts.dtype(gate)
        if dtype is None or dtype != np.float32:
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(dtype)})
        if facts.opset < 9:
            return Decline(
                self.Why.OP_NOT_IN_OPSET, {"op": "Upsample", "since": 9, "opset": facts.opset}
            )
        if not _comes_from_convolution(gate, facts):
            return Decline(self.Why.NOT_FROM_CONVOLUTION, {"gate": gate.name})
        figures = {"height": height, "width": width}
        return LowerGateMatch(node, (node,), index, (height, width), facts=figures)

    def rewrite(
        self,
        match: LowerGateMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        node = match.root
        gate, features = node.inputs[match.gate], node.inputs[1 - match.gate]
        opset = rewriter.model.opset
        scales = rewriter.constant(
            f"{gate.name}/scales", np.asarray([1, 1, *match.size], np.float32)
        )
        inputs: list[Tensor | None] = [gate, scales]
        attrs: Mapping[str, str] = {"mode": "nearest"}
        if opset >= 11:
            # A region of interest is not used here, but must be given before opset 13.
            region = rewriter.constant(f"{gate.name}/roi", np.zeros(0, np.float32))
            inputs = [gate, region if opset < 13 else None, scales]
            attrs = {
                "coordinate_transformation_mode": "asymmetric",
                "mode": "nearest",
                "nearest_mode": "floor",
            }
        repeated = rewriter.variable(f"{gate.name}/repeated", like=features)
        op = "Resize" if opset >= 10 else "Upsample"
        rewriter.add(op, inputs, [repeated], attrs, near=node)
        rewriter.set_input(node, match.gate, repeated)


def _comes_from_convolution(gate: Tensor, facts: Facts) -> bool:
    for _ in range(_MAX_ACTIVATIONS):
        producer = facts.producer(gate)
        if producer is None or facts.is_op(producer, "Conv"):
            return producer is not None
        if not facts.is_op(producer, *_ACTIVATIONS):
            return False
        gate = producer.inputs[0]
    return False
