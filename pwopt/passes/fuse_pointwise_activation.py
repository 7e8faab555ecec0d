"""Fuse an activation, and a residual sum, into the convolution or Gemm before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Shape, Tensor
from pwopt.passes._emitter import Emitter
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["FusePointwiseActivation", "FusePointwiseActivationMatch", "GemmForm"]

Array = np.ndarray[Any, Any]

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


class GemmForm(StrEnum):
    """What becomes of a Gemm and its activation."""

    KEPT = "kept"
    FUSED_GEMM = "fused-gemm"
    FUSED_CONV = "fused-conv"


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
        ``Conv -> Add -> Relu`` into the same with the sum's other operand as its input Z, and
        with zeros for a bias if there is none; other activations (Clip, HardSigmoid, LeakyRelu,
        Sigmoid, Tanh) unless ``relu_only``. With ``gemm`` set to ``fused-gemm``, ``Gemm -> Relu``
        (Elu, HardSigmoid, LeakyRelu, Sigmoid, Tanh) into ``com.microsoft.FusedGemm``; set to
        ``fused-conv``, ``Gemm -> Relu`` with constant weights into ``Reshape -> FusedConv ->
        Reshape``, a 1x1 convolution of images of one pixel. The domain is added to the model's
        imports.

    Algebra:
        ``FusedConv(X, W, B, Z) = activation(W * X + B + Z)`` and
        ``FusedGemm(A, B, C) = activation(alpha A B + beta C)``, as ONNX Runtime's contributed
        operators define them. A row of a matrix is an image of one pixel, so
        ``alpha A B + beta C`` is a 1x1 convolution with the weights ``alpha B^T`` and the bias
        ``beta C`` where C is the same for all rows.

    Declines when:
        no activation follows, or none that the fused operator has or was asked for; the value
        between is read elsewhere or is a graph output; the bounds of a Clip are not constant; the
        residual is not known to have the shape of the sum (Z does not broadcast); the element
        type is not float32; it is a Gemm and those were not asked for, or one that is no
        convolution (A transposed, weights or bias not constant, a bias by rows); the opset is
        older than 7.

    Exactness:
        ROUNDING. The same operations in the same order, in one kernel; the sums of a Gemm may be
        taken in another order.

    When it pays:
        On CUDA, where it saves two passes over the tensor per convolution. There a Gemm first
        fills its result with the bias, by a kernel of its own; the fused convolution adds it on
        the way out.

    Attributes:
        relu_only: fuse Relu only into Conv, all that every version's CUDA kernel takes; a session
            with another activation does not start there.
        gemm: what becomes of Gemm; for ``fused-gemm`` there is a CPU kernel only.
    """

    relu_only: bool = True
    gemm: GemmForm = GemmForm.KEPT

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
        GEMM_IS_NO_CONV = "gemm-is-no-conv"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "fuse-pointwise-activation"
    roots: ClassVar[tuple[str, ...]] = ("Conv", "Gemm")
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    by_default: ClassVar[bool] = False

    def match(self, node: Node, facts: Facts) -> FusePointwiseActivationMatch | Decline:
        """See the class."""
        is_gemm = facts.is_op(node, "Gemm")
        if is_gemm and self.gemm is GemmForm.KEPT:
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
        if is_gemm and self.gemm is GemmForm.FUSED_CONV and _as_conv(node, facts) is None:
            return Decline(self.Why.GEMM_IS_NO_CONV)
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
        becomes_gemm = facts.is_op(node, "Gemm") and self.gemm is GemmForm.FUSED_GEMM
        known = _OF_GEMM if becomes_gemm else _OF_CONV
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
        rewriter.import_domain(_DOMAIN, 1)
        if match.root.op == "Gemm" and self.gemm is GemmForm.FUSED_CONV:
            _write_as_conv(match, rewriter)
            return
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
            if inputs[2] is None:
                # The CUDA kernel reads a bias wherever there is a Z (nn/conv.cc).
                inputs[2] = _no_bias(node, rewriter)
            inputs.append(match.residual)
        for old in match.nodes:
            rewriter.remove(old)
        rewriter.add(f"Fused{node.op}", inputs, [output], attrs, near=node, domain=_DOMAIN)


def _no_bias(conv: Node, rewriter: Rewriter) -> Tensor:
    facts = Facts(rewriter.model)
    channels = (facts.shape(conv.inputs[1]) or facts.shape(conv.outputs[0]) or ())[0]
    assert isinstance(channels, int)
    hint = f"{conv.name or conv.outputs[0].name}/no_bias"
    return rewriter.constant(hint, np.zeros(channels, np.float32))


def _as_conv(gemm: Node, facts: Facts) -> tuple[Array, Array | None] | None:
    """Weights [Cout, Cin] and bias [Cout] of the 1x1 Conv that *gemm* is, if it is one."""
    matrix, bias = facts.constant(gemm.inputs[1]), facts.input(gemm, 2)
    if facts.attr_int(gemm, "transA", 0) or matrix is None or facts.rank(gemm.inputs[0]) != 2:
        return None
    rows = matrix if facts.attr_int(gemm, "transB", 0) else matrix.T
    weights = np.asarray(rows * np.float32(facts.attr_float(gemm, "alpha", 1.0)))
    if bias is None:
        return weights, None
    values, channels = facts.constant(bias), len(weights)
    if values is None or values.shape not in ((), (1,), (1, 1), (channels,), (1, channels)):
        return None
    scaled = values * np.float32(facts.attr_float(gemm, "beta", 1.0))
    return weights, np.broadcast_to(scaled.reshape(-1), (channels,)).copy()


def _write_as_conv(match: FusePointwiseActivationMatch, rewriter: Rewriter) -> None:
    gemm, output = match.root, match.activation.outputs[0]
    emitter = Emitter(rewriter, gemm, gemm.outputs[0], gemm.name or gemm.outputs[0].name)
    parts = _as_conv(gemm, emitter.facts)
    assert parts is not None
    weights, bias = parts
    (cout, cin), source = weights.shape, gemm.inputs[0]
    rows = (emitter.facts.shape(source) or (None,))[0]
    attrs: dict[str, Any] = {"activation": match.activation.op, "kernel_shape": [1, 1]}
    if match.parameters:
        attrs["activation_params"] = list(match.parameters)
    for old in match.nodes:
        rewriter.remove(old)
    image = emitter.reshape(source, (0, cin, 1, 1), (rows, cin, 1, 1))
    constants = [("weight", weights.reshape(cout, cin, 1, 1)), ("bias", bias)]
    operands = [
        rewriter.constant(f"{emitter.name}/{hint}", np.ascontiguousarray(values))
        for hint, values in constants
        if values is not None
    ]
    hint = f"{emitter.name}/FusedConv_output"
    result = rewriter.variable(hint, gemm.outputs[0], (rows, cout, 1, 1))
    rewriter.add("FusedConv", [image, *operands], [result], attrs, near=gemm, domain=_DOMAIN)
    emitter.reshape(result, (0, cout), (rows, cout))
    emitter.finish(output)


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
