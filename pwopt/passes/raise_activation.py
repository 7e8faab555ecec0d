"""Raise activations that an exporter took apart to the operators that they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Constant, Facts, Node, Rewriter, Tensor
from pwopt.passes._activation_forms import write
from pwopt.passes._activations import Activation, NearMiss, Reader, Region, readings
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness, Fact

__all__ = ["Activation", "RaiseActivation", "RaiseActivationMatch"]


@dataclass(frozen=True, eq=False)
class RaiseActivationMatch(Match):
    """An activation in several nodes.

    Attributes:
        activation: what it is.
        parameters: its parameters, in the order of their names.
        x: the tensor it is a function of.
        variant_names: the forms to write that the model's opset and element type have, fastest
            first.
    """

    activation: Activation
    parameters: tuple[float, ...]
    x: Tensor
    variant_names: tuple[str, ...]


@dataclass(frozen=True)
class RaiseActivation(Pass[RaiseActivationMatch]):
    """Raise activations that were exported as arithmetic to the operators that they are.

    Rewrites:
        ``Max(x, 0)`` and ``Clip(x, 0)`` into ``Relu``; ``Min(Max(x, l), h)``, either way round,
        into ``Clip``; ``Max(x, a x)`` and ``Relu(x) - a Relu(-x)`` into ``LeakyRelu``;
        ``Clip(a x + b, 0, 1)`` with the constants anywhere into ``HardSigmoid``;
        ``x * Clip(x + 3, 0, 6) / 6`` in all its forms, and ``x * HardSigmoid(x)``, into
        ``HardSwish`` (before opset 14 ``x * HardSigmoid(x)``);
        ``1 / (1 + Exp(-x))`` into ``Sigmoid``; ``x / (1 + Exp(-a x))`` into
        ``x * Sigmoid(a x)``; ``x * Tanh(Softplus(x))``, also with ``Log(1 + Exp(x))``, into
        ``Mish`` or into ``x * n / (n + 2)``, ``n = e (e + 2)``, ``e = Exp(x)``;
        the error-function and tanh forms of GELU into ``Gelu`` (before opset 20 into the order of
        operations that the runtime fuses); ``Log(1 + Exp(x))`` into ``Softplus`` if asked.
        Operands may stand in any order, the constants before or behind the products and with any
        number of unit dimensions.

    Algebra:
        Both sides have the same normal form as functions of x
        (:mod:`pwopt.numerics.scalar_form`). Hard-swish: Howard et al. 2019 (MobileNetV3);
        hard-sigmoid: Courbariaux et al. 2015; SiLU and swish: Elfwing et al. 2018, Ramachandran
        et al. 2017; Mish: Misra 2019, with
        ``tanh(log(1 + e)) = ((1 + e)^2 - 1) / ((1 + e)^2 + 1)``; GELU: Hendrycks and Gimpel 2016;
        LeakyRelu: Maas et al. 2013.

    Declines when:
        the node ends no activation; a constant is not the activation's (to the rounding of its
        type), may be overridden by the caller, or has more dimensions than x; an inner value is
        used elsewhere or is a graph output; the activation is part of a larger one that applies;
        it is already in the best form; the better operator is not in the model's opset (it is
        named); the element type is not a float, or is float64 and the operator has only single
        precision attributes or kernels; softplus is not asked for.

    Exactness:
        ROUNDING. The same function in real arithmetic; ``e`` is capped where ``n / (n + 2)`` is
        one to the last bit, so that nothing overflows.

    When it pays:
        On CPU almost always: arithmetic with scalars leaves the channel-blocked layout and reads
        and writes the tensor once per node, while Relu, Clip, LeakyRelu, HardSigmoid, HardSwish
        and Sigmoid become part of the convolution and ``x * Sigmoid(x)`` and Gelu stay in the
        layout. Mish as arithmetic is faster than as an operator, whose softplus runs element by
        element; so is softplus, which is why that is off.

    Attributes:
        softplus: also raise ``Log(1 + Exp(x))``, which overflows where ``Softplus`` does not, but
            is faster on CPU.
    """

    softplus: bool = False

    class Why(StrEnum):
        """Reasons to decline."""

        NO_ACTIVATION = "no-activation"
        OTHER_CONSTANT = "other-constant"
        NOT_CONSTANT = "not-constant"
        CONSTANT_RANK = "constant-rank"
        SHARED_INNER_VALUE = "shared-inner-value"
        PART_OF_LARGER = "part-of-larger"
        ALREADY_BEST = "already-best"
        OP_NOT_IN_OPSET = "op-not-in-opset"
        ELEMENT_TYPE = "element-type"
        SINGLE_PRECISION_ONLY = "single-precision-only"
        NOT_ASKED_FOR = "not-asked-for"

    name: ClassVar[str] = "raise-activation"
    roots: ClassVar[tuple[str, ...]] = (
        "Add",
        "Clip",
        "Div",
        "Log",
        "Max",
        "Min",
        "Mul",
        "Reciprocal",
        "Sub",
    )
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> RaiseActivationMatch | Decline:
        """See the class."""
        result = self._recognise(node, facts)
        if isinstance(result, Decline) and result.why is not self.Why.OTHER_CONSTANT:
            return result
        larger = self._larger(node, facts)
        if larger is not None:
            return Decline(
                self.Why.PART_OF_LARGER,
                {"activation": larger.activation.value, "site": facts.site(larger.root)},
            )
        return result

    def variants(self, match: RaiseActivationMatch) -> tuple[Variant, ...]:
        """Most activations have one form per opset; Mish has two."""
        return tuple(Variant(name) for name in match.variant_names)

    def rewrite(self, match: RaiseActivationMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        for node in match.nodes:
            rewriter.remove(node)
        write(variant.name, rewriter, match.root, match.x, match.parameters)

    # -- recognising ---------------------------------------------------------------------------

    def _recognise(self, node: Node, facts: Facts) -> RaiseActivationMatch | Decline:
        """What *node* ends, apart from whether that is part of something larger."""
        region = Region.behind(node, facts)
        if not region.is_promising:
            return Decline(self.Why.NO_ACTIVATION)
        match: RaiseActivationMatch | None = None
        declines: list[Decline] = []
        for x, reader, found in readings(region, node, facts):
            result = None if found is None else self._judge(x, node, reader, found, facts)
            if isinstance(result, RaiseActivationMatch):
                match = result
            elif match is not None:
                break
            elif result is not None:
                declines.append(result)
        if match is not None:
            return match
        if declines:
            return min(declines, key=lambda d: _IMPORTANCE.index(d.why.name))
        return Decline(self.Why.NOT_CONSTANT if region.has_overridable else self.Why.NO_ACTIVATION)

    def _judge(
        self,
        x: Tensor,
        node: Node,
        reader: Reader,
        found: NearMiss | tuple[Activation, tuple[float, ...]],
        facts: Facts,
    ) -> RaiseActivationMatch | Decline:
        """What becomes of *node*, which is an activation of *x*, or nearly."""
        if isinstance(found, NearMiss):
            facts_: dict[str, Fact] = {"activation": found.activation.value, **found.found}
            return Decline(self.Why.OTHER_CONSTANT, facts_)
        activation, parameters = found
        dtype = facts.dtype(x)
        named: dict[str, Fact] = {"activation": activation.value}
        if not facts.is_float(x) or dtype is None:
            return Decline(self.Why.ELEMENT_TYPE, {**named, "dtype": str(dtype)})
        rank = facts.rank(x)
        if reader.constant_rank and (rank is None or reader.constant_rank > rank):
            return Decline(
                self.Why.CONSTANT_RANK, {**named, "constant": reader.constant_rank, "x": rank}
            )
        shared = reader.shared_value(node)
        if shared is not None:
            return Decline(self.Why.SHARED_INNER_VALUE, {**named, "value": shared.name})
        nodes = tuple(reader.nodes.values())
        best = self._already(activation, nodes, facts)
        if best is not None:
            return Decline(best.why, {**named, **best.facts})
        return self._offer(activation, parameters, x, nodes, dtype, facts)

    def _already(
        self, activation: Activation, nodes: tuple[Node, ...], facts: Facts
    ) -> Decline | None:
        """Whether the nodes are already what this pass would write."""
        ops = sorted(n.op for n in nodes)
        if activation is Activation.CLIP and ops == ["Clip"]:
            return Decline(self.Why.ALREADY_BEST)
        if activation is Activation.SWISH and ops in (
            ["Mul", "Sigmoid"],
            ["Mul", "Mul", "Sigmoid"],
        ):
            return Decline(self.Why.ALREADY_BEST)
        gated = ops == ["HardSigmoid", "Mul"]
        if activation is Activation.GATED_HARD_SIGMOID and gated:
            return Decline(self.Why.ALREADY_BEST)
        if activation is Activation.HARD_SWISH and gated and not facts.has_op("HardSwish"):
            return self._too_old("HardSwish", 14, facts)
        fused = _FUSED_GELU.get(activation, frozenset())
        if not facts.has_op("Gelu") and fused and _shape(nodes[0], nodes) in fused:
            return self._too_old("Gelu", 20, facts)
        return None

    def _too_old(self, op: str, since: int, facts: Facts) -> Decline:
        return Decline(self.Why.OP_NOT_IN_OPSET, {"op": op, "since": since, "opset": facts.opset})

    def _offer(
        self,
        activation: Activation,
        parameters: tuple[float, ...],
        x: Tensor,
        nodes: tuple[Node, ...],
        dtype: np.dtype[Any],
        facts: Facts,
    ) -> RaiseActivationMatch | Decline:
        named: dict[str, Fact] = {"activation": activation.value}
        if facts.opset < 7:
            # Until then Mul and Add broadcast by attributes.
            too_old = self._too_old("Mul", 7, facts)
            return Decline(too_old.why, {**named, **too_old.facts})
        if activation is Activation.SOFTPLUS and not self.softplus:
            return Decline(self.Why.NOT_ASKED_FOR, {**named, "option": "softplus"})
        names = _variants(activation, facts)
        if dtype == np.float64:
            names = tuple(n for n in names if _has_double_precision(n, facts))
        if not names:
            return Decline(self.Why.SINGLE_PRECISION_ONLY, named)
        return RaiseActivationMatch(
            nodes[0],
            nodes,
            activation,
            parameters,
            x,
            names,
            facts={**named, "nodes": len(nodes)},
        )

    def _larger(self, node: Node, facts: Facts) -> RaiseActivationMatch | None:
        """The match behind *node* that takes it in, if any."""
        current = node
        for _ in range(_MAX_DEPTH):
            output = current.outputs[0]
            if facts.is_output(output):
                return None
            consumers = facts.consumers(output)
            for consumer in consumers:
                if facts.op(consumer) not in self.roots:
                    continue
                result = self._recognise(consumer, facts)
                if isinstance(result, RaiseActivationMatch) and any(
                    n is node for n in result.nodes
                ):
                    return result
            if len(consumers) != 1:
                return None
            current = consumers[0]
        return None


_MAX_DEPTH = 8
"""How far behind a node the end of a larger activation is looked for."""

_IMPORTANCE = (
    "ALREADY_BEST",
    "OP_NOT_IN_OPSET",
    "SHARED_INNER_VALUE",
    "CONSTANT_RANK",
    "ELEMENT_TYPE",
    "SINGLE_PRECISION_ONLY",
    "NOT_ASKED_FOR",
    "OTHER_CONSTANT",
)
"""Which reason to give when an expression can be read as a function of several tensors."""


# -- what is best already --------------------------------------------------------------------------

_FUSED_GELU = {
    Activation.GELU: frozenset(
        {
            "Mul(Mul(Add(Erf(Div(_,c)),c),_),c)",
            "Mul(Add(Erf(Div(_,c)),c),Mul(_,c))",
        }
    ),
    Activation.GELU_TANH: frozenset(
        {
            "Mul(Add(Tanh(Mul(Add(Mul(Mul(_,c),_),c),Mul(_,c))),c),Mul(_,c))",
            "Mul(Add(Tanh(Mul(Add(Mul(Pow(_,c),c),_),c)),c),Mul(_,c))",
        }
    ),
}
"""The orders of operations that ONNX Runtime fuses to GELU by itself, as :func:`_shape` writes."""


def _shape(root: Node, nodes: tuple[Node, ...]) -> str:
    """The expression with ``_`` for x and ``c`` for constants, operands in a fixed order."""
    inside = {id(n): n for n in nodes}

    def write(node: Node) -> str:
        operands = []
        for tensor in node.inputs:
            producer = next((p for p in tensor.inputs if id(p) in inside), None)
            if producer is not None:
                operands.append(write(producer))
            else:
                operands.append("c" if isinstance(tensor, Constant) else "_")
        if node.op in ("Add", "Mul"):
            operands.sort(key=_operand_order)
        return f"{node.op}({','.join(operands)})"

    return write(root)


def _operand_order(operand: str) -> tuple[int, str]:
    return ({"_": 1, "c": 2}.get(operand, 0), operand)


# -- writing ---------------------------------------------------------------------------------------


def _variants(activation: Activation, facts: Facts) -> tuple[str, ...]:
    """Forms to write, fastest first."""
    match activation:
        case Activation.HARD_SWISH if not facts.has_op("HardSwish"):
            return (Activation.GATED_HARD_SIGMOID.value,)
        case Activation.GELU if not facts.has_op("Gelu"):
            return ("gelu-by-erf",)
        case Activation.GELU_TANH if not facts.has_op("Gelu"):
            return ("gelu-by-tanh",)
        case Activation.MISH:
            return ("mish-by-exp", *(("mish",) if facts.has_op("Mish") else ()))
    return (activation.value,)


def _has_double_precision(variant: str, facts: Facts) -> bool:
    """Whether runtimes compute *variant* in float64: kernels and attributes that are not float."""
    if variant in (Activation.CLIP.value, "mish-by-exp"):
        return facts.has_op("Clip", since=12)
    return variant in ("relu", "sigmoid", "swish", "gelu-by-tanh", "mish")
