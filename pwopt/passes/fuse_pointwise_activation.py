"""Fuse an activation, and a residual sum, into the convolution or Gemm before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Shape, Tensor
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["FusePointwiseActivation", "FusePointwiseActivationMatch"]

_DOMAIN = "com.microsoft"
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "Elu": {"alpha": 1.0},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "LeakyRelu": {"alpha": 0.01},
    "Relu": {},
    "Sigmoid": {},
    "Tanh": {},
}
"""Activations by the attributes that parametrise them, and their defaults."""
_OF_CONV = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
_OF_GEMM = frozenset({"Elu", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})


@dataclass(frozen=True, eq=False)
class FusePointwiseActivationMatch(Match):
    """A Conv or Gemm and what is fused into it.

    Attributes:
        residual: the other operand of the sum, if there is one.
        activation: the last node, whose output the fused operator takes over.
        parameters: of the activation, in the order of its attributes (Clip: bounds).
    """

    residual: Tensor | None
    activation: Node
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class FusePointwiseActivation(Pass[FusePointwiseActivationMatch]):
    """Fuse an activation into the convolution or Gemm before it.

    This is for execution providers that have the fused operators but that ONNX Runtime does not
    fuse for: CUDA since ONNX Runtime 1.20. On CPU the runtime does the same by itself. The result
    runs on ONNX Runtime only, so the pass is off unless asked for.

    Rewrites:
        ``Conv -> Relu`` into ``com.microsoft.FusedConv`` with the attribute ``activation``;
        ``Conv -> Add -> Relu`` into the same with the sum's other operand as its input Z; other
        activations (Clip, HardSigmoid, LeakyRelu, Sigmoid, Tanh) unless ``relu_only``; with
        ``gemm``, ``Gemm -> Relu`` (Elu, HardSigmoid, LeakyRelu, Sigmoid, Tanh) into
        ``com.microsoft.FusedGemm``. The domain is added to the model's imports.

    Algebra:
        ``FusedConv(X, W, B, Z) = activation(W * X + B + Z)`` and
        ``FusedGemm(A, B, C) = activation(alpha A B + beta C)``, as ONNX Runtime's contributed
        operators define them.

    Declines when:
        no activation follows, or none that the fused operator has or was asked for; the value
        between is read elsewhere or is a graph output; the bounds of a Clip are not constant; the
        residual is not known to have the shape of the sum (Z does not broadcast); the element
        type is not float32; it is a Gemm and those were not asked for; the opset is older than 7.

    Exactness:
        ROUNDING. The same operations in the same order, in one kernel.

    When it pays:
        On CUDA, where it saves two passes over the tensor per convolution.

    Attributes:
        relu_only: fuse Relu only into Conv, all that the CUDA kernel takes; a session with
            another activation does not start there.
        gemm: also fuse into Gemm, for which there is a CPU kernel only.
    """

    relu_only: bool = True
    gemm: bool = False

    class Why(StrEnum):
        """Reasons to decline."""

        NO_ACTIVATION = "no-activation"
        ACTIVATION_NOT_FUSABLE = "activation-not-fusable"
        OTHER_READERS = "other-readers"
        GRAPH_OUTPUT = "graph-output"
        BOUNDS_NOT_CONSTANT = "bounds-not-constant"
        RESIDUAL_SHAPE = "residual-shape"
        ELEMENT_TYPE = "element-type"
        NOT_ASKED_FOR = "not-asked-for"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "fuse-pointwise-activation"
    roots: ClassVar[tuple[str, ...]] = ("Conv", "Gemm")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    by_default: ClassVar[bool] = False

    def match(self, node: Node, facts: Facts) -> FusePointwiseActivationMatch | Decline:
        """See the class."""
        is_gemm = facts.is_op(node, "Gemm")
        if is_gemm and not self.gemm:
            return Decline(self.Why.NOT_ASKED_FOR, {"option": "gemm"})
        if facts.opset < 7:
            return Decline(
                self.Why.OP_NOT_IN_OPSET, {"op": "Add", "since": 7, "opset": facts.opset}
            )
        dtype = facts.dtype(node.outputs[0])
        if dtype is None or dtype != np.float32:
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(dtype)})
        after = self._reader(node, facts)
        if isinstance(after, Decline):
            return after
        if is_gemm or not facts.is_op(after, "Add"):
            return self._fuse(node, None, None, after, facts)
        addend = after
        residual = next(t for t in addend.inputs if t is not node.outputs[0])
        shape = facts.shape(residual)
        if shape is None or None in shape or shape != facts.shape(node.outputs[0]):
            return Decline(
                self.Why.RESIDUAL_SHAPE,
                {"residual": _listed(shape), "sum": _listed(facts.shape(addend.outputs[0]))},
            )
        after = self._reader(addend, facts)
        if isinstance(after, Decline):
            return after
        return self._fuse(node, addend, residual, after, facts)

    def _reader(self, node: Node, facts: Facts) -> Node | Decline:
        """The one node that reads *node*'s output."""
        value = node.outputs[0]
        if facts.is_output(value):
            return Decline(self.Why.GRAPH_OUTPUT, {"value": value.name})
        reader = facts.sole_consumer(value)
        if reader is None:
            return Decline(self.Why.OTHER_READERS, {"value": value.name})
        return reader

    def _fuse(
        self, node: Node, addend: Node | None, residual: Tensor | None, after: Node, facts: Facts
    ) -> FusePointwiseActivationMatch | Decline:
        known = _OF_GEMM if facts.is_op(node, "Gemm") else _OF_CONV
        op = facts.op(after)
        if op not in known | _DEFAULTS.keys():
            return Decline(self.Why.NO_ACTIVATION, {"after": op})
        if op not in known or (self.relu_only and known is _OF_CONV and op != "Relu"):
            return Decline(self.Why.ACTIVATION_NOT_FUSABLE, {"activation": op})
        parameters = _parameters(after, facts)
        if parameters is None:
            return Decline(self.Why.BOUNDS_NOT_CONSTANT)
        nodes = tuple(n for n in (node, addend, after) if n is not None)
        return FusePointwiseActivationMatch(
            node,
            nodes,
            residual,
            after,
            parameters,
            facts={"activation": op, "residual": residual is not None},
        )

    def rewrite(
        self,
        match: FusePointwiseActivationMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        node, output = match.root, match.activation.outputs[0]
        attrs: dict[str, Any] = {**node.attrs, "activation": match.activation.op}
        inputs: list[Tensor | None] = [t if not t.is_empty() else None for t in node.inputs]
        if node.op == "Gemm":
            names = ("activation_alpha", "activation_beta")
            attrs.update(zip(names, match.parameters, strict=False))
        elif match.parameters:
            attrs["activation_params"] = list(match.parameters)
        if match.residual is not None:
            inputs += [None] * (3 - len(inputs))
            inputs.append(match.residual)
        for old in match.nodes:
            rewriter.remove(old)
        rewriter.import_domain(_DOMAIN, 1)
        rewriter.add(f"Fused{node.op}", inputs, [output], attrs, near=node, domain=_DOMAIN)


def _parameters(activation: Node, facts: Facts) -> tuple[float, ...] | None:
    """Parameters as the fused operators take them; ``None`` if they are not constant."""
    if activation.op != "Clip":
        defaults = _DEFAULTS[activation.op]
        return tuple(facts.attr_float(activation, k, v) for k, v in defaults.items())
    if facts.opset < 11:
        low = facts.attr_float(activation, "min", -_LARGEST_FLOAT)
        return low, facts.attr_float(activation, "max", _LARGEST_FLOAT)
    bounds: list[float] = []
    for index, default in ((1, -_LARGEST_FLOAT), (2, _LARGEST_FLOAT)):
        tensor = facts.input(activation, index)
        value = default if tensor is None else facts.scalar(tensor)
        if value is None or math.isnan(value):
            return None
        bounds.append(min(max(value, -_LARGEST_FLOAT), _LARGEST_FLOAT))
    return tuple(bounds)


def _listed(shape: Shape | None) -> Fact:
    return None if shape is None else tuple(shape)
